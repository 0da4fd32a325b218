"""`dylora container`: what a job of a cloud runs."""

import os
import shlex
import tempfile
from pathlib import Path

import click

from dylora_moe.cloud.container import launch_of
from dylora_moe.cloud.secrets import fetched


@click.command("container")
def command() -> None:
    """Train as the environment says: what `dylora submit` has a container run.

    DYLORA_RECIPE holds the recipe, DYLORA_SECRETS the names of secrets, AIP_CHECKPOINT_DIR where checkpoints go.
    The same command starts a run and goes on with it; exit codes are those of `dylora train`.
    """
    launch = launch_of(os.environ, Path(tempfile.mkdtemp(prefix="dylora-")))
    launch.file.write_text(launch.recipe, encoding="utf-8")
    secrets = fetched(os.environ)
    if secrets:
        click.echo(f"Secrets: {', '.join(secrets)}", err=True)
    click.echo(f"Runs: {shlex.join(launch.command)}", err=True)
    # In place of this process, so that signals reach the one that trains.
    os.execve(launch.command[0], launch.command, {**os.environ, **launch.variables, **secrets})
