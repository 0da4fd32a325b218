"""Data sets by name: where each comes from, its licence, its format and what of it is kept.

Own entries are added by `extend_registry` (from a mapping) or `load_registry` (from a YAML file).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dylora_moe.data.formats import FORMATS, nearest
from dylora_moe.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class IdSplit:
    """An official split given by the range of a row's id, both ends included."""

    split: str
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """One entry of the registry.

    Attributes:
        name: What a recipe calls it.
        kind: `synthetic` is made by this package, `hub` is downloaded, `file` has to be given.
        licence: SPDX identifier as its card states it, or None where it states none.
        domain: The skill that its examples belong to; default: the name.
        format: A name in `formats.FORMATS`; None for synthetic data, or to find it by the columns.
        num_rows: About how many rows it has, all splits together, before `keep`; None where unknown.
        hub_id: `owner/name` on the Hugging Face hub.
        hub_config: The configuration of the hub data set.
        data_files: The files of the hub data set to read where it holds others, too.
        revision: The commit on the hub, so that the same name gives the same rows next year; None is the newest.
        path: A file or folder on this machine.
        homepage: Where a `file` entry can be had.
        columns: Field of the format -> column of the data set, where they differ.
        keep: Column -> regular expression: only rows in which one of them is found are used. Empty keeps all.
        id_column: The column that `id_splits` look at.
        id_splits: The official splits where they are given by ids.
    """

    name: str
    kind: Literal["synthetic", "hub", "file"]
    licence: str | None
    domain: str | None = None
    format: str | None = None
    num_rows: int | None = None
    hub_id: str | None = None
    hub_config: str | None = None
    data_files: str | None = None
    revision: str | None = None
    path: str | None = None
    homepage: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    keep: Mapping[str, str] = field(default_factory=dict)
    id_column: str = "task_id"
    id_splits: tuple[IdSplit, ...] = ()


_SOURCES = (
    DataSource(
        name="code_alpaca",
        kind="hub",
        hub_id="sahil2801/CodeAlpaca-20k",
        revision="469fd122c8e99d31d9fcd75b2fd01f6bd7eb6846",
        # The hub card says CC-BY-4.0; the authors' repository says NC, the stricter of the two.
        licence="CC-BY-NC-4.0",
        format="alpaca",
        num_rows=20_022,
        # Python only: the task names it, or the answer has a line that only Python has. No column tells the language.
        keep={
            "instruction": r"(?i)\bpython",
            "output": r"(?m)^ *(def \w+\(.*\).*|class \w+.*|for \w+ in .*|while .*|if .*):[ \t]*(#.*)?$"
            r"|^from [\w.]+ import ",
        },
    ),
    DataSource(
        name="mbpp",
        kind="hub",
        hub_id="google-research-datasets/mbpp",
        hub_config="full",
        revision="4bb6404fdc6cacfda99d4ac4205087b89d32030c",
        licence="CC-BY-4.0",
        format="mbpp",
        num_rows=974,
        # Source: https://github.com/google-research/google-research/tree/master/mbpp
        id_splits=(
            IdSplit(split="prompt", first=1, last=10),
            IdSplit(split="test", first=11, last=510),
            IdSplit(split="validation", first=511, last=600),
            IdSplit(split="train", first=601, last=974),
        ),
    ),
    DataSource(
        name="evol_instruct",
        kind="hub",
        hub_id="nickrosh/Evol-Instruct-Code-80k-v1",
        revision="3ae930c20d5496e2c8386872d5628c45f6957db4",
        licence="CC-BY-NC-SA-4.0",
        format="evol",
        num_rows=78_300,
    ),
    DataSource(
        name="code_feedback",
        kind="hub",
        hub_id="m-a-p/CodeFeedback-Filtered-Instruction",
        revision="2a7579504178e9c868438e8d0becb3e33f022f5a",
        licence="Apache-2.0",
        format="prompt_completion",
        columns={"prompt": "query", "completion": "answer"},
        num_rows=157_000,
    ),
    DataSource(
        name="python_codes_25k",
        kind="hub",
        hub_id="flytech/python-codes-25k",
        # The repository holds the same rows a second time as a .json file, which does not parse.
        data_files="python-codes-25k.jsonl",
        revision="30f31bf4edcbbb6cd086936b8d30d0d37f3ee329",
        licence=None,
        format="alpaca",
        num_rows=25_000,
    ),
    DataSource(
        name="python_code_instructions_18k",
        kind="hub",
        hub_id="iamtarun/python_code_instructions_18k_alpaca",
        revision="7cae181e29701a8663a07a3ea43c8e105b663ba1",
        licence=None,
        format="alpaca",
        num_rows=18_600,
    ),
    DataSource(
        name="python_code_23k_sharegpt",
        kind="hub",
        hub_id="ajibawa-2023/Python-Code-23k-ShareGPT",
        revision="5cab95fa12cd729af6dc8df7c70efa24b6a5c231",
        licence="CC-BY-NC-ND-4.0",
        format="sharegpt",
        num_rows=23_000,
    ),
    DataSource(name="requests", kind="synthetic", licence="CC0-1.0"),
    DataSource(name="stripe", kind="synthetic", licence="CC0-1.0"),
    DataSource(name="flask", kind="synthetic", licence="CC0-1.0"),
    DataSource(
        name="cima",
        kind="file",
        homepage="https://github.com/kstats/CIMA (dataset.json)",
        licence="CC-BY-2.5",
        format="cima",
        num_rows=1_135,
    ),
    DataSource(
        name="tatoeba_ita",
        kind="hub",
        hub_id="sentence-transformers/parallel-sentences-tatoeba",
        hub_config="en-it",
        revision="fd47e2ddf9a0c56e6940ec98643df8811676d7ba",
        # The card states none; Tatoeba's own terms, for the text, are CC BY 2.0 FR.
        licence="CC-BY-2.0",
        format="translation",
        columns={"italian": "non_english"},
    ),
    DataSource(
        name="gsm8k",
        kind="hub",
        hub_id="openai/gsm8k",
        hub_config="main",
        revision="740312add88f781978c0658806c59bc2815b9866",
        licence="MIT",
        format="gsm8k",
        num_rows=8_792,
    ),
)
REGISTRY: Mapping[str, DataSource] = {source.name: source for source in _SOURCES}

