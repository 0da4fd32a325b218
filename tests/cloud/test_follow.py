"""A job is followed to its end by Google's clients: each state once, each line once, and how it ended."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("google.cloud.aiplatform_v1", reason="the extra vertex is not installed")
import grpc
from google.cloud.aiplatform_v1 import CustomJob
from tests.cloud.google import line
from tests.cloud.test_job import RECIPE, SETTINGS

from dylora_moe.cloud.follow import Ending, follow
from dylora_moe.cloud.job import make_job
from dylora_moe.cloud.vertex import checked, submit
from dylora_moe.errors import CloudError

PARENT = "projects/p/locations/us-central1"


@pytest.fixture
def followed(google: Any) -> Callable[..., tuple[Ending, list[str]]]:
    """(states, error, lines) -> how it ended, and what was told, without the times of states."""

    def run(states: list[str], error: str = "", lines: Any = ()) -> tuple[Ending, list[str]]:
        server, jobs, logs = google
        message: CustomJob = checked(make_job(SETTINGS, RECIPE))
        name = submit(jobs, PARENT, message)
        server.states = [f"JOB_STATE_{state}" for state in states]
        server.error, server.lines = error, list(lines)
        told: list[str] = []
        ending = follow(name, jobs, logs, told.append, pause=lambda: None)
        return ending, [each[9:] if "JOB_STATE" in each else each for each in told]

    return run


def test_each_state_is_told_once(followed: Callable[..., Any]) -> None:
    ending, told = followed(["QUEUED", "PENDING", "PENDING", "RUNNING", "RUNNING", "SUCCEEDED"])
    assert told == [f"JOB_STATE_{state}" for state in ("QUEUED", "PENDING", "RUNNING", "SUCCEEDED")]
    assert ending == Ending(how="succeeded", state="JOB_STATE_SUCCEEDED", error="")


def test_each_line_is_told_once_however_late_it_comes(followed: Callable[..., Any]) -> None:
    looks = [
        [line("one", second=1), line("three", second=3, as_json=True)],
        [line("two, late", second=2)],
        [line("four", second=300, number=0), line("five", second=300, number=1)],
        [line("after the end", second=301)],
    ]
    _, told = followed(["RUNNING", "RUNNING", "SUCCEEDED"], lines=looks)
    lines = [each for each in told if "JOB_STATE" not in each]
    assert lines == [
        "12:00:01 workerpool0-0: one",
        "12:00:03 workerpool0-0: three",
        "12:00:02 workerpool0-0: two, late",
        "12:05:00 workerpool0-0: four",
        "12:05:00 workerpool0-0: five",
        "12:05:01 workerpool0-0: after the end",
    ]


def test_logs_are_asked_for_by_the_number_of_the_job(followed: Callable[..., Any], google: Any) -> None:
    followed(["SUCCEEDED"], lines=[[line("one", second=200)]])
    looks = [request.filter for request in google[0].asked if hasattr(request, "resource_names")]
    assert looks[0] == 'resource.type="ml_job" AND resource.labels.job_id="1000"'
    assert looks[1] == f'{looks[0]} AND timestamp>="2026-11-23T12:01:20+00:00"'


@pytest.mark.parametrize(
    ("state", "error", "how"),
    [
        ("FAILED", "The replica workerpool0-0 exited with a non-zero status of 1.", "failed"),
        ("FAILED", "The replica workerpool0-0 exited with a non-zero status of 75.", "stopped"),
        ("FAILED", "The replica workerpool0-0 exited with a non-zero status of 755.", "failed"),
        ("FAILED", "STOCKOUT", "stopped"),
        ("FAILED", "Resources are insufficient in region: us-central1. Try a different region.", "stopped"),
        ("CANCELLED", "", "stopped"),
        ("EXPIRED", "", "stopped"),
    ],
)
def test_how_it_ended(followed: Callable[..., Any], state: str, error: str, how: str) -> None:
    ending, _ = followed(["RUNNING", state], error)
    assert ending == Ending(how=how, state=f"JOB_STATE_{state}", error=error)


def test_a_service_that_is_away_for_a_moment_ends_nothing(followed: Callable[..., Any], google: Any) -> None:
    submitted = google[0].refuse
    ending, _ = followed(["RUNNING", "SUCCEEDED"])
    assert ending.how == "succeeded"
    submitted.extend([grpc.StatusCode.UNAVAILABLE] * 2)
    server, jobs, logs = google
    (name,) = server.jobs
    assert follow(name, jobs, logs, lambda _: None, pause=lambda: None).how == "succeeded"
    assert not server.refuse


def test_a_refusal_ends_it(google: Any) -> None:
    server, jobs, logs = google
    name = submit(jobs, PARENT, checked(make_job(SETTINGS, RECIPE)))
    server.refuse = [grpc.StatusCode.PERMISSION_DENIED]
    with pytest.raises(CloudError, match="must allow this"):
        follow(name, jobs, logs, lambda _: None, pause=lambda: None)


def test_a_service_that_stays_away_is_told(google: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the error of Google's own retries, which is of another kind than those of its answers."""
    from google.api_core import retry

    server, jobs, logs = google
    name = submit(jobs, PARENT, checked(make_job(SETTINGS, RECIPE)))
    server.refuse = [grpc.StatusCode.UNAVAILABLE] * 1000
    patient = retry.Retry
    monkeypatch.setattr(retry, "Retry", lambda timeout: patient(initial=0.01, maximum=0.01, timeout=timeout / 1200))
    with pytest.raises(CloudError, match=r"must be reachable, and is not: .*refused for the test"):
        follow(name, jobs, logs, lambda _: None, pause=lambda: None)
