"""Shared fixtures: tiny random base models, and mixtures over them whose experts do something."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dylora_moe.cache.store import cache_folder

COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # the usual 0.02 leaves so small a model without any differences between tokens
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Two whose outputs are cached and one with other widths: a third of the time that all Linears would take.
FEW_TARGETS = ("k_proj", "v_proj", "down_proj")

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", {}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 6,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """A test leaves signals as they were: processes that later ones start would ignore what these ignore."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for what the tests prepare, thrown away with it; bases stay where they are, as converting takes long."""
    bases = cache_folder(None, os.environ) / "bases"
    folder = tmp_path_factory.mktemp("cache")
    bases.mkdir(parents=True, exist_ok=True)
    (folder / "bases").symlink_to(bases, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYLORA_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def make_base() -> Callable[..., Any]:
    """(architecture, seed, **config changes) -> a random causal language model in eval mode; always the same one."""
    import torch
    import transformers

    def make(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
        family, extra = ARCHITECTURES[architecture]
        config_name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
        config = getattr(transformers, config_name)(**COMMON | extra | changes)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(transformers, f"{family}ForCausalLM")(config)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # drawn as zero, which would hide a bias left out
                    torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def randomise() -> Callable[..., Any]:
    """(model, seed) -> the model with random B factors; an expert's B begins as zero, and would change nothing."""
    import torch

    def fill(model: Any, *, seed: int = 1) -> Any:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model

    return fill


@pytest.fixture(scope="session")
def make_model(make_base: Callable[..., Any], randomise: Callable[..., Any]) -> Callable[..., Any]:
    """(experts, architecture, expert, **routing) -> a mixture in eval mode with random experts and router."""
    import torch

    from dylora_moe.tuner import DyLoraModel, ExpertConfig, RoutingConfig

    def make(
        experts: int | list[str] = 4,
        architecture: str = "llama",
        *,
        base: Any = None,
        expert: ExpertConfig | None = None,
        **routing: Any,
    ) -> DyLoraModel:
        names = [f"expert_{index}" for index in range(experts)] if isinstance(experts, int) else experts
        if routing.get("granularity") == "sequence":
            routing = {"execution": "rowwise"} | routing  # what `auto` takes for rows longer than those of most tests
        targets = FEW_TARGETS if architecture in ("llama", "gemma3") else "all-linear"
        with torch.random.fork_rng():
            torch.manual_seed(2)
            model = DyLoraModel(
                base if base is not None else make_base(architecture),
                names,
                expert_config=expert or ExpertConfig(rank=8, alpha=12, target_modules=targets),
                routing=RoutingConfig(**routing),
            )
        return randomise(model).eval()

    return make
