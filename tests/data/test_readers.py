"""Files of every kind give their rows with places; broken ones are named with the line."""

import gzip
import json
from pathlib import Path

import pytest

from dylora_moe.data.readers import SUFFIXES, list_files, read_rows, stem_of
from dylora_moe.errors import DataError

ROWS = [{"prompt": "a\u2028b", "completion": "1"}, {"prompt": "c", "completion": "2"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"
SHARED = Path(__file__).parents[3] / "shared" / "data"


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("name", "data", "place"),
    [
        ("rows.json", json.dumps(ROWS), "{file}, row {n}"),
        ("rows.JSON", "\ufeff" + json.dumps(ROWS), "{file}, row {n}"),
        ("rows.json", json.dumps({"version": 1, "data": ROWS}), "{file}, key 'data', row {n}"),
        ("rows.jsonl", LINES, "{file}, line {n}"),
        ("rows.ndjson", LINES.replace("\n", "\r\n"), "{file}, line {n}"),
        ("rows.json.gz", gzip.compress(json.dumps(ROWS).encode()), "{file}, row {n}"),
        ("rows.jsonl.gz", gzip.compress(LINES.encode()), "{file}, line {n}"),
    ],
    ids=["list", "byte order mark", "list under a key", "lines", "lines of Windows", "list, gz", "lines, gz"],
)
def test_rows_and_their_places(tmp_path, name, data, place):
    file = write(tmp_path / name, data)
    assert list(read_rows(file)) == [(place.format(file=file, n=n), row) for n, row in enumerate(ROWS, 1)]
    assert stem_of(file) == "rows"


def test_a_link_is_named_as_itself(tmp_path):
    """As in a hub's cache, where `test.jsonl` links to a file named by its hash."""
    blob = write(tmp_path / "0abcdef", LINES)
    link = tmp_path / "test.jsonl"
    link.symlink_to(blob)
    assert stem_of(link) == "test" and len(list(read_rows(link))) == len(ROWS)


def test_parquet_rows_over_several_batches(tmp_path):
    rows = [{"prompt": str(n), "test_list": ["x"]} for n in range(2500)]
    read = list(read_rows(parquet(tmp_path / "rows.parquet", rows)))
    assert [row for _, row in read] == rows
    assert read[-1][0].endswith("row 2500")


def test_a_folder_is_its_data_files_in_order(tmp_path):
    write(tmp_path / "b.jsonl", '{"n": 2}')
    write(tmp_path / "a.json", '[{"n": 1}]')
    write(tmp_path / "README.md", "no data")
    assert [row["n"] for _, row in read_rows(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("x.json", "", "file is empty"),
        ("x.json", "[]", "at least one row"),
        ("x.json", '[\n {"a": 1},\n {"a": 2}\n}\n', r"line 4, column 1: .*Replace the last '}' by '\]'"),
        ("x.json", '[{"a": 1},\n {"a": 2}', r"line 2, column 10: .*Add '\]'"),
        ("x.json", '{"a": 1}\n{"a": 2}', r"line 2, column 1: .*rename the file to \.jsonl"),
        ("x.json", '[{"a": 1},\n {"a" 2}]', r"line 2, column 7: not valid JSON"),
        ("x.json", '{"a": 1, "b": 2}', "exactly one list; got an object with 0 lists among its keys a, b"),
        ("x.json", '{"a": [1], "b": [2]}', "with 2 lists"),
        ("x.json", '"hello"', "must be a list of objects, got str"),
        ("x.json", '[{"a": 1}, 5]', "row 2: a row must be an object"),
        ("x.jsonl", '{"a": 1}\n\n{"a": }\n', r"line 3, column 7: not valid JSON"),
        ("x.jsonl", '{"a": 1}\n[2]\n', "line 2: a row must be an object"),
        ("x.jsonl", "\n", "at least one row"),
        ("x.jsonl", b'{"a": "\xff"}', "must be UTF-8, got byte 0xff at offset 7"),
        ("x.json.gz", b"no gzip", "cannot be read"),
        ("x.json.gz", gzip.compress(b"[" * 1000, mtime=0)[:-12], "cannot be read"),
        ("x.parquet", b"no parquet", "not a readable Parquet file"),
    ],
)
def test_a_broken_file_is_named_with_the_place_and_what_to_do(tmp_path, name, data, text):
    file = write(tmp_path / name, data)
    with pytest.raises(DataError, match=text) as caught:
        list(read_rows(file))
    assert str(caught.value).startswith(str(file))


def test_unsupported_files_list_what_is_supported(tmp_path):
    with pytest.raises(DataError) as caught:
        list_files(write(tmp_path / "rows.csv", "a,b"))
    assert all(suffix in str(caught.value) for suffix in SUFFIXES)
    with pytest.raises(DataError, match="must hold files ending in"):
        list_files(tmp_path)
    with pytest.raises(DataError, match="must exist"):
        list_files(tmp_path / "none.json")


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real files in shared/data")
def test_the_real_malformed_file():
    with pytest.raises(DataError, match=r"line 620, column 1: .*Replace the last '}'"):
        list(read_rows(SHARED / "python_codes_25k" / "python-codes-25k.json"))
