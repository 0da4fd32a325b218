"""What is decided about a skill, case by case, with its reason and numbers."""

import math
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from dylora_moe.skills.growth import Decision, Limits, Losses, decide, nearest_skill
from dylora_moe.skills.novelty import Novelty

# a and c share an expert; a is the nearest to what comes.
EXPERTS = {"a": "one", "b": "two", "c": "one"}
KNOWN = Novelty(distances={"a": 0.5, "b": 0.9, "c": 0.8}, nearest="a", threshold=0.6)
NEW = Novelty(distances={"a": 0.7, "b": 0.9, "c": 0.8}, nearest="a", threshold=0.6)
OLD_ANSWERS = Novelty(distances={"a": 0.8, "b": 0.4, "c": 0.9}, nearest="b", threshold=0.6)
NEW_ANSWERS = Novelty(distances={"a": 0.8, "b": 0.75, "c": 0.9}, nearest="b", threshold=0.6)
FIRST = Novelty(distances={}, nearest=None, threshold=0.5)
# At home the expert takes half of the base's loss; of a tenth less on new data that is a fifth, of 45 % nine tenths.
SERVED = Losses(base=2.0, expert=1.1, home_base=4.0, home_expert=2.0)
NOT_SERVED = Losses(base=2.0, expert=1.8, home_base=4.0, home_expert=2.0)
FREE = Limits(may_grow=True, max_experts=None, served_share=0.7)
FULL = Limits(may_grow=True, max_experts=2, served_share=0.7)
ROOM = Limits(may_grow=True, max_experts=3, served_share=0.7)
CLOSED = Limits(may_grow=False, max_experts=None, served_share=0.7)


def told(
    prompts: Novelty = NEW,
    losses: Losses | None = NOT_SERVED,
    limits: Limits = FREE,
    answers: Novelty | None = None,
    **more: Any,
) -> Decision:
    return decide(prompts, answers, experts=EXPERTS, losses=losses, limits=limits, **more)


CASES = [
    (KNOWN, SERVED, FREE, "reuse", "like those of a (0.500 <= 0.600), and expert one does it: 90% of what it gains at"),
    (KNOWN, NOT_SERVED, FREE, "extend", "like those of a (0.500 <= 0.600), but expert one gains 20% of what it gains"),
    (
        NEW,
        SERVED,
        FREE,
        "reuse",
        "differ from those of every known skill, the nearest a (0.700 > 0.600), and expert one does it: 90%",
    ),
    (
        NEW,
        NOT_SERVED,
        FREE,
        "grow",
        "differ from those of every known skill, the nearest a (0.700 > 0.600), but expert one gains 20%",
    ),
    # Two experts serve three skills.
    (NEW, NOT_SERVED, ROOM, "grow", "but expert one gains 20%"),
    (
        NEW,
        NOT_SERVED,
        FULL,
        "extend",
        "But there are 2 experts and max_experts is 2, so expert one takes it",
    ),
    (NEW, NOT_SERVED, CLOSED, "extend", "But experts may not be added (allow_expert_growth), so expert one takes"),
    (NEW, SERVED, FULL, "reuse", "and expert one does it"),
    (NEW, SERVED, CLOSED, "reuse", "and expert one does it"),
    (KNOWN, SERVED, CLOSED, "reuse", "and expert one does it"),
    (KNOWN, NOT_SERVED, CLOSED, "extend", "but expert one gains 20%"),
    (KNOWN, NOT_SERVED, FULL, "extend", "but expert one gains 20%"),
]


@pytest.mark.parametrize(("novelty", "losses", "limits", "kind", "reason"), CASES)
def test_what_is_decided(novelty: Novelty, losses: Losses, limits: Limits, kind: str, reason: str) -> None:
    found = told(novelty, losses, limits)
    assert found.kind == kind and reason in found.reason and found.reason.endswith(".")
    assert found.nearest == "a" and found.expert == (None if kind == "grow" else "one")


