"""`dylora evaluate RUN`"""

import json
from dataclasses import asdict
from pathlib import Path

import click

from dylora_moe.cli.quiet import quiet_libraries
from dylora_moe.cli.show import consoles, show_losses_of, show_routing


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--expert", help="Force this expert instead of routing.")
@click.option("--base", "base_alone", is_flag=True, help="Measure the base alone, without experts.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON on standard output.")
def command(run: Path, expert: str | None, base_alone: bool, as_json: bool) -> None:
    """Measure the validation loss of each domain of RUN, and its routing.

    The figures also go to RUN/eval/, named routed, base or expert-NAME.
    """
    if expert and base_alone:
        raise click.UsageError("--expert and --base exclude each other.")
    quiet_libraries()
    from dylora_moe.evaluate.run import evaluate_run

    console = consoles(as_json)
    evaluation = asdict(evaluate_run(run, expert=expert, base_alone=base_alone, progress=console.print))
    show_losses_of(console, evaluation)
    show_routing(console, evaluation["routing"])
    if as_json:
        click.echo(json.dumps(evaluation, ensure_ascii=False))
