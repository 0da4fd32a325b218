"""Presets: what suits a machine, and scenarios: what suits a purpose. Neither changes the effective batch.

Weakest first: defaults, recognised preset, recipe, named preset, scenario, flags. Pure; `train.machine` looks at the
machine.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from dylora_moe.config.spelling import did_you_mean, nearest
from dylora_moe.config.training import TrainingSettings
from dylora_moe.errors import ConfigError

if TYPE_CHECKING:  # settings.py checks names of presets with this file
    from dylora_moe.config.settings import RunConfig

AUTO, NONE = "auto", "none"
_BATCH = ("batch_size", "gradient_accumulation_steps")
_PRECISION = ("bf16", "fp16")
_GB = 10**9

# Below this share of the memory that a preset was made for, a card of the right name is a slice of it (MIG).
_WHOLE_CARD = 0.9

# What a Mac's system keeps. Source: training guide of the founding documents, "at least 4GB".
_MAC_SYSTEM_GB = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What suits a machine.

    Attributes:
        name: What `preset` calls it.
        memory_gb: Memory that it was made for, in 10^9 bytes: of the card, or what a profile of a card uses of it.
        row_length: Tokens of the rows that the micro-batch is sized for; rows are not cut to it.
        micro_batch: Most rows in one forward pass of training.
        eval_batch_size: Rows in one forward pass of an evaluation.
        gradient_checkpointing: As the setting.
        bf16: As the setting; None leaves it to the hardware.
        fp16: As the setting.
        dataloader_pin_memory: As the setting; None leaves it to the hardware.
        description: What it is for and where its figures come from.
    """

    name: str
    memory_gb: float
    row_length: int
    micro_batch: int
    eval_batch_size: int
    gradient_checkpointing: bool
    bf16: bool | None
    fp16: bool
    dataloader_pin_memory: bool | None
    description: str

    def settings(self) -> dict[str, Any]:
        """Its settings but for the batch, which depends on the effective batch."""
        return {
            "eval_batch_size": self.eval_batch_size,
            "gradient_checkpointing": self.gradient_checkpointing,
            "bf16": self.bf16,
            "fp16": self.fp16,
            "dataloader_pin_memory": self.dataloader_pin_memory,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What suits a purpose.

    Attributes:
        name: What `scenario` calls it.
        settings: Its settings but for the batch.
        micro_batch: Most rows in one forward pass of training; None leaves the batch as it is.
        description: What it is for.
    """

    name: str
    settings: dict[str, Any]
    micro_batch: int | None = None
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a preset is recognised by.

    Attributes:
        device_name: As torch reports it, such as "Tesla T4"; "cpu" where there is no GPU.
        memory_bytes: Of the GPU, else of the machine; 0 where it cannot be told.
        kind: mps is a Mac with Apple silicon.
        has_bf16: It computes in bfloat16 natively.
    """

    device_name: str
    memory_bytes: int
    kind: Literal["cuda", "cpu", "mps"]
    has_bf16: bool


def _a10g(profile: str, memory_gb: float, row_length: int, micro_batch: int) -> Preset:
    return Preset(
        name=f"a10g_{profile}",
        memory_gb=memory_gb,
        row_length=row_length,
        micro_batch=micro_batch,
        eval_batch_size=micro_batch,
        gradient_checkpointing=True,
        bf16=True,
        fp16=False,
        dataloader_pin_memory=None,
        description=f"24 GB card such as the A10G, about {memory_gb:g} GB of it used (training guide).",
    )


def _m3(profile: str, memory_gb: float, row_length: int, micro_batch: int, checkpointing: bool) -> Preset:
    return Preset(
        name=f"m3_{profile}",
        memory_gb=memory_gb,
        row_length=row_length,
        micro_batch=micro_batch,
        eval_batch_size=micro_batch,
        gradient_checkpointing=checkpointing,
        bf16=False,
        fp16=False,
        dataloader_pin_memory=False,
        description=f"Mac, about {memory_gb:g} GB used (training guide). Trains on the CPU in this version: Apple's "
        "GPU lacks float64 and grouped_mm.",
    )


_ALL_PRESETS = (
    Preset(
        name="t4",
        memory_gb=15,
        row_length=1024,
        micro_batch=1,
        eval_batch_size=1,
        gradient_checkpointing=True,
        bf16=False,
        fp16=True,
        dataloader_pin_memory=False,
        description="Tesla T4, 15 GB: one row at a time, float16 since it has no bfloat16 (deep dive).",
    ),
    Preset(
        name="l4",
        memory_gb=24,
        row_length=1024,
        micro_batch=3,
        eval_batch_size=4,
        gradient_checkpointing=True,
        bf16=True,
        fp16=False,
        dataloader_pin_memory=False,
        description="L4, 24 GB (deep dive, 3 x 3; an effective batch of 8 becomes 2 x 4).",
    ),
    _a10g("high", 20, 2048, 8),
    _a10g("balanced", 16, 1024, 4),
    _a10g("low", 12, 768, 2),
    Preset(
        name="a100",
        memory_gb=40,
        row_length=1024,
        micro_batch=2,
        eval_batch_size=3,
        gradient_checkpointing=True,
        bf16=True,
        fp16=False,
        dataloader_pin_memory=True,
        description="A100, 40 GB (deep dive, for a base of 7B). Small bases gain from scenario high_performance.",
    ),
    Preset(
        name="h100",
        memory_gb=80,
        row_length=1024,
        micro_batch=8,
        eval_batch_size=16,
        gradient_checkpointing=False,
        bf16=True,
        fp16=False,
        dataloader_pin_memory=True,
        description="H100 or H200, 80 GB and more (ours, not from the founding documents).",
    ),
    _m3("high", 16, 1024, 3, False),
    _m3("balanced", 14, 1024, 2, False),
    _m3("low", 12, 768, 2, True),
    _m3("safe", 10, 768, 1, True),
    Preset(
        name="cpu",
        memory_gb=8,
        row_length=1024,
        micro_batch=8,
        eval_batch_size=8,
        gradient_checkpointing=False,
        bf16=None,
        fp16=False,
        dataloader_pin_memory=None,
        description="No GPU: the defaults, with bfloat16 where the CPU has it (ours, not from the founding documents).",
    ),
)
PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _ALL_PRESETS})
"""Every preset by its name. Source: the founding documents' deep dive (T4, L4, A100) and training guide (A10G, M3)."""

