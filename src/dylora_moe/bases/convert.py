"""A GGUF file -> a folder with config, float32 safetensors and tokenizer, as transformers loads it without GGUF."""

import mmap
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFValueType
from transformers import AutoModelForCausalLM, GgufConfig

from dylora_moe.bases.embedded import EmbeddedBase
from dylora_moe.bases.fetch import fetch_gguf

_FIXED_BYTES: dict[int, int] = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}
_HEADER = struct.Struct("<4sIQQ")  # magic, version, number of tensors, number of fields
_ARRAY = struct.Struct("<IQ")  # kind of the items, number of items
_UINT32 = struct.Struct("<I")
_UINT64 = struct.Struct("<Q")


def build_folder(entry: EmbeddedBase, scratch: Path, folder: Path, progress: Callable[[str], None]) -> None:
    """Fetch an embedded base and write it to `folder`; `scratch` takes what is needed only on the way.

    Raises:
        BaseModelError: the file cannot be had or is not the pinned one.
    """
    gguf = fetch_gguf(entry, scratch, progress)
    progress(f"{entry.key}: converting to safetensors, once (half a minute on 2 CPU cores)")
    started = time.monotonic()
    convert_tokenizer(gguf, folder, entry.tokenizer_class)
    weights_only = scratch / "weights.gguf"
    strip_vocabulary(gguf, weights_only)
    gguf.unlink()  # the two files together with the result would need more disk than was checked for
    convert_weights(weights_only, folder, entry.key)
    progress(f"{entry.key}: converted in {time.monotonic() - started:.0f} s")


def convert_tokenizer(gguf: Path, folder: Path, tokenizer_class: str) -> None:
    """Write the tokenizer (and chat template, where there is one) that a GGUF's metadata describes."""
    reader = getattr(transformers, tokenizer_class)
    reader.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)


def convert_weights(gguf: Path, folder: Path, name: str) -> None:
    """Write config and dequantised float32 weights of a GGUF."""
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    # The weights are plain now, but the loader leaves its marks, and a model so marked refuses to be saved.
    vars(model).pop("hf_quantizer", None)
    for mark in ("quantization_config", "_model_name_or_path"):
        vars(model.config).pop(mark, None)
    model.config._name_or_path = name
    model.save_pretrained(folder)


def strip_vocabulary(source: Path, target: Path) -> None:
    """Copy a GGUF without its tokenizer's arrays; the size of the vocabulary stays, as a field of its own.

    transformers parses the metadata of a Gemma file twice to load the weights, and each pass over the 262,144
    tokens takes gguf's reader 20 s (2 CPU cores); on the copy it takes milliseconds.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (the layout of the file).
    """
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic, version, num_tensors, num_fields = _HEADER.unpack_from(data)
        fields = _read_fields(data, num_fields)
        kept = [data[field.start : field.end] for field in fields.values() if not _is_vocabulary(field)]
        kept += _vocabulary_size(data, fields)
        tensors_start = max(field.end for field in fields.values())
        tensors_end = _tensor_table_end(data, tensors_start, num_tensors)
        alignment = _alignment(data, fields)
        head = _HEADER.pack(magic, version, num_tensors, len(kept)) + b"".join(kept) + data[tensors_start:tensors_end]
        file.seek(_round_up(tensors_end, alignment))
        with target.open("wb") as copy:
            copy.write(head.ljust(_round_up(len(head), alignment), b"\0"))
            shutil.copyfileobj(file, copy, 1 << 20)


class _Field(NamedTuple):
    """One metadata field and its offsets in the file: of its key, its value, and the byte after it."""

    key: str
    kind: int
    start: int
    value: int
    end: int


def _read_fields(data: mmap.mmap, num_fields: int) -> dict[str, _Field]:
    fields: dict[str, _Field] = {}
    at = _HEADER.size
    for _ in range(num_fields):
        key_end = _string_end(data, at)
        key = data[at + 8 : key_end].decode()
        kind = _UINT32.unpack_from(data, key_end)[0]
        end = _value_end(data, key_end + 4, kind)
        fields[key] = _Field(key, kind, at, key_end + 4, end)
        at = end
    return fields


def _is_vocabulary(field: _Field) -> bool:
    return field.kind == GGUFValueType.ARRAY and field.key.startswith("tokenizer.")


def _vocabulary_size(data: mmap.mmap, fields: dict[str, _Field]) -> list[bytes]:
    """The field that says how many tokens there are, unless the file has it."""
    architecture = fields["general.architecture"]
    key = data[architecture.value + 8 : architecture.end] + b".vocab_size"
    if key.decode() in fields:
        return []
    _, num_tokens = _ARRAY.unpack_from(data, fields["tokenizer.ggml.tokens"].value)
    return [_UINT64.pack(len(key)) + key + _UINT32.pack(GGUFValueType.UINT32) + _UINT32.pack(num_tokens)]


def _value_end(data: mmap.mmap, at: int, kind: int) -> int:
    if kind == GGUFValueType.STRING:
        return _string_end(data, at)
    if kind != GGUFValueType.ARRAY:
        return at + _FIXED_BYTES[kind]
    item_kind, num_items = _ARRAY.unpack_from(data, at)
    at += _ARRAY.size
    if item_kind in _FIXED_BYTES:
        return at + num_items * _FIXED_BYTES[item_kind]
    for _ in range(num_items):
        at = _value_end(data, at, item_kind)
    return at


def _string_end(data: mmap.mmap, at: int) -> int:
    return at + 8 + _UINT64.unpack_from(data, at)[0]


def _tensor_table_end(data: mmap.mmap, at: int, num_tensors: int) -> int:
    for _ in range(num_tensors):
        at = _string_end(data, at)
        num_axes = _UINT32.unpack_from(data, at)[0]
        at += 4 + 8 * num_axes + 4 + 8  # axes, type, offset
    return at


def _alignment(data: mmap.mmap, fields: dict[str, _Field]) -> int:
    field = fields.get("general.alignment")
    return _UINT32.unpack_from(data, field.value)[0] if field else GGUF_DEFAULT_ALIGNMENT


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
