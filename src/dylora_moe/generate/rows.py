"""What becomes of a planned row: events in, its state out. Pure; the log is the events, so it is the state."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

End = Literal["passed", "set_aside"]
Kind = Literal["answer", "failure", "probe", "review", "reopened"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How often a row is tried.

    Attributes:
        regenerations: New answers after the first that did not pass.
        tries: Requests that fail one after the other.
    """

    regenerations: int
    tries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowState:
    """Where a row is.

    Attributes:
        answers: That it got since it was opened.
        failures: Requests that failed since its last answer.
        answer: The last one.
        reasons: Why it does not pass.
        failure: Why the last request failed, where it did.
        before: Answers that it got before it was opened again.
        end: How it ended; None while it is open.
    """

    answers: int = 0
    failures: int = 0
    answer: str | None = None
    reasons: tuple[str, ...] = ()
    failure: tuple[str, ...] = ()
    before: int = 0
    end: End | None = None


def advance(state: RowState, event: Mapping[str, Any], limits: Limits) -> RowState:
    """The state after one more event.

    Args:
        state: Before it.
        event: `kind`: `answer`, with its `text` and the `reasons` why it does not pass, none where it does; `failure`,
            a request without an answer, with its `reasons`, `final` where it will never get one, and `outage` where
            none gets one, which is no fault of the row; `probe`, its request once more to see whether others are
            answered, which changes nothing; `review`, `reasons` that were found later, beside the other answers;
            `reopened`, a row set aside that is tried again.
        limits: How often a row is tried.
    """
    reasons = tuple(event.get("reasons", ()))
    match event["kind"]:
        case "answer":
            made = replace(
                state,
                answers=state.answers + 1,
                failures=0,
                answer=event["text"],
                reasons=reasons,
                failure=(),
                end=None,
            )
            return _refused(made, limits) if reasons else replace(made, end="passed")
        case "review":
            return _refused(replace(state, reasons=reasons, end=None), limits)
        case "failure" if event.get("outage"):
            return replace(state, failure=reasons)
        case "failure":
            failed = replace(state, failures=state.failures + 1, failure=reasons)
            is_over = failed.failures >= limits.tries or event.get("final", False)
            return replace(failed, end="set_aside" if is_over else None)
        case "probe":
            return state
        case "reopened":  # the last answer stays until there is another
            before = state.before + state.answers
            return RowState(answer=state.answer, reasons=state.reasons, before=before)
        case kind:
            raise ValueError(f"an event must be an answer, a failure, a probe, a review or reopened, got {kind!r}")


def _refused(state: RowState, limits: Limits) -> RowState:
    return replace(state, end="set_aside" if state.answers > limits.regenerations else None)