ANSWER_CASES = [
    (
        OLD_ANSWERS,
        SERVED,
        FREE,
        "reuse",
        "two",
        "its answers are like those of b (0.400 <= 0.600), and expert two does it",
    ),
    (OLD_ANSWERS, NOT_SERVED, FREE, "grow", None, "like those of b (0.400 <= 0.600), but expert two gains 20%"),
    (OLD_ANSWERS, NOT_SERVED, FULL, "extend", "two", "so expert two takes it"),
    # However well an expert does other answers: it may know no more than their form.
    (
        NEW_ANSWERS,
        SERVED,
        FREE,
        "grow",
        None,
        "a (0.700 > 0.600), and so do its answers, the nearest b (0.750 > 0.600).",
    ),
    (NEW_ANSWERS, NOT_SERVED, FREE, "grow", None, "and so do its answers"),
    (NEW_ANSWERS, SERVED, CLOSED, "extend", "one", "so expert one takes it"),
]


@pytest.mark.parametrize(("answers", "losses", "limits", "kind", "expert", "reason"), ANSWER_CASES)
def test_answers_tell_other_words_from_a_new_skill(
    answers: Novelty, losses: Losses, limits: Limits, kind: str, expert: str | None, reason: str
) -> None:
    found = told(NEW, losses, limits, answers)
    assert (found.kind, found.expert) == (kind, expert) and reason in found.reason
    assert found.nearest == ("b" if answers is OLD_ANSWERS else "a") == nearest_skill(NEW, answers)
    assert found.numbers["answers: distance to b"] == answers.distances["b"]


@pytest.mark.parametrize("answers", [None, OLD_ANSWERS, NEW_ANSWERS])
def test_known_prompts_need_no_answers(answers: Novelty | None) -> None:
    """They decide where a prompt is sent, so one expert has to do them."""
    assert (
        told(KNOWN, SERVED, FREE, answers).kind == "reuse" and told(KNOWN, NOT_SERVED, FREE, answers).kind == "extend"
    )
    assert nearest_skill(KNOWN, answers) == "a"


@pytest.mark.parametrize("limits", [FREE, FULL, CLOSED])
@pytest.mark.parametrize("wanted", [None, "reuse", "extend", "grow"])
def test_the_first_skill_gets_an_expert_whatever_is_wanted(limits: Limits, wanted: Any) -> None:
    found = decide(FIRST, None, experts={}, losses=None, limits=limits, wanted=wanted)
    assert (found.kind, found.expert, found.nearest) == ("grow", None, None)
    assert found.numbers == {"prompts: threshold": 0.5} and "first skill" in found.reason
    assert (f"The recipe says {wanted}, but there is none yet." in found.reason) is (wanted in ("reuse", "extend"))


@pytest.mark.parametrize("limits", [FREE, FULL, CLOSED])
@pytest.mark.parametrize("losses", [SERVED, NOT_SERVED])
@pytest.mark.parametrize("novelty", [KNOWN, NEW])
@pytest.mark.parametrize("wanted", ["reuse", "extend", "grow"])
def test_what_the_recipe_says_is_done(novelty: Novelty, losses: Losses, limits: Limits, wanted: Any) -> None:
    """Whatever the numbers and the limits are; what the numbers said is told."""
    found = told(novelty, losses, limits, wanted=wanted, same_data="b")
    assert found.kind == wanted and found.expert == (None if wanted == "grow" else "one")
    by_numbers = told(novelty, losses, FREE)
    assert found.reason == (
        f"The recipe says {wanted}. By the numbers it would have been {by_numbers.kind}: {by_numbers.reason}"
    )


@pytest.mark.parametrize("novelty", [KNOWN, NEW, FIRST])
def test_a_skill_that_comes_with_its_expert_keeps_it(novelty: Novelty) -> None:
    losses = None if novelty is FIRST else SERVED
    found = told(novelty, losses, CLOSED, wanted="import")
    assert (found.kind, found.expert) == ("import", None) and found.reason.startswith("It comes with its expert.")
    full = Limits(may_grow=True, max_experts=2, served_share=0.7, merges=True)
    assert not told(novelty, losses, full, wanted="import").needs_room


@pytest.mark.parametrize("limits", [FREE, CLOSED])
@pytest.mark.parametrize("losses", [SERVED, NOT_SERVED])
@pytest.mark.parametrize("novelty", [KNOWN, NEW])
def test_the_same_data_are_learned_already(novelty: Novelty, losses: Losses, limits: Limits) -> None:
    """By the expert that learned them, though another skill is the nearest."""
    found = told(novelty, losses, limits, same_data="b")
    assert (found.kind, found.expert, found.nearest) == ("reuse", "two", "b")
    assert found.reason == "Its rows are those of b, which is learned already."


