"""Settings as a page has them: what differs, the command again, and no secret."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dylora_moe.config import make_config, to_yaml
from dylora_moe.report.records import RunRecord, read_run
from dylora_moe.report.settings import (
    command_of,
    same_again,
    shown,
    unlike_defaults,
    unlike_each_other,
    without_secrets,
)

SECRETS = {
    "https://me:geheim@host.org/a.jsonl": "geheim",
    "https://hf_abcdefghijklmnop@host.org/a": "hf_abcdefghijklmnop",
    "https://host.org/a?part=1&token=abc123": "abc123",
    "--api_key=abc123": "abc123",
    "HF_TOKEN=hf_xyz": "hf_xyz",
    "use hf_AbCdEfGhIjKlMnOpQr here": "hf_AbCdEfGhIjKlMnOpQr",
    "sk-proj-0123456789abcdef": "0123456789abcdef",
    "ghp_0123456789abcdef0123": "0123456789",
}
KEPT = (
    "pypi:gemma3-270m",
    "org/name@0123456789abcdef0123456789abcdef01234567",
    "max_tokens=5",
    "http://localhost:8000/v1",
    "OPENAI_API_KEY",
    "sk-learn",
)


def record(folder: Path, command: Any = None, **settings: Any) -> RunRecord:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(make_config(settings)))
    return replace(read_run(folder), environment={} if command is None else {"command": command})


@pytest.mark.parametrize(("text", "secret"), SECRETS.items())
def test_what_looks_like_a_secret_is_not_shown(text: str, secret: str) -> None:
    assert secret not in without_secrets(text) and "[not shown]" in without_secrets(text)
    assert secret not in str(without_secrets({"a": [{"path": text}]}))


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_secret_is_shown(text: str) -> None:
    assert without_secrets(text) == text


def test_the_command_is_quoted_and_has_no_secret(tmp_path: Path) -> None:
    command = [
        "/some/where/bin/dylora",
        "train",
        "my recipe.yaml",
        "--run_name",
        "a'b",
        "--api-key",
        "geheim",
        "--seed",
        "3",
    ]
    told = command_of(record(tmp_path / "a", command))
    assert told is not None and "geheim" not in told
    parts = shlex.split(told)
    assert parts == [
        "dylora",
        "train",
        "my recipe.yaml",
        "--run_name",
        "a'b",
        "--api-key",
        "[not shown]",
        "--seed",
        "3",
    ]
    assert command_of(record(tmp_path / "a", ["x/bench.py", "--n", "1"])) == "python x/bench.py --n 1"
    started = ["site-packages/dylora_moe/__main__.py", "train", "a.yaml"]  # by `python -m`, as torchrun does
    assert command_of(record(tmp_path / "a", started)) == "python -m dylora_moe train a.yaml"
    named = ["dylora", "generate", "--api_key_variable", "MY_KEY"]
    assert command_of(record(tmp_path / "a", named)) == "dylora generate --api_key_variable MY_KEY"
    for unknown in (None, [], ["-c"], "dylora train", [1, 2]):
        assert command_of(record(tmp_path / "a", unknown)) is None


def test_the_same_again_is_another_run_from_all_its_settings(tmp_path: Path) -> None:
    run = record(tmp_path / "my run")
    assert shlex.split(same_again(run)) == [
        *("dylora", "train", str(tmp_path / "my run" / "config.yaml"), "--run_name", "my run-again"),
    ]


def test_only_settings_unlike_the_defaults_are_told(tmp_path: Path) -> None:
    assert unlike_defaults(record(tmp_path / "a").settings) == []
    run = record(tmp_path / "a", lora_r=32, run_name="x", datasets=[{"path": "https://u:pw@h.org/a", "domain": "d"}])
    assert unlike_defaults(run.settings | {"later": 1}) == [
        ("lora_r", "32", "16"),
        ("datasets", "path https://[not shown]h.org/a, domain d", "requests, stripe, flask"),
        ("later", "1", "unknown"),
    ]


def test_runs_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    one, other = record(tmp_path / "a", lora_r=32), record(tmp_path / "b", num_experts=1)
    assert unlike_each_other([one, other]) == [("num_experts", ["4", "1"]), ("lora_r", ["32", "16"])]
    older = {name: value for name, value in other.settings.items() if name != "num_epochs"}
    assert unlike_each_other([other, replace(other, settings=older)]) == []


def test_values_are_written_as_in_a_recipe() -> None:
    told = [shown(value) for value in (True, None, [], 0.0005, 3, "x", ["a", "b"], {"a": 1, "b": None})]
    assert told == ["true", "none", "none", "0.0005", "3", "x", "a, b", "a 1, b none"]
    assert shown([{"skill": "a"}, {"skill": "b"}]) == "skill a\nskill b"
    assert yaml.safe_load("x: 0.0005")["x"] == 0.0005
