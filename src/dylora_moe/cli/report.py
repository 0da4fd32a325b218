"""`dylora report RUN [RUN ...]`"""

import json
import time
from pathlib import Path

import click

from dylora_moe.cli.show import consoles
from dylora_moe.errors import RunError
from dylora_moe.evaluate.stream import read_stream
from dylora_moe.report.compare import render_comparison
from dylora_moe.report.page import GENERATOR
from dylora_moe.report.records import RunRecord, read_run
from dylora_moe.report.run import render_run
from dylora_moe.run_dir import REPORT, RunDir

_COMPARISON = "report-compare.html"
# Characters of a file in which a page of ours says that it is one.
_HEAD = 2000


@click.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where the page goes. Default: report.html in the run's folder, report-compare.html in the first one's.",
)
@click.option("--json", "as_json", is_flag=True, help="Print where the page is, its bytes and the seconds, as JSON.")
def command(runs: tuple[Path, ...], output: Path | None, as_json: bool) -> None:
    """Make a page of one RUN, or of several side by side: one HTML file that needs no network.

    A run that is still going, or that crashed, is shown as far as it came. The folder of a generation gives its page
    of made data.
    """
    began = time.monotonic()
    target = output or runs[0] / (REPORT if len(runs) == 1 else _COMPARISON)
    if output is not None:
        _check_ours(output)
    found = [read_run(path) for path in runs]
    pages = [render_run(found[0], _stream_of(found[0]))] if len(found) == 1 else []
    page = pages[0] if pages else render_comparison(found, [_stream_of(run) for run in found])
    content = page.encode("utf-8", errors="backslashreplace")
    RunDir(target.parent).write(target.name, content)
    seconds = round(time.monotonic() - began, 3)
    consoles(as_json).print(f"Report: {target}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        click.echo(json.dumps({"report": str(target), "bytes": len(content), "seconds": seconds}, ensure_ascii=False))


def _check_ours(file: Path) -> None:
    """See to it that nothing is written over but a page of ours."""
    if file.is_dir():
        raise click.UsageError(f"--output must be a file, got the folder {file}. Give a name in it.")
    if file.exists():
        with file.open("rb") as content:
            head = content.read(_HEAD)
        if f'<meta name="generator" content="{GENERATOR}">'.encode() not in head:
            raise click.UsageError(
                f"--output must be a new file or a report, got {file}, which is something else. Give another name."
            )
    elif not file.parent.is_dir():
        raise click.UsageError(
            f"--output must be in a folder that is there, got {file}. Make the folder, or give another."
        )


def _stream_of(run: RunRecord) -> dict[str, object] | None:
    """What a stream has come to that is not at its end; None where nothing can be told."""
    if not run.is_stream or run.result:
        return None
    try:
        return read_stream(RunDir(run.path))
    except (RunError, LookupError, TypeError, ValueError):
        return None
