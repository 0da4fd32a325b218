"""What becomes of a row, event by event."""

from dylora_moe.generate.rows import Limits, RowState, advance

LIMITS = Limits(regenerations=1, tries=2)
BAD = {"kind": "answer", "text": "no", "reasons": ["language"]}


def after(*events: dict[str, object]) -> RowState:
    state = RowState()
    for event in events:
        state = advance(state, event, LIMITS)
    return state


def test_a_failed_request_does_not_hide_why_the_answer_did_not_pass() -> None:
    state = after(BAD, {"kind": "failure", "reasons": ["HTTP 500"]})
    assert state.reasons == ("language",) and state.failure == ("HTTP 500",) and state.end is None
    assert after(BAD, {"kind": "failure", "reasons": ["x"]}, BAD | {"reasons": []}).failure == ()


def test_opened_again_a_row_is_asked_with_its_reasons_and_another_seed() -> None:
    state = after(BAD, BAD, {"kind": "reopened"})
    assert (state.answers, state.before, state.answer, state.reasons, state.end) == (0, 2, "no", ("language",), None)
    assert after(BAD, BAD, {"kind": "reopened"}, BAD).end is None  # as many new answers as at first
    assert after(BAD, BAD, {"kind": "reopened"}, BAD, BAD, {"kind": "reopened"}).before == 4


def test_a_probe_changes_nothing() -> None:
    state = after(BAD | {"reasons": []})
    assert advance(state, {"kind": "probe", "reasons": ["HTTP 500"]}, LIMITS) == state and state.end == "passed"
