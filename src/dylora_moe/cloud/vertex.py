"""Vertex AI's own client: is a job what its messages allow, is one of the same output under way, send it."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dylora_moe.cloud.explain import explained
from dylora_moe.errors import CloudError

if TYPE_CHECKING:
    from google.cloud.aiplatform_v1 import CustomJob, JobServiceClient
    from google.cloud.logging_v2.services.logging_service_v2 import LoggingServiceV2Client

# States of a job that has not ended; one that is cancelled still writes its last checkpoint.
_UNDER_WAY = tuple(
    f"JOB_STATE_{state}" for state in ("QUEUED", "PENDING", "RUNNING", "CANCELLING", "PAUSED", "UPDATING")
)


def is_installed() -> bool:
    """Whether Vertex AI's client is there."""
    try:
        return find_spec("google.cloud.aiplatform_v1") is not None
    except (ModuleNotFoundError, ValueError):
        return False


def job_client(region: str) -> "JobServiceClient":
    """A client of the jobs in a region, with the credentials that are found here.

    Raises:
        CloudError: The client is not installed, or there are no credentials.
    """
    with explained():
        from google.cloud.aiplatform_v1 import JobServiceClient

        return JobServiceClient(client_options={"api_endpoint": f"{region}-aiplatform.googleapis.com"})


def log_client() -> "LoggingServiceV2Client":
    """A client of Cloud Logging, with the credentials that are found here.

    Raises:
        CloudError: The client is not installed, or there are no credentials.
    """
    with explained():
        from google.cloud.logging_v2.services.logging_service_v2 import LoggingServiceV2Client

        return LoggingServiceV2Client()


def checked(job: Mapping[str, Any]) -> "CustomJob":
    """A job as the client's own message, which knows every field and refuses others.

    Raises:
        CloudError: The client is not installed, or a field or a value is not Vertex AI's.
    """
    with explained():
        from google.cloud.aiplatform_v1 import CustomJob
    from google.protobuf.json_format import ParseDict, ParseError

    message = CustomJob()
    try:
        ParseDict(dict(job), CustomJob.pb(message))
    except ParseError as error:
        raise CloudError(f"the job must be one that Vertex AI's messages allow, and is not: {error}.") from error
    return message


def under_way(client: "JobServiceClient", parent: str, job: "CustomJob") -> str | None:
    """The name of a job that has not ended and writes to the same folder; None where there is none.

    Raises:
        CloudError: Vertex AI refuses, or cannot be reached.
    """
    output = job.job_spec.base_output_directory.output_uri_prefix
    states = " OR ".join(f'state="{state}"' for state in _UNDER_WAY)
    with explained():
        found = client.list_custom_jobs(
            request={"parent": parent, "filter": f'display_name="{job.display_name}" AND ({states})'}
        )
        for other in found:
            if other.job_spec.base_output_directory.output_uri_prefix == output:
                return other.name
    return None


def submit(client: "JobServiceClient", parent: str, job: "CustomJob") -> str:
    """Send a job; gives its name.

    Raises:
        CloudError: Vertex AI refuses, or cannot be reached.
    """
    with explained():
        return client.create_custom_job(request={"parent": parent, "custom_job": job}).name
