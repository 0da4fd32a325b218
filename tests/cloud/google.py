"""Vertex AI and Cloud Logging as a server on this machine that speaks their own protocol, and clients of it.

Messages are Google's: what has a field that they do not know, or lacks one that they mark as required, is refused.
"""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

import grpc
import proto
from google.cloud.aiplatform_v1 import CustomJob, JobServiceClient, JobState
from google.cloud.aiplatform_v1.services.job_service.transports import JobServiceGrpcTransport
from google.cloud.aiplatform_v1.types import job_service
from google.cloud.logging_v2.services.logging_service_v2 import LoggingServiceV2Client
from google.cloud.logging_v2.services.logging_service_v2.transports import LoggingServiceV2GrpcTransport
from google.cloud.logging_v2.types import ListLogEntriesRequest, ListLogEntriesResponse, LogEntry
from google.protobuf.unknown_fields import UnknownFieldSet

JOBS = "google.cloud.aiplatform.v1.JobService"
LOGS = "google.logging.v2.LoggingServiceV2"
_BEHAVIOUR = re.compile(r"^ +(\w+) \([^)]*\):\n +(Required|Output only)", re.MULTILINE)
BEGAN = datetime(2026, 11, 23, 12, 0, 0, tzinfo=timezone.utc)


@dataclass
class Google:
    """What the server has and was asked.

    Attributes:
        jobs: Name -> job.
        asked: Requests, the oldest first.
        states: Of the newest job, one for each time that it is asked for; the last one stays.
        error: What the job says at its end.
        lines: For each look at the logs, those that are there from then on.
        refuse: Status that the next requests for jobs get.
    """

    jobs: dict[str, CustomJob] = field(default_factory=dict)
    asked: list[Any] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    error: str = ""
    lines: list[list[LogEntry]] = field(default_factory=list)
    refuse: list[grpc.StatusCode] = field(default_factory=list)

    def create(self, request: Any, context: grpc.ServicerContext) -> CustomJob:
        job = CustomJob(request.custom_job)
        job.name = f"{request.parent}/customJobs/{1000 + len(self.jobs)}"
        job.state = JobState.JOB_STATE_QUEUED
        self.jobs[job.name] = job
        return job

    def get(self, request: Any, context: grpc.ServicerContext) -> CustomJob:
        job = self.jobs[request.name]
        if self.states:
            job.state = JobState[self.states.pop(0) if len(self.states) > 1 else self.states[0]]
        if job.state in (JobState.JOB_STATE_FAILED, JobState.JOB_STATE_CANCELLED) and self.error:
            job.error = {"code": 3, "message": self.error}
        return job

    def list(self, request: Any, context: grpc.ServicerContext) -> job_service.ListCustomJobsResponse:
        """Of the filters that Vertex AI documents those that are used here: a name, and states."""
        wanted = request.filter
        found = [
            job
            for job in self.jobs.values()
            if f'display_name="{job.display_name}"' in wanted and f'state="{job.state.name}"' in wanted
        ]
        return job_service.ListCustomJobsResponse(custom_jobs=found)

    def entries(self, request: Any, context: grpc.ServicerContext) -> ListLogEntriesResponse:
        if len(self.lines) > 1:
            self.lines[1] = self.lines[0] + self.lines[1]
            found = self.lines.pop(0)
        else:
            found = self.lines[0] if self.lines else []
        since = re.search(r'timestamp>="(.*)"', request.filter)
        least = datetime.fromisoformat(since[1]) if since else BEGAN
        return ListLogEntriesResponse(
            entries=sorted((each for each in found if each.timestamp >= least), key=lambda each: each.timestamp)
        )


def line(text: str, *, second: int, number: int = 0, as_json: bool = False) -> LogEntry:
    """One line of a container's log, as Vertex AI files it."""
    payload: dict[str, Any] = (
        {"json_payload": {"message": text, "levelname": "INFO"}} if as_json else {"text_payload": text}
    )
    return LogEntry(
        log_name="projects/p/logs/workerpool0-0",
        resource={"type": "ml_job", "labels": {"job_id": "1000", "task_name": "workerpool0-0"}},
        timestamp=BEGAN + timedelta(seconds=second),
        insert_id=f"{second}-{number}",
        **payload,
    )


def faults_of(message: proto.Message, where: str = "") -> list[str]:
    """Fields that Google's classes do not know, lack though required, or keep to themselves; in all that is in it, too.

    What is required is not in the messages' descriptors, but in the text that documents them.
    """
    kind = type(message)
    name = where or kind.__name__
    faults = [f"{name} has an unknown field {each.field_number}" for each in UnknownFieldSet(kind.pb(message))]
    documented = dict(_BEHAVIOUR.findall(kind.__doc__ or ""))
    for part, schema in kind.meta.fields.items():
        value = getattr(message, part)
        if documented.get(part) == "Required" and part not in message:
            faults.append(f"{name} lacks {part}")
        if documented.get(part) == "Output only" and part in message:
            faults.append(f"{name} sets {part}, which is Google's")
        inner = value if schema.repeated else [value] if part in message else []
        faults += [
            fault for each in inner if isinstance(each, proto.Message) for fault in faults_of(each, f"{name}.{part}")
        ]
    return faults


@contextmanager
def serving() -> Iterator[tuple[Google, JobServiceClient, LoggingServiceV2Client]]:
    """The server, and clients of it with Google's own transport."""
    google = Google()

    def handler(answer: Callable[..., Any], kind: Any) -> grpc.RpcMethodHandler:
        def take(content: bytes, context: grpc.ServicerContext) -> Any:
            request = kind.deserialize(content)
            faults = faults_of(request)
            if faults:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "; ".join(faults))
            google.asked.append(request)
            if google.refuse:
                context.abort(google.refuse.pop(0), "refused for the test")
            return answer(request, context)

        return grpc.unary_unary_rpc_method_handler(
            take, response_serializer=lambda message: type(message).serialize(message)
        )

    handlers = {
        JOBS: {
            "CreateCustomJob": handler(google.create, job_service.CreateCustomJobRequest),
            "GetCustomJob": handler(google.get, job_service.GetCustomJobRequest),
            "ListCustomJobs": handler(google.list, job_service.ListCustomJobsRequest),
        },
        LOGS: {"ListLogEntries": handler(google.entries, ListLogEntriesRequest)},
    }
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(service, methods) for service, methods in handlers.items()]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    try:
        jobs = JobServiceClient(transport=JobServiceGrpcTransport(channel=channel))
        logs = LoggingServiceV2Client(transport=LoggingServiceV2GrpcTransport(channel=channel))
        yield google, jobs, logs
    finally:
        channel.close()
        server.stop(None).wait()
