"""`docker/build_and_push`, run with a docker that only writes down what it is told."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.docker.dockerfile import ROOT

SCRIPT = ROOT / "docker" / "build_and_push"
GOOGLE, HUB = "us-docker.pkg.dev/p/r/dylora-moe", "docker.io/o/dylora-moe"
Run = Callable[..., "tuple[int, str, list[str]]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """(*arguments) -> exit code, output, and the commands that docker got."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\necho "docker $*" >> "$0.log"\n[ "$1" != fail ]\n')
    docker.chmod(0o755)

    def start(*arguments: str) -> tuple[int, str, list[str]]:
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        ended = subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        log = tmp_path / "docker.log"
        return ended.returncode, ended.stdout + ended.stderr, log.read_text().splitlines() if log.exists() else []

    return start


def test_one_image_goes_to_all_registries(run: Run) -> None:
    code, _, commands = run("--device", "cuda", GOOGLE, HUB)
    names = [f"{GOOGLE}:0.1.0-cuda", f"{GOOGLE}:cuda", f"{HUB}:0.1.0-cuda", f"{HUB}:cuda"]
    tags = " ".join(f"--tag {name}" for name in names)
    assert code == 0
    assert commands == [
        f"docker build --file docker/Dockerfile --build-arg DEVICE=cuda {tags} .",
        *(f"docker push {name}" for name in names),
    ]


def test_a_dry_run_prints_the_same_and_does_nothing(run: Run) -> None:
    code, told, commands = run("--dry-run", GOOGLE)
    assert code == 0 and commands == []
    _, _, done = run(GOOGLE)
    assert [line.removeprefix("+ ") for line in told.splitlines()] == done


def test_a_tag_of_ones_own_and_no_push(run: Run) -> None:
    _, _, commands = run("--tag", "mine", "--no-push", "localhost:5000/dylora-moe")
    assert commands == [
        "docker build --file docker/Dockerfile --build-arg DEVICE=cpu --tag localhost:5000/dylora-moe:mine ."
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name at least one image"),
        (("--device", "tpu", HUB), "--device must be cpu or cuda, got tpu"),
        (("--device",), "--device needs a value"),
        (("--push", HUB), "there is no option --push"),
        ((f"{HUB}:latest",), "without a tag"),
    ],
)
def test_a_wrong_command_line_does_nothing(run: Run, arguments: tuple[str, ...], words: str) -> None:
    code, told, commands = run(*arguments)
    assert code == 2 and words in told and commands == []


def test_it_builds_this_checkout_wherever_it_lies(run: Run, tmp_path: Path) -> None:
    """Also with blanks in its path, and with a CDPATH in which another `docker` lies."""
    checkout, other = tmp_path / "a check out", tmp_path / "other"
    (other / "docker").mkdir(parents=True)
    (checkout / "docker").mkdir(parents=True)
    for name in ("docker/build_and_push", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout / name)
    (tmp_path / "docker").write_text('#!/bin/sh\npwd >> "$0.log"\n')
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CDPATH": str(other)}
    command = ["bash", "docker/build_and_push", "--no-push", HUB]
    ended = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "docker.log").read_text() == f"{checkout}\n" and ":0.1.0-cpu" in ended.stdout


def test_a_build_that_fails_is_not_pushed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "docker").write_text('#!/bin/sh\necho "docker $*" >> "$0.log"\nexit 7\n')
    code, _, commands = run(HUB)
    assert code == 7 and len(commands) == 1


def test_the_linter_of_shells_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    found = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
