"""`dylora train RECIPE [--setting value ...]`"""

import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from dylora_moe.cli.settings import config_of, recipe_command
from dylora_moe.cli.show import (
    command_name,
    consoles,
    show_losses,
    show_parameters,
    show_plan,
    show_rehearsal,
    show_routing,
    show_samples,
)
from dylora_moe.cli.show_data import show_data, show_lengths
from dylora_moe.cli.show_stream import show_stream
from dylora_moe.config import RunConfig
from dylora_moe.config.explain import remarks
from dylora_moe.errors import ConfigError
from dylora_moe.train.stopping import StopSignals


def _train(recipe: Path | None, as_json: bool, dry_run: bool, nproc: int | None, **settings: Any) -> None:
    """Train as a recipe says, flags changing single settings of it.

    Every setting of a recipe is a flag of the same name, with underscores or hyphens. Without a recipe the defaults
    train four experts on the built-in skill sets.
    """
    config = config_of(recipe, settings)
    if nproc and nproc > 1:
        _launch(config, dry_run, nproc)
    with StopSignals() as stop:
        _run(config, as_json, dry_run, stop)


def _launch(config: RunConfig, dry_run: bool, nproc: int) -> None:
    """Start the processes, and end as they do; in one of them, do nothing."""
    started = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if started == nproc:
        return
    if started > 1:
        raise click.UsageError(
            f"--nproc {nproc} starts processes, and another launcher has started {started}. Leave --nproc out."
        )
    if dry_run:
        raise click.UsageError("--dry-run tries a run out in one process. Leave --nproc out.")
    if config.batch_size % nproc:
        raise ConfigError(
            f"batch_size must be a multiple of --nproc, since the processes share each batch, got {config.batch_size} "
            f"and {nproc}. Change one of them."
        )
    from dylora_moe.train.launch import launch

    sys.exit(launch(sys.argv[1:], nproc))


def _run(config: RunConfig, as_json: bool, dry_run: bool, stop: StopSignals) -> None:
    from dylora_moe.cli.quiet import quiet_libraries

    quiet_libraries()
    from dylora_moe import ranks
    from dylora_moe.train.folder import settle_here
    from dylora_moe.train.run import train
    from dylora_moe.train.session import Stages

    ranks.join()
    console = consoles(as_json) if ranks.is_first() else Console(quiet=True)
    if dry_run:  # which is of this machine alone
        config = config.model_copy(update={"remote_dir": None})
    given, config = config, settle_here(config, lambda line: console.print(line, highlight=False, markup=False))
    console.print(f"Run [bold]{config.run_name}[/] in {config.run_dir}", highlight=False)
    _show_settings(console, given, config)
    stages = Stages(
        data=lambda data: _show_data(console, asdict(data.summary)),
        parameters=lambda parts: show_parameters(console, parts),
        plan=lambda plan: show_plan(console, plan),
        console=console,
    )
    if dry_run:
        if ranks.count() > 1:
            raise ConfigError("A dry run needs one process, got several. Start it without torchrun.")
        from dylora_moe.train.rehearsal import rehearse

        rehearsal = rehearse(config, stages, stop)
        show_rehearsal(console, asdict(rehearsal))
        if as_json:
            click.echo(json.dumps(asdict(rehearsal)))
        return
    result = train(config, stages, stop)
    if not ranks.is_first():
        return
    if result.get("already_finished"):
        console.print("This run is finished already; nothing was trained. Its result:")
    if config.mode == "continual":
        show_stream(console, result)
    else:
        show_losses(console, result["before"], result["after"])
        show_routing(console, result["after"]["routing"])
        show_samples(console, result["samples"])
    _show_next(console, config.run_dir, result)
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))


def _show_settings(console: Any, given: RunConfig, config: RunConfig) -> None:
    """What the preset changed, and settings of unusual value."""
    if given.preset != config.preset:
        changed = [name for name in RunConfig.model_fields if getattr(given, name) != getattr(config, name)]
        values = ", ".join(f"{name} {getattr(config, name)}" for name in changed if name not in ("preset", "run_name"))
        console.print(f"Preset {config.preset}, this machine's: {values or 'nothing to change'}.", highlight=False)
    for remark in remarks(config):
        console.print(f"Note: {remark}", highlight=False, markup=False)


def _show_data(console: Any, summary: dict[str, Any]) -> None:
    show_data(console, summary)
    show_lengths(console, summary)


def _show_next(console: Any, run_dir: Path, result: dict[str, Any]) -> None:
    samples, experts = result.get("samples"), result.get("experts", ["expert_0"])
    prompt = samples[0]["after"]["prompt"] if samples else "Write a function that adds two numbers."
    program, run = command_name(), shlex.quote(str(run_dir))
    console.print("Next:", style="bold")
    for line in (
        f"{program} report {run}",
        f"{program} chat {run} --prompt {shlex.quote(prompt.splitlines()[0])}",
        f"{program} evaluate {run}",
        f"{program} experts list {run}",
        f"{program} experts export {run} --expert {experts[0]} --output my_expert",
    ):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


command = recipe_command(
    "train",
    _train,
    click.Option(
        ["--nproc"],
        type=click.IntRange(min=1),
        help="Processes of this machine to train in, which share each batch: one for each GPU.",
    ),
    click.Option(
        ["--dry-run", "--dry_run"],
        is_flag=True,
        help="Try the run out: two real steps on the largest batch, an evaluation, a checkpoint and back. Shows what "
        "the run will need, and keeps nothing.",
    ),
)
