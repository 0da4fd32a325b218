"""`dylora push RUN OWNER/NAME`"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from dylora_moe.cli.quiet import quiet_libraries
from dylora_moe.cli.show import consoles, size_text


@click.command("push")
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="For everyone to see; otherwise private.")
@click.option(
    "--dry-run",
    "folder",
    type=click.Path(path_type=Path),
    help="Send nothing: write what would be sent to a new folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was sent as JSON on standard output.")
def command(run: Path, repository: str, public: bool, folder: Path | None, as_json: bool) -> None:
    """Send the model of RUN, a run or a model folder, to the hub, with a card made from the run.

    The token is that of HF_TOKEN, or of `hf auth login`. No data, no checkpoint and no log is sent.
    """
    quiet_libraries()
    from dylora_moe.export.push import push, write_repository

    console = consoles(as_json)
    with tempfile.TemporaryDirectory() as scratch:
        target = folder or Path(scratch) / "model"
        files = write_repository(run, repository, target)
        for file in files:
            console.print(f"{size_text(file.size):>10}  {file.name}", highlight=False, markup=False)
        address = None if folder else push(target, repository, public=public)
    if address:
        console.print(f"Sent to {address}", highlight=False, markup=False, soft_wrap=True)
        console.print(f'Load it: dylora_moe.load("{repository}")', highlight=False, markup=False, soft_wrap=True)
    else:
        console.print(f"Sent nothing; it is in {folder}.", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        told = {"repository": repository, "private": not public, "address": address}
        click.echo(json.dumps({**told, "files": [asdict(file) for file in files]}))
