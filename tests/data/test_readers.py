"""Files of every kind give their rows with places; broken ones are named with the line."""

import gzip
import json
import os
import sys
import tracemalloc
from pathlib import Path

import pytest

from dylora_moe.data.readers import SUFFIXES, json_files, lines, list_files, read_labels, read_rows, stem_of
from dylora_moe.errors import DataError

ROWS = [{"prompt": "a\u2028b", "completion": "1"}, {"prompt": "c", "completion": "2"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"
CSV = 'prompt,completion\n"a\u2028b",1\n\nc,2\n'
TEXT = "\n\none\ntwo\n \n\nthree"
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
        ("x.jsonl", b'\xef\xbb\xbf{"a": "\xff"}', "must be UTF-8, got byte 0xff at offset 10"),
        ("x.jsonl", '{"a": ' + "9" * 5000 + "}", "line 1: not valid JSON"),
        ("x.json", '{"a": [' + "9" * 5000 + "]}", "not valid JSON .* Write the number as text"),
        ("x.json", b'  \xef\xbb\xbf[{"a": 1}]', "not valid JSON"),
        ("x.json", b'\xef\xbb\xbf\xef\xbb\xbf[{"a": 1}]', "must be a list|not valid JSON"),
        ("x.json.gz", b"no gzip", "cannot be read"),
        ("x.json.gz", gzip.compress(b"[" * 1000, mtime=0)[:-12], "cannot be read"),
        ("x.parquet", b"no parquet", "not a readable Parquet file"),
        ("x.arrow", b"no arrow at all", "not a readable Arrow file"),
        ("x.arrow", b"", "not a readable Arrow file"),
        ("x.csv", "a,a\n1,2\n", "line 1: the first line must name every column once, got a, a"),
        ("x.csv", "a,\n1,2\n", "line 1: the first line must name every column once"),
        ("x.csv", "", "at least one row"),
        ("x.csv", "a,b\n", "at least one row"),
        ("x.csv", 'a,b\n1,2\n3,"4\n5,6\n', "line 3: cells must be quoted"),
        ("x.csv", "a,b\n1,2\n3\n", r"line 3: a row must have 2 cells as the header has \(a, b\), got 1"),
        ("x.csv", b"a,b\n1,2\n3,\xe8\n", "line 3: text must be UTF-8, got byte 0xe8 at offset 2"),
        ("x.txt", " \n\n", "at least one row"),
        ("x.csv.gz", b"no gzip", "cannot be read"),
        ("x.json", "[" * 100_000, "nested"),
    ],
)
def test_a_broken_file_is_named_with_the_place_and_what_to_do(tmp_path, name, data, text):
    file = write(tmp_path / name, data)
    with pytest.raises(DataError, match=text) as caught:
        list(read_rows(file))
    assert str(caught.value).startswith(str(file))


def test_unsupported_files_list_what_is_supported(tmp_path):
    with pytest.raises(DataError) as caught:
        list_files(write(tmp_path / "rows.xlsx", "a,b"))
    assert all(suffix in str(caught.value) for suffix in SUFFIXES)
    with pytest.raises(DataError, match="must hold files ending in"):
        list_files(tmp_path)
    with pytest.raises(DataError, match="must exist"):
        list_files(tmp_path / "none.json")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_text_is_told(tmp_path):
    path = write(tmp_path / os.fsdecode(b"caf\xe9.jsonl"), '{"a": 1}')
    for place in (path, tmp_path):
        with pytest.raises(DataError, match=r"caf\\udce9\.jsonl'\. Rename it"):
            list_files(place)


def arrow(path, rows, *, stream):
    import pyarrow
    import pyarrow.ipc

    table = pyarrow.Table.from_pylist(rows)
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "file"])
def test_arrow_rows(tmp_path, stream):
    rows = [{"prompt": str(n), "test_list": ["x"]} for n in range(2500)]
    read = list(read_rows(arrow(tmp_path / "rows.arrow", rows, stream=stream)))
    assert [row for _, row in read] == rows and read[-1][0].endswith("row 2500")


