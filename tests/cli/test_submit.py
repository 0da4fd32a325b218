"""`dylora submit vertex`: what a dry run prints, what is sent, and how following ends."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

Run = Callable[..., Any]
RECIPES = Path(__file__).parents[2] / "recipes"
PLACE = ("--project", "p", "--output", "gs://bucket/runs", "--image", "docker.io/o/dylora-moe:cuda")
SENT = ("submit", "vertex", RECIPES / "quickstart.yaml", *PLACE)


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Vertex AI on this machine, which the command finds in place of Google's."""
    pytest.importorskip("google.cloud.aiplatform_v1", reason="the extra vertex is not installed")
    from tests.cloud.google import serving

    from dylora_moe.cloud import follow, vertex

    with serving() as (server, jobs, logs):
        monkeypatch.setattr(vertex, "job_client", lambda region: jobs)
        monkeypatch.setattr(vertex, "log_client", lambda: logs)
        monkeypatch.setattr(follow, "PAUSE_S", 0)
        yield server


@pytest.mark.parametrize("name", ["full", "poc", "proof_of_concept"])
def test_a_dry_run_prints_a_job_that_google_accepts(dylora: Run, name: str, monkeypatch: Any) -> None:
    """Without any place, project or image: the recipes of the founding documents."""
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    outcome = dylora("submit", "vertex", RECIPES / f"{name}.yaml", "--dry-run")
    assert outcome.code == 0, outcome.err
    job, _, rest = outcome.out.partition("\nThe container runs")
    parsed = yaml.safe_load(job)
    assert "`dylora container`" in rest and f"--remote_dir gs://bucket/folder/{name}/checkpoints" in rest
    assert "$0.39 to $0.47 an hour" in rest and "2025-03-06" in rest and "at the most $9.45 to $11.34" in rest
    assert "Sent nothing. To send it, give --project, --output, --image, too." in rest
    pytest.importorskip("google.cloud.aiplatform_v1", reason="the extra vertex is not installed")
    from dylora_moe.cloud.vertex import checked

    message = checked(parsed)
    assert message.display_name == f"dylora-{name}"
    assert message.job_spec.worker_pool_specs[0].machine_spec.accelerator_type.name == "NVIDIA_L4"


def test_what_is_printed_is_what_is_sent(dylora: Run, google: Any) -> None:
    flags = ("--workers", "2", "--secret", "HF_TOKEN=hf-token", "--num_experts", "8", "--service-account", "a@b")
    dry = dylora(*SENT, *flags, "--dry-run", "--json").json()
    assert google.asked == [] and dry["missing"] == [] and dry["checked"]
    sent = dylora(*SENT, *flags, "--json").json()
    assert sent["job"] == dry["job"] and sent["name"] == "projects/p/locations/us-central1/customJobs/1000"
    from dylora_moe.cloud.vertex import checked

    listing, creation = google.asked
    assert creation.custom_job == checked(dry["job"]) and listing.parent == creation.parent
    env = {each.name: each.value for each in creation.custom_job.job_spec.worker_pool_specs[1].container_spec.env}
    assert yaml.safe_load(env["DYLORA_RECIPE"])["num_experts"] == 8
    assert json.loads(env["DYLORA_SECRETS"]) == {"HF_TOKEN": "projects/p/secrets/hf-token/versions/latest"}


def test_no_secret_of_the_environment_is_in_what_is_sent(dylora: Run, google: Any, monkeypatch: Any) -> None:
    token = "hf_" + "aB3" * 11
    for name in ("HF_TOKEN", "WANDB_API_KEY", "DYLORA_API_KEY"):
        monkeypatch.setenv(name, token)
    outcome = dylora(*SENT, "--secret", "HF_TOKEN=hf-token")
    assert outcome.code == 0 and token not in outcome.out + outcome.err
    assert all(token not in str(request) for request in google.asked)
    outcome = dylora(*SENT, "--secret", f"HF_TOKEN={token}")
    assert outcome.code == 1 and "the secret itself" in outcome.err and token not in outcome.err


def test_the_same_command_again_sends_no_second_job(dylora: Run, google: Any) -> None:
    assert "Sent: projects/p/locations/us-central1/customJobs/1000" in dylora(*SENT).out
    again = dylora(*SENT)
    assert again.code == 0 and len(google.jobs) == 1
    assert "under way, so no other was sent: projects/p/locations/us-central1/customJobs/1000" in again.out
    google.states = ["JOB_STATE_RUNNING", "JOB_STATE_SUCCEEDED"]
    followed = dylora(*SENT, "--follow")
    assert followed.code == 0 and len(google.jobs) == 1 and "Trained." in followed.out
    assert dylora(*SENT).code == 0 and len(google.jobs) == 2  # the first has ended


