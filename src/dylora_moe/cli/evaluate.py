"""`dylora evaluate RUN`"""

import json
from pathlib import Path
from typing import Any

import click

from dylora_moe.cli.quiet import quiet_libraries
from dylora_moe.cli.show import consoles
from dylora_moe.cli.show_evaluation import (
    show_comparison,
    show_levels,
    show_matrix,
    show_measured,
    show_similarity,
)


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--expert", help="Measure this expert alone.")
@click.option("--base", "base_alone", is_flag=True, help="Measure the base alone, without experts.")
@click.option("--experts", "each", is_flag=True, help="Measure every expert on every domain, and all of them together.")
@click.option(
    "--split",
    type=click.Choice(["validation", "test"]),
    default="validation",
    show_default=True,
    help="Rows to measure on; test rows are those of official splits and of files named test.",
)
@click.option(
    "--compare",
    "others",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="RUN",
    help="Compare the mixture with that of another run, on the rows of both. May be given several times.",
)
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
def command(
    run: Path,
    expert: str | None,
    base_alone: bool,
    each: bool,
    split: Any,
    others: tuple[Path, ...],
    made_in: Path | None,
    rows: int,
    as_json: bool,
) -> None:
    """Measure RUN on rows that it did not train on: losses of the base and of the mixture, and its routing.

    The figures also go to RUN/eval/, and into `dylora report RUN`.
    """
    if expert and base_alone:
        raise click.UsageError("--expert and --base exclude each other.")
    if sum((each, bool(others), made_in is not None)) > 1:
        raise click.UsageError("--experts, --compare and --levels exclude each other.")
    if (expert or base_alone) and (each or others):
        raise click.UsageError("--expert and --base say who answers; leave them out with --experts and --compare.")
    quiet_libraries()
    console = consoles(as_json)

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    from dylora_moe.evaluate.load import Speaker

    speaker = Speaker.chosen(expert=expert, base_alone=base_alone)
    if made_in is not None:
        from dylora_moe.generate.conditioned import evaluate_levels

        record = evaluate_levels(run, made_in, rows=rows, speaker=speaker, tell=tell)
        show_levels(console, record)
    elif others:
        from dylora_moe.evaluate.compare import compare_runs

        record = compare_runs(run, others, split=split, tell=tell)
        show_comparison(console, record)
    elif each:
        from dylora_moe.evaluate.run import evaluate_experts

        record = evaluate_experts(run, split=split, tell=tell)
        show_matrix(console, record["matrix"])
        show_similarity(console, record["similarity"])
    else:
        from dylora_moe.evaluate.run import evaluate_run

        speakers = (Speaker(kind="base"), speaker) if speaker == Speaker() else (speaker,)
        record = evaluate_run(run, speakers, split=split, tell=tell)
        show_measured(console, record)
    if as_json:
        click.echo(json.dumps(record, ensure_ascii=False))
