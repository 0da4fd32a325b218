"""What decides a run's rows, as one hash: the content of the data, tokenizer and template, settings, and our code."""

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dylora_moe.cache.disk import hash_file
from dylora_moe.config import DatasetSpec
from dylora_moe.data.readers import files_read
from dylora_moe.data.registry import DataSource
from dylora_moe.data.source_reader import hub_fingerprint

_COMMIT = re.compile("[0-9a-f]{40}")  # a branch or a tag says something else tomorrow
# They render templates and cut text into tokens.
_LIBRARIES = ("transformers", "tokenizers", "jinja2")


def identify(
    specs: Sequence[DatasetSpec],
    tokenizer: PreTrainedTokenizerBase,
    registry: Mapping[str, DataSource],
    settings: Mapping[str, Any],
) -> str:
    """A hash (hexadecimal) that changes whenever the rows could.

    Raises:
        DataError: A file or a data set of the hub is not there.
    """
    record = {
        "code": _hash_code(),
        "libraries": [platform.python_version(), *(version(name) for name in _LIBRARIES)],
        "data": [_identify_one(spec, registry) for spec in specs],
        "tokenizer": _hash_tokenizer(tokenizer),
        "template": tokenizer.chat_template,
        "settings": dict(settings),
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()


def _identify_one(spec: DatasetSpec, registry: Mapping[str, DataSource]) -> dict[str, Any]:
    entry = registry[spec.name] if spec.name is not None else None
    path = spec.path if spec.path is not None else entry and entry.path
    content: Any = None
    if path is not None:
        content = [(file.name, hash_file(file)) for file in files_read(Path(path).expanduser())]
    elif entry is not None and entry.kind == "hub":
        is_commit = entry.revision is not None and _COMMIT.fullmatch(entry.revision)
        content = entry.revision if is_commit else hub_fingerprint(entry)
    # A relative path gives a domain its name by the working directory.
    place = path and str(Path(path).expanduser().absolute())
    return {"spec": asdict(spec), "entry": entry and asdict(entry), "place": place, "content": content}


def _hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    core = getattr(tokenizer, "backend_tokenizer", None)
    text = core.to_str() if core is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps(
        [tokenizer.special_tokens_map, type(tokenizer).__name__, getattr(tokenizer, "split_special_tokens", False)],
        sort_keys=True,
        default=str,
    )
    return hashlib.sha256((text + special).encode()).hexdigest()


@cache
def _hash_code() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
