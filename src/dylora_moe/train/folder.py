"""A run's folder that is not empty: the same run, finished or not, or something else; and where to go on from."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml

from dylora_moe import ranks
from dylora_moe.config import RunConfig
from dylora_moe.config.presets import AUTO, name_run, settle
from dylora_moe.errors import DyLoraError, RunError
from dylora_moe.evaluate.load import read_config
from dylora_moe.remote.fetching import read_remote
from dylora_moe.run_dir import CHECKPOINTS, CONFIG, RESULT, RunDir
from dylora_moe.train.checkpoint import find_fault, find_newest
from dylora_moe.train.keeper import RUN
from dylora_moe.train.machine import this_machine
from dylora_moe.train.spreading import spread

# They say where a run is, how it is kept and watched, and change no figure of it.
_HARMLESS = {
    "output_dir",
    "remote_dir",
    "run_name",
    "save_steps",
    "save_total_limit",
    "resume",
    "wandb_checkpoint_artifact",
    "report_to",
    "wandb_artifacts",
    "preset",
    "scenario",
    "sharding",
    "dataloader_num_workers",
    "dataloader_pin_memory",
}
# Of an unfinished run: it has only its lines of metrics elsewhere.
LINES_ELSEWHERE = {"logging_steps"}


def settle_here(config: RunConfig, tell: Callable[[str], None] = lambda text: None) -> RunConfig:
    """The run as this machine trains it, or as the machine did that began it; a remote folder is waited for."""
    machine = this_machine()
    named = name_run(config, machine)
    try:
        stored = read_config(RunDir(named.run_dir)).preset
    except DyLoraError:  # no run of ours, or none yet
        stored = _remote_preset(named, tell)
    return settle(config, machine, stored)


def _remote_preset(config: RunConfig, tell: Callable[[str], None]) -> str | None:
    """That of the machine which began the run, where only the remote folder knows."""
    if config.remote_dir is None or config.preset != AUTO:
        return None
    text = read_remote(f"{config.remote_dir.rstrip('/')}/{config.run_name}", CONFIG, tell)
    return None if text is None else yaml.safe_load(text).get("preset")


def fetch_nothing(name: str) -> Path:
    """For runs that never begin from an artifact."""
    raise RunError(f"wandb_checkpoint_artifact must not be given here, got {name}.")


def find_start(
    run: RunDir, config: RunConfig, tell: Callable[[str], None], fetch: Callable[[str], Path] = fetch_nothing
) -> Path | None:
    """The checkpoint to go on from, None to begin; what is wrong with newer ones is told.

    That of the run's own folder comes first, so that the same command starts a run and goes on with it.

    Args:
        run: The run's folder.
        config: The settings now.
        tell: Takes what a person should know.
        fetch: Name of an artifact -> the folder of the checkpoint in it.

    Raises:
        RunError: The folder holds something else or a run with other settings, or the checkpoint that was asked for is
            not sound or is of such a run.
    """
    _check_unfinished(run, config)
    own = find_newest(run / CHECKPOINTS, tell=tell)
    if own is not None:
        if config.resume not in ("auto", "never") or config.wandb_checkpoint_artifact is not None:
            tell(f"{run.path} has checkpoints of its own: the run goes on from the newest of them.")
        return own
    if config.wandb_checkpoint_artifact is not None:
        return _check_given(fetch(config.wandb_checkpoint_artifact), config)
    return None if config.resume in ("auto", "never") else _check_given(Path(config.resume).expanduser(), config)


def find_start_together(
    run: RunDir, config: RunConfig, tell: Callable[[str], None], fetch: Callable[[str], Path] = fetch_nothing
) -> Path | None:
    """`find_start` by the first process of a run, for all, who have the checkpoint on their disks by then."""
    found = ranks.by_first(lambda: [str(path) for path in [find_start(run, config, tell, fetch)] if path is not None])
    if not found:
        return None
    spread(Path(found[0]))
    return Path(found[0])


def _check_unfinished(run: RunDir, config: RunConfig) -> None:
    if run.is_empty:
        return
    try:
        stored = read_config(run)
    except DyLoraError:  # no run of ours
        stored = None
    if stored is not None and config.resume == "never":
        raise RunError(
            f"{run.path} holds a run that did not finish, and resume is never. Go on with --resume auto, choose "
            "another --run_name, or move or delete the folder; nothing was changed."
        )
    if stored is None:
        raise RunError(
            f"a run folder must be new or empty, and {run.path} holds something else. "
            "Move or delete it, or choose another --run_name; nothing was changed."
        )
    if changed := differences(stored, config, also_harmless=LINES_ELSEWHERE):
        raise RunError(
            f"{run.path} holds an unfinished run with other settings: {changed}. Go on with its own, or choose another "
            "--run_name; nothing was changed."
        )


def _check_given(checkpoint: Path, config: RunConfig) -> Path:
    if (inside := find_newest(checkpoint / CHECKPOINTS, tell=lambda text: None)) is not None:
        raise RunError(
            f"resume must be the folder of a checkpoint, and {checkpoint} is a run. Its newest one is {inside}."
        )
    fault = find_fault(checkpoint) if checkpoint.exists() else "it does not exist"
    if fault is not None:
        raise RunError(
            f"resume must be auto, never or the folder of a sound checkpoint, and {checkpoint} is none: {fault}."
        )
    if changed := differences(read_config(RunDir(checkpoint / RUN)), config, also_harmless=LINES_ELSEWHERE):
        raise RunError(f"the checkpoint {checkpoint} is of a run with other settings: {changed}. Go on with its own.")
    return checkpoint


def finished_result(run: RunDir, config: RunConfig) -> dict[str, Any]:
    """The result of a finished run, marked as `already_finished`.

    Raises:
        RunError: It had other settings.
    """
    if changed := differences(read_config(run), config):
        raise RunError(f"{run.path} holds a finished run with other settings: {changed}. Choose another --run_name.")
    return {**run.read(RESULT), "already_finished": True}


def differences(there: RunConfig, here: RunConfig, *, also_harmless: Collection[str] = ()) -> str:
    """Settings with other values, as text; empty where there is none that matters."""
    names = [name for name in RunConfig.model_fields if name not in _HARMLESS and name not in also_harmless]
    changed = [name for name in names if getattr(there, name) != getattr(here, name)]
    return ", ".join(f"{name} {getattr(there, name)!r} there, {getattr(here, name)!r} here" for name in changed)