_ALL_SCENARIOS = (
    Scenario(
        name="debug",
        settings={"num_epochs": 1, "eval_steps": 10, "save_steps": 50, "logging_steps": 5},
        description="A short run that shows everything early.",
    ),
    Scenario(
        name="production",
        settings={"num_epochs": 3, "eval_steps": 100, "save_steps": 500, "logging_steps": 10},
        description="A full run, evaluated and saved regularly.",
    ),
    Scenario(
        name="memory_constrained",
        settings={"gradient_checkpointing": True, "dataloader_pin_memory": False},
        micro_batch=1,
        description="The least memory: one row at a time, activations recomputed.",
    ),
    Scenario(
        name="high_performance",
        settings={"gradient_checkpointing": False, "dataloader_pin_memory": True},
        micro_batch=4,
        description="Memory to spare: nothing recomputed, larger micro-batches.",
    ),
)
SCENARIOS: Mapping[str, Scenario] = MappingProxyType({scenario.name: scenario for scenario in _ALL_SCENARIOS})
"""Every scenario by its name. Source: the founding documents' deep dive, "Configuration for Different Scenarios"."""

# A card's model is a word of its name: L40 is no L4, A100 no A10.
_CARDS = (
    (re.compile(r"\bT4\b"), "t4"),
    (re.compile(r"\bL4\b"), "l4"),
    (re.compile(r"\bA10G?\b"), "a10g_balanced"),
    (re.compile(r"\bA100\b"), "a100"),
    (re.compile(r"\bH[12]00\b"), "h100"),
)


def check_preset_name(name: str) -> str:
    """The name of a preset as it is spelt here, `auto` or `none`; case and hyphens do not matter.

    Raises:
        ConfigError: there is no such preset.
    """
    return _spelling("preset", name, [AUTO, NONE, *PRESETS])


def _spelling(setting: str, name: str, known: Collection[str]) -> str:
    plain = name.strip().lower().replace("-", "_")
    if plain in known:
        return plain
    hint = did_you_mean(nearest(plain, known))
    raise ConfigError(f"{setting} must be one of {', '.join(known)}, got {name!r}. {hint}".rstrip())


