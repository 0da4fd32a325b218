"""Experts of a model folder -> plain PEFT adapters, each with the tokenizer and the template of its training."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dylora_moe.bases import EMBEDDED, converted_folder, resolve_base
from dylora_moe.export.verify import forced_logits, verify
from dylora_moe.tuner.folder import check_experts, read_description, write_copy, written_whole


def export_adapters(
    model_folder: Path, names: Iterable[str], folder: Path, *, check: bool, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Write experts as plain PEFT adapters: one into the folder itself, several into a folder each.

    Args:
        model_folder: Of the mixture.
        names: Of the experts, one at least.
        folder: New or empty.
        check: Whether to compare logits with the source; nothing is left where they differ.
        tell: Takes a line of text at each long step.

    Returns:
        `experts` (name -> folder), `base` as other programs find it, and `difference`, None without a check.

    Raises:
        TunerError: No such expert, or the folder is not empty.
        ExportError: What was written is not what its source is.
    """
    names = list(dict.fromkeys(names))
    check_experts(model_folder, names)
    description = read_description(model_folder)
    difference = None
    with written_whole(Path(folder)) as target:
        places = {name: target / name if len(names) > 1 else target for name in names}
        base = base_elsewhere(description["base"])
        for name, place in places.items():
            write_copy(model_folder, name, place)
            _name_base(place / "adapter_config.json", base)
        if check:
            difference = _verify(model_folder, places, tell)
    written = {name: str(Path(folder) / name if len(names) > 1 else Path(folder)) for name in names}
    return {"experts": written, "base": base, "difference": difference}


def base_elsewhere(base: str) -> str:
    """The base as programs without this package find it: of an embedded one the folder that it was converted into."""
    return str(converted_folder(base) or base) if base in EMBEDDED else base


def _name_base(config: Path, base: str) -> None:
    values = json.loads(config.read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = base
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _verify(model_folder: Path, places: dict[str, Path], tell: Callable[[str], None]) -> float:
    description = read_description(model_folder)
    probe, expected = forced_logits(model_folder, places, tell)
    base = resolve_base(description["base"], expected=description.get("base_revision"), progress=tell)
    tell("comparing logits with those of stock PEFT, in a process of its own")
    return verify(places, expected, probe, base=Path(base.path_or_id))
