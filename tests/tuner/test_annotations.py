"""Shapes and types in signatures, checked while the tuner runs: a second copy of the package, with jaxtyping active."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError, install_import_hook
from torch import Tensor

pytest.importorskip("beartype")


def own_modules() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "dylora_moe"]


@pytest.fixture(scope="module")
def checked() -> ModuleType:
    """`dylora_moe.tuner`, imported again with every annotation checked at run time; once, for beartype's cache."""
    unchecked = {name: sys.modules.pop(name) for name in own_modules()}
    try:
        with install_import_hook("dylora_moe.tuner", "beartype.beartype"):
            import dylora_moe.tuner
            import dylora_moe.tuner.head
        return dylora_moe.tuner
    finally:
        for name in own_modules():
            del sys.modules[name]
        sys.modules.update(unchecked)


def test_the_checks_are_active(checked: Any) -> None:
    x, factors, scales = torch.zeros(3, 8), torch.zeros(2, 8, 8), torch.ones(2)
    good = checked.kernels.bottleneck(x, torch.zeros(3, 2), factors, factors, scales)
    assert good.shape == (3, 8)
    with pytest.raises(TypeCheckError):
        checked.kernels.bottleneck(x, torch.zeros(4, 2), factors, factors, scales)
    with pytest.raises(TypeCheckError):
        checked.LoadWindow().add(None, torch.zeros(2, 2))


def steps(tuner: Any, model: Any, batch: dict[str, Tensor]) -> None:
    loss = model.train()(**batch).loss
    auxiliary = model.auxiliary_losses(tuner.LoadWindow())
    (loss + auxiliary.balance + auxiliary.z).backward()
    model.eval()
    with model.recording(), model.forced(model.expert_names[0]):
        model(**batch)
    head = tuner.head.read_head(model.lm)
    head.nll(model(hidden_only=True, **batch), batch["labels"]).sum().backward()


@pytest.mark.parametrize(
    "routing",
    [
        {"granularity": "token", "router_scope": "per_layer", "top_k": 2, "tap_layer": 1},
        {"granularity": "sequence", "router_scope": "shared"},
    ],
    ids=lambda routing: routing["granularity"],
)
def test_annotations_hold_in_every_path(
    checked: Any, make_base: Any, batch: dict[str, Tensor], routing: dict[str, Any], tmp_path: Path
) -> None:
    packed = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    packed["position_ids"] = (torch.arange(12) % 5).expand(3, 12)
    model = checked.DyLoraModel(
        make_base(),
        ["a", "b"],
        expert_config=checked.ExpertConfig(rank=8, target_modules=("v_proj", "down_proj")),
        routing=checked.RoutingConfig(**routing),
    )
    model.calibrate([batch])
    for execution in ("reference", "bottleneck", "rowwise", "grouped"):
        for _, linear in model.routed_linears():
            linear.execution = execution
        steps(checked, model, packed if execution == "grouped" else batch)
    model.activation_checkpointing_enable()
    model.add_expert("c", checked.ExpertConfig(rank=4, target_modules="attention"))
    steps(checked, model, batch)
    model.set_maturity("c", 1.0)
    steps(checked, model, batch)
    prompt = {"input_ids": batch["input_ids"][:2], "attention_mask": batch["attention_mask"][:2]}
    model.generate(**prompt, max_new_tokens=2)
    checked.save_model(model, tmp_path / "model", base_name="b")
    checked.load_model(make_base(), tmp_path / "model")
    checked.export_expert(model, "c", tmp_path / "c", base_name="b")
    checked.import_expert(model, tmp_path / "c", "d")
    model.freeze_expert("d")
    model.rename_expert("d", "e")
    model.remove_expert("a")
    steps(checked, model.bfloat16(), batch)


@pytest.mark.parametrize("unsure", ["base", "dense"])
def test_annotations_hold_for_prototypes(checked: Any, make_base: Any, batch: dict[str, Tensor], unsure: str) -> None:
    model = checked.DyLoraModel(
        make_base(),
        ["a", "b"],
        expert_config=checked.ExpertConfig(rank=8, target_modules=("v_proj", "down_proj")),
        routing=checked.RoutingConfig(router="prototype", granularity="sequence", unsure=unsure),
    )
    steps(checked, model, batch)  # no skill is known yet
    features = model.prompt_features([batch])
    for skills, dimensions in ((1, 0), (2, 1), (3, 2)):
        places = torch.zeros(skills, dimensions), torch.full((skills,), 0.5)
        model.set_prototypes(torch.ones(features.shape[1], dimensions), *places, ["a", "b", "a"][:skills])
        steps(checked, model, batch)
    model.add_expert("c", maturity=1.0)
    model.remove_expert("a")
    steps(checked, model, batch)
    prompt = {"input_ids": batch["input_ids"][:2], "attention_mask": batch["attention_mask"][:2]}
    model.generate(**prompt, max_new_tokens=2)
