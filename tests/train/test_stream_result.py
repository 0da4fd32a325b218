"""A stream is taken back to before any skill, and learns it again."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.train.streams import beside, outcome

from dylora_moe.errors import RunError
from dylora_moe.run_dir import RunDir
from dylora_moe.train.run import train
from dylora_moe.train.stream_result import rollback


def test_a_stream_is_taken_back_and_learns_again(whole: Any) -> None:
    config = beside(whole, "back")
    train(config)
    (config.run_dir / "stages" / ".DS_Store").touch()
    (config.run_dir / "stages" / "notes").mkdir()
    undone = rollback(config.run_dir, "functions")
    assert undone["skills"] == ["capitals"] and undone["undone"] == ["02-functions", "03-sums"]
    run = RunDir(config.run_dir)
    assert run.read("result.json")["experts"] == ["capitals"]
    assert sorted(path.name for path in (run / "final" / "experts").iterdir()) == ["capitals"]
    assert (run / "undone" / "1" / "03-sums" / "stage.json").is_file()
    with pytest.raises(RunError, match=r"a skill that .* has learned, .* \(capitals\), got 'sums'"):
        rollback(config.run_dir, "sums")
    train(config)
    (run / "stages" / ".DS_Store").unlink()
    assert outcome(run) == outcome(whole[1])


def test_what_cannot_be_gone_back_to_is_left_alone(whole: Any, tmp_path: Path) -> None:
    """A library of an earlier version."""
    shutil.copytree(whole[1].path, run := tmp_path / "old")
    record = run / "stages" / "01-capitals" / "skills.json"
    record.write_text(record.read_text().replace('"format": 2', '"format": 1'))
    before = outcome(RunDir(run))
    with pytest.raises(RunError, match=r"format 2 to be read by this version, got 1\. Begin the stream anew"):
        rollback(run, "functions")
    assert outcome(RunDir(run)) == before
    assert rollback(run, "03-sums")["skills"] == ["capitals", "functions"]


def test_what_is_no_run_is_not_taken_back(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no config\.yaml"):
        rollback(tmp_path / "nothing", "capitals")
    assert not (tmp_path / "nothing").exists()
