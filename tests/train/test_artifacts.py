"""Checkpoints go to Weights & Biases, and runs begin from them. Its server cannot be here: what it would be sent is
read from its own files, and what would be downloaded is a folder with the same."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.train.wandb_file import artifacts, read_wandb
from tests.train.whole import HARD, outcome

from dylora_moe.config import RunConfig
from dylora_moe.errors import ConfigError, RunError
from dylora_moe.run_dir import RunDir
from dylora_moe.train import run as run_module
from dylora_moe.train.run import train
from dylora_moe.train.trackers import fetch_checkpoint
from dylora_moe.train.trackers.artifacts import copy_by_links, find_checkpoint


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs the extra `trackers`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))


@pytest.mark.usefixtures("offline")
def test_another_run_begins_from_the_best_checkpoint_that_was_sent(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run itself keeps two of five; the artifact's files are all that the other one has."""
    first = tiny_config(**HARD, run_name="first", report_to=["wandb"], wandb_artifacts="checkpoints")
    train(first)
    (written,) = first.run_dir.glob("trackers/wandb/offline-run-*/*.wandb")
    sent = artifacts(read_wandb(written), "checkpoint")
    assert [artifact.name for artifact in sent] == ["first-checkpoint"] * 5
    steps = [next(alias for alias in artifact.aliases if alias.startswith("step-")) for artifact in sent]
    assert steps == ["step-000003", "step-000006", "step-000009", "step-000012", "step-000013"]
    best = [artifact for artifact in sent if "best" in artifact.aliases]
    assert f"step-{RunDir(first.run_dir).read('result.json')['best_step']:06d}" in best[-1].aliases

    def download(reference: str, into: Path) -> Path:
        for entry in sent[1].manifest.contents:
            (into / entry.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(entry.local_path, into / entry.path)
        return find_checkpoint(into, reference)

    monkeypatch.setattr(run_module, "fetch_checkpoint", download)
    second = tiny_config(**HARD, run_name="second", wandb_checkpoint_artifact="me/dylora-moe/first-checkpoint:best")
    train(second)
    assert outcome(RunDir(second.run_dir)) == outcome(RunDir(first.run_dir))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("wanted", "kinds"), [({}, {"model"}), ({"wandb_artifacts": "none"}, set())])
def test_what_is_not_asked_for_is_not_sent(
    tiny_config: Callable[..., RunConfig], wanted: dict[str, str], kinds: set[str]
) -> None:
    train(config := tiny_config(report_to=["wandb"], **wanted))
    (written,) = config.run_dir.glob("trackers/wandb/offline-run-*/*.wandb")
    records = read_wandb(written)
    assert {kind for kind in ("model", "checkpoint") if artifacts(records, kind)} == kinds


def test_a_copy_outlives_its_folder_also_where_a_disk_has_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("links", "none"):
        (tmp_path / "step" / "run").mkdir(parents=True)
        (tmp_path / "step" / "run" / "file").write_text(name)
        copy = copy_by_links(tmp_path / "step", tmp_path / "copies" / "step")  # the second time over the first
        shutil.rmtree(tmp_path / "step")
        assert (copy / "run" / "file").read_text() == name

        def refuse(source: str, target: str) -> None:
            raise OSError

        monkeypatch.setattr("os.link", refuse)


def test_references_of_artifacts_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download itself needs W&B's server and is not tried here."""
    for wrong in ("name", "user/name:v0", "user/project/name", "user/project/name:", "a/b/c/d:v0", "a/b/c:v 0"):
        with pytest.raises(ConfigError, match="user/project/name:v0"):
            fetch_checkpoint(wrong, tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        fetch_checkpoint("user/project/name:v0", tmp_path)


def test_the_checkpoint_in_an_artifact_is_found(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"must hold one checkpoint.* got 0"):
        find_checkpoint(tmp_path, "u/p/n:v0")
    inner = tmp_path / "step-000010"
    inner.mkdir()
    (inner / "manifest.json").write_text("{}")
    assert find_checkpoint(tmp_path, "u/p/n:v0") == inner
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(RunError, match="got 2"):
        find_checkpoint(tmp_path, "u/p/n:v0")
