"""An optimizer goes on over a change of experts as if those that stay had never noticed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dylora_moe.errors import TunerError
from dylora_moe.tuner import DyLoraModel, ExpertConfig, moments_kept

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda values: torch.optim.AdamW(values, lr=1e-2, weight_decay=0.0),
    "amsgrad": lambda values: torch.optim.AdamW(values, lr=1e-2, weight_decay=0.0, amsgrad=True),
    "momentum": lambda values: torch.optim.SGD(values, lr=1e-2, momentum=0.9),
}


def trained(model: DyLoraModel) -> list[torch.nn.Parameter]:
    return [value for value in model.parameters() if value.requires_grad]


def steps(model: DyLoraModel, optimizer: torch.optim.Optimizer, batch: Any, count: int, expert: str | None) -> None:
    with model.forced(expert):
        for _ in range(count):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()


def weights_of(model: DyLoraModel, expert: str) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.lm.state_dict().items() if f".{expert}." in name}


def check_groups(model: DyLoraModel, optimizer: torch.optim.Optimizer) -> None:
    """What trains is in it once, nothing else is, and each group has its kind."""
    held = [id(value) for group in optimizer.param_groups for value in group["params"]]
    assert sorted(held) == sorted(map(id, trained(model))) and set(map(id, optimizer.state)) <= set(held)
    routers = {id(value) for value in model.routers.parameters()}
    assert all(len({id(value) in routers for value in group["params"]}) < 2 for group in optimizer.param_groups)


def start(make_model: Any, count: int, make: Make) -> tuple[DyLoraModel, torch.optim.Optimizer]:
    """Experts and router in groups of their own, with rates of their own."""
    torch.manual_seed(0)
    model = make_model(count)
    groups = [{"params": [value for value in trained(model) if not is_router(model, value)]}]
    if model.routers:
        groups.append({"params": [value for value in trained(model) if is_router(model, value)], "lr": 1e-3})
    return model, make(groups)


def is_router(model: DyLoraModel, value: Tensor) -> bool:
    return any(value is other for other in model.routers.parameters())


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("count", [2, 3])
def test_experts_that_stay_train_on_as_if_nothing_had_come(make_model: Any, batch: Any, make: Make, count: int) -> None:
    """Bit for bit: one comes that is forced never, and goes again."""
    found = []
    for grows in (False, True):
        model, optimizer = start(make_model, count, make)
        steps(model, optimizer, batch, 2, None)
        if grows:
            with moments_kept(model, optimizer):
                model.add_expert("new", maturity=1.0)
            check_groups(model, optimizer)
        steps(model, optimizer, batch, 2, "expert_1")
        if grows:
            with moments_kept(model, optimizer):
                model.remove_expert("new")
            check_groups(model, optimizer)
        steps(model, optimizer, batch, 2, None)
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_growth_as_in_a_stream(make_model: Any, batch: Any) -> None:
    """The old ones are frozen, and the new one begins at its first step."""
    model, optimizer = start(make_model, 2, OPTIMIZERS["adamw"])
    steps(model, optimizer, batch, 3, None)
    old = {name: weights_of(model, name) for name in model.expert_names}
    router = model.routers["shared"].weight
    moments = optimizer.state[router]["exp_avg"].clone()
    with moments_kept(model, optimizer):
        for name in model.expert_names:
            model.freeze_expert(name)
        model.add_expert("new", maturity=1.0)
    check_groups(model, optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [1e-2, 1e-3]
    grown = optimizer.state[model.routers["shared"].weight]["exp_avg"]
    assert torch.equal(grown[:2], moments) and not grown[2].any()
    steps(model, optimizer, batch, 1, "new")
    counts = {float(optimizer.state[value]["step"]) for value in optimizer.param_groups[0]["params"]}
    assert counts == {1.0}
    for name, weights in old.items():
        assert all(torch.equal(value, weights_of(model, name)[key]) for key, value in weights.items())


def test_a_new_one_among_others_has_their_scale(make_model: Any, batch: Any) -> None:
    model, optimizer = start(make_model, 2, OPTIMIZERS["adamw"])
    steps(model, optimizer, batch, 3, None)
    before = {id(value): optimizer.state[value]["exp_avg_sq"].clone() for value in optimizer.param_groups[0]["params"]}
    means = sorted(float(value.mean(0).sum()) for value in before.values())
    with moments_kept(model, optimizer):
        model.add_expert("new", maturity=1.0)
    states = [optimizer.state[value] for value in optimizer.param_groups[0]["params"]]
    assert sorted(float(state["exp_avg_sq"][2].sum()) for state in states) == pytest.approx(means)
    assert not any(state["exp_avg"][2].any() for state in states) and {float(state["step"]) for state in states} == {3}


def test_one_lora_becomes_a_mixture(make_model: Any, batch: Any) -> None:
    """Its moments move into what it shares with the second one, and a router comes where none was."""
    model, optimizer = start(make_model, 1, OPTIMIZERS["adamw"])
    steps(model, optimizer, batch, 2, None)
    sizes = sorted(float(state["exp_avg"].abs().sum()) for state in optimizer.state.values())
    with moments_kept(model, optimizer):
        model.add_expert("new", maturity=1.0)
    held = [id(value) for group in optimizer.param_groups for value in group["params"]]
    assert sorted(held) == sorted(map(id, trained(model))) and len(optimizer.param_groups) == 1
    found = sorted(float(state["exp_avg"][0].abs().sum()) for state in optimizer.state.values())
    assert found == pytest.approx(sizes)


def test_experts_of_different_ranks_keep_theirs(make_model: Any, batch: Any) -> None:
    """They lie apart, so nothing is shared."""
    model, optimizer = start(make_model, 2, OPTIMIZERS["adamw"])
    steps(model, optimizer, batch, 2, None)
    count = len(optimizer.param_groups[0]["params"])
    total = sum(float(optimizer.state[value]["exp_avg"].abs().sum()) for value in optimizer.param_groups[0]["params"])
    with moments_kept(model, optimizer):
        model.add_expert("wide", ExpertConfig(rank=16), maturity=1.0)
    check_groups(model, optimizer)
    states = [optimizer.state.get(value) for value in optimizer.param_groups[0]["params"]]
    assert sum(float(state["exp_avg"].abs().sum()) for state in states if state) == pytest.approx(total)
    assert sum(state is not None for state in states) == 2 * count  # each of the two for itself now
    steps(model, optimizer, batch, 1, None)


def test_each_of_two_optimizers_keeps_to_its_kind(make_model: Any, batch: Any) -> None:
    model = make_model(2)
    kinds = [[v for v in trained(model) if is_router(model, v) is router] for router in (False, True)]
    optimizers = [OPTIMIZERS["adamw"](values) for values in kinds]
    with moments_kept(model, optimizers[0]), moments_kept(model, optimizers[1]):
        model.add_expert("new", maturity=1.0)
    held = [[id(v) for group in optimizer.param_groups for v in group["params"]] for optimizer in optimizers]
    assert sorted(held[0] + held[1]) == sorted(map(id, trained(model)))
    assert held[1] == [id(model.routers["shared"].weight)]


def test_it_follows_even_where_the_block_fails(make_model: Any, batch: Any) -> None:
    model, optimizer = start(make_model, 2, OPTIMIZERS["adamw"])
    with pytest.raises(KeyError), moments_kept(model, optimizer):
        model.add_expert("new", maturity=1.0)
        raise KeyError
    check_groups(model, optimizer)


def test_counts_of_steps_that_come_together_are_the_larger(make_model: Any, batch: Any) -> None:
    """One expert trained alone for longer, then with the other in one parameter."""
    model, optimizer = start(make_model, 2, OPTIMIZERS["adamw"])
    with moments_kept(model, optimizer):
        model.freeze_expert("expert_1")
    steps(model, optimizer, batch, 3, "expert_0")
    with moments_kept(model, optimizer):
        model.freeze_expert("expert_1", frozen=False)
    states = [optimizer.state[value] for value in optimizer.param_groups[0]["params"]]
    assert {float(state["step"]) for state in states} == {3.0}
    assert all(state["exp_avg"][0].any() and not state["exp_avg"][1].any() for state in states)


def test_an_optimizer_of_something_else_is_refused(make_model: Any) -> None:
    model = make_model(2)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(TunerError, match="it knows none of them"), moments_kept(model, optimizer):
        pytest.fail("the block was entered")
