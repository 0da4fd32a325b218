"""What is kept as artifacts of Weights & Biases, and checkpoints that come from there."""

import os
import re
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dylora_moe.errors import ConfigError, RunError
from dylora_moe.train.checkpoint import MANIFEST
from dylora_moe.train.trackers.check import check_wandb_key

_REFERENCE = re.compile(r"[^/:\s]+/[^/:\s]+/[^/:\s]+:[^/:\s]+")


def copy_by_links(folder: Path, target: Path) -> Path:
    """A copy of a folder that outlives it, made at once and without space where the disk has hard links.

    Returns:
        `target`, anew where it was there.
    """
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(folder, target, copy_function=_link))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def fetch_checkpoint(reference: str, into: Path) -> Path:
    """Download an artifact, and return the folder of the checkpoint in it; whether it is sound is not looked at.

    Args:
        reference: `user/project/name:v0`; any alias can stand for the version.
        into: Folder to download into.

    Raises:
        ConfigError: The reference has another form, or wandb or its key is missing.
        RunError: It cannot be downloaded, or holds no checkpoint.
    """
    if not _REFERENCE.fullmatch(reference):
        raise ConfigError(f"wandb_checkpoint_artifact must be user/project/name:v0, got {reference!r}.")
    if find_spec("wandb") is None:
        raise ConfigError("wandb_checkpoint_artifact needs the package wandb. Install it: pip install wandb.")
    check_wandb_key()
    wandb: Any = import_module("wandb")
    try:
        wandb.Api().artifact(reference).download(root=str(into))
    except Exception as error:
        raise RunError(
            f"The artifact {reference} must be there and readable with your WANDB_API_KEY, got {type(error).__name__}: "
            f"{error}. Look at its page on W&B for its name, and at the network."
        ) from error
    return find_checkpoint(into, reference)


def find_checkpoint(folder: Path, reference: str) -> Path:
    """The folder of the one checkpoint in a downloaded artifact.

    Raises:
        RunError: There is none, or several.
    """
    found = sorted(path.parent for path in folder.rglob(MANIFEST))
    if len(found) != 1:
        raise RunError(
            f"The artifact {reference} must hold one checkpoint, a folder with {MANIFEST}, got {len(found)}. Make one "
            "of a checkpoint: wandb artifact put --type checkpoint RUN/checkpoints/step-NNNNNN."
        )
    return found[0]
