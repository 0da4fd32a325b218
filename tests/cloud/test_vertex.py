"""Jobs are sent by Google's client to a server that takes nothing but its messages."""

from typing import Any

import pytest
from tests.cloud.test_job import RECIPE, SETTINGS

from dylora_moe.cloud.job import make_job
from dylora_moe.errors import CloudError

PARENT = "projects/p/locations/us-central1"

pytest.importorskip("google.cloud.aiplatform_v1", reason="the extra vertex is not installed")
grpc = pytest.importorskip("grpc", reason="the extra vertex is not installed")
from dylora_moe.cloud.vertex import checked, submit, under_way  # noqa: E402


def test_a_job_arrives_as_it_was_made(google: Any) -> None:
    server, jobs, _ = google
    message = checked(make_job(SETTINGS, RECIPE))
    name = submit(jobs, PARENT, message)
    assert name == f"{PARENT}/customJobs/1000"
    (request,) = server.asked
    assert request.parent == PARENT and request.custom_job == message


def test_the_server_refuses_what_google_would(google: Any) -> None:
    """So that a green test means something: an empty job, and one with an unknown field, do not get through."""
    from google.cloud.aiplatform_v1 import CustomJob

    _, jobs, _ = google
    with pytest.raises(CloudError, match="lacks display_name"):
        submit(jobs, PARENT, CustomJob())
    message = checked(make_job(SETTINGS, RECIPE))
    CustomJob.pb(message).MergeFromString(b"\xaa\xf4\x01\x01x")  # field 3909, a text
    with pytest.raises(CloudError, match="unknown field 3909"):
        submit(jobs, PARENT, message)


def test_a_job_of_the_same_output_is_found_while_it_is_under_way(google: Any) -> None:
    from google.cloud.aiplatform_v1 import JobState

    server, jobs, _ = google
    message = checked(make_job(SETTINGS, RECIPE))
    assert under_way(jobs, PARENT, message) is None
    name = submit(jobs, PARENT, message)
    assert under_way(jobs, PARENT, message) == name
    elsewhere = checked(make_job(SETTINGS, RECIPE))
    elsewhere.job_spec.base_output_directory.output_uri_prefix = "gs://other/runs"
    assert under_way(jobs, PARENT, elsewhere) is None
    server.jobs[name].state = JobState.JOB_STATE_CANCELLING  # it still writes its last checkpoint
    assert under_way(jobs, PARENT, message) == name
    for state in ("JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED"):
        server.jobs[name].state = JobState[state]
        assert under_way(jobs, PARENT, message) is None


@pytest.mark.parametrize(
    ("status", "words"),
    [("PERMISSION_DENIED", r"roles/aiplatform\.user"), ("INVALID_ARGUMENT", "InvalidArgument: ref")],
)
def test_refusals_say_what_to_do(google: Any, status: str, words: str) -> None:
    server, jobs, _ = google
    server.refuse = [grpc.StatusCode[status]]
    with pytest.raises(CloudError, match=words):
        submit(jobs, PARENT, checked(make_job(SETTINGS, RECIPE)))


def test_without_credentials_it_says_how_to_get_some(monkeypatch: pytest.MonkeyPatch) -> None:
    from google.auth.exceptions import DefaultCredentialsError

    from dylora_moe.cloud.explain import explained

    with pytest.raises(CloudError, match="gcloud auth application-default login"), explained():
        raise DefaultCredentialsError("none")
    with pytest.raises(KeyError), explained():  # any other error is none of Google's
        raise KeyError("a bug")
