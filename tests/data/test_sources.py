"""Entries of a recipe become specs, and specs examples; what cannot work is named."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.source_files import lines, load, mbpp_rows, pairs

from dylora_moe.data.sources import (
    REGISTRY,
    DatasetSpec,
    check_path,
    draw_rows,
    extend_registry,
    parse_dataset_spec,
)
from dylora_moe.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the real files in shared/data")


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
        ({"name": "flask", "part": "2/10"}, DatasetSpec(name="flask", part="2/10")),
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
        *[
            ({"path": "r", "part": part}, f"must be one of so many, such as 1/2 or 2/2, got {part!r}")
            for part in ("0/2", "3/2", "1/0", "1", "1/2/3", "-1/2", "1.5/2", " 1/2", "", "half", 0.5, 2, True, [1, 2])
        ],
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


@given(number=st.integers(1, 60), count=st.integers(1, 60), seed=st.integers(0, 3))
def test_parts_are_disjoint_and_cover_all_rows(number, count, seed):
    count = min(number, count)
    parts = [draw_rows(DatasetSpec(path="r", part=f"{n}/{count}"), number, seed=seed) for n in range(1, count + 1)]
    assert sorted(place for part in parts for place in part) == list(range(number))
    assert all(part == sorted(part) for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_parts_are_random_and_drawn_from_by_number():
    def draw(part, number=None, seed=0):
        return draw_rows(DatasetSpec(path="r", part=part, num_examples=number), 100, seed=seed)

    assert draw("1/2") == draw("1/2") != draw("1/2", seed=1)
    assert sum(place < 50 for place in draw("1/2")) not in (0, 50) and draw("1/2") != list(range(0, 100, 2))
    assert len(draw("1/2", 7)) == 7 and set(draw("1/2", 7)) < set(draw("1/2"))
    assert draw("1/2", 50) == draw("1/2")
    with pytest.raises(DataError, match=r"at most the 50 training rows of part 2/2, got 51\. Lower it, or take larger"):
        draw("2/2", 51)
    with pytest.raises(DataError, match="leave each part a training row, got 101/101 of 100 rows"):
        draw("101/101")


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
