"""Settings of runs as a page tells them: what differs, and the command that makes a run again; never a secret."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from dylora_moe.config import GenerateConfig, RunConfig
from dylora_moe.report.records import Record, RunRecord

_HIDDEN = "[not shown]"
_SECRET_NAME = (
    r"(?:api|access|auth|private|secret)?[_-]?(?:key|token|secret|password|passwd|credentials?|signature|sig)"
)
_SECRETS = (
    # A name or a password before the host of an address.
    (re.compile(r"(://)[^/\s'\"@]*@"), r"\1"),
    # A value in the query of an address, or after an equals sign.
    (re.compile(rf"(?i)((?:^|[?&\s_-]){_SECRET_NAME}=)[^&\s'\"]+"), r"\1"),
    # What services give out: Hugging Face, OpenAI and its like, GitHub, GitLab, AWS, Slack.
    (
        re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|AKIA|xox[abprs]-)[A-Za-z0-9_-]{12,}"),
        "",
    ),
)
_SECRET_FLAG = re.compile(rf"(?i)--?(?:[a-z0-9]+[_-])*{_SECRET_NAME}")
# Names of variables, not their values.
_NAMES_ONLY = "api_key_variable"
# Where a run is, which its page says at the top.
_OF_THE_FOLDER = ("output_dir", "run_name")


def without_secrets(value: Any) -> Any:
    """A text, or the texts in lists and mappings, without what looks like a password or a key."""
    if isinstance(value, str):
        for pattern, kept in _SECRETS:
            value = pattern.sub(kept + _HIDDEN, value)
        return value
    if isinstance(value, Mapping):
        return {name: without_secrets(each) for name, each in value.items()}
    return [without_secrets(each) for each in value] if isinstance(value, (list, tuple)) else value


def shown(value: Any) -> str:
    """A value of a setting as it is written in a recipe."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or value == [] or value == {}:
        return "none"
    if isinstance(value, float) and abs(value) < 1e12:
        return f"{value:g}"
    if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        return "\n".join(map(shown, value))
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(each)}" for name, each in value.items())
    return str(value)


def unlike_defaults(settings: Record) -> list[tuple[str, str, str]]:
    """(name, value, default) of the settings that were given another value, or that this version does not know."""
    model = GenerateConfig if "generator" in settings else RunConfig
    defaults = _defaults(model)
    return [
        (name, shown(without_secrets(value)), shown(defaults[name]) if name in defaults else "unknown")
        for name, value in settings.items()
        if name not in _OF_THE_FOLDER and (name not in defaults or value != defaults[name])
    ]


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    """Name -> default, of the settings that have one."""
    return {
        name: to_jsonable_python(field.get_default(call_default_factory=True))
        for name, field in model.model_fields.items()
        if not field.is_required()
    }


def unlike_each_other(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """(name, value of each run) of the settings that are not the same in all."""
    defaults = _defaults(RunConfig)
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in _OF_THE_FOLDER)
    found = []
    for name in names:
        values = [shown(without_secrets(run.settings.get(name, defaults.get(name)))) for run in runs]
        if len(set(values)) > 1:
            found.append((name, values))
    return found


def command_of(run: RunRecord) -> str | None:
    """The command line that began a run, quoted for a shell; None where it is not known."""
    told = run.environment.get("command")
    if not isinstance(told, list) or not told or not all(isinstance(part, str) for part in told):
        return None
    program, arguments = PurePath(told[0]), _without_secret_flags(told[1:])
    if program.stem == "dylora":
        return shlex.join(["dylora", *arguments])
    if program.name == "__main__.py":
        return shlex.join(["python", "-m", program.parent.name, *arguments])
    if program.name == "main.py" and program.parent.name == "cli":
        return shlex.join(["python", "-m", "dylora_moe.cli.main", *arguments])
    return shlex.join(["python", str(program), *arguments]) if program.suffix == ".py" else None


def _without_secret_flags(arguments: Sequence[str]) -> list[str]:
    found, hide = list[str](), False
    for argument in arguments:
        found.append(_HIDDEN if hide else without_secrets(argument))
        flag = _SECRET_FLAG.fullmatch(argument)
        hide = flag is not None and argument.lstrip("-").replace("-", "_") != _NAMES_ONLY
    return found


def same_again(run: RunRecord) -> str:
    """The command that makes a run once more, beside it, from its own complete settings."""
    verb = "generate" if run.is_generation else "train"
    return shlex.join(["dylora", verb, str(run.path / "config.yaml"), "--run_name", f"{run.name}-again"])
