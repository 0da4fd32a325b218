"""Rows of one pass: what the base is asked to compute."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.serve.conftest import BASE

from dylora_moe.serve.engine import Engine
from dylora_moe.serve.request import Request


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_last_states_lie_side_by_side(
    make_mixture: Callable[..., Any], make_engine: Callable[..., Engine], architecture: str
) -> None:
    model, seen = make_mixture(architecture), list[torch.Tensor]()
    model.lm.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    engine = make_engine(model)
    request = Request(prompt=[5, 6, 7, 8], speaker=BASE, max_tokens=3)
    for stream in [engine.submit(request) for _ in range(5)]:
        list(stream)
    assert seen[0].shape[1:] == (1, 32)
    # Of others torch multiplies each row by a copy of its own of the weights, in bfloat16 on a CPU.
    assert all(states.stride() == torch.empty(states.shape).stride() for states in seen)
