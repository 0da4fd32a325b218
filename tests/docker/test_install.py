"""The image's install steps, taken from the Dockerfile and run in a bare virtual environment in place of an image."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docker.dockerfile import ROOT, stages, texts

# Of the CPU build; here pip's own settings say where packages are, and an index in an argument would replace them.
_INDEX = re.compile(r"--index-url \S+ ")


def steps() -> list[list[str]]:
    """(word, text) of what the stage that installs copies and runs, in order."""
    _, (packages, _) = stages()
    return [[each.word, each.text] for each in packages if each.word in ("COPY", "RUN")]


@pytest.mark.slow
def test_the_steps_make_a_dylora_that_works(tmp_path: Path) -> None:
    build, target = tmp_path / "build", tmp_path / "opt" / "dylora"
    build.mkdir()
    _, (packages, _) = stages()
    extras = next(each for each in texts(packages, "ARG") if each.startswith("EXTRAS=")).removeprefix("EXTRAS=")
    python = Path(sys.executable).resolve().parent
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG") or name.startswith("PIP_")}
    path = f"{target}/bin:{python}:/usr/bin:/bin"
    environment = kept | {"PATH": path, "DEVICE": "cpu", "EXTRAS": extras, "DYLORA_CACHE": str(tmp_path / "cache")}
    for word, text in steps():
        if word == "COPY":
            *sources, _ = text.split()
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copyfile
                copy(ROOT / source, build / source)
            continue
        command = _INDEX.sub("", text.replace("/opt/dylora", str(target)))
        ended = subprocess.run(
            ["sh", "-c", command], cwd=build, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
    shutil.rmtree(build)  # the image has the packages alone

    def dylora(*arguments: str) -> str:
        command = [str(target / "bin" / "dylora"), *arguments]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert "dylora" in dylora("--version") and "serve" in dylora("--help")
    dry = dylora("submit", "vertex", str(ROOT / "recipes" / "full.yaml"), "--dry-run", "--json")
    assert json.loads(dry)["job"]["displayName"] == "dylora-full"
    assert "Answer requests" in dylora("serve", "--help")
    check = "import torch, transformers, peft, fastapi, uvicorn, wandb, gcsfs, google.cloud.secretmanager"
    subprocess.run([str(target / "bin" / "python"), "-c", check], env=environment, check=True)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file() and not file.is_symlink())
    print(f"the packages take {size / 1e9:.2f} GB")