@pytest.mark.parametrize(
    ("state", "error", "code", "words"),
    [
        ("SUCCEEDED", "", 0, "Trained."),
        ("FAILED", "The replica workerpool0-0 exited with a non-zero status of 1.", 1, "Its log says why"),
        ("FAILED", "The replica workerpool0-0 exited with a non-zero status of 75.", 75, "goes on"),
        ("CANCELLED", "", 75, "goes on"),
    ],
)
def test_the_exit_code_says_how_it_ended(
    dylora: Run, google: Any, state: str, error: str, code: int, words: str
) -> None:
    from tests.cloud.google import line

    google.states = ["JOB_STATE_PENDING", "JOB_STATE_RUNNING", f"JOB_STATE_{state}"]
    google.error, google.lines = error, [[line("step 1/5\x1b[2J", second=1)]]
    outcome = dylora(*SENT, "--follow", "--json")
    assert outcome.code == code, outcome.err
    assert words in outcome.err and error in outcome.err
    assert "12:00:01 workerpool0-0: step 1/5\\x1b[2J" in outcome.err  # what a log holds steers no terminal
    told = json.loads(outcome.out)
    assert told["ended"]["state"] == f"JOB_STATE_{state}" and told["cost"]["hour"]


def test_a_cost_that_is_not_known_is_not_made_up(dylora: Run) -> None:
    machine = ("--machine", "n1-standard-8", "--accelerator", "NVIDIA_TESLA_T4", "--dry-run")
    outcome = dylora(*SENT, *machine)
    assert outcome.code == 0 and "Cost: not known for n1-standard-8 in us-central1, spot." in outcome.out
    outcome = dylora(*SENT, *machine, "--price_per_hour", "0.5", "--timeout-hours", "3")
    assert "Cost: $0.50 an hour (n1-standard-8 in us-central1, spot), at the most $1.50 for the 3 hours" in outcome.out
    assert "Prices are of" not in outcome.out


def test_what_is_missing_is_named(dylora: Run, monkeypatch: Any) -> None:
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    outcome = dylora("submit", "vertex", RECIPES / "full.yaml", "--output", "gs://bucket/runs")
    assert outcome.code == 1 and "a job needs --project, --image" in outcome.err


@pytest.mark.parametrize(
    "flags",
    [
        ("--timeout_hours", "inf"),
        ("--timeout_hours", "nan"),
        ("--timeout_hours", "0.001"),
        ("--price_per_hour", "nan"),
        ("--price_per_hour", "inf"),
    ],
)
def test_a_number_that_is_none_is_a_wrong_command_line(dylora: Run, flags: tuple[str, str]) -> None:
    outcome = dylora(*SENT, *flags, "--dry-run")
    assert outcome.code == 2 and flags[0].replace("_", "-") in outcome.err.replace("_", "-")


def test_a_batch_that_all_gpus_cannot_share_is_refused(dylora: Run) -> None:
    machine = ("--machine", "g2-standard-48", "--dry-run")
    outcome = dylora("submit", "vertex", RECIPES / "poc.yaml", *PLACE, *machine)
    assert outcome.code == 1 and "multiple of the number of processes" in outcome.err
    outcome = dylora("submit", "vertex", RECIPES / "poc.yaml", *PLACE, *machine, "--batch_size", "8")
    assert outcome.code == 0, outcome.err


def test_a_wrong_setting_is_refused_as_by_train(dylora: Run) -> None:
    outcome = dylora(*SENT, "--num_expert", "8", "--dry-run")
    assert outcome.code == 2 and "Did you mean --num_experts" in outcome.err
    outcome = dylora(*SENT, "--top_k", "99", "--dry-run")
    assert outcome.code == 1 and "top_k" in outcome.err


def test_a_dry_run_needs_no_client_of_google(dylora: Run, monkeypatch: Any) -> None:
    import sys

    for name in [name for name in sys.modules if name.split(".")[:2] == ["google", "cloud"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "google.cloud.aiplatform_v1", None)
    outcome = dylora(*SENT, "--dry-run")
    assert outcome.code == 0 and "displayName: dylora-quickstart" in outcome.out
    assert "not checked" in outcome.out
    outcome = dylora(*SENT)
    assert outcome.code == 1 and "pip install 'dylora-moe[vertex]'" in outcome.err
