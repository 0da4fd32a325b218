"""What a person sees while training, on a terminal and elsewhere."""

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from dylora_moe.config import RunConfig
from dylora_moe.train.run import train
from dylora_moe.train.session import Stages
from dylora_moe.train.trainer import RoutedTrainer

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # what a terminal is sent for its cursor


def shown(config: RunConfig, *, terminal: bool) -> str:
    file = io.StringIO()
    train(config, Stages(console=Console(file=file, force_terminal=terminal, width=120, color_system=None)))
    return file.getvalue()


@pytest.fixture
def config(tiny_config: Callable[..., RunConfig]) -> RunConfig:
    return tiny_config(max_steps=2, logging_steps=1, eval_steps=1, sample_tokens=0, eval_subset=20)


def test_plain_lines_where_there_is_no_terminal(config: RunConfig) -> None:
    text = shown(config, terminal=False)
    assert "\x1b" not in text
    steps = re.findall(r"^step +(\d)/2  loss \d+\.\d{4}  lr \S+  \d+ tokens/s  load entropy [01]\.\d\d$", text, re.M)
    assert steps == ["1", "2"]
    losses = re.findall(
        r"^step +(\d)  validation loss: capitals \d+\.\d+  functions \d+\.\d+  sums \d+\.\d+$", text, re.M
    )
    assert losses == ["0", "1", "2"]


def test_a_bar_with_speed_and_time_left_on_a_terminal(config: RunConfig) -> None:
    text = shown(config, terminal=True)
    assert re.search(r"loss \d+\.\d{3} .*2/2 .*left .*\d:\d\d:\d\d.* tokens/s", text)
    assert text.count(HIDE) == text.count(SHOW) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_bar_goes_away_after_an_error(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(RoutedTrainer, "compute_loss", fail)
    file = io.StringIO()
    with pytest.raises(error):
        train(config, Stages(console=Console(file=file, force_terminal=True, width=120)))
    text = file.getvalue()
    assert text.count(HIDE) == text.count(SHOW) == 1
