"""`dylora fetch URL`"""

import json
import time
from pathlib import Path

import click

from dylora_moe.cli.show import consoles
from dylora_moe.config import RunConfig


@click.command("fetch")
@click.argument("url")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="The new run folder. Default: the run's name in runs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print where the run is, its files, bytes and seconds, as JSON.")
def command(url: str, output: Path | None, as_json: bool) -> None:
    """Fetch the run at URL, which is remote_dir/run_name of its settings, as it was sent last.

    Every file is checked. What takes run folders (report, chat, evaluate, serve, experts, push) takes the new one. A
    run that is still going on elsewhere is left alone.
    """
    from dylora_moe.remote.fetching import fetch_run

    began, console = time.monotonic(), consoles(as_json)
    target = output or RunConfig.model_fields["output_dir"].default / url.rstrip("/").rpartition("/")[2]

    def tell(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    snapshot = fetch_run(url, target, tell)
    total = sum(entry.bytes for entry in snapshot.files.values())
    seconds = round(time.monotonic() - began, 3)
    tell(f"Fetched {target}: {len(snapshot.files)} files, {total / 1e6:.1f} MB.")
    if as_json:
        click.echo(json.dumps({"run": str(target), "files": len(snapshot.files), "bytes": total, "seconds": seconds}))
