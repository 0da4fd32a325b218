"""Flags from settings: each field of `RunConfig` is an option under its own name, with hyphens too."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from dylora_moe.config import (
    GENERATION,
    TRAINING,
    GenerateConfig,
    Kind,
    RunConfig,
    load_recipe,
    make_config,
    make_generate_config,
    split_list,
    with_own_names,
)
from dylora_moe.config.explain import shown
from dylora_moe.config.presets import with_preset
from dylora_moe.config.spelling import did_you_mean, nearest, plain_name

_LISTS = ("datasets", "skills", "target_modules", "report_to", "questions", "endpoints", "judge_endpoints")
_NUMBERS_BY_NAME = {"domain_weights": "A=2,B=1,...", "levels": "A1=40,A2=20,..."}


def setting_options(kind: Kind = TRAINING) -> list[click.Option]:
    """One click option for each setting, and a hidden one for each other name of it; one not given yields nothing."""
    fields = kind.settings.model_fields
    own = [_option(name, field) for name, field in fields.items()]
    return own + [_option(alias, fields[name], setting=name) for alias, name in kind.aliases.items()]


def given_settings(values: dict[str, Any], kind: Kind = TRAINING) -> dict[str, Any]:
    """The settings among a command's values that were really given, under our names.

    Raises:
        ConfigError: a setting was given under two names.
    """
    known = {*kind.settings.model_fields, *kind.aliases}
    given = {name: value for name, value in values.items() if name in known and value is not None}
    return with_own_names(given, where="flags", kind=kind)


def config_of(recipe: Path | None, values: dict[str, Any]) -> RunConfig:
    """A command's recipe, with the preset, the scenario and the settings that were given as flags over it.

    Raises:
        ConfigError: the recipe cannot be read, or a setting is unknown or out of range.
    """
    stored = _stored(recipe, TRAINING)
    return make_config(with_preset(stored, given_settings(values)), where=str(recipe) if recipe else "flags")


def generate_config_of(recipe: Path | None, values: dict[str, Any]) -> GenerateConfig:
    """A command's recipe of a generation, with the settings that were given as flags over it.

    Raises:
        ConfigError: the recipe cannot be read, or a setting is unknown or out of range.
    """
    stored = _stored(recipe, GENERATION) | given_settings(values, GENERATION)
    return make_generate_config(stored, where=str(recipe) if recipe else "flags")


def _stored(recipe: Path | None, kind: Kind) -> dict[str, Any]:
    stored = load_recipe(recipe, kind) if recipe else {}
    return {"run_name": recipe.stem, **stored} if recipe else stored


class _SettingsCommand(click.Command):
    """A command that says what an unknown flag was meant to be."""

    kind = TRAINING

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(
                _unknown_flag(error.option_name, self.get_params(ctx), self.kind), ctx=ctx
            ) from error


def _unknown_flag(flag: str, parameters: list[click.Parameter], kind: Kind) -> str:
    name = plain_name(flag)
    if name in kind.replaced:
        return f"there is no flag {flag}. {kind.replaced[name]}"
    spelt: dict[str, str] = {}
    for parameter in parameters:
        for option in (*parameter.opts, *parameter.secondary_opts) if isinstance(parameter, click.Option) else ():
            word, own = plain_name(option), str(parameter.name)
            # Another name of a setting follows the setting, and is answered with the setting's.
            spelt.setdefault(word, spelt.get(word.replace(own, kind.aliases.get(own, own)), option))
    near = list(dict.fromkeys(spelt[word] for word in nearest(name, spelt)))
    return f"there is no flag {flag}. {did_you_mean(near) or '`dylora config explain` lists those of settings.'}"


def recipe_command(
    name: str, callback: Callable[..., None], *options: click.Option, kind: Kind = TRAINING
) -> click.Command:
    """A verb that takes a recipe, `--json`, its own options, and every setting as a flag."""
    command = _SettingsCommand(
        name,
        callback=callback,
        help=callback.__doc__,
        params=[
            click.Argument(["recipe"], required=False, type=click.Path(dir_okay=False, path_type=Path)),
            click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON on standard output."),
            *options,
            *setting_options(kind),
        ],
    )
    command.kind = kind
    return command


def _option(name: str, field: FieldInfo, *, setting: str | None = None) -> click.Option:
    """The flag of a setting under one of its names; under another one than ours it is not in the help."""
    hyphened = name.replace("_", "-")
    spellings = [f"--{name}"] if hyphened == name else [f"--{name}", f"--{hyphened}"]
    kind = _plain_type(field.annotation)
    default = "" if field.default is None else f" Default: {shown(field.default)}."
    common: dict[str, Any] = {
        "default": None,
        "help": f"{field.description}{default}",
        "hidden": setting is not None,
    }
    if kind is bool:
        # A declaration without its first half adds a spelling of "off"; two halves would repeat one of "on".
        off = [f" /--no-{hyphened}", f" /--no_{name}", *([] if hyphened == name else [f" /--no-{name}"])]
        return click.Option([*spellings, *off, name], is_flag=True, **common)
    return click.Option([*spellings, name], **common, **_reading(setting or name, kind))


def _reading(setting: str, kind: Any) -> dict[str, Any]:
    """How the text of a flag becomes the value of a setting that is no switch: what click.Option takes."""
    if setting in _LISTS:
        return {"callback": _as_list(setting), "metavar": "A,B,..."}
    if setting in _NUMBERS_BY_NAME:
        return {"callback": _as_weights, "metavar": _NUMBERS_BY_NAME[setting]}
    if get_origin(kind) is Literal:
        return {"metavar": "|".join(get_args(kind))}
    if isinstance(kind, tuple):
        return {"type": _IntOrWord(kind)}
    return {"type": kind if kind in (int, float) else str}


class _IntOrWord(click.ParamType):
    """A whole number, or one of a few words."""

    name = "integer or word"

    def __init__(self, words: tuple[str, ...]) -> None:
        self.words = words

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "|".join(["INTEGER", *self.words])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value in self.words:
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is not a whole number or {' or '.join(self.words)}.", param, ctx)


def _plain_type(annotation: Any) -> Any:
    """`int | None` -> int; a number or words -> the words; other unions -> str; other types as they are."""
    if get_origin(annotation) not in (types.UnionType, Union):
        return annotation
    parts = [part for part in get_args(annotation) if part is not type(None)]
    words = [get_args(part) for part in parts if get_origin(part) is Literal]
    if len(parts) == 1:
        return parts[0]
    return words[0] if int in parts and len(words) == len(parts) - 1 == 1 else str


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
