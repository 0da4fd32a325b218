"""Streams of the tiny domains: fixtures and helpers of the tests of streams, which import the fixtures from here."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import DOMAINS, settings
from tests.train.whole import CLOCKS

from dylora_moe.config import RunConfig, make_config
from dylora_moe.run_dir import RunDir
from dylora_moe.train.run import train


class Stop(Exception):
    """Stands for a stop at a place of the test's choice."""


def make_stream(base: Path, rows: dict[str, Path], folder: Path, **changes: Any) -> RunConfig:
    """A stream of the tiny domains: three steps a skill, and a checkpoint after each."""
    values = settings(base, {}, folder)
    values |= {"mode": "continual", "skills": [str(rows[domain]) for domain in DOMAINS]}
    values |= {"validation_split": 0.1, "max_steps": 3, "save_steps": 1, "feature_rows": 20, "sample_tokens": 0}
    del values["datasets"]
    return make_config(values | changes)


@pytest.fixture
def stream(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path) -> Callable[..., RunConfig]:
    """(**changes) -> a stream in the test's own folder."""
    return partial(make_stream, tiny_base, tiny_rows, tmp_path / "runs")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_rows: dict[str, Path]) -> Any:
    """(settings, run folder, result) of a stream without a stop; not to be changed."""
    config = make_stream(tiny_base, tiny_rows, tmp_path_factory.mktemp("streams"), run_name="whole")
    result = json.loads(json.dumps(train(config), allow_nan=False))
    return config, RunDir(config.run_dir), result


def outcome(run: RunDir) -> dict[str, Any]:
    """All that a stream leaves, but for clocks, paths, checkpoints and what was undone."""
    left: dict[str, Any] = {}
    for path in sorted(run.path.rglob("*")):
        name = path.relative_to(run.path).as_posix()
        if not path.is_file() or {"checkpoints", "undone", "eval"} & set(name.split("/")):
            continue
        if path.name in ("environment.json", "config.yaml", "report.html") or path.name.startswith(".lock"):
            continue
        content = path.read_bytes().replace(str(run.path).encode(), b"RUN")
        if path.name == "metrics.jsonl":
            lines = RunDir(path.parent).read_lines(path.name)
            left[name] = [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]
        else:
            left[name] = content
    return left


def beside(whole: Any, name: str, **changes: Any) -> RunConfig:
    """The same stream under another name."""
    return whole[0].model_copy(update={"run_name": name, **changes})


def stop_at(patch: pytest.MonkeyPatch, owner: Any, name: str, times: int) -> None:
    """Raise at that call of a function instead of making it."""
    act, calls = getattr(owner, name), []

    def acting(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == times:
            raise Stop
        return act(*args, **kwargs)

    patch.setattr(owner, name, acting)
