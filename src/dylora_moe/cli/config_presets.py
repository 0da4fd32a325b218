"""`dylora config presets`"""

import json
from dataclasses import asdict
from typing import Any

import click
from rich.table import Table

from dylora_moe.cli.show import consoles
from dylora_moe.config.presets import PRESETS, SCENARIOS, Machine, Preset, recognise


@click.command("presets")
@click.option("--json", "as_json", is_flag=True, help="Print the lists as JSON on standard output.")
def command(as_json: bool) -> None:
    """Show what suits each machine and each purpose, and which machine this one is.

    A preset keeps the effective batch (batch_size x gradient_accumulation_steps): it takes the largest micro-batch that
    divides it, and accumulates the rest. Give one with --preset, none to leave the defaults; a purpose with --scenario.
    What is auto is left to the hardware; row is the length in tokens that the batch is sized for.
    """
    from dylora_moe.train.machine import this_machine

    machine = this_machine()
    own = recognise(machine)
    console = consoles(as_json)
    console.print(_presets_table(own))
    console.print(_purposes())
    console.print(_machine_line(machine, own), highlight=False, markup=False)
    console.print(_scenarios_table())
    if as_json:
        record = {
            "machine": {**asdict(machine), "preset": own},
            "presets": [asdict(preset) for preset in PRESETS.values()],
            "scenarios": [asdict(scenario) for scenario in SCENARIOS.values()],
        }
        click.echo(json.dumps(record))


def _presets_table(own: str) -> Table:
    table = Table(title="Presets", title_justify="left")
    for column in ("preset", "memory", "row", "batch", "eval", "recompute", "dtype", "pinned"):
        is_number = column in ("memory", "row", "batch", "eval")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=True)
    for preset in PRESETS.values():
        is_own = preset.name == own
        table.add_row(
            f"{preset.name} *" if is_own else preset.name,
            f"{preset.memory_gb:g} GB",
            str(preset.row_length),
            f"<= {preset.micro_batch}",
            str(preset.eval_batch_size),
            _word(preset.gradient_checkpointing),
            _precision(preset),
            _word(preset.dataloader_pin_memory),
            style="bold" if is_own else None,
        )
    return table


def _purposes() -> Table:
    """What each preset is for; of its own, so that the table of figures fits 80 columns."""
    grid = Table.grid(padding=(0, 2))
    for preset in PRESETS.values():
        grid.add_row(preset.name, preset.description)
    return grid


def _scenarios_table() -> Table:
    table = Table(title="Scenarios", title_justify="left")
    for column in ("scenario", "settings", "what for"):
        table.add_column(column)
    for scenario in SCENARIOS.values():
        values: dict[str, Any] = dict(scenario.settings)
        if scenario.micro_batch is not None:
            values = {"batch_size up to": scenario.micro_batch, **values}
        shown = ", ".join(f"{name} {_word(value)}" for name, value in values.items())
        table.add_row(scenario.name, shown, scenario.description)
    return table


def _machine_line(machine: Machine, own: str) -> str:
    memory = f", {machine.memory_bytes / 1e9:.0f} GB" if machine.memory_bytes else ""
    return f"\n* this machine: {machine.device_name}{memory}; runs with preset auto take {own}.\n"


def _precision(preset: Preset) -> str:
    if preset.fp16:
        return "fp16"
    return {True: "bf16", False: "fp32", None: "auto"}[preset.bf16]


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "auto" if value is None else str(value)
