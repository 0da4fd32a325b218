"""Rows of files, folders and the hub become examples by split; bad rows and wrong columns are named."""

import datasets
import huggingface_hub
import pytest
from tests.data.source_files import lines, load, pairs

from dylora_moe.data.sources import (
    REGISTRY,
    DataSource,
    FoundFormat,
    SourceReader,
    parse_dataset_spec,
)
from dylora_moe.errors import DataError


def test_a_folder_keeps_its_splits_apart(tmp_path):
    lines(tmp_path / "train-00000-of-00001.jsonl", pairs([0, 1]))
    lines(tmp_path / "extra.jsonl", pairs([2]))
    lines(tmp_path / "dev.jsonl", pairs([3]))
    lines(tmp_path / "test.jsonl", pairs([4, 5]))
    source = load(str(tmp_path))
    assert sorted(example.answer[-1] for example in source.examples) == ["0", "1", "2"]
    assert [example.answer[-1] for example in source.validation] == ["3"]
    assert [example.answer[-1] for example in source.test] == ["4", "5"]


def test_a_file_given_by_itself_is_trained_on_whatever_its_name(tmp_path):
    source = load(str(lines(tmp_path / "test.jsonl", pairs([0, 1]))))
    assert len(source.examples) == 2 and source.test is None


def test_bad_rows_stop_with_their_places_or_are_skipped_and_counted(tmp_path):
    rows = pairs(range(10))
    rows[3]["completion"] = ""
    del rows[7]["completion"]
    file = str(lines(tmp_path / "sql.jsonl", rows))
    with pytest.raises(DataError, match="2 of 10 do not") as caught:
        load(file)
    assert "line 4: field 'completion'" in str(caught.value)
    assert "line 8: field 'completion' (the answer) is missing" in str(caught.value)
    source = load({"path": file, "on_bad_row": "skip"})
    assert (len(source.examples), source.num_bad_rows) == (8, 2)


def test_many_bad_rows_are_shown_in_part(tmp_path):
    file = lines(tmp_path / "sql.jsonl", [{**row, "completion": ""} for row in pairs(range(9))])
    for entry in (str(file), {"path": str(file), "on_bad_row": "skip"}):
        with pytest.raises(DataError, match=r"9 of 9 do not(?s:.*)and 4 more"):
            load(entry)


def test_a_file_of_unknown_columns_is_named(tmp_path):
    with pytest.raises(DataError, match=r"sql\.jsonl, line 1: The columns"):
        load(str(lines(tmp_path / "sql.jsonl", [{"from": "human"}])))


def test_a_hub_data_set_is_read_by_its_splits(tmp_path, monkeypatch):
    # The library reads a folder by the same call as a hub id.
    hub = tmp_path / "hub"
    hub.mkdir()
    lines(hub / "train.jsonl", pairs([0, 1]))
    lines(hub / "validation.jsonl", pairs([2]))
    lines(hub / "test.jsonl", pairs([3, 4, 5]))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    entry = DataSource(name="ours", kind="hub", licence="MIT", format="prompt_completion", hub_id=str(hub))
    monkeypatch.setitem(REGISTRY, "ours", entry)
    source = load("ours")
    assert [len(part) for part in (source.examples, source.validation, source.test)] == [2, 1, 3]
    assert (source.domain, source.licence, source.examples[0].source) == ("ours", "MIT", "ours")


def test_an_unreachable_hub_says_to_give_a_local_file(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load("mbpp")
    assert "google-research-datasets/mbpp" in str(caught.value)
    assert "{name: mbpp, path: mbpp.jsonl}" in str(caught.value)


def test_bad_rows_are_handed_out_as_they_were_read(tmp_path):
    rows = [*pairs(range(3)), {"prompt": "question 3", "completion": " ", "id": 7}]
    file = lines(tmp_path / "sql.jsonl", rows)
    file.write_text(file.read_text() + "\nno json")
    empty, broken = load({"path": str(file), "on_bad_row": "skip"}).bad_rows
    assert (empty.where, empty.row) == (f"{file}, line 4", rows[3])
    assert empty.reason.startswith("field 'completion' (the answer) must hold text")
    assert (broken.where, broken.row) == (f"{file}, line 5, column 1", "no json")
    with pytest.raises(DataError, match=r"2 of 5 do not(?s:.*)line 4: field(?s:.*)line 5, column 1: not valid JSON"):
        load(str(file))


def test_what_was_detected_is_kept(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "input": "c"}, *pairs(range(2))]
    file = str(lines(tmp_path / "mixed.jsonl", rows))
    assert load(file).formats == (
        FoundFormat(format="evol", given=False, columns=("instruction", "output"), num_rows=1),
        FoundFormat(format="alpaca", given=False, columns=("instruction", "output", "input"), num_rows=1),
        FoundFormat(format="prompt_completion", given=False, columns=("prompt", "completion"), num_rows=2),
    )
    [found] = load({"path": file, "format": "evol", "on_bad_row": "skip"}).formats
    assert (found.format, found.given, found.num_rows) == ("evol", True, 2)


