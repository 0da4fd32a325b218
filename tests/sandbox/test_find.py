"""Which sandbox is taken, and what is said where there is none."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.sandbox.conftest import works

from dylora_moe.errors import SandboxError
from dylora_moe.sandbox import NAMES, docker, find_sandbox, landlock, try_back_end


@pytest.fixture
def no_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No bwrap and no docker on the path."""
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def no_sandlock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "find_spec", lambda name: None)


def test_bubblewrap_comes_first() -> None:
    works("bubblewrap")
    assert find_sandbox().name == "bubblewrap"


@pytest.mark.usefixtures("no_commands")
def test_without_it_landlock_is_taken() -> None:
    works("sandlock")
    assert find_sandbox().name == "sandlock"


@pytest.mark.usefixtures("no_commands", "no_sandlock")
def test_without_both_nothing_is_run_and_the_ways_out_are_told() -> None:
    with pytest.raises(SandboxError) as told:
        find_sandbox()
    for way in ("apt-get install bubblewrap", "pip install 'dylora-moe[sandbox]'", "Docker", "`none`"):
        assert way in str(told.value)


def test_a_bubblewrap_that_fails_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    works("sandlock")
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert "No permissions to create new namespace" in try_back_end("bubblewrap").reason
    assert find_sandbox().name == "sandlock"


def test_a_sandbox_that_protects_too_much_to_run_python_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\nprintf '\\0the program starts\\n' >&2\nexit 127\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert "must pass, it failed" in try_back_end("bubblewrap").reason


def test_where_bubblewrap_itself_works_so_does_the_sandbox() -> None:
    """So that a mistake of ours does not pass as a machine without it."""
    command = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--size", "4096", "--tmpfs", "/tmp", "true"]
    if shutil.which("bwrap") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("bubblewrap is not installed here, or makes no namespaces")
    assert try_back_end("bubblewrap").reason == ""


def test_where_sandlock_itself_works_so_does_the_sandbox() -> None:
    code = "import sandlock; print(sandlock.Sandbox(fs_readable=['/']).run(['/bin/true']).success)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if run.stdout != "True\n":
        pytest.skip(f"sandlock does not work here: {run.stdout}{run.stderr[-300:]}")
    assert try_back_end("sandlock").reason == ""


def test_none_is_taken_by_its_name_alone() -> None:
    assert find_sandbox("none").name == "none"
    with pytest.raises(SandboxError, match=re.escape("must be one of auto, bubblewrap, sandlock, docker, none")):
        find_sandbox("unsafe")
    assert NAMES[0] == "auto"


def test_docker_gives_the_container_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from dylora_moe.sandbox import Limits

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    limits = Limits(memory_bytes=123 << 20, processes=7, file_bytes=5 << 20)
    arguments = docker.run_arguments("some-name", limits)
    text = " ".join(arguments)
    for part in (
        "run --rm --interactive --name some-name",
        "--network none",
        "--read-only",
        "--cap-drop ALL",
        "--security-opt no-new-privileges",
        "--pids-limit 8",
        f"--memory {123 << 20} --memory-swap {123 << 20}",
        "--user 65534:65534",
        f"/work:rw,nosuid,nodev,size={5 << 20},mode=1777",
        f"{docker.image()} python -I -S -c",
    ):
        assert part in text
    assert not {"--privileged", "--volume", "-v", "--env", "-e", "--mount"} & set(arguments)
    assert "hf_secret" not in text and "HF_TOKEN" not in docker._environment()


@pytest.mark.usefixtures("no_commands")
def test_docker_says_what_is_missing() -> None:
    with pytest.raises(SandboxError, match="Docker must be installed"):
        find_sandbox("docker")
