"""Greedy answers: they stop where they should, and a batch changes neither their text nor their routing."""

from typing import Any

import pytest
import torch

from dylora_moe.data.example import Message
from dylora_moe.data.templates import render_prompt
from dylora_moe.evaluate.generate import Answer, Sampling, generate_answers

ROUTINGS = [
    {"granularity": "token"},
    {"granularity": "token", "router_scope": "per_layer", "top_k": 2},
    {"granularity": "sequence"},
]
PROMPTS = [
    "Add 3 and 21.",
    "Say blue zebra in capitals.",
    "Write pink stone, red river and blue zebra in turn.",
]
NO_END = (10**6,)


@pytest.fixture
def ask(tokenizer: Any, data: Any) -> Any:
    """(model, prompts, end tokens, most tokens) -> answers."""

    def generate(
        model: Any, prompts: list[str], ends: Any = NO_END, max_new_tokens: int = 8, sampling: Any = None
    ) -> list[Answer]:
        conversations = [[Message(role="user", content=prompt)] for prompt in prompts]
        return generate_answers(
            model,
            tokenizer,
            conversations,
            max_new_tokens=max_new_tokens,
            end_token_ids=list(ends),
            sampling=sampling,
        )

    return generate


@pytest.fixture
def greedy(tokenizer: Any, data: Any) -> Any:
    """(model, prompt, number) -> the most likely ids, one full pass for each."""

    @torch.no_grad()
    def loop(model: Any, prompt: str, number: int) -> list[int]:
        text = render_prompt([Message(role="user", content=prompt)], tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        length = len(ids)
        for _ in range(number):
            asked = torch.arange(len(ids))[None] < length
            logits = model(input_ids=torch.tensor([ids]), prompt_mask=asked, use_cache=False).logits
            ids = [*ids, int(logits[0, -1].argmax())]
        return ids[-number:]

    return loop


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_an_answer_is_the_most_likely_token_again_and_again(
    mixture: Any, ask: Any, greedy: Any, tokenizer: Any, routing: Any
) -> None:
    model = mixture(**routing)
    (answer,) = ask(model, PROMPTS[:1])
    expected = greedy(model, PROMPTS[0], 8)
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert (answer.prompt, answer.tokens, answer.stopped) == (PROMPTS[0], 8, False)


@pytest.mark.parametrize("place", [0, 2, 7])
def test_an_answer_ends_before_the_end_token(mixture: Any, ask: Any, greedy: Any, tokenizer: Any, place: int) -> None:
    model = mixture(granularity="token")
    expected = greedy(model, PROMPTS[0], 8)
    length = expected.index(expected[place])
    (answer,) = ask(model, PROMPTS[:1], [expected[place], *NO_END])
    assert answer.tokens == length and answer.stopped
    assert answer.text == tokenizer.decode(expected[:length], skip_special_tokens=True)


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_a_batch_answers_as_each_prompt_alone(mixture: Any, ask: Any, routing: Any) -> None:
    model = mixture(**routing)
    together = ask(model, PROMPTS)
    alone = [ask(model, [prompt])[0] for prompt in PROMPTS]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    for batched, single in zip(together, alone, strict=True):
        assert batched.routing == pytest.approx(single.routing, abs=1e-5)
        assert sum((batched.routing or {}).values()) == pytest.approx(1, abs=1e-5)
    assert len({answer.text for answer in together}) == 3


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_a_row_that_ends_early_is_not_changed_by_the_rows_that_go_on(
    mixture: Any, ask: Any, greedy: Any, routing: Any
) -> None:
    model = mixture(**routing)
    ends = [greedy(model, PROMPTS[0], 2)[1]]
    together = ask(model, PROMPTS, ends)
    (alone,) = ask(model, PROMPTS[:1], ends)
    assert alone.stopped and alone.tokens < 2 and max(answer.tokens for answer in together) > 2
    assert (together[0].text, together[0].tokens, together[0].stopped) == (alone.text, alone.tokens, True)
    assert together[0].routing == pytest.approx(alone.routing, abs=1e-5)


def test_without_a_router_there_is_no_routing(mixture: Any, ask: Any) -> None:
    assert ask(mixture(1), PROMPTS)[0].routing is None
    model = mixture()
    routed = ask(model, PROMPTS)
    with model.forced("expert_2"):
        forced = ask(model, PROMPTS)
    with model.disabled():
        alone = ask(model, PROMPTS)
    assert routed[0].routing is not None and forced[0].routing is None and alone[0].routing is None
    assert len({tuple(answer.text for answer in answers) for answers in (routed, forced, alone)}) == 3


def test_dropout_is_off_and_the_mode_is_left_as_it_was(mixture: Any, ask: Any) -> None:
    expected = ask(mixture(), PROMPTS)
    model = mixture(dropout=0.5).train()
    assert ask(model, PROMPTS) == expected
    assert model.training


def test_answers_are_drawn_by_their_own_seed_and_by_the_models_odds(mixture: Any, ask: Any) -> None:
    model = mixture(granularity="token")
    drawn = Sampling(temperature=1.0, top_p=1.0, seed=3)
    state = torch.random.get_rng_state()
    first, again = ask(model, PROMPTS, sampling=drawn), ask(model, PROMPTS, sampling=drawn)
    assert torch.equal(torch.random.get_rng_state(), state), "those of others are left alone"
    other = ask(model, PROMPTS, sampling=drawn.moved(1))
    assert first == again and [each.text for each in first] != [each.text for each in other]
    cold = ask(model, PROMPTS, sampling=Sampling(temperature=1e-4, top_p=1.0, seed=3))
    assert [each.text for each in cold] == [each.text for each in ask(model, PROMPTS)]
    nucleus = ask(model, PROMPTS, sampling=Sampling(temperature=1.0, top_p=1e-4, seed=3))
    assert [each.text for each in nucleus] == [each.text for each in ask(model, PROMPTS)]
