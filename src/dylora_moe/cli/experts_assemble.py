"""`dylora experts assemble`"""

import json
from pathlib import Path

import click

from dylora_moe.cli.quiet import quiet_libraries
from dylora_moe.cli.show import consoles


@click.command("assemble")
@click.option("--base", required=True, help="Base of all of them: a hub id, a folder, or an embedded base.")
@click.option("--expert", "experts", required=True, multiple=True, help="NAME=FOLDER of a plain PEFT LoRA; repeatable.")
@click.option(
    "--data", "data", required=True, multiple=True, help="NAME=ROWS that are like its own, as in a recipe; repeatable."
)
@click.option(
    "--rows", default=32, show_default=True, type=click.IntRange(2), help="Rows to know each expert by, at most."
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="New model folder to write.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON on standard output.")
def assemble(
    base: str, experts: tuple[str, ...], data: tuple[str, ...], rows: int, output: Path, as_json: bool
) -> None:
    """Make a mixture of independent PEFT LoRAs: each prompt goes to the one whose rows it is most like.

    Nothing is trained. Ranks and targets may differ; a few rows of each are enough.
    """
    folders: dict[str, Path] = {}
    for name, value in map(_split, experts):
        if name in folders:
            raise click.UsageError(f"Give each expert one folder, got two for {name}.")
        folders[name] = Path(value)
    datasets: dict[str, list[str]] = {}
    for name, value in map(_split, data):
        datasets.setdefault(name, []).append(value)
    quiet_libraries()
    from dylora_moe.train.assemble import assemble as make

    console = consoles(as_json)
    told = make(
        base,
        folders,
        datasets,
        output,
        rows=rows,
        tell=lambda line: console.print(line, style="dim", highlight=False, markup=False),
    )
    for name, found in told["experts"].items():
        console.print(
            f"{name}: known by {found['rows']} rows; {found['right']:.0%} of {found['held_out']} others go to it.",
            highlight=False,
            markup=False,
        )
    console.print(f'Wrote {output}. Use it: dylora_moe.load("{output}")', highlight=False, markup=False, soft_wrap=True)
    if as_json:
        click.echo(json.dumps({"output": str(output), **told}, ensure_ascii=False))


def _split(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise click.UsageError(f"Write it as NAME=VALUE, got {text!r}.")
    return name, value