def split_batch(effective_batch: int, micro_batch: int) -> dict[str, int]:
    """The largest micro-batch that divides the effective batch and is not above `micro_batch`; accumulation the rest.

    Args:
        effective_batch: rows of one optimizer step.
        micro_batch: most rows of one forward pass.
    """
    size = next(size for size in range(min(effective_batch, micro_batch), 0, -1) if effective_batch % size == 0)
    return {"batch_size": size, "gradient_accumulation_steps": effective_batch // size}


def with_preset(recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe, with the preset and scenario that it or a flag names over it, and the flags over these.

    The effective batch is that of the recipe and the flags. Where a flag gives a part of the batch, or of the
    precision (bf16, fp16), a preset leaves the other part alone. A preset `auto` is left to `settle`.

    Raises:
        ConfigError: there is no such preset or scenario.
    """
    plain = {**recipe, **flags}
    named: dict[str, Any] = {}
    preset, scenario = plain.get("preset"), plain.get("scenario")
    if isinstance(preset, str):
        plain["preset"] = preset = check_preset_name(preset)
        if preset in PRESETS:
            named |= _batch_of(plain, PRESETS[preset].micro_batch) | PRESETS[preset].settings()
    if isinstance(scenario, str):
        plain["scenario"] = scenario = _spelling("scenario", scenario, SCENARIOS)
        named |= _batch_of(plain, SCENARIOS[scenario].micro_batch)
        named |= SCENARIOS[scenario].settings
    own = {*flags, *_partners(flags)}
    return plain | {name: value for name, value in named.items() if name not in own}


def _partners(given: Collection[str]) -> set[str]:
    """Settings that go together with one that was given."""
    return {name for group in (_BATCH, _PRECISION) if set(group) & set(given) for name in group}


def _batch_of(values: Mapping[str, Any], micro_batch: int | None) -> dict[str, int]:
    """The effective batch of the values in micro-batches; nothing where a value is no count, which is told later."""
    parts = [_count(values.get(name, TrainingSettings.model_fields[name].default)) for name in _BATCH]
    if micro_batch is None or not all(parts):
        return {}
    return split_batch(parts[0] * parts[1], micro_batch)


def _count(value: Any) -> int:
    """A value that pydantic would take for a count; 0 for others."""
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    is_text = isinstance(value, str) and value.strip().isdecimal()
    return max(0, int(value)) if is_whole or is_text else 0


def recognise(machine: Machine) -> str:
    """The name of the preset that suits a machine.

    A known card by its name; another card by the largest memory not above its own, T4 for those without bfloat16; a
    Mac by what its system leaves of its memory.
    """
    memory_gb = machine.memory_bytes / _GB
    if machine.kind == "cpu":
        return "cpu"
    if machine.kind == "mps":
        return _largest([name for name in PRESETS if name.startswith("m3_")], memory_gb - _MAC_SYSTEM_GB)
    for pattern, name in _CARDS:
        if pattern.search(machine.device_name) and memory_gb >= _WHOLE_CARD * PRESETS[name].memory_gb:
            return name
    if not machine.has_bf16:
        return "t4"
    return _largest([name for name, preset in PRESETS.items() if preset.bf16], memory_gb)


def _largest(names: list[str], memory_gb: float) -> str:
    """The one made for the most memory not above `memory_gb`, else for the least of all."""
    by_memory = sorted(names, key=lambda name: PRESETS[name].memory_gb)
    return ([name for name in by_memory if PRESETS[name].memory_gb <= memory_gb] or by_memory[:1])[-1]


def device_slug(machine: Machine) -> str:
    """The device's name as a part of a file name: tesla-t4, a100-sxm4-40gb, cpu."""
    words = re.sub(r"[^a-z0-9]+", "-", machine.device_name.lower()).strip("-")
    return words.removeprefix("nvidia-") or machine.kind


def name_run(config: "RunConfig", machine: Machine) -> "RunConfig":
    """The same run with the device's name in place of `{device}` in run_name."""
    if "{device}" not in config.run_name:
        return config
    return config.model_copy(update={"run_name": config.run_name.replace("{device}", device_slug(machine))})


def settle(config: "RunConfig", machine: Machine, stored_preset: str | None = None) -> "RunConfig":
    """The run as this machine will train it: with preset `auto`, what suits the machine where nothing was given.

    The default effective batch is split only if no part of it was given, and precision is set only if neither bf16
    nor fp16 was. `{device}` in run_name is replaced, whatever the preset.

    Args:
        config: as given; which settings were is read from `model_fields_set`.
        machine: the one to train on.
        stored_preset: the preset of the unfinished run that goes on. It is taken in place of the machine's own, so
            that a run restarted on another machine is the same run; `auto`, of a run from before presets, is none.

    Raises:
        ConfigError: the stored preset is unknown.
    """
    config = name_run(config, machine)
    if config.preset != AUTO:
        return config
    name = check_preset_name(recognise(machine) if stored_preset is None else stored_preset)
    if name not in PRESETS:
        return config.model_copy(update={"preset": NONE})
    preset, given = PRESETS[name], config.model_fields_set
    wanted = split_batch(config.batch_size * config.gradient_accumulation_steps, preset.micro_batch)
    wanted |= preset.settings()
    own = {*given, *_partners(given)}
    changes = {setting: value for setting, value in wanted.items() if setting not in own}
    return config.model_copy(update=changes | {"preset": name})
