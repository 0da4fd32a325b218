"""What a container of Vertex AI does: its environment -> the command that trains. The same one starts and goes on."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from dylora_moe.cloud.workers import rendezvous
from dylora_moe.errors import CloudError

RECIPE = "DYLORA_RECIPE"
PROCESSES = "DYLORA_PROCESSES"
# Where Vertex AI has a run leave what must outlive its machine; with a base output folder it sets both.
_REMOTE = ("AIP_CHECKPOINT_DIR", "AIP_MODEL_DIR")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How a container trains.

    Attributes:
        recipe: Content of the recipe's file.
        file: Its path.
        command: Program and arguments.
        variables: Those that it needs besides.
    """

    recipe: str
    file: Path
    command: tuple[str, ...]
    variables: Mapping[str, str]


def launch_of(environ: Mapping[str, str], folder: Path, python: str = sys.executable) -> Launch:
    """The command that trains in a container with this environment.

    Args:
        environ: DYLORA_RECIPE, the recipe's text; AIP_CHECKPOINT_DIR or AIP_MODEL_DIR, where what outlives the
            machine goes, unless the recipe says where; CLUSTER_SPEC, where there are several machines;
            DYLORA_PROCESSES, processes on each.
        folder: Where the recipe's file goes.
        python: The interpreter.

    Raises:
        CloudError: There is no recipe, or one of the others has another form.
    """
    recipe = environ.get(RECIPE, "")
    try:
        settings = yaml.safe_load(recipe)
    except yaml.YAMLError as error:
        raise CloudError(f"{RECIPE} must be a recipe in YAML, got none: {error}") from error
    if not isinstance(settings, dict) or not settings.get("run_name") or "/" in str(settings["run_name"]):
        raise CloudError(
            f"{RECIPE} must hold the text of a recipe with a run_name, the name of a folder, got {len(recipe)} "
            "characters without. `dylora submit vertex` sets it."
        )
    file = folder / f"{settings['run_name']}.yaml"
    program, flags, variables = _processes(environ)
    remote = [] if settings.get("remote_dir") else _remote(environ)
    train = ["train", str(file), *flags, *remote]
    return Launch(recipe=recipe, file=file, command=(python, "-m", *program, *train), variables=variables)


def _remote(environ: Mapping[str, str]) -> list[str]:
    for variable in _REMOTE:
        if url := environ.get(variable, "").rstrip("/"):
            return ["--remote_dir", url]
    return []


def _processes(environ: Mapping[str, str]) -> tuple[list[str], list[str], dict[str, str]]:
    """What `python -m` runs, flags of the training, and variables: for a process for each GPU of all machines."""
    meet, given = rendezvous(environ.get("CLUSTER_SPEC")), environ.get(PROCESSES, "1")
    if not given.isdecimal() or int(given) < 1:
        raise CloudError(f"{PROCESSES} must be a number of processes of at least 1, got {given!r}.")
    processes = int(given)
    if meet is None:
        return ["dylora_moe"], ["--nproc", given] if processes > 1 else [], {}
    if processes == 1:  # without torchrun, which would have an exit code of its own
        return ["dylora_moe"], [], meet.variables()
    return ["torch.distributed.run", *meet.torchrun(processes), "-m", "dylora_moe"], [], {}
