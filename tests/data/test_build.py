"""Entries of a recipe become training and validation rows that share no prompt, and a record of it all."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dylora_moe.data.build import build_data
from dylora_moe.data.settings import DataSettings
from dylora_moe.data.tokenize import IGNORED
from dylora_moe.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet, vocab_size=300)
    core.train_from_iterator(["question 1 answer 2"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def write(path, pairs):
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def pairs(name, count):
    return [(f"{name} question {n}", f"{name} answer {n}") for n in range(count)]


def build(datasets, tokenizer, **settings):
    return build_data(datasets, tokenizer, DataSettings(**{"max_length": 200, **settings}))


def answers(rows, tokenizer):
    return [tokenizer.decode([label for label in row.labels if label != IGNORED]).removesuffix("<eos>") for row in rows]


def test_of_a_file_as_many_rows_are_drawn_as_asked_for(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", pairs("a", 60))
    bundle = build([{"path": path, "num_examples": 20}], tokenizer)
    drawn = answers([*bundle.train, *bundle.validation["a"]], tokenizer)
    assert len(drawn) == len(set(drawn)) == 20 and set(drawn) < {answer for _, answer in pairs("a", 60)}
    assert sorted(drawn) != sorted(answer for _, answer in pairs("a", 20))
    assert bundle.summary.domains[0].num_not_drawn == 40
    bundle = build([path], tokenizer, training_subset=50, eval_subset=50)
    assert (len(bundle.train), len(bundle.validation["a"]), bundle.summary.domains[0].num_not_drawn) == (27, 3, 30)


def test_domains_are_split_and_tokenised(tmp_path, tokenizer):
    first, second = write(tmp_path / "a.jsonl", pairs("a", 40)), write(tmp_path / "b.jsonl", pairs("b", 20))
    bundle = build([first, {"path": second, "domain": "bee", "licence": "MIT"}], tokenizer)
    assert bundle.domains == ("a", "bee")
    assert Counter(row.domain for row in bundle.train) == {0: 36, 1: 18}
    assert {name: len(rows) for name, rows in bundle.validation.items()} == {"a": 4, "bee": 2}
    assert {row.domain for row in bundle.validation["bee"]} == {1}
    for name, rows in bundle.validation.items():
        assert answers(rows, tokenizer) == [e.answer for e in bundle.validation_examples[name]]
    everything = answers([*bundle.train, *bundle.validation["a"], *bundle.validation["bee"]], tokenizer)
    assert sorted(everything) == sorted(answer for _, answer in pairs("a", 40) + pairs("b", 20))
    assert bundle.summary.end_token_ids == (tokenizer.eos_token_id,)


def test_the_summary_is_json_and_right(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", pairs("a", 40))
    bundle = build([{"path": path, "licence": "MIT"}], tokenizer, seed=3)
    summary = json.loads(json.dumps(dataclasses.asdict(bundle.summary)))
    (domain,) = summary["domains"]
    rows = [*bundle.train, *bundle.validation["a"]]
    assert (summary["seed"], summary["max_length"]) == (3, 200)
    assert (domain["domain"], domain["sources"], domain["licences"]) == ("a", [path], ["MIT"])
    assert (domain["num_train"], domain["num_validation"]) == (36, 4)
    assert domain["num_train_tokens"] == sum(map(len, bundle.train))
    assert domain["num_train_label_tokens"] == sum(label != IGNORED for row in bundle.train for label in row.labels)
    assert domain["lengths"]["maximum"] == max(map(len, rows))
    assert domain["lengths"]["minimum"] == min(map(len, rows))


def test_the_hash_tells_content_apart(tmp_path, tokenizer):
    def sha256(name, rows):
        return build([write(tmp_path / name, rows)], tokenizer).summary.domains[0].sha256

    rows = pairs("a", 10)
    assert sha256("a.jsonl", rows) == sha256("b.jsonl", rows)
    assert sha256("c.jsonl", [*rows[:-1], (rows[-1][0], "other")]) != sha256("a.jsonl", rows)


def test_the_hash_tells_on_which_side_a_row_is(tmp_path, tokenizer):
    def sha256(border):
        write(tmp_path / "train.jsonl", pairs("a", 40)[:border])
        write(tmp_path / "validation.jsonl", pairs("a", 40)[border:])
        return build([str(tmp_path)], tokenizer).summary.domains[0].sha256

    assert sha256(36) != sha256(30)


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "eval", "evaluation"])
def test_a_validation_file_has_one_of_many_names(tmp_path, tokenizer, name):
    write(tmp_path / "train.jsonl", pairs("a", 10))
    write(tmp_path / f"{name}.jsonl", pairs("b", 3))
    (rows,) = build([str(tmp_path)], tokenizer).validation.values()
    assert len(rows) == 3


def test_one_seed_gives_one_bundle_and_another_seed_another(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", pairs("a", 40))
    first, again, other = (build([path], tokenizer, seed=seed) for seed in (0, 0, 1))
    assert list(first.train) == list(again.train) and first.summary == again.summary
    assert list(first.validation["a"]) == list(again.validation["a"]) != list(other.validation["a"])


def test_data_sets_of_one_domain_are_merged_without_duplicates(tmp_path, tokenizer):
    first = write(tmp_path / "a.jsonl", pairs("a", 20))
    second = write(tmp_path / "b.jsonl", [*pairs("a", 5), *pairs("b", 20), *pairs("b", 1)])
    bundle = build([{"path": first, "domain": "x"}, {"path": second, "domain": "x"}], tokenizer)
    (domain,) = bundle.summary.domains
    assert bundle.domains == ("x",)
    assert domain.removed == {"duplicate": 6}
    assert domain.num_train + domain.num_validation == 40
    assert domain.sources == (first, second)


def test_an_official_validation_split_is_kept_and_its_prompts_are_not_trained_on(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl", [*pairs("a", 10), ("b question 0", "another answer"), *pairs("b", 1)])
    write(tmp_path / "validation.jsonl", pairs("b", 3))
    bundle = build([str(tmp_path)], tokenizer)
    (domain,) = bundle.summary.domains
    assert answers(bundle.train, tokenizer) == [answer for _, answer in pairs("a", 10)]
    assert answers(bundle.validation[domain.domain], tokenizer) == [answer for _, answer in pairs("b", 3)]
    assert domain.removed == {"duplicate": 1, "leak": 1}


def test_a_merged_domain_has_official_and_own_validation_rows(tmp_path, tokenizer):
    folder = tmp_path / "official"
    folder.mkdir()
    write(folder / "train.jsonl", pairs("a", 10))
    write(folder / "validation.jsonl", pairs("v", 3))
    own = write(tmp_path / "own.jsonl", pairs("o", 20))
    bundle = build([{"path": str(folder), "domain": "x"}, {"path": own, "domain": "x"}], tokenizer)
    assert Counter(e.answer[0] for e in bundle.validation_examples["x"]) == {"v": 3, "o": 2}
    assert len(bundle.train) == 28


def test_subsets_are_percentages_and_nested(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", pairs("a", 100))
    small = build([path], tokenizer, training_subset=10, eval_subset=50)
    large = build([path], tokenizer, training_subset=50)
    assert (len(small.train), len(small.validation["a"])) == (9, 5)
    assert (len(large.train), len(large.validation["a"])) == (45, 10)
    assert set(small.train) < set(large.train)
    assert set(small.validation["a"]) < set(large.validation["a"])
    least = build([path], tokenizer, training_subset=0.001, eval_subset=0.001)
    assert (len(least.train), len(least.validation["a"])) == (1, 1)


def test_overlong_rows_stop_for_all_domains_at_once_or_are_dropped(tmp_path, tokenizer):
    first = write(tmp_path / "a.jsonl", [*pairs("a", 20), ("long", "word " * 100)])
    second = write(tmp_path / "b.jsonl", [*pairs("b", 20), ("longer", "word " * 200)])
    with pytest.raises(DataError, match="2 of 42 have more"):
        build([first, second], tokenizer)
    bundle = build([first, second], tokenizer, overlong="drop")
    assert [domain.num_overlong for domain in bundle.summary.domains] == [1, 1]
    for name, rows in bundle.validation.items():
        assert answers(rows, tokenizer) == [e.answer for e in bundle.validation_examples[name]]
    with pytest.raises(DataError, match="Domain 'a' must have at least one training row"):
        build([first], tokenizer, overlong="drop", max_length=3)


def test_bad_rows_are_counted(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [*pairs("a", 10), ("no answer", "")])
    bundle = build([{"path": path, "on_bad_row": "skip"}], tokenizer)
    assert bundle.summary.domains[0].num_bad_rows == 1


def test_the_built_in_skills_build(tokenizer):
    skills = [{"name": name, "num_examples": 20} for name in ("requests", "stripe", "flask")]
    bundle = build(skills, tokenizer, max_length=5000)
    assert bundle.domains == ("requests", "stripe", "flask")
    assert all(domain.num_validation >= 1 for domain in bundle.summary.domains)


@pytest.mark.parametrize(
    ("datasets", "settings", "text"),
    [
        ([], {}, "at least one name"),
        ("flask", {}, "at least one name"),
        (["flask", "none.jsonl"], {}, "existing file or folder, got 'none.jsonl'"),
        (["flask"], {"validation_split": 0}, "validation_split must be"),
        (["flask"], {"validation_split": 1.0}, "validation_split must be"),
        (["flask"], {"training_subset": 0}, "training_subset must be a percentage"),
        (["flask"], {"eval_subset": 101}, "eval_subset must be a percentage"),
        (["flask"], {"max_length": 0}, "max_length must be"),
        (["flask"], {"overlong": "cut"}, "one of error, drop, truncate, split"),
        (["flask"], {"learn": "answer"}, "learn must be one of answers, last_answer, all"),
    ],
)
def test_impossible_settings_stop(datasets, settings, text, tokenizer):
    with pytest.raises(DataError, match=text):
        build(datasets, tokenizer, **settings)


def test_a_domain_of_one_prompt_stops(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [("same", "1"), ("same", "2")])
    with pytest.raises(DataError, match="Domain 'a': A split needs at least two different prompts, got 1"):
        build([path], tokenizer)


def test_a_file_without_rows_stops(tmp_path, tokenizer):
    with pytest.raises(DataError, match="at least one row"):
        build([write(tmp_path / "a.jsonl", [])], tokenizer)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real files in shared/data")
def test_the_real_mbpp_keeps_its_split(tokenizer):
    path = str(SHARED / "mbpp" / "mbpp.jsonl")
    bundle = build([{"name": "mbpp", "path": path}], tokenizer, max_length=5000)
    assert (len(bundle.train), len(bundle.validation["mbpp"])) == (374, 90)


def test_two_files_of_one_name_are_not_merged_in_silence(tmp_path, tokenizer):
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths.append(write(tmp_path / name / "rows.jsonl", pairs(name, 10)))
    with pytest.raises(DataError, match=r"a/rows\.jsonl and .*b/rows\.jsonl, which would both be the domain 'rows'"):
        build(paths, tokenizer)
    entries = [{"path": path, "domain": "rows"} for path in paths]
    assert build(entries, tokenizer).summary.domains[0].removed == {}


def test_a_prompt_of_another_domains_validation_is_not_trained_on(tmp_path, tokenizer):
    asked = ("Write a function that returns the sum of two whole numbers, please.", "def add(a, b): return a + b")
    near = (asked[0].replace("please", "thanks"), "lambda a, b: a + b")
    for name, rows in (("train", pairs("a", 10)), ("validation", [asked])):
        (tmp_path / "first").mkdir(exist_ok=True)
        write(tmp_path / "first" / f"{name}.jsonl", rows)
    other = tmp_path / "other"
    other.mkdir()
    write(other / "train.jsonl", [*pairs("b", 10), near])
    write(other / "validation.jsonl", pairs("c", 2))
    bundle = build([str(tmp_path / "first"), str(other)], tokenizer)
    (first, second) = bundle.summary.domains
    assert (first.removed, second.removed) == ({}, {"leak": 1})
    (removed,) = map(json.loads, bundle.removed_file.read_text().splitlines())
    assert removed["domain"] == "other" and removed["where"] == f"{other}/train.jsonl, line 11"
    assert removed["row"][-1] == {"role": "assistant", "content": near[1]}
    assert re.fullmatch(r"leak: prompt 0\.\d\d like that of .*/first/validation\.jsonl, line 1", removed["reason"])
    assert near[1] not in answers(bundle.train, tokenizer)


def test_official_test_rows_are_counted_and_kept_apart(tmp_path, tokenizer):
    tested = pairs("t", 4)
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "train.jsonl", pairs("a", 10))
    write(tmp_path / "a" / "test.jsonl", tested)
    other = write(tmp_path / "b.jsonl", pairs("b", 10))
    bundle = build([str(tmp_path / "a"), other], tokenizer)
    assert [domain.num_test for domain in bundle.summary.domains] == [4, 0]
    assert answers(bundle.test["a"], tokenizer) == [answer for _, answer in tested]
    assert [example.answer for example in bundle.test_examples["a"]] == [answer for _, answer in tested]
    assert len(bundle.test["b"]) == len(bundle.test_examples["b"]) == 0
    assert answers(bundle.validation["b"], tokenizer) == [e.answer for e in bundle.validation_examples["b"]]
    trained = answers([*bundle.train, *bundle.validation["a"], *bundle.validation["b"]], tokenizer)
    assert sorted(trained) == sorted(answer for _, answer in pairs("a", 10) + pairs("b", 10))


def test_a_test_row_too_long_to_train_on_is_left_out_and_no_error(tmp_path, tokenizer):
    long = ("t question", "t " * 300)
    write(tmp_path / "train.jsonl", pairs("a", 10))
    write(tmp_path / "test.jsonl", [long, *pairs("t", 2)])
    bundle = build([str(tmp_path)], tokenizer, overlong="error")
    (name,) = bundle.domains
    assert answers(bundle.test[name], tokenizer) == [answer for _, answer in pairs("t", 2)]
    assert "overlong" in bundle.removed_file.read_text() and bundle.summary.domains[0].num_test == 3
