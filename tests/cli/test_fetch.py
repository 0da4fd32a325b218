"""`dylora fetch`, what other verbs say of addresses, and `dylora train` told to end on a machine that is taken away."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import finish, start_python
from tests.remote.faults import Failing, failing

from dylora_moe.remote import place

__all__ = ["failing"]


@pytest.fixture
def sent(recipe: Callable[..., Path], dylora: Callable[..., Any], tmp_path: Path) -> str:
    """The address of a finished run, of which nothing is left on the disk."""
    outcome = dylora("train", recipe(remote_dir=f"file://{tmp_path / 'remote'}"))
    assert outcome.code == 0, outcome.err
    assert f"file://{tmp_path / 'remote'}/tiny has all of the run." in outcome.out
    shutil.rmtree(tmp_path / "runs")
    return f"file://{tmp_path / 'remote'}/tiny"


def test_a_fetched_run_is_one(
    sent: str, dylora: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = dylora("fetch", sent, "--json").json()
    assert told["run"] == "runs/tiny" and told["files"] > 10 and told["bytes"] > 10_000
    assert dylora("report", "runs/tiny").code == 0
    assert dylora("evaluate", "runs/tiny").code == 0 and list(Path("runs/tiny/eval").iterdir())
    again = dylora("fetch", sent)
    assert again.code == 1 and "runs/tiny is there. Give another with --output." in again.err
    assert dylora("fetch", sent, "--output", "other").code == 0 and Path("other/final/dylora_moe.json").is_file()


def test_what_cannot_be_fetched_is_told(dylora: Callable[..., Any], tmp_path: Path) -> None:
    nothing = dylora("fetch", f"file://{tmp_path}/nothing", "--output", tmp_path / "got")
    assert nothing.code == 1 and "with a sound snapshot, and holds none" in nothing.err
    secret = dylora("fetch", "s3://KEY:SECRET@bucket/run")
    assert secret.code == 1 and "must have no credentials" in secret.err and "SECRET" not in secret.err
    assert "must be the address of a folder" in dylora("fetch", "runs/tiny").err
    assert not (tmp_path / "got").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "gs://bucket/runs/a"),
        ("report", "gs://bucket/runs/a"),
        ("chat", "gs://bucket/runs/a", "--prompt", "x"),
        ("experts", "list", "gs://bucket/runs/a"),
        ("serve", "gs://bucket/runs/a"),
        ("train", "--output_dir", "gs://bucket/runs"),
    ],
    ids=lambda words: words[0],
)
def test_other_verbs_say_how(dylora: Callable[..., Any], words: tuple[str, ...]) -> None:
    outcome = dylora(*words)
    assert outcome.code == 1 and "must be on this machine, got gs://" in outcome.err, outcome.err
    assert "dylora fetch ADDRESS" in outcome.err


def test_a_remote_folder_that_is_waited_for_is_told(
    recipe: Callable[..., Path], dylora: Callable[..., Any], tmp_path: Path, failing: type[Failing], monkeypatch: Any
) -> None:
    """Also where only the preset is asked for, before anything else is shown."""
    monkeypatch.setattr(place, "_PAUSES_S", (0.01,))
    failing.plan(1, until=10**9)
    outcome = dylora("train", recipe(remote_dir=f"failing://{tmp_path / 'remote'}"))
    assert outcome.code == 1 and "credentials in the environment" in outcome.err
    assert "cannot be reached (ConnectionError: the network is away). Trying again for a minute" in outcome.out


def test_what_is_told_to_end_has_sent_its_last_step(
    recipe: Callable[..., Path], dylora: Callable[..., Any], tmp_path: Path
) -> None:
    """Exit code 75, within the time that a machine which is taken away grants."""
    path = recipe(remote_dir=f"file://{tmp_path / 'remote'}", max_steps=100_000, save_steps=100_000, num_epochs=10_000)
    process = start_python("from dylora_moe.cli.main import main; main()", "train", path)
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and '"loss"' in metrics.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, err = finish(process)
    assert process.returncode == 75, err
    assert time.monotonic() - began < 30
    (step,) = (path.name for path in (tmp_path / "runs/tiny/checkpoints").iterdir())
    shutil.rmtree(tmp_path / "runs")
    assert dylora("fetch", f"file://{tmp_path / 'remote'}/tiny", "--output", tmp_path / "got").code == 0
    (fetched,) = (tmp_path / "got" / "checkpoints").iterdir()
    assert fetched.name == step
    assert json.loads((fetched / "trainer_state.json").read_text())["global_step"] == int(step.removeprefix("step-"))
