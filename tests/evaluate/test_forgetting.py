"""Figures of a stream: by hand, and against loops written down from the papers' formulas."""

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dylora_moe.errors import DataError
from dylora_moe.evaluate.forgetting import MeasureFigures, StageFigures, StreamSummary, summarise


def stage(skill: str | None, losses: dict[str, float], **changes: Any) -> StageFigures:
    figures: dict[str, Any] = {
        "skill": skill,
        "expert": skill,
        "before": 2.0,
        "losses": losses,
        "accuracies": {},
        "routed": {name: {name: 1.0} for name in losses},
        "unsure": dict.fromkeys(losses, 0.0),
        "general": None,
    }
    return StageFigures(**figures | changes)


def make(stages: list[StageFigures], **changes: Any) -> StreamSummary:
    names = [figures.skill for figures in stages if figures.skill is not None]
    arguments: dict[str, Any] = {
        "base_losses": dict.fromkeys(names, 3.0),
        "base_general": None,
        "experts": dict(zip(names, names, strict=True)),
    }
    return summarise(stages, **arguments | changes)


STREAM = [
    stage("a", {"a": 1.0}, before=3.0, general=4.0),
    stage("b", {"a": 0.75, "b": 2.0}, before=2.5, accuracies={"b": 0.5}, general=4.5),
    stage("c", {"a": 1.5, "b": 2.0, "c": 0.5}, before=3.5, accuracies={"b": 0.25}, general=4.25),
]


def test_losses_by_hand() -> None:
    loss = make(STREAM).loss
    assert loss.matrix == ((1.0, None, None), (0.75, 2.0, None), (1.5, 2.0, 0.5))
    assert loss.average == pytest.approx(4 / 3)
    assert loss.backward_transfer == pytest.approx((-0.5 + 0) / 2)
    assert loss.forgetting == pytest.approx((0.75 + 0) / 2)  # from the best, which came after stage b
    assert loss.forward_transfer == pytest.approx((0.5 - 0.5) / 2)
    first, second, last = loss.by_skill
    assert (first.learned, first.last, first.backward_transfer, first.forgetting) == (1.0, 1.5, -0.5, 0.75)
    assert (first.forward_transfer, second.forward_transfer, last.forward_transfer) == (None, 0.5, -0.5)
    assert (last.learned, last.last, last.backward_transfer, last.forgetting) == (0.5, 0.5, None, None)


def test_right_answers_count_only_where_a_label_is_chosen() -> None:
    accuracy = make(STREAM).accuracy
    assert accuracy is not None
    assert accuracy.matrix == ((None, None, None), (None, 0.5, None), (None, 0.25, None))
    assert (accuracy.average, accuracy.backward_transfer, accuracy.forgetting) == (0.25, -0.25, 0.25)
    assert accuracy.forward_transfer is None
    assert make([replace(figures, accuracies={}) for figures in STREAM]).accuracy is None


def test_nothing_is_forgotten_where_nothing_changed() -> None:
    kept = [stage("a", {"a": 0.1}), stage("b", {"a": 0.1, "b": 0.3})]
    loss = make(kept).loss
    first = loss.by_skill[0]
    for figure in (loss.backward_transfer, loss.forgetting, first.backward_transfer, first.forgetting):
        assert figure == 0 and figure is not None and math.copysign(1, figure) == 1


def test_what_became_better_is_forgotten_less_than_nothing() -> None:
    loss = make([stage("a", {"a": 1.0}), stage("b", {"a": 0.5, "b": 1.0})]).loss
    assert (loss.backward_transfer, loss.forgetting) == (0.5, -0.5)


def test_a_single_stage_has_no_transfer() -> None:
    summary = make(STREAM[:1], base_general=4.0)
    loss = summary.loss
    assert (loss.average, loss.backward_transfer, loss.forward_transfer, loss.forgetting) == (1.0, None, None, None)
    assert summary.general_change == 0


def test_the_change_of_general_text_is_the_last_against_the_base() -> None:
    assert make(STREAM, base_general=4.0).general_change == 0.25
    assert make(STREAM).general_change is None
    assert make([replace(STREAM[0], general=None)], base_general=4.0).general_change is None


def test_routing_is_that_of_the_last_stage() -> None:
    routed = {"a": {"x": 0.75, "other": 0.25}, "b": {"x": 0.5, "y": 0.25}, "c": {"y": 1.0}}
    last = replace(STREAM[2], routed=routed, unsure={"a": 0.0, "b": 0.25, "c": 0.0})
    routing = make([*STREAM[:2], last], experts={"a": "x", "b": "y", "c": "y"}).routing
    assert routing.experts == ("x", "y", "other")
    assert routing.confusion == ((0.75, 0.0, 0.25), (0.5, 0.25, 0.0), (0.0, 1.0, 0.0))
    assert routing.unsure == (0.0, 0.25, 0.0) and routing.served_by == ("x", "y", "y")
    assert routing.by_skill == (0.75, 0.25, 1.0) and routing.accuracy == pytest.approx(2 / 3)


