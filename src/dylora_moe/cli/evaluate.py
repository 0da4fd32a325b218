"""`dylora evaluate RUN`"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dylora_moe.cli.quiet import quiet_libraries
from dylora_moe.cli.show import consoles, show_losses_of, show_routing


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--expert", help="Force this expert instead of routing.")
@click.option("--base", "base_alone", is_flag=True, help="Measure the base alone, without experts.")
@click.option(
    "--levels",
    "made_in",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Ask RUN the validation questions of the data in FOLDER, a run of `dylora generate`, at each of its levels, "
    "and tell the level of every answer.",
)
@click.option("--rows", default=20, show_default=True, type=click.IntRange(1), help="Questions a level, with --levels.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON on standard output.")
def command(run: Path, expert: str | None, base_alone: bool, made_in: Path | None, rows: int, as_json: bool) -> None:
    """Measure the validation loss of each domain of RUN, and its routing; or, with --levels, the level of its answers.

    The figures also go to RUN/eval/, named routed, base or expert-NAME, and levels-routed and so on.
    """
    if expert and base_alone:
        raise click.UsageError("--expert and --base exclude each other.")
    quiet_libraries()
    console = consoles(as_json)
    if made_in is not None:
        from dylora_moe.generate.conditioned import evaluate_levels

        record = evaluate_levels(
            run,
            made_in,
            rows=rows,
            expert=expert,
            base_alone=base_alone,
            tell=lambda line: console.print(line, markup=False),
        )
        _show_levels(console, record)
        if as_json:
            click.echo(json.dumps(record, ensure_ascii=False))
        return
    from dylora_moe.evaluate.run import evaluate_run

    evaluation = asdict(evaluate_run(run, expert=expert, base_alone=base_alone, progress=console.print))
    show_losses_of(console, evaluation)
    show_routing(console, evaluation["routing"])
    if as_json:
        click.echo(json.dumps(evaluation, ensure_ascii=False))


def _show_levels(console: Console, record: Mapping[str, Any]) -> None:
    """Levels asked for and found of a model's answers."""
    told = record["levels_found"]
    names = list(record["levels"])
    table = Table(title="Levels asked for, and those of the answers", title_justify="left")
    for column in (
        "asked for",
        *(map(escape, told["levels"]) if told else ()),
        "too short to tell",
        "all together",
        "pass",
        "words",
    ):
        table.add_column(column, justify="left" if column == "asked for" else "right")
    for name in names:
        level = record["levels"][name]
        found = told["counts"][told["levels"].index(name)] if told else []
        counts = (f"{count:,}" for count in (*found, level["answers"] - sum(found)))
        table.add_row(escape(name), *counts, level["together"] or "", f"{level['passed']:,}", f"{level['words']:.0f}")
    console.print(table)
    if told:
        console.print(
            f"Agreement {told['kappa']:.2f} (weighted kappa: 1 for the levels asked for, 0 for what chance gives).",
            highlight=False,
        )
    wrong = ", ".join(f"{reason} {count:,}" for reason, count in sorted(record["wrong"].items(), key=lambda x: -x[1]))
    if wrong:
        console.print(f"Answers that would not pass: {wrong}.", highlight=False)
