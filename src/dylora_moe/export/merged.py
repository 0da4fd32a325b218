"""One expert, or a weighted sum of several, merged into the base: an ordinary transformers folder."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModelForCausalLM, set_peft_model_state_dict
from peft.tuners.lora.model import LoraModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dylora_moe.bases import LoadedBase, load_base
from dylora_moe.data.templates import end_token_id, ensure_template
from dylora_moe.errors import ExportError
from dylora_moe.evaluate.load import set_saved_template
from dylora_moe.export.verify import Probe, check_difference, forced_logits, largest_difference, verify
from dylora_moe.tuner.folder import EXPERTS_FOLDER, check_experts, read_adapter, read_description, written_whole
from dylora_moe.tuner.inspect import check_reach

Method = Literal["linear", "ties", "dare"]

# PEFT's names. Its plain `linear`, `ties` and `dare_linear` combine the factors A and B each by themselves, and the
# product of two sums is not the sum of the products; these combine the changes that the experts make.
_COMBINATIONS: dict[Method, str] = {"linear": "cat", "ties": "ties_svd", "dare": "dare_linear_svd"}
_SUM = "weighted_sum"
_SEED = 0  # DARE drops at random


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """Which experts, how much of each, and how they are combined."""

    weights: Mapping[str, float]
    """Expert -> weight, taken as it is."""
    method: Method = "linear"
    density: float = 0.5
    """Share of the values of each change that TIES and DARE keep."""

    @property
    def is_one(self) -> bool:
        """One expert as it is."""
        return list(self.weights.values()) == [1.0]


def export_merged(
    model_folder: Path,
    mixed: Mixed,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    check: bool,
    also: Callable[[Path], None] = lambda written: None,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Merge into the base, in float32, and write model, tokenizer, chat template and generation config.

    Args:
        model_folder: Of the mixture.
        mixed: What to merge.
        folder: New or empty.
        dtype: To write; None for that of the base's own files.
        check: Whether to compare logits with the source; nothing is left where they differ.
        also: Called with the folder before it is at its place; nothing is left where it fails.
        tell: Takes a line of text at each long step.

    Returns:
        `dtype`; and with a check `difference`, of the merge and of the files, and `rounding`, what a dtype of 16 bits
        adds to it.

    Raises:
        TunerError: No such expert, or the folder is not empty.
        ExportError: A weight or density that makes no sense, values too large for the dtype, or another model than the
            source.
    """
    check_experts(model_folder, mixed.weights)
    _check(mixed)
    told: dict[str, Any] = {"difference": None, "rounding": None}
    with written_whole(Path(folder)) as target:
        probe, source = None, list[torch.Tensor]()
        if check and mixed.is_one:
            probe, found = forced_logits(model_folder, mixed.weights, tell)
            (source,) = found.values()
        base = _load(model_folder, tell)
        written = dtype or _stored_dtype(Path(base.resolved.path_or_id))
        adapted = adapt(base.model, model_folder, mixed)
        if check and probe is None:
            probe = Probe.of(base.tokenizer)
            source = probe.logits(adapted)
        merged = cast(PreTrainedModel, adapted.merge_and_unload())
        if probe:
            told["difference"] = check_difference(largest_difference(source, probe.logits(merged)), "the merged model")
        _cast(merged, written)
        _check_finite(merged, written)
        _set_generation(merged, base.tokenizer)
        merged.save_pretrained(target)
        base.tokenizer.save_pretrained(target)
        if probe:
            rounded = probe.logits(merged)
            told["rounding"] = largest_difference(source, rounded) if written != torch.float32 else None
            del adapted, merged, base  # another process loads them now
            tell("comparing logits with those of transformers, in a process of its own")
            again = verify({"the merged model": target}, {"the merged model": rounded}, probe, base=None)
            told["difference"] = max(told["difference"], again)
        also(target)
    return {"dtype": str(written).removeprefix("torch."), **told}


def adapt(base: PreTrainedModel, model_folder: Path, mixed: Mixed) -> PeftModelForCausalLM:
    """The base with the experts, by stock PEFT, of which only what is mixed is active.

    Args:
        base: Changed in place; not that of a loaded mixture.
        model_folder: Of the mixture.
        mixed: What to make.
    """
    adapters = {name: read_adapter(model_folder / EXPERTS_FOLDER / name) for name in mixed.weights}
    # All before the first is there: PEFT's layers have Linears of their own inside.
    plain = {name: _plain(base, config) for name, (config, _) in adapters.items()}
    first = next(iter(plain))
    model = PeftModelForCausalLM(base, plain[first], adapter_name=first)
    for name, config in plain.items():
        if name != first:
            model.add_adapter(name, config)
        set_peft_model_state_dict(model, adapters[name][1], adapter_name=name)
    active, lora = first, cast(LoraModel, model.base_model)
    if not mixed.is_one:
        active = _SUM
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            lora.add_weighted_adapter(
                list(mixed.weights),
                list(mixed.weights.values()),
                active,
                combination_type=_COMBINATIONS[mixed.method],  # type: ignore[arg-type]
                svd_rank=sum(config.r for config in plain.values()),
                svd_full_matrices=False,
                density=mixed.density,
            )
    lora.set_adapter(active)
    return model.eval()


def _plain(base: PreTrainedModel, config: LoraConfig) -> LoraConfig:
    """The same LoRA with each Linear named in full, and its scaling as alpha / r.

    PEFT gives the sum of several the layers and the rsLoRA of the first alone.
    """
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    alpha: Any = scaling * config.r
    return LoraConfig(
        r=config.r, lora_alpha=alpha, target_modules=check_reach(base, config, 0), bias="none", task_type="CAUSAL_LM"
    )


def _check(mixed: Mixed) -> None:
    if not all(math.isfinite(weight) for weight in mixed.weights.values()) or not any(mixed.weights.values()):
        raise ExportError(f"weights must be finite and one of them not 0, got {dict(mixed.weights)}.")
    if not 0 < mixed.density <= 1:
        raise ExportError(f"density must be above 0 and at most 1, got {mixed.density}. 0.5 is a common choice.")


def _load(model_folder: Path, tell: Callable[[str], None]) -> LoadedBase:
    description = read_description(model_folder)
    base = load_base(
        description["base"], dtype=torch.float32, expected_revision=description.get("base_revision"), progress=tell
    )
    set_saved_template(base.tokenizer, model_folder)
    ensure_template(base.tokenizer)
    return base


def _stored_dtype(base: Path) -> torch.dtype:
    """That of the base's own files, as its config has it."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    found = getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """What is written; buffers such as the frequencies of positions are made anew where the model is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _check_finite(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """A large weight of an expert, or a dtype of a small range, makes infinities of large values."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ExportError(
                f"merged weights must be finite numbers in {str(dtype).removeprefix('torch.')}, and {name} has others. "
                "Give the experts smaller weights, or choose float32 or bfloat16."
            )


def _set_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Answers end where those of the training did: at the end token of the chat template, too."""
    config: Any = model.generation_config
    known = config.eos_token_id
    ends = [known] if isinstance(known, int) else list(known or [])
    end = end_token_id(tokenizer)
    if end not in ends:
        config.eos_token_id = [*ends, end]
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
