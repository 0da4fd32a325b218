"""Settings and a recipe -> a custom job of Vertex AI, as its REST interface takes it. Pure, and without its clients."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from dylora_moe.cloud.container import PROCESSES, RECIPE
from dylora_moe.cloud.machines import Gpus, Price
from dylora_moe.cloud.secrets import VARIABLE, check_no_secrets
from dylora_moe.errors import CloudError

_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[^\s]*)?")
_LABEL = re.compile(r"[^a-z0-9_-]")
_MOST_LABEL = 63
COMMAND = ("dylora", "container")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """Where and on what a run is trained.

    Attributes:
        project: Of Google Cloud.
        region: Where the machines are.
        output: Folder in a bucket; the run's own is in it.
        image: The container.
        machine: Machine type.
        gpus: Its accelerators.
        workers: How many such machines.
        spot: Machines that may be taken away, for less.
        restarts: Whether Vertex AI tries again after errors that may pass.
        timeout_hours: After how long it ends the job.
        service_account: Whom the run acts as; None for the project's default.
        secrets: Variable -> full name of a version in Secret Manager.
    """

    project: str
    region: str
    output: str
    image: str
    machine: str
    gpus: Gpus | None
    workers: int = 1
    spot: bool = True
    restarts: bool = True
    timeout_hours: float = 24
    service_account: str | None = None
    secrets: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a job will cost by a price, in US dollars.

    Attributes:
        hour: (least, most) for an hour of all machines.
        limit: (least, most) when it runs until its timeout.
        price: Of one machine.
    """

    hour: tuple[float, float]
    limit: tuple[float, float]
    price: Price


def make_job(settings: JobSettings, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The job of a recipe.

    Args:
        settings: Where and on what.
        recipe: Settings of the run, with its run_name.

    Raises:
        CloudError: The output is in no bucket, or the recipe or another part holds what looks like a secret.
    """
    if not _BUCKET.fullmatch(settings.output):
        raise CloudError(f"--output must be a folder in a bucket, gs://BUCKET/FOLDER, got {settings.output!r}.")
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    check_no_secrets(text, "a recipe that is sent in a job")
    name = str(recipe["run_name"])
    scheduling: dict[str, Any] = {
        "timeout": f"{round(settings.timeout_hours * 3600)}s",
        "strategy": "SPOT" if settings.spot else "STANDARD",
        "disableRetries": not settings.restarts,
    }
    if settings.workers > 1 and settings.restarts:
        # Processes that have met cannot take in one that comes anew, so that all must begin again with it.
        scheduling["restartJobOnWorkerRestart"] = True
    spec: dict[str, Any] = {
        "workerPoolSpecs": _pools(settings, text),
        "scheduling": scheduling,
        "baseOutputDirectory": {"outputUriPrefix": f"{settings.output.rstrip('/')}/{name}"},
    }
    if settings.service_account:
        spec["serviceAccount"] = settings.service_account
    job = {
        "displayName": f"dylora-{name}"[:128],
        "jobSpec": spec,
        "labels": {"dylora-run": _LABEL.sub("-", name.lower())[:_MOST_LABEL]},
    }
    check_no_secrets(json.dumps(job, ensure_ascii=False), "a job")
    return job


def _pools(settings: JobSettings, recipe: str) -> list[dict[str, Any]]:
    """The primary machine's, and that of the others where there are some."""
    machine: dict[str, Any] = {"machineType": settings.machine}
    variables = {RECIPE: recipe}
    if settings.gpus is not None:
        machine |= {"acceleratorType": settings.gpus.accelerator, "acceleratorCount": settings.gpus.count}
        if settings.gpus.count > 1:
            variables[PROCESSES] = str(settings.gpus.count)
    if settings.secrets:
        variables[VARIABLE] = json.dumps(dict(settings.secrets))
    container = {
        "imageUri": settings.image,
        "command": list(COMMAND),
        "env": [{"name": name, "value": value} for name, value in variables.items()],
    }
    counts = [1] if settings.workers == 1 else [1, settings.workers - 1]
    return [{"machineSpec": machine, "replicaCount": str(count), "containerSpec": container} for count in counts]


def cost_of(settings: JobSettings, price: Price) -> Cost:
    """What a job costs an hour, and at the most."""
    hour = (price.least * settings.workers, price.most * settings.workers)
    limit = (hour[0] * settings.timeout_hours, hour[1] * settings.timeout_hours)
    return Cost(hour=hour, limit=limit, price=price)
