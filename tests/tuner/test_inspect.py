"""What a target setting matches in each family, and where decoder layers are."""

from typing import Any

import pytest
import torch

from dylora_moe.errors import TunerError
from dylora_moe.tuner.inspect import decoder_layers, layer_index, linear_names, resolve_targets

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
TARGETS = {
    "llama": (ATTENTION, ["down_proj", "gate_proj", "up_proj"]),
    "gemma3": (ATTENTION, ["down_proj", "gate_proj", "up_proj"]),
    "phi": (["dense", "k_proj", "q_proj", "v_proj"], ["fc1", "fc2"]),
    "phi3": (["o_proj", "qkv_proj"], ["down_proj", "gate_up_proj"]),
}


@pytest.mark.parametrize("architecture", list(TARGETS))
def test_targets_by_word(make_base: Any, architecture: str) -> None:
    base, (attention, others) = make_base(architecture), TARGETS[architecture]
    assert resolve_targets(base, "attention") == sorted(attention)
    assert resolve_targets(base, "all-linear") == sorted(attention + others)
    assert resolve_targets(base, tuple(others)) == sorted(others)
    assert resolve_targets(base, others[0]) == [others[0]]


def test_unknown_targets_list_the_known_ones(make_base: Any) -> None:
    with pytest.raises(TunerError, match=r"w_proj.*down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"):
        resolve_targets(make_base(), ("q_proj", "w_proj"))
    with pytest.raises(TunerError, match="empty list"):
        resolve_targets(make_base(), ())
    with pytest.raises(TunerError, match="lm_head"):
        resolve_targets(make_base(), ("lm_head",))


def test_targets_of_an_adapted_base_are_those_of_the_base(make_base: Any, make_model: Any) -> None:
    adapted = make_model(2)
    assert resolve_targets(adapted.lm, "all-linear") == resolve_targets(make_base(), "all-linear")
    assert linear_names(decoder_layers(adapted.lm)[1]) == linear_names(decoder_layers(make_base())[1])


def test_layers_are_found_and_numbered(make_base: Any) -> None:
    path, layers = decoder_layers(make_base())
    assert path == "model.layers" and len(layers) == 3
    assert layer_index(path, "model.layers.2.mlp.up_proj") == 2
    assert layer_index(path, "model.norm") is None
    assert layer_index(path, "model.layers_norm.1") is None


def test_a_base_without_decoder_layers_is_refused(make_base: Any) -> None:
    base = make_base()
    base.model.layers = torch.nn.ModuleList(list(base.model.layers)[:2])
    with pytest.raises(TunerError, match="list of 3 layers"):
        decoder_layers(base)
