"""The lines of a training: the same ones wherever they go."""

import io
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from dylora_moe.config import RunConfig
from dylora_moe.train.run import train
from dylora_moe.train.session import Stages


@pytest.mark.parametrize("options", [{}, {"force_terminal": True}, {"force_terminal": True, "no_color": True}])
def test_plain_lines_where_there_is_no_terminal(
    tiny_config: Callable[..., RunConfig], options: dict[str, bool]
) -> None:
    """Nor is one to be had by force."""
    file = io.StringIO()
    config = tiny_config(max_steps=2, logging_steps=1, eval_steps=1, sample_tokens=0, eval_subset=20)
    train(config, Stages(console=Console(file=file, width=120, color_system=None, **options)))
    text = file.getvalue()
    assert "\x1b" not in text
    assert "\nTraining for 2 steps.\n" in text
    steps = re.findall(r"^step +(\d)/2  loss \d+\.\d{4}  lr \S+  \d+ tokens/s  load entropy [01]\.\d\d$", text, re.M)
    assert steps == ["1", "2"]
    losses = re.findall(
        r"^step +(\d)  validation loss: capitals \d+\.\d+  functions \d+\.\d+  sums \d+\.\d+$", text, re.M
    )
    assert losses == ["0", "1", "2"]