def test_columns_are_mapped(tmp_path):
    rows = [{"question": f"q {n}", "reply": f"r {n}", "prompt": "unused"} for n in range(3)]
    source = load(
        {"path": str(lines(tmp_path / "r.jsonl", rows)), "columns": {"prompt": "question", "answer": "reply"}}
    )
    assert [(example.prompt[0].content, example.answer) for example in source.examples] == [
        (f"q {n}", f"r {n}") for n in range(3)
    ]
    assert source.formats[0].columns == ("prompt", "answer")


def test_a_map_of_columns_that_are_not_there_stops(tmp_path):
    rows = [*pairs(range(2)), {"prompt": "a"}]
    file = str(lines(tmp_path / "r.jsonl", rows))
    with pytest.raises(DataError) as caught:
        load({"path": file, "columns": {"completion": "reply"}, "on_bad_row": "skip"})
    expected = f"{file}, line 1: columns must name columns of the file, got 'reply'; the row has prompt, completion."
    assert str(caught.value).startswith(expected)
    source = load({"path": file, "columns": {"answer": "completion"}, "on_bad_row": "skip"})
    assert len(source.examples) == 2 and source.bad_rows[0].where.endswith("line 3")


def test_swapped_columns_stop_and_the_map_it_gives_mends_them(tmp_path):
    english = ["Who told you that Tom did that?", "Tom didn't return my phone calls."]
    italian = ["Chi le ha detto che Tom l'ha fatto?", "Tom non rispose alle mie telefonate."]
    rows = [{"italian": a, "english": b} for a, b in zip(english, italian, strict=True)]
    file = str(lines(tmp_path / "pairs.jsonl", rows))
    with pytest.raises(DataError, match=r"columns: \{italian: english, english: italian\}"):
        load(file)
    source = load({"path": file, "columns": {"italian": "english", "english": "italian"}})
    assert [example.answer for example in source.examples] == italian
    # In a folder every file is looked at, and not the first rows alone.
    lines(tmp_path / "many.jsonl", pairs(range(300)))
    with pytest.raises(DataError, match=r"pairs\.jsonl: columns 'italian' and 'english'"):
        load(str(tmp_path))


def test_labels_beside_the_file_are_used(tmp_path):
    (tmp_path / "labels.json").write_text('["no", "yes"]')
    lines(tmp_path / "train.jsonl", [{"sentence": "a", "label": 1}, {"sentence": "b", "label": "no"}])
    lines(tmp_path / "test.jsonl", [{"sentence": "c", "label": "yes"}])
    source = load(str(tmp_path))
    assert [example.answer for example in source.examples] == ["yes", "no"]
    assert "Labels: no, yes" in source.test[0].prompt[0].content
    lines(tmp_path / "train.jsonl", [{"sentence": "a", "label": 1}, {"sentence": "b", "label": "maybe"}])
    [bad] = load({"path": str(tmp_path), "on_bad_row": "skip"}).bad_rows
    assert bad.row == {"sentence": "b", "label": "maybe"}


CODE = [
    {"instruction": "Write a Python program", "input": "", "output": "print(1)"},
    {"instruction": "Add two numbers", "input": "", "output": "def add(a, b):\n    return a + b"},
    {"instruction": "Add two numbers", "input": "", "output": "function add(a, b) { return a + b }"},
    {"instruction": "Write a Ruby method", "input": "", "output": "def add(a, b)\n  a + b\nend"},
]


def test_code_alpaca_is_its_python_rows(tmp_path):
    file = str(lines(tmp_path / "rows.jsonl", CODE))
    source = load({"name": "code_alpaca", "path": file})
    assert [example.answer for example in source.examples] == [row["output"] for row in CODE[:2]]
    assert source.num_filtered == 2
    assert len(load({"name": "code_alpaca", "path": file, "keep_all": True}).examples) == 4
    assert len(load(file).examples) == 4
    with pytest.raises(DataError, match="left out 2 rows; keep_all: true uses them"):
        load({"name": "code_alpaca", "path": str(lines(tmp_path / "rows.jsonl", CODE[2:]))})


def test_a_local_copy_may_have_the_names_of_the_hub_or_of_the_format(tmp_path):
    for row in ({"query": "a", "answer": "b", "lang": "python"}, {"prompt": "a", "completion": "b"}):
        file = str(lines(tmp_path / "rows.jsonl", [row]))
        [example] = load({"name": "code_feedback", "path": file}).examples
        assert (example.prompt[0].content, example.answer) == ("a", "b")


def test_a_reader_gives_one_example_at_a_time(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n')
    reader = SourceReader(parse_dataset_spec(str(file)), seed=0)
    items = iter(reader)
    first = next(items)
    assert (first.split, first.where, first.example.answer) == ("train", f"{file}, line 1", "b")
    with pytest.raises(DataError, match="line 2: field 'completion'"):
        next(items)
    assert [len(list(SourceReader(parse_dataset_spec("flask"), seed=0))) for _ in range(2)] == [300, 300]
