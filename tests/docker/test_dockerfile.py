"""The image by its text: no daemon is here that could build it. A linter reads it, and so does this."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.docker.dockerfile import DOCKERFILE, ROOT, stages, texts

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PINNED = re.compile(r"python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}")
SECRET = re.compile(r"(?i)token|key|secret|password|credential")


def test_the_linter_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    found = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, ""), found.stdout + found.stderr


def test_both_stages_are_of_one_pinned_python() -> None:
    before, found = stages()
    (python,) = texts(before, "ARG")
    assert PINNED.fullmatch(python.removeprefix("PYTHON="))
    assert [texts(stage, "FROM") for stage in found] == [["${PYTHON} AS packages"], ["${PYTHON}"]]


def test_packages_are_those_of_the_constraints() -> None:
    _, (packages, _) = stages()
    installs = re.findall(r"pip install[^;&]*", " ; ".join(texts(packages, "RUN")))
    assert len(installs) == 3 and all("-c constraints.txt" in each for each in installs)
    extras = next(each for each in texts(packages, "ARG") if each.startswith("EXTRAS="))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(extras.removeprefix("EXTRAS=").split(",")) <= set(known) - {"dev"}


def test_the_image_has_packages_and_no_tools_that_made_them() -> None:
    _, (_, image) = stages()
    copied = texts(image, "COPY")
    assert copied[0] == "--from=packages /opt/dylora /opt/dylora"
    assert not any(each.startswith("src") for each in copied)
    assert not any("pip" in each for each in texts(image, "RUN"))


def test_it_runs_as_nobody_special() -> None:
    _, (_, image) = stages()
    words = [each.word for each in image]
    assert texts(image, "USER") == ["1000:1000"]
    assert not {"RUN", "COPY", "ADD"} & set(words[words.index("USER") :])
    (run,) = texts(image, "RUN")
    owned = re.search(r"install -d -o dylora -g dylora (.*)$", run)
    assert owned is not None
    assert {*owned[1].split()} == set(yaml.safe_load(texts(image, "VOLUME")[0]))
    env = " ".join(texts(image, "ENV"))
    assert "DYLORA_CACHE=/cache/" in env and "HF_HOME=/cache/" in env and texts(image, "WORKDIR") == ["/app"]


def test_no_secret_can_be_in_a_layer() -> None:
    before, found = stages()
    for stage in (before, *found):
        for text in texts(stage, "ARG") + texts(stage, "ENV"):
            assert not SECRET.search(text), text
        assert not any("--mount=type=secret" in each for each in texts(stage, "RUN"))


def test_all_that_is_copied_is_there_and_nothing_else_is_sent(tmp_path: Path) -> None:
    """By Docker's own reading of .dockerignore, on a tree with all that must stay behind."""
    build = pytest.importorskip("docker.utils.build", reason="Docker's Python client is not installed")
    for name in (
        *("constraints.txt", "pyproject.toml", "README.md", "LICENSE", "src/dylora_moe/cli/main.py", "src/p/a.yaml"),
        *("recipes/full.yaml", "docker/healthcheck.py", "docker/Dockerfile", ".git/config", ".env", "src/.env"),
        *("runs/a/result.json", "src/p/__pycache__/a.pyc", "recipes/.env.local", "token.txt", "tests/a.py", "data/x"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in patterns if line and not line.startswith("#")]
    sent = {path for path in build.exclude_paths(str(tmp_path), patterns) if (tmp_path / path).is_file()}
    assert sent - {"docker/Dockerfile"} == {
        *("constraints.txt", "pyproject.toml", "README.md", "LICENSE", "src/dylora_moe/cli/main.py", "src/p/a.yaml"),
        *("recipes/full.yaml", "docker/healthcheck.py"),
    }
    _, found = stages()
    for stage in found:
        for text in texts(stage, "COPY"):
            for source in [] if text.startswith("--from") else text.split()[:-1]:
                assert (ROOT / source).exists() and any(path == source or path.startswith(source) for path in sent)


def test_it_starts_dylora_and_can_be_asked_whether_it_is_well() -> None:
    _, (_, image) = stages()
    assert texts(image, "ENTRYPOINT") == ['["dylora"]'] and texts(image, "EXPOSE") == ["8000"]
    (check,) = texts(image, "HEALTHCHECK")
    assert check.endswith('CMD ["python", "/opt/dylora/healthcheck.py"]')
    assert "docker/healthcheck.py /opt/dylora/healthcheck.py" in texts(image, "COPY")


@pytest.mark.parametrize("device", ["cpu", "cuda", "tpu"])
def test_a_device_is_one_of_two(device: str, tmp_path: Path) -> None:
    """The shell that chooses torch's build, run with a pip that only writes down what it is told."""
    _, (packages, _) = stages()
    (choose,) = [each for each in texts(packages, "RUN") if each.startswith("case")]
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "$@" >> "$0.log"\n')
    pip.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DEVICE": device}
    ended = subprocess.run(["sh", "-c", choose], env=environment, capture_output=True, text=True, check=False)
    log = (tmp_path / "pip.log").read_text() if device != "tpu" else ""
    if device == "tpu":
        assert ended.returncode == 1 and "DEVICE must be cpu or cuda, got tpu" in ended.stderr
    else:
        assert ended.returncode == 0, ended.stderr
        assert log.strip().endswith(" torch") and ("/whl/cpu" in log) == (device == "cpu")
