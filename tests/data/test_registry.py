"""Every named data set is complete and documented; own entries are added and checked."""

import re
from pathlib import Path

import pytest
import yaml

from dylora_moe.data.formats import FORMATS
from dylora_moe.data.registry import REGISTRY, DataSource, extend_registry, load_registry
from dylora_moe.data.synthetic import SKILLS
from dylora_moe.errors import DataError

DOCS = Path(__file__).parents[2] / "docs" / "datasets.md"
NAMES = """code_alpaca mbpp evol_instruct code_feedback python_codes_25k python_code_instructions_18k
python_code_23k_sharegpt requests stripe flask cima tatoeba_ita gsm8k"""


def documented(source):
    """The row of the table in docs/datasets.md."""
    config = f" ({source.hub_config})" if source.hub_config else ""
    files = f", {source.data_files}" if source.data_files else ""
    origin = {"synthetic": "made here", "hub": f"{source.hub_id}{config}{files}", "file": source.homepage}[source.kind]
    rows = f"{source.num_rows:,}" if source.num_rows else "any" if source.kind == "synthetic" else "unknown"
    cells = (
        source.name,
        origin,
        source.revision or "-",
        source.licence or "none stated",
        source.format or "-",
        rows,
        source.domain or source.name,
    )
    return f"| {' | '.join(cells)} |"


def test_the_table_in_the_documents_is_the_registry():
    text = DOCS.read_text()
    table = text.split("## The registry")[1].split("\n\n")[1].splitlines()
    assert table[2:] == [documented(source) for source in REGISTRY.values()]


def test_the_formats_in_the_documents_are_those_there_are():
    text = DOCS.read_text()
    table = text.split("## Formats")[1].split("\n\n")[2].splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in table[2:]] == list(FORMATS)


def test_all_names_are_there_and_each_can_be_had():
    assert list(REGISTRY) == NAMES.split()
    for name, source in REGISTRY.items():
        assert source.name == name
        assert (source.kind == "synthetic") == (name in SKILLS)
        assert (source.kind == "hub") == (source.hub_id is not None)
        assert (source.kind == "file") == (source.homepage is not None)
        assert source.kind == "synthetic" or source.format in FORMATS
        assert source.revision is None or re.fullmatch("[0-9a-f]{40}", source.revision)


def test_an_own_entry_is_added(tmp_path):
    fields = {
        "path": "tickets.csv",
        "columns": {"prompt": "question"},
        "keep": {"question": "(?i)refund"},
        "licence": "MIT",
        "num_rows": 3,
    }
    entries = {"theirs": {"hub_id": "a/b", "format": "alpaca"}, "tickets": fields}
    file = tmp_path / "sources.yaml"
    file.write_text(yaml.safe_dump(entries))
    registry = load_registry(file)
    assert list(registry) == [*REGISTRY, "theirs", "tickets"] and len(REGISTRY) == 13
    expected = DataSource(name="tickets", kind="file", **{**fields, "path": str(tmp_path / "tickets.csv")})
    assert registry["tickets"] == expected
    assert registry["theirs"] == DataSource(name="theirs", kind="hub", hub_id="a/b", format="alpaca", licence=None)
    assert extend_registry({"x": {"path": "/x.csv"}})["x"].path == "/x.csv"


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([], "must hold entries"),
        ({"a b": {"path": "x"}}, "a name must be letters"),
        ({"mbpp": {"path": "x"}}, "mbpp: an own entry must have a new name"),
        ({"x": "rows.csv"}, "x: an entry must be fields"),
        ({"x": {}}, "either a hub_id or a path"),
        ({"x": {"hub_id": "a/b", "path": "x"}}, "either a hub_id or a path"),
        ({"x": {"pth": "x"}}, "Did you mean 'path'?"),
        ({"x": {"path": ""}}, "path must be text"),
        ({"x": {"path": "x", "num_rows": 0}}, "num_rows must be"),
        ({"x": {"path": "x", "format": "alpca"}}, "Did you mean 'alpaca'?"),
        ({"x": {"path": "x", "columns": ["a"]}}, "columns must map names"),
        ({"x": {"path": "x", "keep": {"a": "("}}}, "regular expressions, got '(' for a"),
    ],
)
def test_a_wrong_entry_is_named(entries, text):
    with pytest.raises(DataError, match=re.escape(text)):
        extend_registry(entries)


@pytest.mark.parametrize("data", [None, b"a: [", b"\xff"])
def test_a_registry_file_that_cannot_be_read_is_named(tmp_path, data):
    file = tmp_path / "sources.yaml"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(DataError, match=re.escape(str(file))):
        load_registry(file)
