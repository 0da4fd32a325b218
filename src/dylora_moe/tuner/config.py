"""What the tuner needs to know: how tokens reach experts, and what each expert is. Plain data, saved as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from dylora_moe.errors import ConfigError

Granularity = Literal["token", "sequence"]
RouterScope = Literal["shared", "per_layer"]
RouterKind = Literal["linear", "prototype"]
Unsure = Literal["base", "dense"]
Execution = Literal["auto", "reference", "bottleneck", "rowwise", "grouped", "triton"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """How a hidden state becomes a choice of experts.

    Raises:
        ConfigError: a value is outside its range.
    """

    granularity: Granularity = "token"
    """`token`: one decision a token; `sequence`: one decision a document, from its prompt."""

    router_scope: RouterScope = "shared"
    """`shared`: one router at the tap, its decision used by every layer above; `per_layer`: one router a layer."""

    router: RouterKind = "linear"
    """`linear`: a learned map; `prototype`: the nearest of the known skills, from their statistics."""

    unsure: Unsure = "base"
    """Prototype router: what answers where no skill is near enough, the base alone or all experts together."""

    tap_layer: int = 0
    """Index of the decoder layer whose input the router reads. Layers below it carry no adapter."""

    top_k: int = 1
    """Experts that contribute to one token under sparse delegation, 1 to the number of experts."""

    temperature: float = 1.0
    """Divides the logits under dense collaboration, to 1 as experts mature: above 1 softer, below 1 sharper."""

    prefix_tokens: int = 16
    """Sequence granularity: a document without a known prompt is routed by this many first tokens."""

    execution: Execution = "auto"
    """Which implementation computes the experts; `auto` chooses by size and device."""

    def __post_init__(self) -> None:
        _one_of("granularity", self.granularity, get_args(Granularity))
        _one_of("router_scope", self.router_scope, get_args(RouterScope))
        _one_of("router", self.router, get_args(RouterKind))
        _one_of("unsure", self.unsure, get_args(Unsure))
        _one_of("execution", self.execution, get_args(Execution))
        _at_least("tap_layer", self.tap_layer, 0)
        _at_least("top_k", self.top_k, 1)
        _at_least("prefix_tokens", self.prefix_tokens, 1)
        if not self.temperature > 0:
            raise ConfigError(
                f"temperature must be above 0, got {self.temperature}. 1.0 leaves the logits as they are."
            )
        if self.router == "prototype":
            self._check_prototype()

    def _check_prototype(self) -> None:
        """One decision a document, shared by all layers: what statistics of prompts at the tap can say."""
        wanted = {"granularity": "sequence", "router_scope": "shared", "top_k": 1}
        for name, value in wanted.items():
            got = getattr(self, name)
            if got != value:
                raise ConfigError(
                    f"router prototype needs {name} {value}, got {got}. Set {name} to {value}, or router to linear."
                )

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RoutingConfig":
        """Inverse of `to_json`; unknown keys are an error, since they would change the routing in silence."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ConfigError(
                f"routing settings {unknown} are unknown to this version; it knows "
                f"{[field.name for field in fields(cls)]}. Update dylora-moe to load this model."
            )
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertConfig:
    """The shape of one LoRA expert, as in PEFT's `LoraConfig`."""

    rank: int = 16
    """Rank r of the two low-rank factors."""

    alpha: float = 32
    """Numerator of the scaling: alpha / r, or alpha / sqrt(r) with rank-stabilised scaling."""

    dropout: float = 0.0
    """Probability of dropping an input element of the low-rank path while training."""

    use_rslora: bool = False
    """Rank-stabilised scaling, arXiv 2312.03732."""

    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear`, `attention`, or the last parts of Linear names, e.g. ("q_proj", "v_proj")."""

    def __post_init__(self) -> None:
        _at_least("lora_r", self.rank, 1)
        if not self.alpha > 0:
            raise ConfigError(f"lora_alpha must be above 0, got {self.alpha}. Twice lora_r is a common choice.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora_dropout must be at least 0 and below 1, got {self.dropout}.")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}.")