def test_the_share_from_which_an_expert_serves_is_the_limit_s() -> None:
    for share, kind in ((0.5, "reuse"), (0.51, "extend")):
        limits = Limits(may_grow=True, max_experts=None, served_share=share)
        assert told(KNOWN, Losses(base=1.0, expert=0.75, home_base=2.0, home_expert=1.0), limits).kind == kind


@pytest.mark.parametrize(
    ("losses", "share"),
    [
        (SERVED, 0.9),
        (NOT_SERVED, 0.2),
        (Losses(base=4.0, expert=2.0, home_base=4.0, home_expert=2.0), 1.0),
        (Losses(base=4.0, expert=4.0, home_base=4.0, home_expert=2.0), 0.0),
        (Losses(base=4.0, expert=5.0, home_base=4.0, home_expert=2.0), -0.5),
        # Relative to the base's loss: from 1 to 0.75 is half of what from 4 to 2 is.
        (Losses(base=1.0, expert=0.75, home_base=4.0, home_expert=2.0), 0.5),
        (Losses(base=1.0, expert=0.25, home_base=4.0, home_expert=2.0), 1.5),
        # An expert that gains nothing at home serves nothing.
        (Losses(base=2.0, expert=1.0, home_base=4.0, home_expert=4.0), 0.0),
        (Losses(base=2.0, expert=1.0, home_base=4.0, home_expert=5.0), 0.0),
    ],
)
def test_a_share_by_hand(losses: Losses, share: float) -> None:
    assert losses.share == pytest.approx(share)


LOSS = st.floats(0.01, 20)


@given(base=LOSS, home_base=LOSS, gain=st.floats(0.01, 0.99), times=st.floats(0.1, 10))
def test_a_share_is_the_same_in_any_unit(base: float, home_base: float, gain: float, times: float) -> None:
    """Bits or nats; and an expert does its own data as well as itself."""
    expert, home_expert = base * (1 - gain / 2), home_base * (1 - gain)
    nats = Losses(base=base, expert=expert, home_base=home_base, home_expert=home_expert)
    other = Losses(base=base * times, expert=expert * times, home_base=home_base, home_expert=home_expert)
    assert nats.share == pytest.approx(0.5) and other.share == pytest.approx(nats.share)
    assert Losses(base=base, expert=base * (1 - gain), home_base=base, home_expert=base * (1 - gain)).share == 1.0


def test_the_numbers_are_those_that_it_was_decided_by() -> None:
    assert told(NEW, SERVED).numbers == pytest.approx(
        {
            "prompts: distance to a": 0.7,
            "prompts: distance to b": 0.9,
            "prompts: distance to c": 0.8,
            "prompts: threshold": 0.6,
            "base loss": 2.0,
            "expert loss": 1.1,
            "base loss at home": 4.0,
            "expert loss at home": 2.0,
            "share of the gain at home": 0.9,
        }
    )
    assert all(math.isfinite(number) for number in told().numbers.values())


def test_a_decision_is_read_as_it_was_written() -> None:
    adapter = TypeAdapter(Decision)
    for found in (told(), told(KNOWN), told(wanted="reuse")):
        assert adapter.validate_python(asdict(found)) == adapter.validate_json(adapter.dump_json(found)) == found


@pytest.mark.parametrize(
    ("most", "merges", "kind", "needs_room"),
    [
        (2, True, "grow", True),
        (3, True, "grow", False),
        (2, False, "extend", False),
    ],
)
def test_a_full_stream_may_make_room(most: int, merges: bool, kind: str, needs_room: bool) -> None:
    found = told(limits=Limits(may_grow=True, max_experts=most, served_share=0.7, merges=merges))
    assert (found.kind, found.needs_room) == (kind, needs_room)


def test_a_single_expert_cannot_make_room() -> None:
    limits = Limits(may_grow=True, max_experts=1, served_share=0.7, merges=True)
    found = decide(NEW, None, experts={"a": "one", "b": "one", "c": "one"}, losses=NOT_SERVED, limits=limits)
    assert (found.kind, found.needs_room) == ("extend", False)