@pytest.mark.parametrize(
    ("name", "data", "places"),
    [
        ("rows.csv", CSV, [2, 4]),
        ("rows.csv", "\ufeff\r\n" + CSV.replace("\n", "\r\n"), [3, 5]),
        ("rows.tsv.gz", gzip.compress(CSV.replace(",", "\t").encode()), [2, 4]),
    ],
    ids=["csv", "windows", "tsv.gz"],  # gzip's bytes, which hold the time, would differ between workers
)
def test_separated_rows_and_their_places(tmp_path, name, data, places):
    file = write(tmp_path / name, data)
    assert list(read_rows(file)) == [(f"{file}, line {n}", row) for n, row in zip(places, ROWS, strict=True)]
    assert stem_of(file) == "rows"


def test_a_quoted_cell_may_hold_lines_and_separators(tmp_path):
    file = write(tmp_path / "x.csv", 'a,b\n"1,\n""2""",3\n4,5\n')
    assert list(read_rows(file)) == [
        (f"{file}, line 2", {"a": '1,\n"2"', "b": "3"}),
        (f"{file}, line 4", {"a": "4", "b": "5"}),
    ]


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz"])
def test_text_is_documents_between_blank_lines(tmp_path, name):
    file = write(tmp_path / name, gzip.compress(TEXT.encode()) if name.endswith("gz") else TEXT)
    assert list(read_rows(file)) == [(f"{file}, line 3", {"text": "one\ntwo"}), (f"{file}, line 7", {"text": "three"})]


@pytest.fixture
def pair(tmp_path):
    """Two aligned files, the second without an end of its last line."""
    return write(tmp_path / "p.en-it.en", "Hello.\nBye.\n"), write(tmp_path / "p.en-it.it", "Salve.\nCiao.")


def test_aligned_files_are_one_source_by_either_name_and_in_a_folder(pair, tmp_path):
    english, italian = pair
    expected = [
        (f"{english}, line 1", {"en": "Hello.", "it": "Salve."}),
        (f"{english}, line 2", {"en": "Bye.", "it": "Ciao."}),
    ]
    write(tmp_path / "lonely.it", "Ciao.")
    for path in (english, italian, tmp_path):
        assert list(read_rows(path)) == expected
    assert list_files(tmp_path) == [english]
    assert stem_of(english) == stem_of(italian) == "p.en-it"


def test_aligned_files_of_other_lengths_are_named(pair):
    pair[1].write_text("Salve.\n")
    with pytest.raises(DataError, match=r"p\.en-it\.en, line 2: .*p\.en-it\.it ends at line 1"):
        list(read_rows(pair[0]))
    pair[1].write_text("Salve.\nCiao.\nCiao.\n")
    with pytest.raises(DataError, match=r"p\.en-it\.it, line 3: .*p\.en-it\.en ends at line 2"):
        list(read_rows(pair[0]))


def test_an_aligned_file_needs_exactly_one_other(pair, tmp_path):
    write(tmp_path / "p.en-it.de", "Hallo.\n")
    with pytest.raises(DataError, match="aligned text must be two files"):
        list(read_rows(pair[0]))
    with pytest.raises(DataError, match="aligned text must be two files"):
        list(read_rows(write(tmp_path / "alone.it", "Ciao.")))


def test_objects_of_objects_are_rows_by_key(tmp_path):
    file = write(tmp_path / "x.json", '{"prep": {"0": {"a": 1}, "7": {"a": 2}}, "shape": {}}')
    assert list(read_rows(file)) == [
        (f"{file}, key 'prep', row '0'", {"a": 1}),
        (f"{file}, key 'prep', row '7'", {"a": 2}),
    ]


