"""What there is to know about a setting, taken from where it is declared; and remarks on a run's settings.

Pure: records and texts in, records and texts out.
"""

import types
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from dylora_moe.config.advice import Advice
from dylora_moe.config.continual import ContinualSettings
from dylora_moe.config.data import DataSettings
from dylora_moe.config.generation import GeneratorSettings, KeepSettings, QuestionSettings
from dylora_moe.config.model import ModelSettings
from dylora_moe.config.names import GENERATION, KINDS, TRAINING, Kind, unknown_setting
from dylora_moe.config.running import RunSettings
from dylora_moe.config.settings import RunConfig
from dylora_moe.config.spelling import plain_name
from dylora_moe.config.training import TrainingSettings
from dylora_moe.errors import ConfigError

_GROUPS: tuple[tuple[str, type[BaseModel], Kind], ...] = (
    ("Model", ModelSettings, TRAINING),
    ("Data", DataSettings, TRAINING),
    ("Skills", ContinualSettings, TRAINING),
    ("Training", TrainingSettings, TRAINING),
    ("Run", RunSettings, TRAINING),
    ("Questions", QuestionSettings, GENERATION),
    ("Generator", GeneratorSettings, GENERATION),
    ("Made data", KeepSettings, GENERATION),
)

_PLAIN_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}

_OF_THE_ROUTER = (
    "router_learning_rate",
    "granularity",
    "router_scope",
    "temperature",
    "balance_coefficient",
    "z_coefficient",
)

# Of a router that is trained; that of a stream of skills is made from their prompts.
_OF_ITS_TRAINING = ("router_learning_rate", "balance_coefficient", "z_coefficient")

_OF_STREAMS = tuple(name for name in ContinualSettings.model_fields if name != "mode")

# Effective batches of the founding documents: 8 and 9 (deep dive), 32 to 64 (training guide). Half of the least and
# the most of them.
_LEAST_BATCH, _LARGEST_BATCH = 4, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """All that is known about one setting.

    Attributes:
        name: As in a recipe; a flag has two hyphens before it.
        group: Which settings it stands with, such as Model or Training.
        meaning: Its help.
        allowed: What may be given, in words.
        default: As in a recipe; None where it is not given by default.
        unit: Of the value, or nothing.
        low: The lowest recommended value.
        high: The highest recommended value.
        more: What a higher value does.
        less: What a lower value does.
        note: What else there is to know.
        aliases: Other names that mean the same.
    """

    name: str
    group: str
    meaning: str
    allowed: str
    default: Any
    unit: str
    low: float | None
    high: float | None
    more: str
    less: str
    note: str
    aliases: tuple[str, ...]

    @property
    def recommended(self) -> str:
        """The recommended range in words; empty where there is none."""
        if self.low is None:
            return "" if self.high is None else f"up to {self.high:g}"
        return f"from {self.low:g}" if self.high is None else f"{self.low:g} to {self.high:g}"


def explain(name: str) -> Explanation:
    """What there is to know about a setting; one of training, where generation has one of that name, too.

    Args:
        name: Ours or another one; as a flag, with hyphens, too.

    Raises:
        ConfigError: there is no such setting.
    """
    for kind in KINDS:
        if setting := kind.setting_named(plain_name(name)):
            return _explain(setting, kind)
    raise ConfigError(unknown_setting(plain_name(name)))


def _explain(setting: str, kind: Kind) -> Explanation:
    field, advice = kind.settings.model_fields[setting], advice_of(setting, kind)
    return Explanation(
        name=setting,
        group=next(group for group, part, of in _GROUPS if of is kind and setting in part.model_fields),
        meaning=" ".join((field.description or "").split()),
        allowed=allowed(setting, kind),
        default=to_jsonable_python(field.get_default(call_default_factory=True)),
        unit=advice.unit,
        low=advice.low,
        high=advice.high,
        more=advice.more,
        less=advice.less,
        note=advice.note,
        aliases=tuple(alias for alias, meant in kind.aliases.items() if meant == setting),
    )


def explain_all() -> dict[str, list[Explanation]]:
    """Every setting by its group, in the order of their declaration."""
    return {group: [_explain(name, kind) for name in part.model_fields] for group, part, kind in _GROUPS}


