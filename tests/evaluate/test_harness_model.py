"""The harness is told what our own model says to each question alone: likelihoods and answers, routed, forced, base."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_moe.config import make_config
from dylora_moe.errors import ConfigError, DataError, TunerError
from dylora_moe.evaluate.load import Speaker, TrainedRun
from dylora_moe.run_dir import RunDir

pytest.importorskip("lm_eval", reason="needs the extra `harness`: pip install 'dylora-moe[harness]'")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from dylora_moe.evaluate.harness_model import HarnessModel

ROUTINGS: dict[str, dict[str, Any]] = {
    "token": {"granularity": "token"},
    "layers": {"granularity": "token", "router_scope": "per_layer", "top_k": 2},
    "sequence": {"granularity": "sequence", "prefix_tokens": 5},
}
SPEAKERS = {
    "routed": Speaker(),
    "forced": Speaker(kind="expert", expert="expert_2"),
    "base": Speaker(kind="base"),
}
CONTEXTS = ("Say blue zebra in capitals.", "Add 3 and 21.", "Write pink stone, red river and blue zebra in turn.", "x")


@pytest.fixture(scope="module")
def make_harness(mixture: Any, tokenizer: Any, data: Any, tiny_base: Path) -> Callable[..., HarnessModel]:
    """(routing, speaker, batch size, ...) -> the harness's model over a mixture with random experts, made once each."""
    made: dict[str, TrainedRun] = {}

    def make(routing: str, speaker: str = "routed", batch_size: int = 4, **limits: Any) -> HarnessModel:
        if routing not in made:
            config = make_config({"base_model": str(tiny_base), "datasets": ["requests"]})
            model = mixture(**ROUTINGS[routing])
            made[routing] = TrainedRun(
                name="tiny", run=RunDir(tiny_base), config=config, model=model, tokenizer=tokenizer, digest="0"
            )
        return HarnessModel(made[routing], batch_size=batch_size, speaker=SPEAKERS[speaker], **limits)

    return make


def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]  # type: ignore[arg-type]


