"""Settings of the tuner: ranges, names in messages, JSON."""

import json
from typing import Any

import pytest

from dylora_moe.errors import ConfigError
from dylora_moe.tuner import ExpertConfig, RoutingConfig


@pytest.mark.parametrize(
    "wrong",
    [
        {"granularity": "word"},
        {"router_scope": "both"},
        {"execution": "fast"},
        {"router": "nearest"},
        {"unsure": "guess"},
        {"tap_layer": -1},
        {"tap_layer": 1.0},
        {"top_k": 0},
        {"top_k": True},
        {"prefix_tokens": 0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
    ],
    ids=str,
)
def test_routing_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        RoutingConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"rank": 0}, "lora_r"),
        ({"alpha": 0}, "lora_alpha"),
        ({"dropout": 1.0}, "lora_dropout"),
        ({"rank": 2.5}, "lora_r"),
    ],
    ids=str,
)
def test_expert_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        ExpertConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"granularity": "token"}, {"router_scope": "per_layer"}, {"top_k": 2}], ids=str)
def test_prototypes_need_one_decision_a_document(wrong: dict[str, Any]) -> None:
    RoutingConfig(router="prototype", granularity="sequence")
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"router prototype needs {name}"):
        RoutingConfig(**{"router": "prototype", "granularity": "sequence"} | wrong)


def test_routing_settings_survive_json() -> None:
    config = RoutingConfig(granularity="sequence", router_scope="per_layer", tap_layer=2, top_k=2, temperature=0.5)
    assert RoutingConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    prototype = RoutingConfig(router="prototype", granularity="sequence", unsure="dense")
    assert RoutingConfig.from_json(json.loads(json.dumps(prototype.to_json()))) == prototype


def test_unknown_routing_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="new_trick"):
        RoutingConfig.from_json({"top_k": 1, "new_trick": 3})