def test_a_skill_without_an_expert_is_not_routed_wrong() -> None:
    last = replace(STREAM[1], routed={"a": {"a": 1.0}})
    routing = make([STREAM[0], last], experts={"a": "a"}).routing
    assert routing.by_skill == (1.0, None) and routing.accuracy == 1.0
    assert routing.served_by == ("a", None) and routing.confusion == ((1.0,), (None,))


def test_a_change_by_hand_is_a_row_and_no_column() -> None:
    """What it does to the skills is their backward transfer."""
    change = stage(None, {"a": 0.875, "b": 2.5}, before=None)
    found = make(
        [*STREAM[:2], change, stage("c", {"a": 0.875, "b": 2.25, "c": 1.0}, before=2.0)], base_losses={"c": 3.0}
    )
    assert found.skills == ("a", "b", "c")
    assert found.loss.matrix == (
        (1.0, None, None),
        (0.75, 2.0, None),
        (0.875, 2.5, None),
        (0.875, 2.25, 1.0),
    )
    b = found.loss.by_skill[1]
    assert (b.learned, b.last, b.backward_transfer, b.forgetting) == (2.0, 2.25, -0.25, 0.25)
    assert found.loss.by_skill[2].forward_transfer == 1.0 and found.loss.by_skill[2].learned == 1.0


def test_a_summary_is_json() -> None:
    record = asdict(make(STREAM, base_general=4.0))
    assert json.loads(json.dumps(record))["loss"]["matrix"][1] == [0.75, 2.0, None]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "a stage that learned a skill first"),
        ([STREAM[0], STREAM[0]], "'a' twice"),
        ([STREAM[0], stage("b", {"b": 1.0})], "stage 2, b, must hold the loss of every skill .* none of a"),
    ],
)
def test_figures_with_gaps_are_refused(stages: list[StageFigures], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(stages)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[StageFigures], dict[str, float]]:
    names = [f"s{index}" for index in range(draw(st.integers(1, 6)))]
    labelled = [name for name in names if draw(st.booleans())]
    loss, share = st.floats(0, 20), st.floats(0, 1)
    stages = []
    for place, name in enumerate(names):
        seen = names[: place + 1]
        losses = {other: draw(loss) for other in seen}
        accuracies = {other: draw(share) for other in seen if other in labelled}
        stages.append(stage(name, losses, before=draw(loss), accuracies=accuracies))
    return stages, {name: draw(loss) for name in names}


def check_against_loops(figures: MeasureFigures, rows: list[dict[str, float]], names: list[str], sign: int) -> None:
    """Lopez-Paz and Ranzato 2017, eq. 3; Chaudhry et al. 2018, def. 1: accuracies, so losses are turned round."""
    end = len(rows) - 1
    backward, forgotten, final = [], [], []
    for j, name in enumerate(names):
        if name not in rows[end]:
            continue
        final.append(rows[end][name])
        if j == end:
            continue
        backward.append(sign * rows[end][name] - sign * rows[j][name])
        best = -math.inf
        for i in range(j, end):
            best = max(best, sign * rows[i][name])
        forgotten.append(best - sign * rows[end][name])
    for found, values in (
        (figures.average, final),
        (figures.backward_transfer, backward),
        (figures.forgetting, forgotten),
    ):
        assert found == (pytest.approx(sum(values) / len(values)) if values else None)
    if figures.forgetting is not None:  # the best is at least what was learned
        assert figures.forgetting >= -(figures.backward_transfer or 0) - 1e-9


@given(streams())
def test_every_figure_is_that_of_the_papers(drawn: tuple[list[StageFigures], dict[str, float]]) -> None:
    stages, base = drawn
    names = [figures.skill for figures in stages if figures.skill is not None]
    summary = make(stages, base_losses=base)
    check_against_loops(summary.loss, [dict(figures.losses) for figures in stages], names, -1)
    if summary.accuracy is not None:
        check_against_loops(summary.accuracy, [dict(figures.accuracies) for figures in stages], names, 1)
    assert (summary.accuracy is None) == (not stages[-1].accuracies)
    gains = [base[figures.skill] - figures.before for figures in stages[1:]]
    assert summary.loss.forward_transfer == (pytest.approx(sum(gains) / len(gains)) if gains else None)
