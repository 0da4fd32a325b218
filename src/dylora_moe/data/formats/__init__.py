"""Raw rows of every known format -> examples; the format is found by the columns."""

from dylora_moe.data.formats.fields import Row, nearest
from dylora_moe.data.formats.known import FORMATS, RowFormat, detect_format, row_to_examples
from dylora_moe.data.formats.labels import translation_of

__all__ = ["FORMATS", "Row", "RowFormat", "detect_format", "nearest", "row_to_examples", "translation_of"]
