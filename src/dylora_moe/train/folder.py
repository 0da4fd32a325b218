"""A run's folder that is not empty: the same run, finished or not, or something else."""

from collections.abc import Collection
from typing import Any

from dylora_moe.config import RunConfig
from dylora_moe.errors import DyLoraError, RunError
from dylora_moe.evaluate.load import read_config
from dylora_moe.run_dir import RESULT, RunDir

# They say where a run is and how it is kept, and change no figure of it.
_HARMLESS = {"output_dir", "run_name", "save_steps", "save_total_limit", "resume"}


def check_unfinished(run: RunDir, config: RunConfig) -> None:
    """See to it that the run's folder is empty, or holds the same run, which did not finish.

    Raises:
        RunError: It holds something else, or a run with other settings.
    """
    if run.is_empty:
        return
    try:
        stored = None if config.resume == "never" else read_config(run)
    except DyLoraError:  # no run of ours
        stored = None
    if stored is None:
        raise RunError(
            f"a run folder must be new or empty, and {run.path} holds something else or a run that did not finish. "
            "Move or delete it, or choose another --run_name; nothing was changed."
        )
    if changed := _differences(stored, config, harmless=_HARMLESS | {"logging_steps"}):
        raise RunError(
            f"{run.path} holds an unfinished run with other settings: {changed}. Go on with its own, or choose another "
            "--run_name; nothing was changed."
        )


def finished_result(run: RunDir, config: RunConfig) -> dict[str, Any]:
    """The result of a finished run, marked as `already_finished`.

    Raises:
        RunError: It had other settings.
    """
    if changed := _differences(read_config(run), config, harmless=_HARMLESS):
        raise RunError(f"{run.path} holds a finished run with other settings: {changed}. Choose another --run_name.")
    return {**run.read(RESULT), "already_finished": True}


def _differences(there: RunConfig, here: RunConfig, *, harmless: Collection[str]) -> str:
    """Settings with other values, as text; empty where there is none that matters."""
    names = [name for name in RunConfig.model_fields if name not in harmless]
    changed = [name for name in names if getattr(there, name) != getattr(here, name)]
    return ", ".join(f"{name} {getattr(there, name)!r} there, {getattr(here, name)!r} here" for name in changed)
