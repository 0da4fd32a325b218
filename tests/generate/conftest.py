"""Stub servers, and recipes of a few questions."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dylora_moe.config import GenerateConfig, make_generate_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """(**settings of the stub) -> the address of one that runs until the test ends."""
    running: list[subprocess.Popen[str]] = []

    def start(**settings: Any) -> str:
        command = [sys.executable, "-m", "tests.generate.stub", json.dumps(settings)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        return f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Twenty of them, a line each."""
    rows = [{"text": f"Come si dice la parola numero {number} in italiano?"} for number in range(20)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def recipe(questions: Path, tmp_path: Path) -> Callable[..., GenerateConfig]:
    """(**changes) -> a generation in the test's own folder: two levels, ten rows each."""

    def make(**changes: Any) -> GenerateConfig:
        values = {"questions": [str(questions)], "levels": {"A1": 10, "B2": 10}, "generator": "stub"}
        values |= {"output_dir": str(tmp_path / "runs"), "run_name": "made", "timeout": 2.0}
        return make_generate_config(values | changes)

    return make
