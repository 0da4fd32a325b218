"""Independent PEFT LoRAs -> a mixture that routes between them, by a few rows of each; nothing is trained."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dylora_moe.bases import load_base
from dylora_moe.data.batching import Collator, TokenizedRow, pad_token_id
from dylora_moe.data.build import build_data
from dylora_moe.data.settings import DataSettings
from dylora_moe.data.stream import parse_skills
from dylora_moe.data.templates import ensure_template
from dylora_moe.errors import DataError
from dylora_moe.evaluate.load import TEMPLATE
from dylora_moe.evaluate.machine import base_dtype
from dylora_moe.skills.library import Features
from dylora_moe.skills.prototypes import fit_prototypes
from dylora_moe.train.features import draw_sample
from dylora_moe.tuner import DyLoraModel, RoutingConfig, save_model
from dylora_moe.tuner.exchange import mixture_of
from dylora_moe.tuner.folder import check_new, read_adapter
from dylora_moe.tuner.inspect import check_reach, decoder_layers, layer_index

# 16 are enough for domains far apart, 8 not always (benchmarks/assemble.py).
ROWS = 32
_FEW = 0.5  # of an expert's own prompts
_MAX_LENGTH = 1024
_BATCH_SIZE = 8


def assemble(
    base_name: str,
    adapters: Mapping[str, Path],
    datasets: Mapping[str, Sequence[Any]],
    folder: Path,
    *,
    rows: int = ROWS,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Write a model folder of several LoRAs whose router sends each prompt to the LoRA whose rows it is most like.

    Args:
        base_name: That all of them are of.
        adapters: Expert -> folder of a plain PEFT LoRA, of any rank and targets.
        datasets: Expert -> rows that are like its own, as in a recipe.
        folder: New or empty.
        rows: To know each expert by, at most.
        tell: Takes a line of text at each long step.

    Returns:
        `experts` (name -> `rows`, and `right`, the share of `held_out` other prompts that it gets), `tap_layer`.

    Raises:
        DataError: The names of LoRAs and rows are not the same, or rows that cannot be read or are too few.
        TunerError: One is no plain LoRA, or is of another base.
        BaseModelError: The base cannot be had.
    """
    if set(adapters) != set(datasets) or len(adapters) < 2:
        raise DataError(
            f"a mixture needs two experts or more, each with a LoRA and rows, got LoRAs of {', '.join(adapters)} and "
            f"rows of {', '.join(datasets) or 'none'}."
        )
    check_new(folder)
    if Path(base_name).expanduser().is_dir():  # the model may be loaded from elsewhere
        base_name = str(Path(base_name).expanduser().absolute())
    base = load_base(base_name, dtype=base_dtype(bf16=None, fp16=False), progress=tell)
    _set_template(base.tokenizer, list(adapters.values()), tell)
    routing = RoutingConfig(router="prototype", granularity="sequence", tap_layer=lowest_layer(base.model, adapters))
    model = mixture_of(base.model, adapters, routing)
    _tell_of_other_bases(base_name, base.resolved.path_or_id, adapters, tell)
    known: dict[str, Features] = {}
    held: dict[str, Features] = {}
    settings = DataSettings(max_length=_MAX_LENGTH, overlong="truncate", validation_split=0.2)
    for name in adapters:
        (skill,) = parse_skills([{"skill": name, "datasets": list(datasets[name])}])
        data = build_data(skill.datasets, base.tokenizer, settings, tell=tell)
        chosen, others = draw_sample(data, rows, settings.seed), list(data.validation[name])[:rows]
        known[name], held[name] = (read_prompts(model, part, base.tokenizer) for part in (chosen, others))
    fit_router(model, known)
    save_model(model, folder, base_name=base_name, base_revision=base.resolved.revision, tokenizer=base.tokenizer)
    found: dict[str, dict[str, Any]] = {}
    for name in model.expert_names:
        right = _share_right(model, name, held[name])
        found[name] = {"rows": len(known[name]), "held_out": len(held[name]), "right": right}
        if right < _FEW:
            tell(
                f"Note: few prompts like the rows of {name} go to it. Give it rows that are unlike those of the others."
            )
    return {"experts": found, "tap_layer": routing.tap_layer}


def fit_router(model: DyLoraModel, known: Mapping[str, Features]) -> None:
    """Route by samples of prompts: each to the expert whose prompts it is most like, however unlike they all are.

    No prompt is unsure: a radius from so few rows turns away 4 % of an expert's own and more (benchmarks/assemble.py).

    Args:
        model: With a prototype router.
        known: Expert -> features of its prompts.
    """
    found = fit_prototypes(known, unsure_rate=0)
    model.set_prototypes(found.projection, found.centres, found.radii, found.skills)


def lowest_layer(base: PreTrainedModel, adapters: Mapping[str, Path]) -> int:
    """The lowest decoder layer that any of the adapters changes: the tap may be there, and the higher the better."""
    path, _ = decoder_layers(base)
    found = [
        layer_index(path, name)
        for folder in adapters.values()
        for name in check_reach(base, read_adapter(folder)[0], 0)
    ]
    return min(index for index in found if index is not None)


def read_prompts(model: DyLoraModel, rows: Sequence[TokenizedRow], tokenizer: PreTrainedTokenizerBase) -> Features:
    """Features of the rows' prompts, (rows, features), in their order."""
    collate, parts = Collator(pad_token_id=pad_token_id(tokenizer)), []
    for start in range(0, len(rows), _BATCH_SIZE):
        batch = collate(list(rows[start : start + _BATCH_SIZE]))
        parts.append(model.prompt_features([{key: value for key, value in batch.items() if key != "domain"}]))
    return torch.cat(parts).numpy()


@torch.no_grad()
def _share_right(model: DyLoraModel, name: str, features: Features) -> float:
    (router,) = model.routers.values()
    return float((router(torch.from_numpy(features)).argmax(-1) == model.expert_names.index(name)).float().mean())


def _set_template(tokenizer: PreTrainedTokenizerBase, folders: Sequence[Path], tell: Callable[[str], None]) -> None:
    """The chat template that came with the LoRAs, where all that have one have the same; otherwise the base's."""
    files = [folder / TEMPLATE for folder in folders if (folder / TEMPLATE).is_file()]
    found = {file.read_text(encoding="utf-8") for file in files}
    if len(found) == 1:
        (tokenizer.chat_template,) = found
    elif found:
        tell(f"Note: the LoRAs were trained with {len(found)} chat templates; the base's own is used.")
    ensure_template(tokenizer)


def _tell_of_other_bases(base: str, folder: str, adapters: Mapping[str, Path], tell: Callable[[str], None]) -> None:
    for name, adapter in adapters.items():
        named = read_adapter(adapter)[0].base_model_name_or_path
        if named and named not in (base, folder) and Path(named).absolute() != Path(base):
            tell(f"Note: {name} says that it is of {named}, and the base is {base}. Its shapes fit.")
