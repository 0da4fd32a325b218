"""A job that was sent -> its states and its logs as they come, and how it ended."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Literal, cast

from dylora_moe.cloud.explain import explained

if TYPE_CHECKING:
    from google.cloud.aiplatform_v1 import CustomJob, JobServiceClient
    from google.cloud.logging_v2.services.logging_service_v2 import LoggingServiceV2Client
    from google.cloud.logging_v2.types import LogEntry

How = Literal["succeeded", "failed", "stopped"]
PAUSE_S = 10.0
# Lines reach Cloud Logging late and out of order: each look goes back so far behind the newest line that it has seen.
_LATE = timedelta(minutes=2)
# How often, after the end, logs are looked at again.
_LAST_LOOKS = 2
_ENDED: dict[str, How] = {
    "JOB_STATE_SUCCEEDED": "succeeded",
    "JOB_STATE_PARTIALLY_SUCCEEDED": "failed",
    "JOB_STATE_FAILED": "failed",
    "JOB_STATE_CANCELLED": "stopped",
    "JOB_STATE_EXPIRED": "stopped",
}
# Of a job that failed because its machine was taken, or because the run was told to stop and left a checkpoint.
_STOPPED = re.compile(r"STOCKOUT|preempt|resources are insufficient|non-zero status of 75\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a job ended.

    Attributes:
        how: `stopped` when the same job, sent again, goes on.
        state: Vertex AI's word.
        error: What Vertex AI says of it; empty for none.
    """

    how: How
    state: str
    error: str


def follow(
    name: str,
    jobs: "JobServiceClient",
    logs: "LoggingServiceV2Client",
    tell: Callable[[str], None],
    pause: Callable[[], None] = lambda: time.sleep(PAUSE_S),
) -> Ending:
    """Tell states and log lines of a job until it has ended.

    Args:
        name: Full name of the job.
        jobs: Who knows its state.
        logs: Who has its lines.
        tell: Takes one line.
        pause: Waits between two looks.

    Raises:
        CloudError: One of both refuses, or cannot be reached for ten minutes.
    """
    reader, state = _LogReader(name, logs, tell), ""
    while True:
        job = _job(jobs, name)
        if job.state.name != state:
            state = job.state.name
            tell(f"{time.strftime('%H:%M:%S')} {state}")
        reader.look()
        if state in _ENDED:
            break
        pause()
    for _ in range(_LAST_LOOKS):
        pause()
        reader.look()
    error = job.error.message
    how: How = "stopped" if _ENDED[state] == "failed" and _STOPPED.search(error) else _ENDED[state]
    return Ending(how=how, state=state, error=error)


def _job(jobs: "JobServiceClient", name: str) -> "CustomJob":
    with explained():
        from google.api_core.retry import Retry

        return jobs.get_custom_job(name=name, retry=Retry(timeout=600))


class _LogReader:
    """Tells each line of a job once, the oldest first."""

    def __init__(self, name: str, client: "LoggingServiceV2Client", tell: Callable[[str], None]) -> None:
        _, project, _, _, _, number = name.split("/")
        self._project, self._number = project, number
        self._client, self._tell = client, tell
        self._newest = datetime.min.replace(tzinfo=timezone.utc)
        self._seen: dict[str, datetime] = {}

    def look(self) -> None:
        """Tell what came since the last time."""
        parts = ['resource.type="ml_job"', f'resource.labels.job_id="{self._number}"']
        if self._seen:
            since = self._newest - _LATE
            parts.append(f'timestamp>="{since.isoformat()}"')
            self._seen = {key: when for key, when in self._seen.items() if when >= since}
        with explained():
            from google.api_core.retry import Retry

            request = {
                "resource_names": [f"projects/{self._project}"],
                "filter": " AND ".join(parts),
                "order_by": "timestamp asc",
                "page_size": 1000,
            }
            for entry in self._client.list_log_entries(request=request, retry=Retry(timeout=600)):
                self._take(entry)

    def _take(self, entry: "LogEntry") -> None:
        if entry.insert_id in self._seen:
            return
        when = cast(datetime, entry.timestamp)  # what proto-plus makes of a Timestamp
        self._seen[entry.insert_id] = when
        self._newest = max(self._newest, when)
        worker = entry.resource.labels.get("task_name", "")
        self._tell(f"{when:%H:%M:%S} {f'{worker}: ' if worker else ''}{_text(entry)}")


def _text(entry: "LogEntry") -> str:
    """A line's text; Vertex AI sends what a container prints as JSON with a message."""
    if entry.text_payload:
        return entry.text_payload.rstrip("\n")
    payload = dict(entry.json_payload or {})
    return str(payload.get("message", payload)).rstrip("\n")
