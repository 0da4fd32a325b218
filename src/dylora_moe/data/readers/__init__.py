"""A local file or folder -> rows, each with the place where it stands, for errors that can be acted on."""

from dylora_moe.data.readers.files import (
    LABELS_FILE,
    SUFFIXES,
    files_read,
    list_files,
    read_labels,
    read_rows,
    stem_of,
    suffix_of,
)
from dylora_moe.data.readers.rows import BadRow, OnBad, stop_at

__all__ = [
    "LABELS_FILE",
    "SUFFIXES",
    "BadRow",
    "OnBad",
    "files_read",
    "list_files",
    "read_labels",
    "read_rows",
    "stem_of",
    "stop_at",
    "suffix_of",
]
