"""`dylora doctor`, and `dylora doctor sandbox`"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dylora_moe.cli.show import consoles, printable
from dylora_moe.errors import SandboxError
from dylora_moe.sandbox import NAMES, BackEnd, find_sandbox, try_back_end

if TYPE_CHECKING:
    from dylora_moe.sandbox.self_test import Trial

_COLOURS = {"passed": "green", "stopped": "green", "not run": "yellow", "failed": "red", "not stopped": "red"}


@click.group("doctor", invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON on standard output.")
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Check this machine: each thing that runs need, and the command that repairs it.

    Green: it works. Yellow: it works but for what is said. Red: it does not, and the exit code is 1. No secret is
    printed; of the hub one question is asked, of clouds none.
    """
    if context.invoked_subcommand is not None:
        return
    console = consoles(as_json)
    found: list[Mapping[str, str]] = []
    for finding in _findings():
        found.append(finding)
        _show(console, finding["colour"], finding["check"], finding["found"], finding["repair"])
    counts = {colour: sum(each["colour"] == colour for each in found) for colour in ("green", "yellow", "red")}
    console.print(", ".join(f"{count} {colour}" for colour, count in counts.items()), highlight=False)
    if as_json:
        record = {"findings": found, "well": not counts["red"]}
        click.echo(json.dumps(record, ensure_ascii=False))
    if counts["red"]:
        sys.exit(1)


def _findings() -> Iterator[Mapping[str, str]]:
    """What the doctor finds; only what it lacks itself, where its own imports fail."""
    try:
        from dylora_moe.cli.doctor_checks import look
    except ModuleNotFoundError as error:
        told = f"{error.name} is not installed, without which nothing else can be looked at"
        repair = f"python -m pip install {error.name}"
        yield {"check": "packages", "colour": "red", "found": told, "repair": repair}
        return
    for finding in look(os.environ, Path("runs")):
        yield asdict(finding)


def _show(console: Console, colour: str, check: str, found: str, repair: str) -> None:
    """A line as soon as it is known; its command stands on a line of its own, to be copied."""
    console.print(f"[{colour}]{colour:<6}[/]  {check:<10}  {escape(printable(found))}", highlight=False, soft_wrap=True)
    if repair:
        console.print(f"{'':20}{repair}", highlight=False, markup=False, soft_wrap=True)


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