_TEXTS = ("licence", "domain", "format", "hub_id", "hub_config", "data_files", "revision", "path", "homepage")
_MAPS = ("columns", "keep")
_KEYS = (*_TEXTS, *_MAPS, "num_rows")


def registry_of(own: str | Path | Mapping[str, object] | None) -> Mapping[str, DataSource]:
    """The registry with a run's own entries: those of a YAML file, or the entries themselves.

    Raises:
        DataError: As `load_registry` and `extend_registry`.
    """
    if own is None:
        return REGISTRY
    return extend_registry(own, where="data_registry") if isinstance(own, Mapping) else load_registry(Path(own))


def load_registry(path: Path) -> Mapping[str, DataSource]:
    """The registry with the entries of a YAML file added; a `path` in it is relative to that file.

    Raises:
        DataError: The file cannot be read, or an entry is wrong; with the file and the entry's name.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"The registry file {path} must be readable YAML in UTF-8: {error}.") from error
    return extend_registry(entries, where=str(path), folder=path.parent)


def extend_registry(
    entries: object, *, where: str = "data sources", folder: Path | None = None
) -> Mapping[str, DataSource]:
    """The registry with own entries added.

    Args:
        entries: Name -> the entry's fields as in `DataSource`, such as
            `{tickets: {path: tickets.csv, columns: {prompt: question, answer: reply}, licence: MIT}}`.
        where: What stands at the front of errors.
        folder: What a relative `path` starts from; default: the working directory.

    Raises:
        DataError: A name is taken, a field unknown or of the wrong type, or there is neither hub_id nor path.
    """
    if not isinstance(entries, Mapping):
        raise DataError(
            f"{where}: must hold entries such as `tickets: {{path: tickets.csv}}`, got {type(entries).__name__}."
        )
    return {**REGISTRY, **{name: _entry(name, values, where, folder) for name, values in entries.items()}}


def _entry(name: object, values: object, where: str, folder: Path | None) -> DataSource:
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise DataError(f"{where}: a name must be letters, digits, '_', '-' and '.', got {name!r}.")
    where = f"{where}, {name}"
    if name in REGISTRY:
        raise DataError(f"{where}: an own entry must have a new name, got one of the registry. Rename it.")
    if not isinstance(values, Mapping):
        raise DataError(f"{where}: an entry must be fields such as path and format, got {type(values).__name__}.")
    for key, value in values.items():
        _check_value(key, value, where)
    if ("hub_id" in values) == ("path" in values):
        raise DataError(f"{where}: an entry must have either a hub_id or a path, got {', '.join(map(str, values))}.")
    known: dict[str, Any] = {"licence": None, **values}
    if "path" in known:
        known["path"] = str((folder or Path()) / Path(known["path"]).expanduser())
    return DataSource(name=name, kind="file" if "path" in known else "hub", **known)


def _check_value(key: object, value: object, where: str) -> None:
    if key not in _KEYS:
        raise DataError(f"{where}: a field must be one of {', '.join(_KEYS)}, got {key!r}.{nearest(str(key), _KEYS)}")
    if key in _TEXTS and not (isinstance(value, str) and value.strip()):
        raise DataError(f"{where}: {key} must be text, got {value!r}.")
    if key == "num_rows" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise DataError(f"{where}: num_rows must be a whole number of at least 1, got {value!r}.")
    if key == "format" and value not in FORMATS:
        raise DataError(
            f"{where}: format must be one of {', '.join(FORMATS)}, got {value!r}.{nearest(str(value), FORMATS)}"
        )
    if key in _MAPS:
        check_map(value, where=f"{where}: {key}")
        if key == "keep":
            _check_patterns(value, where)


def check_map(value: object, *, where: str) -> None:
    """Stop unless a value is a mapping from text to text.

    Raises:
        DataError: It is not.
    """
    if not isinstance(value, Mapping) or not all(
        isinstance(text, str) and text.strip() for pair in value.items() for text in pair
    ):
        raise DataError(f"{where} must map names to names, such as {{prompt: question}}, got {value!r}.")


def _check_patterns(patterns: Any, where: str) -> None:
    for column, pattern in patterns.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise DataError(
                f"{where}: keep must hold regular expressions, got {pattern!r} for {column} ({error})."
            ) from error
