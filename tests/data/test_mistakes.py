"""What goes wrong with training data in practice, each on a file of its own: it stops with an error, or is reported."""

import json
import string

import pytest
from tests.data.test_prepare import make_tokenizer
from tokenizers import Tokenizer, models, trainers
from transformers import PreTrainedTokenizerFast

from dylora_moe.data.build import build_data
from dylora_moe.data.settings import DataSettings
from dylora_moe.data.templates import set_template
from dylora_moe.data.tokenize import IGNORED
from dylora_moe.errors import DataError

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count=20, **fixed):
    return [{"prompt": f"question {n}", "completion": f"answer {n}", **fixed} for n in range(count)]


def stops(match, datasets, tokenizer, **settings):
    with pytest.raises(DataError, match=match):
        build_data(datasets, tokenizer, DataSettings(**{"max_length": 100, **settings}))


def test_a_row_without_a_label(tmp_path):
    """A vocabulary that lacks all of an answer, and has no token for the unknown."""
    core = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=list(string.printable))
    core.train_from_iterator(["question answer"], trainer)
    lacking = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    assert len(build_data([write(tmp_path / "good.jsonl", rows())], lacking, DataSettings(max_length=100)).train) == 18
    bad = [*rows(), {"prompt": "question 3", "completion": "\u65e5\u672c"}]
    stops(
        r"beginning 'question 3': every row must have labels besides its end token, got \[0\]",
        [write(tmp_path / "bad.jsonl", bad)],
        lacking,
    )


def test_an_end_of_turn_that_is_never_a_label(tmp_path, tokenizer):
    """Every row is cut before its end, so that the model would never learn to stop."""
    path = write(tmp_path / "a.jsonl", [{**row, "completion": "word " * 60} for row in rows()])
    stops("teach where an answer ends, got none of 18: all are cut", [path], tokenizer, overlong="truncate")
    data = build_data([path], tokenizer, DataSettings(max_length=400, overlong="truncate"))
    assert {row.labels[-1] for row in data.train} == set(data.summary.end_token_ids) and data.summary.domains[
        0
    ].num_cut == 0


@pytest.mark.parametrize(
    ("template", "match"),
    [
        # What is rendered for generation is not the beginning of the whole conversation.
        (TEMPLATE.replace("<assistant>{% endif %}", "<think></think>{% endif %}"), "prompt with the answer after it"),
        (TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"), "must keep the answer as it is"),
        ("{% if messages | length > 9 %}{{ broken(", "must render a question and an answer"),
    ],
    ids=["another prompt", "another answer", "no template"],
)
def test_a_template_that_does_not_match(tmp_path, template, match):
    good, bad = tmp_path / "good.jinja", tmp_path / "bad.jinja"
    good.write_text(TEMPLATE)
    bad.write_text(template)
    path = write(tmp_path / "a.jsonl", rows())
    tokenizer = make_tokenizer()
    set_template(tokenizer, str(good))
    assert len(build_data([path], tokenizer, DataSettings(max_length=100)).train) == 18
    set_template(tokenizer, str(bad))
    stops(match, [path], tokenizer)


def test_no_row_is_cut_in_silence(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [*rows(), {"prompt": "long", "completion": "word " * 60}])
    lengths = build_data([path], tokenizer, DataSettings(max_length=1000)).summary.domains[0].lengths
    stops(
        rf"1 of 21 have more; the longest has {lengths.maximum}\. max_length={lengths.p99} fits 99 %",
        [path],
        tokenizer,
    )
    cut = build_data([path], tokenizer, DataSettings(max_length=100, overlong="truncate")).summary.domains[0]
    assert (cut.num_cut, cut.num_overlong, cut.lengths.maximum) == (1, 0, 100)


def test_a_file_that_ends_in_a_brace_for_a_bracket(tmp_path, tokenizer):
    path = tmp_path / "a.json"
    text = json.dumps(rows(), indent=1)
    path.write_text(text[:-1] + "}")
    line = len(text.splitlines())
    stops(rf"a\.json, line {line}, column 1: the list opened with '\[' is closed with '}}'", [str(path)], tokenizer)
    path.write_text(text)
    assert len(build_data([str(path)], tokenizer, DataSettings(max_length=100)).train) == 18


def test_columns_in_the_wrong_order(tmp_path, tokenizer):
    english = ["Where is the station?", "I would like a coffee, please.", "My brother lives in the big house there."]
    italian = [
        "Dov'\u00e8 la stazione?",
        "Vorrei un caff\u00e8, per favore.",
        "Mio fratello abita nella casa.",
    ]
    pairs = [
        {"english": f"{en} {number}", "italian": f"{it} {number}"}
        for number in range(20)
        for en, it in zip(english, italian, strict=True)
    ]
    swapped = [{"english": pair["italian"], "italian": pair["english"]} for pair in pairs]
    assert len(build_data([write(tmp_path / "right.jsonl", pairs)], tokenizer, DataSettings(max_length=300)).train) > 40
    path = write(tmp_path / "swapped.jsonl", swapped)
    stops(r"swapped\.jsonl: .*columns: \{english: italian, italian: english\}", [path], tokenizer, max_length=300)
    entry = {"path": path, "columns": {"english": "italian", "italian": "english"}}
    assert len(build_data([entry], tokenizer, DataSettings(max_length=300)).train) > 40


@pytest.mark.parametrize("answer", ["", " \n", None])
def test_an_empty_answer(tmp_path, tokenizer, answer):
    path = write(tmp_path / "a.jsonl", [*rows(), {"prompt": "what?", "completion": answer}])
    stops(r"1 of 21 do not:\n  - .*a\.jsonl, line 21: ", [path], tokenizer)
    data = build_data([{"path": path, "on_bad_row": "skip"}], tokenizer, DataSettings(max_length=100))
    (removed,) = map(json.loads, data.removed_file.read_text().splitlines())
    assert removed["where"].endswith("a.jsonl, line 21") and removed["row"]["prompt"] == "what?"
    assert data.summary.domains[0].num_bad_rows == 1


def test_a_prompt_in_both_splits(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl", [*rows(), {"prompt": "held out 0", "completion": "another answer"}])
    write(tmp_path / "validation.jsonl", [{"prompt": f"held out {n}", "completion": "yes"} for n in range(3)])
    data = build_data([str(tmp_path)], tokenizer, DataSettings(max_length=100))
    (removed,) = map(json.loads, data.removed_file.read_text().splitlines())
    assert removed["where"] == f"{tmp_path}/train.jsonl, line 21"
    assert removed["reason"] == f"leak: the prompt of {tmp_path}/validation.jsonl, line 1"
    assert data.summary.domains[0].removed == {"leak": 1}
    prompts = [
        {row.input_ids[: sum(label == IGNORED for label in row.labels)] for row in side}
        for side in (data.train, *data.validation.values())
    ]
    assert not prompts[0] & prompts[1] and len(prompts[1]) == 3
