"""What one of two processes fails by is said, and the other one ends."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.train.several import start_several

from dylora_moe.config import RunConfig

pytestmark = pytest.mark.slow


def errors_of(config: RunConfig, folder: Path, fault: str) -> list[str]:
    """What each of two processes says of a fault after three steps."""
    started = start_several([config], folder, dies_at=3, fault=fault)
    assert [process.wait(60) for process in started] == [1, 1]
    return [(folder / f"error-{rank}.txt").read_text() for rank in range(2)]


def test_a_checkpoint_that_cannot_be_written_is_told(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """By the one that writes, which is not alone with it while the others wait."""
    first, second = errors_of(tiny_config(save_steps=2, max_steps=6, sample_tokens=0), tmp_path / "seen", "no disk")
    assert first.startswith("RunError: The checkpoint of step 4 must be written to") and "exists" in first
    assert second.startswith("OtherFailed: The first process of this run failed: The checkpoint of step 4")


def test_an_error_of_one_process_alone_ends_all(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Nobody waits for ever, though errors of this kind are usually of all, who write a checkpoint together."""
    first, second = errors_of(tiny_config(save_steps=2, max_steps=6, sample_tokens=0), tmp_path / "seen", "alone")
    assert second == "RunError: an error of one process"
    assert first.startswith("OtherFailed: Another process of this run ended")
