"""What is compiled, and what is said where nothing is."""

from collections.abc import Callable
from typing import Any

import pytest

from dylora_moe.train.compiling import compile_layers, layers_to_compile
from dylora_moe.tuner.inspect import decoder_layers


def test_layers_below_the_tap_are_compiled_on_a_gpu(make_session: Callable[..., Any]) -> None:
    model = make_session(tap_layer=1).model
    layers, reason = layers_to_compile(model, "cuda")
    assert reason is None and layers == [decoder_layers(model.lm)[1][0]]
    assert layers_to_compile(make_session().model, "cuda")[0] == []


@pytest.mark.parametrize("changes", [{}, {"tap_layer": 1}], ids=str)
def test_the_reason_is_said_on_a_cpu(make_session: Callable[..., Any], changes: dict[str, Any]) -> None:
    told: list[str] = []
    model = make_session(**changes).model
    compile_layers(model, told.append)
    assert len(told) == 1 and told[0].startswith("torch_compile is skipped: on a CPU")
    assert not any(hasattr(layer, "_compiled_call_impl") and layer._compiled_call_impl for layer in model.modules())
