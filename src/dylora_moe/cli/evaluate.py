"""`dylora evaluate RUN`"""

import json
from pathlib import Path
from typing import Any

import click

from dylora_moe.cli.quiet import quiet_libraries
from dylora_moe.cli.show import consoles
from dylora_moe.cli.show_evaluation import (
    show_answers,
    show_code,
    show_comparison,
    show_levels,
    show_matrix,
    show_measured,
    show_similarity,
    show_tasks,
)


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--expert", help="Measure this expert alone.")
@click.option("--base", "base_alone", is_flag=True, help="Measure the base alone, without experts.")
@click.option("--experts", "each", is_flag=True, help="Measure every expert on every domain, and all of them together.")
@click.option(
    "--split",
    type=click.Choice(["validation", "test"]),
    help="Rows to measure on: validation unless said, test with --code. Test rows are those of official splits, and of "
    "files named test.",
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
@click.option(
    "--answers", is_flag=True, help="Ask RUN, and tell how many answers are right, where they can be compared."
)
@click.option(
    "--code",
    "problems",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Let RUN solve the problems of a file of MBPP or HumanEval; its programs run in a sandbox.",
)
@click.option(
    "--harness",
    "tasks",
    metavar="TASK,...",
    help="Let RUN answer tasks of lm-evaluation-harness, in the template it was trained with; needs the extra harness.",
)
@click.option("--samples", default=1, show_default=True, type=click.IntRange(1), help="Answers a problem, with --code.")
@click.option(
    "--sandbox",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "bubblewrap", "sandlock", "docker", "none"]),
    help="For --code; none runs programs unprotected, and the result says so.",
)
@click.option(
    "--rows",
    type=click.IntRange(1),
    help="At most so many: questions a level (20 unless said), rows of a domain with --answers, problems with --code, "
    "rows of a task with --harness.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON on standard output.")
def command(
    run: Path,
    expert: str | None,
    base_alone: bool,
    each: bool,
    split: Any,
    others: tuple[Path, ...],
    made_in: Path | None,
    answers: bool,
    problems: Path | None,
    tasks: str | None,
    samples: int,
    sandbox: str,
    rows: int | None,
    as_json: bool,
) -> None:
    """Measure RUN on rows that it did not train on: losses of the base and of the mixture, and its routing.

    The figures also go to RUN/eval/, and into `dylora report RUN`.
    """
    if expert and base_alone:
        raise click.UsageError("--expert and --base exclude each other.")
    if sum((each, bool(others), made_in is not None, answers, problems is not None, tasks is not None)) > 1:
        raise click.UsageError("--experts, --compare, --levels, --answers, --code and --harness exclude each other.")
    if (expert or base_alone) and (each or others):
        raise click.UsageError("--expert and --base say who answers; leave them out with --experts and --compare.")
    if rows is not None and not (made_in or answers or problems or tasks):
        raise click.UsageError("--rows goes with --levels, --answers, --code and --harness; losses take all rows.")
    if problems is None and (samples > 1 or sandbox != "auto"):
        raise click.UsageError("--samples and --sandbox go with --code.")
    if split and (made_in or tasks):
        raise click.UsageError("--split goes with losses, --answers and --code; --levels and --harness have their own.")
    quiet_libraries()
    console = consoles(as_json)

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    from dylora_moe.evaluate.load import Speaker

    speaker = Speaker.chosen(expert=expert, base_alone=base_alone)
    speakers = (Speaker(kind="base"), speaker) if speaker == Speaker() else (speaker,)
    of_rows = split or "validation"
    if made_in is not None:
        from dylora_moe.generate.conditioned import evaluate_levels

        record = evaluate_levels(run, made_in, rows=rows or 20, speaker=speaker, tell=tell)
        show_levels(console, record)
    elif problems is not None:
        from dylora_moe.evaluate.code import evaluate_code

        how = {"split": split or "test", "samples": samples, "rows": rows, "sandbox": sandbox}
        record = evaluate_code(run, problems, speakers, **how, tell=tell)
        show_code(console, record)
    elif tasks is not None:
        from dylora_moe.evaluate.harness import run_harness

        record = run_harness(run, tasks.split(","), speaker=speaker, limit=rows, chat=True, tell=tell)
        show_tasks(console, record)
    elif answers:
        from dylora_moe.evaluate.answers import evaluate_answers

        record = evaluate_answers(run, speakers, split=of_rows, rows=rows, tell=tell)
        show_answers(console, record)
    elif others:
        from dylora_moe.evaluate.compare import compare_runs

        record = compare_runs(run, others, split=of_rows, tell=tell)
        show_comparison(console, record)
    elif each:
        from dylora_moe.evaluate.run import evaluate_experts

        record = evaluate_experts(run, split=of_rows, tell=tell)
        show_matrix(console, record["matrix"])
        show_similarity(console, record["similarity"])
    else:
        from dylora_moe.evaluate.run import evaluate_run

        record = evaluate_run(run, speakers, split=of_rows, tell=tell)
        show_measured(console, record)
    if as_json:
        click.echo(json.dumps(record, ensure_ascii=False))