def test_bad_rows_can_be_stepped_over_and_are_handed_out(tmp_path):
    bad = []
    file = write(tmp_path / "x.jsonl", '{"n": 1}\n{"n": }\n[2]\n{"n": 4}\n')
    assert [row["n"] for _, row in read_rows(file, bad.append)] == [1, 4]
    assert [(found.where, found.row) for found in bad] == [
        (f"{file}, line 2, column 7", '{"n": }'),
        (f"{file}, line 3", [2]),
    ]
    bad.clear()
    file = write(tmp_path / "x.csv", "a,b\n1,2\n3\n4,5,6\n7,8\n")
    assert [row["a"] for _, row in read_rows(file, bad.append)] == ["1", "7"]
    assert [(found.where[-6:], found.row) for found in bad] == [("line 3", ["3"]), ("line 4", ["4", "5", "6"])]
    assert "must have 2 cells as the header has (a, b), got 1" in bad[0].reason
    bad.clear()
    write(tmp_path / "p.en", "Hello.\n\n\nBye.\n")
    write(tmp_path / "p.it", "Ciao.\nCiao.\n\nCiao.\n")
    assert len(list(read_rows(tmp_path / "p.en", bad.append))) == 2
    assert [found.row for found in bad] == [{"en": "", "it": "Ciao."}]


def test_lists_of_labels_and_records_of_datasets_are_no_rows(tmp_path):
    file = write(tmp_path / "train.jsonl", '{"n": 1}')
    assert read_labels(file) is None
    write(tmp_path / "labels.json", '["World", "Sports"]')
    write(tmp_path / "state.json", '{"a": 1}')
    write(tmp_path / "notes.txt", "about it")
    assert list_files(tmp_path) == [file] and read_labels(file) == ("World", "Sports")
    for text in ('["a", "a"]', '["a", 1]', '[""]', '{"a": 1}'):
        write(tmp_path / "labels.json", text)
        with pytest.raises(DataError, match=r"labels\.json"):
            read_labels(file)


def test_text_files_alone_are_rows(tmp_path):
    write(tmp_path / "b.txt", "two")
    write(tmp_path / "a.txt", "one")
    assert [row["text"] for _, row in read_rows(tmp_path)] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "module", "limit", "text"),
    [
        ("x.json", json_files, "MAX_JSON_BYTES", "must be at most 0 MiB.*a list of the rows"),
        ("x.json.gz", json_files, "MAX_JSON_BYTES", "must be at most 0 MiB.*a list of the rows"),
        ("x.jsonl", lines, "MAX_LINE_BYTES", "line 2: a line must be at most"),
    ],
)
def test_what_would_not_fit_into_memory_is_refused(tmp_path, monkeypatch, name, module, limit, text):
    monkeypatch.setattr(module, limit, 20)
    data = b'{"a": 1}\n' + json.dumps({"a": "x" * 30}).encode()
    file = write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(DataError, match=text):
        list(read_rows(file))


@pytest.mark.parametrize("name", ["x.json", "x.json.gz", "x.jsonl", "x.jsonl.gz", "x.csv", "x.parquet", "x.arrow"])
def test_a_large_file_takes_little_memory(tmp_path, name):
    """40 MB of rows are read in a tenth of that; 200 rows a batch of Arrow is what `datasets` writes at least."""
    rows = [{"prompt": f"{n} " + "x" * 10_000, "completion": "y"} for n in range(4000)]
    file = tmp_path / name
    if name == "x.parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=200)
    elif name == "x.arrow":
        arrow(file, rows, stream=True)
    elif name == "x.csv":
        write(file, "prompt,completion\n" + "\n".join(f"{row['prompt']},y" for row in rows))
    else:
        data = (json.dumps(rows) if ".json" in file.suffixes else "\n".join(map(json.dumps, rows))).encode()
        write(file, gzip.compress(data, 1) if name.endswith(".gz") else data)
    del rows
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(file)) == 4000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12_000_000


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real files in shared/data")
def test_the_real_malformed_file():
    with pytest.raises(DataError, match=r"line 620, column 1: .*Replace the last '}'"):
        list(read_rows(SHARED / "python_codes_25k" / "python-codes-25k.json"))


def test_a_cell_may_be_long(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion\nq," + '"' + "long, " * 50_000 + '"\n')
    ((_, row),) = read_rows(file)
    assert len(row["completion"]) == 300_000
