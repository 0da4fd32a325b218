"""`dylora data list` and `dylora data inspect`"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from dylora_moe.cli.data_inspect import command as inspect_command
from dylora_moe.cli.show import consoles
from dylora_moe.data.registry import REGISTRY, DataSource, load_registry


@click.group("data")
def command() -> None:
    """List the data sets that have a name, and look at what a recipe would train on."""


command.add_command(inspect_command)


@command.command("list")
@click.option("--registry", type=click.Path(path_type=Path), help="YAML file with own entries to add.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON on standard output.")
def list_sources(registry: Path | None, as_json: bool) -> None:
    """Show each data set: domain, format, about how many rows, licence, and where it comes from."""
    sources = load_registry(registry) if registry is not None else REGISTRY
    table = Table(title="Data sets", title_justify="left")
    for column in ("name", "format", "rows", "licence", "from"):
        table.add_column(column, justify="right" if column == "rows" else "left", overflow="fold")
    for source in sources.values():
        table.add_row(
            source.name,
            source.format or ("-" if source.kind == "synthetic" else "by columns"),
            "any" if source.kind == "synthetic" else f"{source.num_rows:,}" if source.num_rows else "unknown",
            escape(source.licence or "none stated"),
            escape(_origin(source)),
        )
    consoles(as_json).print(table)
    if as_json:
        click.echo(json.dumps([_as_json(source) for source in sources.values()], ensure_ascii=False))


def _origin(source: DataSource) -> str:
    if source.kind == "synthetic":
        return "made here"
    if source.kind == "file":
        return source.path or f"a file: {source.homepage}"
    config = f" ({source.hub_config})" if source.hub_config else ""
    return f"{source.hub_id}{config} @ {source.revision[:7] if source.revision else 'newest'}"


def _as_json(source: DataSource) -> dict[str, Any]:
    return {**asdict(source), "domain": source.domain or source.name}
