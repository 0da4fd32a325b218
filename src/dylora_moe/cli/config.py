"""`dylora config show|explain|schema|presets|targets`: settings, without training anything."""

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dylora_moe.cli.settings import config_of, recipe_command
from dylora_moe.cli.show import consoles
from dylora_moe.config import ALIASES, Explanation, RunConfig, explain, explain_all, remarks
from dylora_moe.config.explain import render_markdown, shown

# Command -> (module, what it does): imported when asked for, as the verbs are.
_MODULES = {
    "presets": ("config_presets", "List what suits a machine or a purpose."),
    "targets": ("config_targets", "Show the layers that experts can adapt, and what each costs."),
}


class _Commands(click.Group):
    """A group with some commands that are imported when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.commands, *_MODULES]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _MODULES:
            return importlib.import_module(f"dylora_moe.cli.{_MODULES[cmd_name][0]}").command
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, part.get_short_help_str(limit=100)) for name, part in self.commands.items()]
        rows += [(name, text) for name, (_, text) in _MODULES.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group("config", cls=_Commands)
def command() -> None:
    """Look at settings: what they mean, and what a recipe makes of them."""


def _show(recipe: Path | None, as_json: bool, **settings: Any) -> None:
    """Show all settings of a run as a recipe that makes it again.

    Recipe, named preset, scenario and flags are applied; what differs from the default is marked. A preset `auto` stays
    as it is: only `dylora train` looks at the machine.
    """
    config = config_of(recipe, settings)
    values, defaults = config.model_dump(mode="json"), RunConfig().model_dump(mode="json")
    changed = [name for name, value in values.items() if value != defaults[name]]
    told = remarks(config)
    if as_json:
        click.echo(json.dumps({"settings": values, "changed": changed, "remarks": told}, ensure_ascii=False))
        return
    for name, value in values.items():
        text = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True)
        click.echo(_marked(text, shown(defaults[name])) if name in changed else text, nl=False)
    for remark in told:
        click.echo(f"# {remark}")


def _marked(text: str, default: str) -> str:
    """The YAML of a setting with its default in a comment, at the end of a line that surely ends there."""
    comment, (first, *rest) = f"# default: {default}", text.splitlines()
    if rest and not first.endswith(":"):
        return "\n".join([comment, first, *rest, ""])
    return "\n".join([f"{first}  {comment}", *rest, ""])


command.add_command(recipe_command("show", _show))


@command.command("schema")
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors that check YAML while it is written."""
    found = RunConfig.model_json_schema()
    properties = found["properties"]
    for alias, name in ALIASES.items():
        properties[alias] = properties[name] | {"description": f"Another name of {name}."}
    click.echo(json.dumps(found, ensure_ascii=False))


@command.command("explain", context_settings={"ignore_unknown_options": True})  # NAME may be written as a flag
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON on standard output.")
@click.option("--markdown", is_flag=True, help="Print the tables of docs/settings.md.")
def explain_command(name: str | None, as_json: bool, markdown: bool) -> None:
    """Say what a setting means, which values serve, and what goes up and down with it.

    Without NAME: every setting in one line.
    """
    if markdown:
        click.echo(render_markdown(), nl=False)
        return
    console = consoles(as_json)
    if name is None:
        groups = explain_all()
        _print_all(console, groups)
        found: Any = [_as_record(setting) for settings in groups.values() for setting in settings]
    else:
        setting = explain(name)
        _print_one(console, setting)
        found = _as_record(setting)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))


def _as_record(setting: Explanation) -> dict[str, Any]:
    return {**asdict(setting), "recommended": setting.recommended}


def _print_all(console: Console, groups: dict[str, list[Explanation]]) -> None:
    for group, settings in groups.items():
        table = Table(title=group, title_justify="left")
        for column in ("setting", "default", "recommended", "meaning"):
            table.add_column(column, overflow="fold")
        for setting in settings:
            cells = (
                setting.name,
                shown(setting.default),
                setting.recommended,
                setting.meaning.split(". ")[0].rstrip("."),
            )
            table.add_row(*map(escape, cells))
        console.print(table)


def _print_one(console: Console, setting: Explanation) -> None:
    console.print(f"[bold]{setting.name}[/]  {escape(setting.meaning)}", highlight=False)
    table = Table(box=None, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "must be": setting.allowed,
        "unit": setting.unit,
        "default": shown(setting.default),
        "recommended": setting.recommended,
        "higher": setting.more,
        "lower": setting.less,
        "note": setting.note,
        "other names": ", ".join(setting.aliases),
        "as a flag": f"--{setting.name}",
    }
    for word, text in rows.items():
        if text:
            table.add_row(word, escape(text))
    console.print(table)
