"""A run's settings -> those that a job sends: only what was given, and no file of this machine."""

from collections.abc import Iterator, Mapping
from typing import Any

from dylora_moe.cloud.machines import Gpus
from dylora_moe.config import RunConfig
from dylora_moe.config.presets import AUTO, NONE, Machine, settle
from dylora_moe.data.paths import with_full_paths
from dylora_moe.errors import CloudError

# Where Vertex AI shows a container the buckets that its account may read.
_BUCKETS = "/gcs/"
# Bytes of a card that is known by its name.
_MUCH = 10**12
# Settings that may name files.
_PATHS = ("base_model", "datasets", "skills", "data_registry", "chat_template")


def sent_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that were given, as a recipe that makes the same run in a container.

    A named preset and a scenario are in the values already; the folder of runs is the container's own.

    Raises:
        CloudError: One names a file or a folder that is only here.
    """
    given = config.model_fields_set | {"run_name"}
    full = with_full_paths(config).model_dump(mode="json", include=given)
    for name in _PATHS:
        for path in _texts(full.get(name)):
            if path.startswith("/") and not path.startswith(_BUCKETS):
                raise CloudError(
                    f"{name} must name nothing that is only on this machine, got {path}. Copy it to a bucket with "
                    "`gcloud storage cp`, and give it as /gcs/BUCKET/PATH, where the container finds it."
                )
    if config.resume not in ("auto", "never"):
        raise CloudError(
            f"resume must be auto or never in a job, got {config.resume}, a folder of this machine. Leave it out: a "
            "job goes on from its own output."
        )
    sent = config.model_dump(mode="json", include=given, exclude={"output_dir", "scenario"})
    return sent if config.preset == AUTO else sent | {"preset": NONE}


def check_batch(config: RunConfig, gpus: Gpus | None, workers: int) -> None:
    """See that each batch can be shared by all processes of a job, one for each GPU, before machines are paid for it.

    Raises:
        CloudError: It cannot.
    """
    processes = workers * (gpus.count if gpus is not None else 1)
    if gpus is not None:  # whose preset may split the batch
        name = gpus.accelerator.replace("_", " ")
        machine = Machine(device_name=name, memory_bytes=_MUCH, kind="cuda", has_bf16="TESLA" not in name)
        config = settle(config, machine)
    if config.batch_size % processes:
        raise CloudError(
            f"batch_size must be a multiple of the number of processes, one for each GPU, which share each batch, got "
            f"{config.batch_size} (preset {config.preset}) for {processes}. Give --batch_size and "
            "--gradient_accumulation_steps, or other machines."
        )


def _texts(value: Any) -> Iterator[str]:
    """All texts in lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)