def advice_of(name: str, kind: Kind = TRAINING) -> Advice:
    """The advice in the annotation of a setting; an empty one where there is none."""
    found = (part for part in kind.settings.model_fields[name].metadata if isinstance(part, Advice))
    return next(found, Advice())


def allowed(name: str, kind: Kind = TRAINING) -> str:
    """What may be given for a setting, in words that follow "must be"."""
    return advice_of(name, kind).values or _allowed(kind.settings.model_fields[name])


def _allowed(field: FieldInfo) -> str:
    annotation = field.annotation
    if get_origin(annotation) in (types.UnionType, Union):
        (annotation,) = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is Literal:
        return _one_of(get_args(annotation))
    bounds = [text for part in field.metadata if (text := _bound(part))]
    text = _PLAIN_TYPES[annotation]  # pyright: ignore[reportArgumentType]
    return f"{text} {' and '.join(bounds)}" if bounds else text


def words_of(name: str, kind: Kind = TRAINING) -> list[str]:
    """The words that may be given for a setting; empty for one that takes none in particular."""
    return _words(kind.settings.model_fields[name].annotation)


def _words(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [word for word in get_args(annotation) if isinstance(word, str)]
    return [word for part in get_args(annotation) for word in _words(part)]


def _bound(constraint: Any) -> str:
    match constraint:
        case Ge(ge=value):
            return f"of at least {value}"
        case Gt(gt=value):
            return f"above {value}"
        case Le(le=value):
            return f"of at most {value}"
        case Lt(lt=value):
            return f"below {value}"
        case _:
            return ""


def _one_of(words: Collection[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}"


def shown(value: Any) -> str:
    """A value of a recipe as people read it."""
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def remarks(config: RunConfig, given: Collection[str] | None = None) -> list[str]:
    """What is unusual about the settings of a run: a sentence each, none for what is as recommended.

    Args:
        config: The run's settings.
        given: Settings that were chosen, the only ones to remark on; `config.model_fields_set` if not given.
    """
    given = config.model_fields_set if given is None else given
    if set(RunConfig.model_fields) <= set(given):  # a run's complete settings, read again
        default = RunConfig()
        given = [name for name in given if getattr(config, name) != getattr(default, name)]
    ranged = [text for name in RunConfig.model_fields if name in given and (text := _outside(name, config))]
    return [*ranged, *_unused(config, given), *_unusual(config, given)]


def _outside(name: str, config: RunConfig) -> str:
    value, advice = getattr(config, name), advice_of(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if advice.high is not None and value > advice.high:
        return f"{name} {value:g} is above {advice.high:g}, the highest recommended: {advice.more}."
    if advice.low is not None and 0 != value < advice.low:
        return f"{name} {value:g} is below {advice.low:g}, the lowest recommended: {advice.less}."
    return ""


def _unused(config: RunConfig, given: Collection[str]) -> Iterator[str]:
    if "warmup_ratio" in given and config.warmup_ratio and config.lr_scheduler_type == "constant":
        yield "warmup_ratio has no effect with lr_scheduler_type constant: constant_with_warmup has a warm-up."
    if config.lr_scheduler_type != "two_phase":
        for name in _among(("seeding_ratio", "consolidation_factor"), given):
            yield f"{name} has no effect with lr_scheduler_type {config.lr_scheduler_type}: two_phase has phases."
    if config.eval_steps is None:
        if "load_best_model_at_end" in given and config.load_best_model_at_end:
            yield "load_best_model_at_end has no effect without eval_steps: there is no evaluation to be the best."
        if "metric_for_best_model" in given:
            yield "metric_for_best_model has no effect without eval_steps: there is no evaluation to be the best."
    yield from _unused_in_streams(config, given) if config.mode == "continual" else _unused_in_joint(config, given)


def _unused_in_joint(config: RunConfig, given: Collection[str]) -> Iterator[str]:
    if config.num_experts == 1:
        if names := _among(_OF_THE_ROUTER, given):
            yield f"{_have_no_effect(names)} with num_experts 1: a single LoRA has no router."
    elif "temperature" in given:
        yield "temperature has no effect in joint training: it is for immature experts, and there are none."
    # Without growth is what joint training is, and need not be remarked on.
    if names := [name for name in _among(_OF_STREAMS, given) if name not in ("skills", "allow_expert_growth")]:
        yield f"{_have_no_effect(names)} with mode joint: set mode: continual, which learns skills."


def _unused_in_streams(config: RunConfig, given: Collection[str]) -> Iterator[str]:
    if "datasets" in given:
        yield "datasets has no effect with mode continual: it learns what is in skills."
    if "num_experts" in given:
        yield "num_experts has no effect with mode continual: experts come with new skills, up to max_experts."
    if names := _among(_OF_ITS_TRAINING, given):
        yield f"{_have_no_effect(names)} with mode continual: its router is not trained, but made from prompts."
    if "temperature" in given and not config.maturity_ratio and config.unsure_answer == "base":
        yield "temperature has no effect with maturity_ratio 0 and unsure_answer base: experts work alone."
    if config.stream_router == "learned" and (names := _among(("unsure_rate", "unsure_answer"), given)):
        yield f"{_have_no_effect(names)} with stream_router learned: it is never unsure."
    if "unsure_answer" in given and not config.unsure_rate and config.stream_router == "prototype":
        yield "unsure_answer has no effect with unsure_rate 0: the router is never unsure."
    if "false_growth_rate" in given and config.novelty_detector != "two_sample":
        yield f"false_growth_rate has no effect with novelty_detector {config.novelty_detector}: its limit is fixed."
    if "max_experts" in given and config.max_experts and config.allow_expert_growth is False:
        yield "max_experts has no effect with allow_expert_growth false: no expert is added."


def _have_no_effect(names: Collection[str]) -> str:
    return f"{' and '.join(names)} {'have' if len(names) > 1 else 'has'} no effect"


def _unusual(config: RunConfig, given: Collection[str]) -> Iterator[str]:
    times = config.lora_alpha / config.lora_r
    if _among(("lora_alpha", "lora_r"), given) and not config.use_rslora and not 1 <= times <= 4:
        effect = "a strong effect that can make training restless" if times > 4 else "a weak effect of the experts"
        yield f"lora_alpha {config.lora_alpha:g} is {times:g} times lora_r {config.lora_r}, 1 to 4 is usual: {effect}."
    batch = config.batch_size * config.gradient_accumulation_steps
    if _among(("batch_size", "gradient_accumulation_steps"), given) and not _LEAST_BATCH <= batch <= _LARGEST_BATCH:
        effect = "few updates an epoch" if batch > _LARGEST_BATCH else "noisy gradients"
        yield (
            f"batch_size {config.batch_size} x gradient_accumulation_steps {config.gradient_accumulation_steps} is an "
            f"effective batch of {batch}, {_LEAST_BATCH} to {_LARGEST_BATCH} is usual: {effect}."
        )
    if "balance_coefficient" in given and not config.balance_coefficient and _trains_router(config):
        yield "balance_coefficient 0 lets the router send everything to one expert: watch the load of the experts."
    patience = config.early_stopping_patience
    if patience and config.eval_steps == "epoch" and config.max_steps is None and patience >= config.num_epochs:
        yield (
            f"early_stopping_patience {patience} cannot stop a run of num_epochs {config.num_epochs:g} with eval_steps "
            "epoch: it counts evaluations."
        )


def _trains_router(config: RunConfig) -> bool:
    return config.num_experts > 1 and config.mode == "joint"


def _among(names: Collection[str], given: Collection[str]) -> list[str]:
    return [name for name in names if name in given]


def render_markdown() -> str:
    """Every setting by group as tables of Markdown, for docs/settings.md."""
    parts = []
    for group, settings in explain_all().items():
        parts += [f"### {group}", "", "| setting | default | must be | recommended | meaning |", "| --- " * 5 + "|"]
        parts += [_row(setting) for setting in settings]
        parts.append("")
    return "\n".join(parts)


def _row(setting: Explanation) -> str:
    unit = f" ({setting.unit})" if setting.unit else ""
    cells = (
        f"`{setting.name}`",
        shown(setting.default),
        setting.allowed + unit,
        setting.recommended,
        setting.meaning,
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
