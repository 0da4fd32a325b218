"""Flags from settings: each field of `RunConfig` is an option under its own name, with hyphens too."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from dylora_moe.config import RunConfig, load_recipe, make_config, split_list


def setting_options() -> list[click.Option]:
    """One click option for each setting; an option that is not given yields no value at all."""
    return [_option(name, field) for name, field in RunConfig.model_fields.items()]


def given_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The settings among a command's values that were really given."""
    return {name: value for name, value in values.items() if name in RunConfig.model_fields and value is not None}


def config_of(recipe: Path | None, values: dict[str, Any]) -> RunConfig:
    """A command's recipe, with the settings that were given as flags in their place.

    Raises:
        ConfigError: the recipe cannot be read, or a setting is unknown or out of range.
    """
    stored = load_recipe(recipe) if recipe else {}
    if recipe and "run_name" not in stored:
        stored["run_name"] = recipe.stem
    return make_config(stored | given_settings(values), where=str(recipe) if recipe else "flags")


def recipe_command(name: str, callback: Callable[..., None], *options: click.Option) -> click.Command:
    """A verb that takes a recipe, `--json`, its own options, and every setting as a flag."""
    return click.Command(
        name,
        callback=callback,
        help=callback.__doc__,
        params=[
            click.Argument(["recipe"], required=False, type=click.Path(dir_okay=False, path_type=Path)),
            click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON on standard output."),
            *options,
            *setting_options(),
        ],
    )


def _option(name: str, field: FieldInfo) -> click.Option:
    hyphened = name.replace("_", "-")
    spellings = [f"--{name}"] if hyphened == name else [f"--{name}", f"--{hyphened}"]
    kind = _plain_type(field.annotation)
    default = "" if field.default is None else f" Default: {_shown(field.default)}."
    text = f"{field.description}{default}"
    if kind is bool:
        # A declaration without its first half adds a spelling of "off"; two halves would repeat one of "on".
        off = [f" /--no-{hyphened}", f" /--no_{name}"]
        return click.Option([*spellings, *off, name], is_flag=True, default=None, help=text)
    if name in ("datasets", "target_modules"):
        return click.Option([*spellings, name], default=None, help=text, callback=_as_list(name), metavar="A,B,...")
    if name == "domain_weights":
        return click.Option([*spellings, name], default=None, help=text, callback=_as_weights, metavar="A=2,B=1,...")
    if get_origin(kind) is Literal:
        return click.Option([*spellings, name], type=click.Choice(get_args(kind)), default=None, help=text)
    return click.Option([*spellings, name], type=kind if kind in (int, float) else str, default=None, help=text)


def _plain_type(annotation: Any) -> Any:
    """`int | None` -> int; other types as they are."""
    if get_origin(annotation) in (types.UnionType, Union):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return parts[0] if len(parts) == 1 else str
    return annotation


def _as_list(name: str) -> Any:
    def parse(ctx: click.Context, option: click.Parameter, value: str | None) -> Any:
        if value is None:
            return None
        parts = split_list(value)
        is_word = name == "target_modules" and parts in (["all-linear"], ["attention"])
        return parts[0] if is_word else parts

    return parse


def _as_weights(ctx: click.Context, option: click.Parameter, value: str | None) -> dict[str, str] | None:
    """`a=2,b=1` -> names and numbers, the numbers still as text, to be checked with all other settings."""
    if value is None:
        return None
    pairs = [part.rpartition("=") for part in split_list(value)]
    names = [name.strip() for name, _, _ in pairs]
    if not all(name and sign for name, sign, _ in pairs) or len(set(names)) < len(names):
        raise click.BadParameter(f"must be different names and their numbers such as code=2,maths=1, got {value!r}.")
    return {name.strip(): number.strip() for name, _, number in pairs}


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
