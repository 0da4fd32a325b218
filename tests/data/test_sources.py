"""Entries of a recipe become specs, and specs examples; what cannot work is named."""

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from dylora_moe.data.sources import (
    REGISTRY,
    DatasetSpec,
    DataSource,
    FoundFormat,
    SourceReader,
    check_path,
    draw_rows,
    extend_registry,
    parse_dataset_spec,
    read_source,
)
from dylora_moe.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the real files in shared/data")


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def pairs(numbers):
    return [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in numbers]


def mbpp_rows(ids):
    return [{"text": f"task {n}", "code": f"x = {n}", "task_id": n, "test_list": ["assert x"]} for n in ids]


def load(value, seed=0, registry=REGISTRY):
    """What reading a data set gives, with the examples of each split."""
    spec = parse_dataset_spec(value, registry)
    splits = {"train": [], "validation": [], "test": [], "unused": []}
    bad_rows = []
    record = read_source(
        spec,
        seed=seed,
        registry=registry,
        add=lambda item: splits[item.split].append(item.example),
        on_bad=lambda domain, bad: bad_rows.append(bad),
    )
    chosen = splits["train"]
    if not record.is_synthetic:
        chosen = [chosen[place] for place in draw_rows(spec, len(chosen), seed=seed)]
    assert len(bad_rows) == record.num_bad_rows
    return SimpleNamespace(
        **{field.name: getattr(record, field.name) for field in fields(record)},
        examples=tuple(chosen),
        validation=tuple(splits["validation"]) or None,
        test=tuple(splits["test"]) or None,
        num_unused=len(splits["unused"]),
        bad_rows=tuple(bad_rows),
    )


@pytest.mark.parametrize(
    ("value", "spec"),
    [
        ("mbpp", DatasetSpec(name="mbpp")),
        ("rows.jsonl", DatasetSpec(path="rows.jsonl")),
        ("./mbpp", DatasetSpec(path="./mbpp")),
        ({"name": "mbpp", "path": "m.jsonl"}, DatasetSpec(name="mbpp", path="m.jsonl")),
        (
            {"path": "r", "domain": "d", "format": "alpaca", "num_examples": 3, "licence": "MIT"},
            DatasetSpec(path="r", domain="d", format="alpaca", num_examples=3, licence="MIT"),
        ),
        ({"name": "flask", "on_bad_row": "skip"}, DatasetSpec(name="flask", on_bad_row="skip")),
    ],
)
def test_entries_are_parsed(value, spec):
    assert parse_dataset_spec(value) == spec
    assert parse_dataset_spec(spec) == spec


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("", "name, a path or a mapping"),
        (5, "name, a path or a mapping"),
        ({"nam": "mbpp"}, "got 'nam'. Did you mean name?"),
        ({"path": "r", "num_example": 3}, "Did you mean num_examples?"),
        ({"domain": "d"}, "must have a name or a path"),
        ({"name": "mpbb"}, "Did you mean 'mbpp'?"),
        ({"name": "mine", "path": "r"}, "its label as domain"),
        ({"name": 5}, "must be text"),
        ({"path": "r", "format": "alpca"}, "Did you mean 'alpaca'?"),
        ({"path": "r", "num_examples": 0}, "at least 1"),
        ({"path": "r", "num_examples": True}, "at least 1"),
        ({"path": "r", "num_examples": "3"}, "at least 1"),
        ({"path": "r", "on_bad_row": "ignore"}, "stop or skip"),
        ({"path": "r", "keep_all": "yes"}, "true or false"),
        ({"path": "r", "columns": ["prompt"]}, "must map names to names"),
        ({"path": "r", "columns": {"prompt": 3}}, "must map names to names"),
        (DatasetSpec(name="mpbb"), "Did you mean 'mbpp'?"),
    ],
)
def test_wrong_entries_are_named(value, text):
    with pytest.raises(DataError) as caught:
        parse_dataset_spec(value)
    assert text in str(caught.value)


def test_an_unknown_name_gives_the_nearest_and_the_list():
    with pytest.raises(DataError) as caught:
        load("code_alpca")
    assert "Did you mean 'code_alpaca'?" in str(caught.value)
    assert all(name in str(caught.value) for name in REGISTRY)


def test_synthetic_examples_take_number_domain_and_seed():
    source = load({"name": "flask", "num_examples": 20, "domain": "web"})
    assert len(source.examples) == 20
    assert {example.domain for example in source.examples} == {source.domain} == {"web"}
    assert source.examples == load({"name": "flask", "num_examples": 20, "domain": "web"}).examples
    assert source.examples != load({"name": "flask", "num_examples": 20, "domain": "web"}, seed=1).examples
    assert len(load("flask").examples) == 300


def test_a_local_file_has_its_stem_for_domain_and_itself_for_source(tmp_path):
    file = lines(tmp_path / "sql.jsonl", pairs(range(3)))
    source = load(str(file))
    assert (source.domain, source.licence, source.where) == ("sql", None, str(file))
    assert [example.answer for example in source.examples] == ["answer 0", "answer 1", "answer 2"]
    assert source.examples[0].source == str(file)
    assert source.validation is None and source.test is None


