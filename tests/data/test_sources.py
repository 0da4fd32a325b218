"""Entries of a recipe become specs, and specs examples; what cannot work is named."""

import json
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from dylora_moe.data.sources import (
    REGISTRY,
    DatasetSpec,
    DataSource,
    load_examples,
    parse_dataset_spec,
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


def load(value, seed=0):
    return load_examples(parse_dataset_spec(value), seed=seed)


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
