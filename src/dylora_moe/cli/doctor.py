"""`dylora doctor sandbox`"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dylora_moe.cli.show import consoles
from dylora_moe.errors import SandboxError
from dylora_moe.sandbox import NAMES, BackEnd, find_sandbox, try_back_end

if TYPE_CHECKING:
    from dylora_moe.sandbox.self_test import Trial

_COLOURS = {"passed": "green", "stopped": "green", "not run": "yellow", "failed": "red", "not stopped": "red"}


@click.group("doctor")
def command() -> None:
    """Check what this machine can do."""


@command.command("sandbox")
@click.option(
    "--sandbox",
    "name",
    default="auto",
    show_default=True,
    type=click.Choice(NAMES),
    help="Which to try; none is no sandbox, and shows what that means.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the tables as JSON on standard output.")
def sandbox(name: str, as_json: bool) -> None:
    """Show which sandboxes for programs that a model wrote work here, and run known attacks in one.

    The attacks are mild: one that gets through does no harm. Exit code 1 when one did, or when there is no sandbox.
    """
    from dylora_moe.sandbox.self_test import self_test

    console = consoles(as_json)
    with console.status("Trying the sandboxes"):
        back_ends = [try_back_end(each) for each in NAMES if each != "auto"]
    _show_back_ends(console, back_ends)
    try:
        chosen, error = find_sandbox(name), None
    except SandboxError as problem:
        chosen, error = None, problem
    trials: list[Trial] = []
    if chosen is not None:
        with console.status("Running attacks") as status:
            for trial in self_test(chosen):
                trials.append(trial)
                status.update(f"Running attacks: {len(trials)} programs tried")
        _show_trials(console, chosen.name, trials)
    is_well = chosen is not None and all(trial.is_well for trial in trials)
    if as_json:
        record = {
            "back_ends": [
                {"name": each.name, "works": each.sandbox is not None, "reason": each.reason} for each in back_ends
            ],
            "sandbox": chosen and chosen.name,
            "trials": [asdict(trial) for trial in trials],
            "well": is_well,
        }
        click.echo(json.dumps(record, ensure_ascii=False))
    if error is not None:
        raise error
    if not is_well:
        sys.exit(1)


def _show_back_ends(console: Console, back_ends: Sequence[BackEnd]) -> None:
    table = Table("sandbox", "works here", "why not", title="Sandboxes", title_justify="left")
    for each in back_ends:
        is_none = each.name == "none"
        works = "no" if each.sandbox is None else "[yellow]unprotected[/]" if is_none else "[green]yes[/]"
        reason = "no sandbox: only where it is asked for by name" if is_none and each.sandbox else each.reason
        table.add_row(each.name, works, escape(reason))
    console.print(table)


def _show_trials(console: Console, name: str, trials: Sequence["Trial"]) -> None:
    table = Table(title=f"Programs run in {name}", title_justify="left")
    for column in ("program", "what must hold", "verdict", "how"):
        table.add_column(column, no_wrap=column in ("program", "verdict"))
    for trial in trials:
        verdict = f"[{_COLOURS[trial.verdict]}]{trial.verdict}[/]"
        table.add_row(trial.name, trial.must_hold, verdict, escape(trial.detail))
        if trial is [each for each in trials if each.kind == "good program"][-1]:
            table.add_section()
    console.print(table)
    attacks = [trial for trial in trials if trial.kind == "attack"]
    counts = ", ".join(
        f"{count} {verdict}"
        for verdict in ("stopped", "not stopped", "not run")
        if (count := sum(trial.verdict == verdict for trial in attacks))
    )
    console.print(f"Attacks: {counts}. What no sandbox covers is in docs/sandbox.md.", highlight=False)