@torch.no_grad()
def alone(harness: HarnessModel, speaker: str, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One question to our own model, unbatched, with all of its logits."""
    trained = harness._trained
    ids = torch.tensor([context + continuation])
    asked = torch.arange(ids.shape[1])[None] < len(context)
    with trained.speaking(SPEAKERS[speaker]):
        logits = trained.model(input_ids=ids, prompt_mask=asked, use_cache=False).logits[0].double()
    said = logits[len(context) - 1 : -1]
    wanted = ids[0, len(context) :]
    likelihood = said.log_softmax(-1).gather(1, wanted[:, None]).sum()
    return float(likelihood), bool((said.argmax(-1) == wanted).all())


@pytest.mark.parametrize("speaker", SPEAKERS)
@pytest.mark.parametrize("routing", ROUTINGS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_likelihoods_of_a_batch_are_those_of_each_question_alone(
    make_harness: Any, routing: str, speaker: str, data: st.DataObject
) -> None:
    harness = make_harness(routing, speaker, data.draw(st.integers(1, 5), label="batch size"))
    ids = st.integers(2, 300)
    context, continuation = st.lists(ids, min_size=1, max_size=30), st.lists(ids, min_size=1, max_size=8)
    questions = data.draw(st.lists(st.tuples(context, continuation), min_size=1, max_size=6))
    # Choices of one letter share a pass; so would the same tokens with the border elsewhere, if nobody looked.
    (first, second) = questions[0]
    questions += [(first, [*second[:-1], 7]), (first + second[:1], [*second[1:-1], 9])]
    found = harness._loglikelihood_tokens([(None, *question) for question in questions], disable_tqdm=True)
    for (likelihood, greedy), question in zip(found, questions, strict=True):
        expected, expected_greedy = alone(harness, speaker, *question)
        assert likelihood == pytest.approx(expected, abs=1e-5, rel=1e-5)
        assert greedy == expected_greedy


def test_who_speaks_and_where_the_question_ends_change_likelihoods(make_harness: Any) -> None:
    question = make_harness("sequence").tok_encode(CONTEXTS[2])
    said = {alone(make_harness("sequence", speaker), speaker, question, [7, 8])[0] for speaker in SPEAKERS}
    assert len(said) == 3
    whole = [*question, 7, 8]
    harness = make_harness("sequence")
    borders = [harness._loglikelihood_tokens([(None, whole[:at], whole[at:])], True)[0][0] for at in (3, 20)]
    parts = [harness._loglikelihood_tokens([(None, whole[:3], whole[3:20])], True)[0][0], borders[1]]
    assert borders[0] != pytest.approx(sum(parts), abs=1e-2)  # another question is answered by other experts


@pytest.mark.parametrize("speaker", SPEAKERS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_texts_are_scored_as_texts(make_harness: Any, routing: str, speaker: str) -> None:
    harness = make_harness(routing, speaker)
    pairs = [(context, answer) for context in CONTEXTS for answer in (" BLUE", " def blue_zebra():")]
    found = harness.loglikelihood(ask("loglikelihood", *pairs, ("", "Add"), ("Add 3 ", "and")), disable_tqdm=True)
    for (context, answer), (likelihood, _) in zip(pairs, found, strict=False):
        question = harness.tok_encode(context)
        continuation = harness.tok_encode(context + answer)[len(question) :]
        assert likelihood == pytest.approx(alone(harness, speaker, question, continuation)[0], rel=1e-5, abs=1e-5)
    end = harness.tokenizer.eos_token_id
    bare, spaced = (
        alone(harness, speaker, *pair)[0]
        for pair in (
            ([end], harness.tok_encode("Add")),
            (harness.tok_encode("Add 3"), harness.tok_encode("Add 3 and")[len(harness.tok_encode("Add 3")) :]),
        )
    )
    assert [likelihood for likelihood, _ in found[-2:]] == pytest.approx([bare, spaced], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("speaker", SPEAKERS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("max_length", [None, 12])
def test_whole_texts_are_routed_by_their_beginning_and_scored_before_it_is_known(
    make_harness: Any, routing: str, speaker: str, max_length: int | None
) -> None:
    harness = make_harness(routing, speaker, max_length=max_length)
    found = harness.loglikelihood_rolling(ask("loglikelihood_rolling", *((text,) for text in CONTEXTS)), True)
    prefix = ROUTINGS[routing].get("prefix_tokens", 0)
    for text, likelihood in zip(CONTEXTS, found, strict=True):
        ids = [harness.tokenizer.eos_token_id, *harness.tokenizer(text)["input_ids"]]
        limit, total, done = max_length or len(ids), 0.0, 1
        while done < len(ids):
            # The model reads `limit` tokens and scores those behind them; later windows go back as far as they can.
            end = min(done + limit, len(ids))
            start = max(0, end - limit - 1) if done > 1 else 0
            border = max(done, min(start + prefix, end))
            if border > done:
                total += alone(harness, speaker, ids[start:done], ids[done:border])[0]
            if end > border:
                total += alone(harness, speaker, ids[start:border], ids[border:end])[0]
            done = end
        assert likelihood == pytest.approx(total, rel=1e-5, abs=1e-4)


@torch.no_grad()
def greedy(harness: HarnessModel, speaker: str, context: str, number: int) -> list[int]:
    """The most likely ids, one full pass for each."""
    trained, ids = harness._trained, harness.tok_encode(context)
    length = len(ids)
    with trained.speaking(SPEAKERS[speaker]):
        for _ in range(number):
            asked = torch.arange(len(ids))[None] < length
            logits = trained.model(input_ids=torch.tensor([ids]), prompt_mask=asked, use_cache=False).logits
            ids = [*ids, int(logits[0, -1].argmax())]
    return ids[length:]


@pytest.mark.parametrize("speaker", SPEAKERS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_answers_of_a_batch_are_those_of_each_question_alone(make_harness: Any, routing: str, speaker: str) -> None:
    harness = make_harness(routing, speaker)
    wishes = {"until": [], "max_gen_toks": 9}
    answers = harness.generate_until(ask("generate_until", *((text, wishes) for text in CONTEXTS)), True)
    for text, answer in zip(CONTEXTS, answers, strict=True):
        ids = greedy(harness, speaker, text, 9)
        ids = ids[: ids.index(1)] if 1 in ids else ids
        assert answer == harness.tokenizer.decode(ids, skip_special_tokens=True)
    assert len(set(answers)) == len(answers)


def test_answers_stop_at_stop_texts_and_end_tokens_and_limits(make_harness: Any) -> None:
    harness = make_harness("sequence")
    ids = greedy(harness, "routed", CONTEXTS[0], 12)
    whole = harness.tokenizer.decode(ids, skip_special_tokens=True)
    stop = whole[4:6]
    requests = [(CONTEXTS[0], {"until": [stop], "max_gen_toks": 12}), (CONTEXTS[0], {"until": "", "max_gen_toks": 3})]
    stopped, short = harness.generate_until(ask("generate_until", *requests), True)
    assert stopped == whole.split(stop)[0] and stop not in stopped
    assert short == harness.tokenizer.decode(ids[:3], skip_special_tokens=True)


def test_answers_stop_at_special_tokens_that_decoding_leaves_out(make_harness: Any) -> None:
    harness = make_harness("sequence")
    ids = greedy(harness, "routed", CONTEXTS[0], 12)
    harness.tokenizer = deepcopy(harness.tokenizer)
    special = harness.tokenizer.convert_ids_to_tokens(ids[5])
    harness.tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    assert harness.tokenizer.convert_tokens_to_ids(special) == ids[5]
    (answer,) = harness.generate_until(
        ask("generate_until", (CONTEXTS[0], {"until": [special], "max_gen_toks": 12})), True
    )
    assert answer == harness.tokenizer.decode(ids[: ids.index(ids[5])])
    assert answer != harness.tokenizer.decode(ids, skip_special_tokens=True)


def test_sampled_answers_differ_and_come_again_from_their_seed(make_harness: Any) -> None:
    harness = make_harness("sequence")
    wishes = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    requests = ask("generate_until", *[(CONTEXTS[0], wishes)] * 6)
    torch.manual_seed(0)
    first = harness.generate_until(requests, True)
    torch.manual_seed(0)
    assert harness.generate_until(requests, True) == first
    assert len(set(first)) > 1


def test_conversations_are_written_as_in_training(make_harness: Any) -> None:
    harness = make_harness("sequence")
    turns = [{"role": "user", "content": "Add 3 and 21."}]
    prompt = harness.apply_chat_template(turns)
    assert prompt == "### User:\nAdd 3 and 21.\n\n### Assistant:\n"
    prefilled = [*turns, {"role": "assistant", "content": "3 +"}]
    assert harness.apply_chat_template(prefilled, add_generation_prompt=False).endswith("3 +")
    assert harness.chat_template(True) == harness.tokenizer.chat_template
    assert len(harness.tokenizer_name.rpartition("__")[2]) == 16


def test_bos_stands_before_plain_text_alone(make_harness: Any) -> None:
    harness = make_harness("token")
    ids = harness.tokenizer("Add")["input_ids"]
    assert harness.tok_encode("Add") == ids
    harness._start = [1]  # of a tokenizer that puts it there
    assert harness.tok_encode("Add") == [1, *ids]
    assert harness.tok_encode("<eos>Add") == [1, *ids]
    assert harness.tok_encode("Add", add_special_tokens=False) == ids
    harness.apply_chat_template([{"role": "user", "content": "x"}])
    assert harness.tok_encode("Add") == ids


def test_what_cannot_be_asked_is_told(make_harness: Any) -> None:
    with pytest.raises(TunerError, match="no expert 'nobody'"):
        HarnessModel(make_harness("token")._trained, speaker=Speaker(kind="expert", expert="nobody"))
    harness = make_harness("token", max_length=8)
    with pytest.raises(DataError, match="1 to max_length=8 tokens, got 9"):
        harness._loglikelihood_tokens([(None, [5], [5] * 9)], True)
    with pytest.raises(DataError, match="1 to 7 tokens, as the model reads 8, got 8"):
        harness.generate_until(ask("generate_until", ("x", {"until": [], "max_gen_toks": 8})), True)


def test_the_harness_makes_the_model_of_a_run_by_its_arguments(finished_run: Path) -> None:
    make = get_model("dylora").create_from_arg_string
    found = make(f"run={finished_run},expert=expert_1,batch_size=3,max_length=64", {"device": "cuda:0"})
    assert isinstance(found, HarnessModel)
    assert (found._speaker.name, found.batch_size, found.max_length) == ("expert-expert_1", 3, 64)
    base = make(f"run={finished_run},base=True", {"batch_size": 5, "max_batch_size": None})
    assert (base._speaker.name, base.batch_size, base.max_length) == ("base", 5, 256)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("pretrained=gpt2", "takes the arguments run, expert, base, batch_size, max_length, and needs run, got pretr"),
        ("", "needs run, got none"),
        ("run=x,trust_remote_code=True", "code from a repository is never run here"),
        ("run=x,expert=a,base=True", "expert and base exclude each other"),
        ("run=RUN,batch_size=auto", "batch_size must be a whole number of at least 1, got 'auto'"),
    ],
)
def test_arguments_that_cannot_work_are_told(finished_run: Path, arguments: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        get_model("dylora").create_from_arg_string(arguments.replace("RUN", str(finished_run)))