def test_num_examples_draws_from_a_file_by_seed(tmp_path):
    file = str(lines(tmp_path / "sql.jsonl", pairs(range(100))))
    drawn = load({"path": file, "num_examples": 30}).examples
    assert len(set(drawn)) == 30
    assert drawn == load({"path": file, "num_examples": 30}).examples
    assert drawn != load({"path": file, "num_examples": 30}, seed=1).examples
    with pytest.raises(DataError, match="at most the 100 training rows"):
        load({"path": file, "num_examples": 101})


def test_a_local_copy_takes_the_defaults_of_its_name(tmp_path):
    file = str(lines(tmp_path / "copy.jsonl", mbpp_rows([601, 602])))
    source = load({"name": "mbpp", "path": file})
    assert (source.domain, source.licence, source.where) == ("mbpp", REGISTRY["mbpp"].licence, file)
    assert {example.source for example in source.examples} == {"mbpp"}


@pytest.mark.parametrize("named", [True, False])
def test_mbpp_keeps_the_official_split(tmp_path, named):
    file = str(lines(tmp_path / "m.jsonl", mbpp_rows([1, 10, 11, 510, 511, 600, 601, 974])))
    source = load({"name": "mbpp", "path": file} if named else file)
    assert [example.answer for example in source.examples] == ["x = 601", "x = 974"]
    assert [example.answer for example in source.validation] == ["x = 511", "x = 600"]
    assert [example.answer for example in source.test] == ["x = 11", "x = 510"]
    assert source.num_unused == 2


def test_a_file_of_test_rows_alone_is_not_trained_on(tmp_path):
    with pytest.raises(DataError, match="at least one training row"):
        load(str(lines(tmp_path / "m.jsonl", mbpp_rows([11, 12]))))


def test_own_rows_with_a_task_id_are_all_trained_on(tmp_path):
    rows = [{"prompt": f"own {n}", "code": "x = 1", "task_id": n} for n in range(1, 601)]
    loaded = load(str(lines(tmp_path / "own.jsonl", rows)))
    assert len(loaded.examples) == 600 and loaded.validation is None and loaded.test is None


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


def test_own_entries_are_read_by_name(tmp_path):
    rows = [{"q": "refund?", "r": "yes"}, {"q": "hello?", "r": "no"}]
    entry = {
        "path": "t.jsonl",
        "columns": {"prompt": "q", "answer": "r"},
        "keep": {"q": "refund"},
        "domain": "help",
        "licence": "MIT",
    }
    lines(tmp_path / "t.jsonl", rows)
    registry = extend_registry({"tickets": entry}, folder=tmp_path)
    spec = parse_dataset_spec("tickets", registry)
    check_path(spec, registry)
    source = load(spec, registry=registry)
    assert [example.answer for example in source.examples] == ["yes"]
    assert (source.domain, source.licence, source.num_filtered) == ("help", "MIT", 1)
    assert source.examples[0].source == "tickets"
    (tmp_path / "t.jsonl").unlink()
    with pytest.raises(DataError, match=r"existing file or folder, got .*t\.jsonl"):
        check_path(spec, registry)


def test_a_data_set_that_no_hub_has_says_what_to_give():
    for call in (check_path, load):
        with pytest.raises(DataError, match=r"github.com/kstats/CIMA \(dataset.json\).*\{name: cima, path: the file\}"):
            call(parse_dataset_spec("cima"))


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


@needs_shared
def test_the_real_files_of_every_folder():
    """Examples counted by hand (see each folder's flaws in shared/data/README.md)."""
    expected = {
        "cima": (3315, None),
        "dolly": (151, None),
        "evol_instruct": (1966, None),
        "python_codes_25k/python-codes-25k.fixed.json": (103, None),
        "sharegpt": (500, None),
        "formats/glaive_toolcall_en_demo.json": (300, None),
        "formats/v1_sft_demo.jsonl": (500, None),
        "formats/identity.json": (91, None),
        "tatoeba/tatoeba.ita-eng.ita": (1000, None),
        "wikisql": (1000, 100),
        "continual/agnews": (2000, 500),
    }
    for name, (num_train, num_test) in expected.items():
        source = load(str(SHARED / name))
        assert (len(source.examples), source.test and len(source.test)) == (num_train, num_test), name
    with pytest.raises(DataError, match=r"italian_sentences\.json: .*columns: \{italian: english, english: italian\}"):
        load(str(SHARED / "tatoeba"))
    assert load({"path": str(SHARED / "alpaca"), "on_bad_row": "skip"}).num_bad_rows == 2


@needs_shared
def test_the_real_files():
    mbpp = load(str(SHARED / "mbpp" / "mbpp.jsonl"))
    assert (len(mbpp.examples), len(mbpp.validation), len(mbpp.test), mbpp.num_unused) == (374, 90, 500, 10)
    alpaca = SHARED / "code_alpaca"
    assert len(load(str(alpaca / "new_codealpaca.json")).examples) == 4535
    with pytest.raises(DataError, match=r"2 of 2017 do not(?s:.*)row 238(?s:.*)row 1860"):
        load(str(alpaca / "code_alpaca_2k.json"))
    assert load({"path": str(alpaca / "code_alpaca_2k.json"), "on_bad_row": "skip"}).num_bad_rows == 2
    gsm8k = load(str(SHARED / "gsm8k"))
    assert (len(gsm8k.examples), len(gsm8k.test)) == (7473, 1319)
