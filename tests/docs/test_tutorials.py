"""README.md and the tutorials, command by command and program by program, over tiny bases and in a few steps.

What is changed: the embedded bases become tiny folders of the same names, runs have two steps, rows may have more
tokens, since a tiny tokenizer makes many of them, and the pupil learns other answers than a tiny teacher's, which are
noise. `test_newcomer.py` does them unchanged.
"""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.tiny import lean_process, write_base

from dylora_moe.cli.main import main

__all__ = ["lean_process"]

ROOT = Path(__file__).resolve().parents[2]
SHELL = re.compile(r"[|>;&<]|\$\(")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Embedded base -> a tiny folder, of another family each, for long rows."""
    folder = tmp_path_factory.mktemp("bases")
    found = {}
    for name in ("gemma3-270m", "smollm2"):
        found[f"pypi:{name}"] = path = write_base(folder / name)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return found


@pytest.fixture(scope="module")
def checkout(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes, made small, in which all tutorials follow each other as they do for a reader."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for recipe in (folder / "recipes").rglob("*.yaml"):
        recipe.write_text(small(recipe.read_text(encoding="utf-8"), bases), encoding="utf-8")
    (folder / "made").mkdir()
    rows = [
        {"level": level, "prompt": f"What is {n} times {n}?", "completion": f"It is {n * n}, {level}."}
        for level in ("plain", "full")
        for n in range(12)
    ]
    (folder / "made" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def small(text: str, bases: dict[str, Path]) -> str:
    for name, path in bases.items():
        text = text.replace(name, str(path))
    text = re.sub(r"max_length: \d+", "max_length: 2048\noverlong: drop", text)
    text = re.sub(r"max_steps: \d+", "max_steps: 2\nbf16: false", text)
    return text.replace("max_regenerations: 1", "max_regenerations: 0").replace("runs/lessons/data,", "made,")


@pytest.fixture
def shell(newcomer: ModuleType, checkout: Path) -> Iterator[Any]:
    """Commands that are not `dylora` alone; `dylora` and `python` in them are those of this environment."""
    programs = checkout / ".bin"
    programs.mkdir(exist_ok=True)
    for name, words in {"python": "", "dylora": "-c 'from dylora_moe.cli.main import main; main()'"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    opened = newcomer.Shell(checkout, {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src")})
    yield opened
    opened.close()


def in_process(command: str) -> None:
    """`dylora ...` without a process of its own, which would take most of the time to import torch."""
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(command, comments=True)[1:])
    assert ended.value.code in (0, None), command


PAGES = ["README.md", *(f"docs/tutorials/{path.name}" for path in sorted((ROOT / "docs" / "tutorials").glob("*.md")))]


# Half a minute and more each.
LONG = ("README.md", "docs/tutorials/continual-stream.md")


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow) if page in LONG else page for page in PAGES],
    ids=lambda page: Path(page).stem,
)
def test_a_page_can_be_followed(
    page: str, newcomer: ModuleType, shell: Any, checkout: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    if not (checkout / "runs" / "quickstart").is_dir():  # the first of these tests that runs
        in_process("dylora train recipes/quickstart.yaml")
    for step in newcomer.read_steps((ROOT / page).read_text(encoding="utf-8"), page):
        text = small(step.text, bases)
        if step.language == "python":
            exec(compile(text, str(step), "exec"), {"__name__": "__main__"})
        elif text.startswith("dylora ") and not SHELL.search(text):
            in_process(text)
        elif not text.startswith(("pip ", "make ", "source .venv")):  # what makes an environment
            code, written = shell.run(text, seconds=300)
            assert code == 0, f"{step}\n{written}"
