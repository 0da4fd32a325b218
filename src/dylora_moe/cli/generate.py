"""`dylora generate RECIPE [--setting value ...]`"""

import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dylora_moe.cli.settings import generate_config_of, recipe_command
from dylora_moe.cli.show import consoles
from dylora_moe.config import GENERATION, GenerateConfig
from dylora_moe.train.stopping import StopSignals

_LINE_EVERY_S = 10.0


def _generate(
    recipe: Path | None, as_json: bool, retry: bool, dry_run: bool, write_prompts: Path | None, **settings: Any
) -> None:
    """Make data with a second model: ask it the questions of a recipe, and keep the answers that pass.

    Every request and every answer is in the run's log. A run that was stopped goes on with the same command.
    """
    if write_prompts is not None:
        _write_prompts(settings.get("prompts"), write_prompts, as_json)
        return
    config = generate_config_of(recipe, settings)
    from dylora_moe.cli.quiet import quiet_libraries

    quiet_libraries()
    from dylora_moe.generate.asking import Hooks
    from dylora_moe.generate.run import generate

    console = consoles(as_json)
    if dry_run:
        _show_plan(console, config, as_json)
        return
    console.print(f"Data [bold]{escape(config.run_name)}[/] in {escape(str(config.run_dir))}", highlight=False)
    with StopSignals("stopping. Ctrl-C ends at once.") as stop, stop.deferred():
        hooks = Hooks(
            tell=lambda line: console.print(line, highlight=False, markup=False),
            progress=_Progress(console, config.input_price, config.output_price),
            check=stop.check,
        )
        result = generate(config, hooks, retry=retry)
    _show(console, result)
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))


def _show_plan(console: Console, config: GenerateConfig, as_json: bool) -> None:
    """What would be asked: rows by level and source, and one row of each level as it is sent."""
    from dylora_moe.generate.prepare import prepare

    made = prepare(config, lambda line: console.print(line, highlight=False, markup=False))
    sources = sorted({work.question.source for work in made.work})
    counts = Counter((work.planned.level, work.question.source) for work in made.work)
    table = Table(title="Rows to make", title_justify="left")
    table.add_column("level")
    for column in (*map(escape, sources), "all", "tokens at most"):
        table.add_column(column, justify="right")
    levels = list(dict.fromkeys(work.planned.level for work in made.work))
    for level in levels:
        each = [counts[level, source] for source in sources]
        most = sum(each) * made.pack.levels[level].max_tokens
        table.add_row(escape(level), *(f"{number:,}" for number in (*each, sum(each), most)))
    console.print(table)
    first = {work.planned.level: work for work in reversed(made.work)}
    sent = {level: made.pack.messages(level, first[level].question.messages) for level in levels}
    for level, messages in sent.items():
        console.print(f"{level}:", style="bold", markup=False)
        for message in messages:
            console.print(f"  {message.role}: {message.content}", highlight=False, markup=False)
    if as_json:
        record = {"questions": asdict(made.counts) | {"kept": len(made.questions)}, "rows": len(made.work)}
        record["levels"] = {level: {source: counts[level, source] for source in sources} for level in levels}
        record["sent"] = {
            level: [{"role": message.role, "content": message.content} for message in messages]
            for level, messages in sent.items()
        }
        click.echo(json.dumps(record, ensure_ascii=False))


def _write_prompts(name: str | None, folder: Path, as_json: bool) -> None:
    from dylora_moe.generate.packs import PACKS, write_pack

    name = name or PACKS[0]
    write_pack(name, folder)
    console = consoles(as_json)
    console.print(
        f"Wrote the prompts of {name}. Edit them, and write in a recipe: prompts: {folder}",
        highlight=False,
        markup=False,
    )
    if as_json:
        click.echo(json.dumps({"prompts": str(folder), "pack": name}))


class _Progress:
    """A line now and then: rows, rate, what is left, tokens, cost."""

    def __init__(self, console: Console, input_price: float, output_price: float) -> None:
        self._console, self._prices, self._last = console, (input_price, output_price), time.monotonic()

    def __call__(self, total: int, tally: Any) -> None:
        now = time.monotonic()
        if now - self._last < _LINE_EVERY_S and tally.rows < total:
            return
        self._last = now
        seconds = max(now - tally.began, 1e-9)
        rate = tally.rows / seconds
        left = f"{(total - tally.rows) / rate:,.0f} s left" if rate else "no row yet"
        cost = (tally.tokens_in * self._prices[0] + tally.tokens_out * self._prices[1]) / 1e6
        self._console.print(
            f"{tally.rows:,} of {total:,} rows, {tally.set_aside:,} set aside; {rate:,.1f} rows/s, "
            f"{tally.tokens_out / seconds:,.0f} tokens/s, {left}" + (f", cost {cost:,.2f}" if cost else ""),
            highlight=False,
        )


def _show(console: Console, result: dict[str, Any]) -> None:
    table = Table(title="Rows", title_justify="left")
    for column in ("level", "asked for", "passed", "share"):
        table.add_column(column, justify="left" if column == "level" else "right")
    for level, counts in result["levels"].items():
        share = counts["passed"] / counts["asked"] if counts["asked"] else 0.0
        table.add_row(escape(level), f"{counts['asked']:,}", f"{counts['passed']:,}", f"{share:.0%}")
    console.print(table)
    rows = result["rows"]
    console.print(
        f"{rows['passed']:,} of {rows['planned']:,} rows passed, {rows['set_aside']:,} are set aside; "
        f"{rows['authentic']:,} authentic answers are kept. {rows['train']:,} rows to train on, "
        f"{rows['validation']:,} to validate on, in {result['run']}/data.",
        highlight=False,
        markup=False,
    )
    if not rows["validation"]:
        console.print(
            "No question fell to validation: ask more, or let training split the rows by its own validation_split."
        )
    if judge := result["judge"]:
        console.print(
            f"{judge['model']} judged {judge['judged']:,} answers; of {judge['unclear']:,} it named no level, of "
            f"{judge['failed']:,} it gave no reply.",
            highlight=False,
            markup=False,
        )
    for name, what in (
        ("set_aside", "Set aside"),
        ("refused_answers", "Answers that did not pass"),
        ("failures", "Failed"),
    ):
        if result[name]:
            told = ", ".join(
                f"{reason} {count:,}" for reason, count in sorted(result[name].items(), key=lambda x: -x[1])
            )
            console.print(f"{what}: {told}.", highlight=False, markup=False)


command = recipe_command(
    "generate",
    _generate,
    click.Option(["--dry-run", "--dry_run"], is_flag=True, help="Show what would be asked, and ask nothing."),
    click.Option(["--retry"], is_flag=True, help="Try rows again that were set aside."),
    click.Option(
        ["--write-prompts", "--write_prompts"],
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="Write the built-in prompts into a new folder, to be edited, and ask nothing.",
    ),
    kind=GENERATION,
)
