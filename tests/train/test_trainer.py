"""One optimizer step is that of the mean over all its labelled tokens, and its balance loss is over all its tokens."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dylora_moe.evaluate.routing import RoutingReport
from dylora_moe.train.needs import plan_memory
from dylora_moe.train.session import Session, build_trainer, calibrate_router
from dylora_moe.train.stopping import StopSignals
from dylora_moe.train.trainer import RoutedTrainer
from dylora_moe.tuner.auxiliary import balance_loss

# As (rows in a pass, passes in a step): all make one step of the same six rows.
SPLITS = [(6, 1), (4, 2), (1, 6)]
ONE_STEP = {"max_steps": 1, "logging_steps": 1, "max_grad_norm": 1e9}
MIXTURES = [
    {"num_experts": 1},
    {"granularity": "sequence"},
    {"granularity": "token", "top_k": 2, "router_scope": "per_layer"},
]


@pytest.fixture
def six_rows(make_session: Callable[..., Session]) -> list[Any]:
    """Two rows of each domain, with unequal numbers of labels."""
    train = make_session().data.train
    rows = [row for domain in range(3) for row in [row for row in train if row.domain == domain][:2]]
    assert len({labelled(row) for row in rows}) >= 3
    return rows


def labelled(row: Any) -> int:
    return sum(label != -100 for label in row.labels)


def new_trainer(session: Session) -> RoutedTrainer:
    return build_trainer(session, stop=StopSignals(), tell=print)


def fit(session: Session, *callbacks: Any) -> RoutedTrainer:
    trainer = new_trainer(session)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def logged(trainer: RoutedTrainer, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if "loss" in line]


def slow_step(session: Session) -> tuple[float, dict[str, Tensor]]:
    """Mean loss and gradients over all labelled tokens of the rows, each row alone, from all logits."""
    rows, model = session.data.train, session.model
    total: Tensor | float = 0.0
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits
        total = total + F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    loss = total / sum(map(labelled, rows))
    assert isinstance(loss, Tensor)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return float(loss), {name: grad for name, grad in grads.items() if grad is not None}


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_a_step_is_that_of_the_mean_over_its_labelled_tokens(
    make_session: Any, six_rows: Any, gradients: Any, mixture: dict[str, Any]
) -> None:
    loss, expected = slow_step(make_session(six_rows, **mixture))
    largest = max(float(grad.abs().max()) for grad in expected.values())
    assert len(expected) > 4 and largest > 1e-3
    for batch_size, passes in SPLITS:
        sizes = {"batch_size": batch_size, "gradient_accumulation_steps": passes}
        trainer = fit(make_session(six_rows, **mixture, **ONE_STEP, **sizes), gradients)
        assert trainer.state.global_step == 1
        assert logged(trainer, "loss") == pytest.approx([loss], rel=1e-5)
        found = gradients.steps.pop()
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_a_step_of_packs_is_the_same_step(
    make_session: Any, six_rows: Any, gradients: Any, mixture: dict[str, Any]
) -> None:
    """Also its losses on routing and what it counts: documents are told apart, and padding counts for nothing."""
    changes = {**mixture, **ONE_STEP, "balance_coefficient": 0.5, "z_coefficient": 0.1}
    alone = fit(make_session(six_rows, **changes, batch_size=6), gradients)
    expected = gradients.steps.pop()
    # Three packs of unequal length, all in one pass.
    max_length = 2 * max(map(len, six_rows))
    packed = fit(make_session(six_rows, **changes, batch_size=3, packing=True, max_length=max_length), gradients)
    assert packed.sampler.num_batches == 1 and packed.sampler.fill_rate() < 1
    for key in ("loss", "balance_loss", "z_loss"):
        assert logged(packed, key) == pytest.approx(logged(alone, key), rel=1e-4)
    largest = max(float(grad.abs().max()) for grad in expected.values())
    found = gradients.steps.pop()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5 * largest, msg=name)
    assert packed.figures.rows.tolist() == alone.figures.rows.tolist() == [2, 2, 2]
    lengths = [sum(len(row) for row in six_rows if row.domain == domain) for domain in range(3)]
    assert packed.figures.tokens.tolist() == alone.figures.tokens.tolist() == lengths


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_packs_tell_which_domain_goes_where(make_session: Any, six_rows: Any, granularity: str) -> None:
    changes = {**ONE_STEP, "granularity": granularity, "learning_rate": 1e-12}
    reports = []
    for packing in ({"batch_size": 6}, {"batch_size": 3, "packing": True, "max_length": 2 * max(map(len, six_rows))}):
        session = make_session(six_rows, **changes, **packing)
        calibrate_router(session)
        trainer = new_trainer(session)
        recorded: list[RoutingReport] = []
        trainer.record_routing = lambda step, split, report, seen=recorded: seen.append(report)
        trainer.train()
        reports += recorded
    alone, packed = reports
    assert alone.units == packed.units and len(set(alone.table)) > 1
    assert [sum(row) for row in alone.table] == pytest.approx([1, 1, 1])
    assert packed.table == tuple(pytest.approx(row) for row in alone.table)


@pytest.mark.parametrize("changes", [{}, {"router_scope": "per_layer", "granularity": "token", "top_k": 2}], ids=str)
def test_the_balance_loss_is_over_the_tokens_of_the_step(make_session: Any, six_rows: Any, changes: Any) -> None:
    # Three steps of two passes; the learning rate keeps all weights as they are.
    changes |= {"batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 3, "logging_steps": 1}
    changes |= {"learning_rate": 1e-12, "num_epochs": 3}
    plain = logged(fit(make_session(six_rows, **changes)), "loss")
    session = make_session(six_rows, balance_coefficient=0.5, **changes)
    with session.model.recording() as decisions:
        trainer = fit(session)
    routers = len(session.model.routers)
    assert len(decisions) == 3 * 2 * routers
    for step in range(3):
        passes = [decisions[(2 * step + i) * routers : (2 * step + i + 1) * routers] for i in range(2)]
        expected = []
        for index in range(2):
            losses = []
            for router in range(routers):
                load = sum(each[router].load().sum(0) for each in passes[: index + 1])
                assert isinstance(load, Tensor)
                now = passes[index][router]
                losses.append(balance_loss(load / load.sum(), now.probs, now.valid))
            expected.append(float(torch.stack(losses).mean()))
        assert logged(trainer, "balance_loss")[step] == pytest.approx(expected[1], rel=1e-5)
        extra = logged(trainer, "loss")[step] - plain[step]
        assert extra == pytest.approx(0.5 * sum(expected) / 2, rel=1e-3)


def test_auxiliary_losses_reach_the_router_and_no_expert(make_session: Any, six_rows: Any, gradients: Any) -> None:
    changes = {**ONE_STEP, "batch_size": 3, "gradient_accumulation_steps": 2}
    fit(make_session(six_rows, **changes), gradients)
    fit(make_session(six_rows, balance_coefficient=1.0, **changes), gradients)
    fit(make_session(six_rows, z_coefficient=1.0, **changes), gradients)
    plain, balanced, bounded = gradients.steps
    for other in (balanced, bounded):
        for name, grad in plain.items():
            is_router = name.startswith("routers.")
            assert torch.allclose(grad, other[name], rtol=1e-4, atol=1e-7) is not is_router, name


def test_the_z_loss_is_the_mean_of_the_passes(make_session: Any, six_rows: Any) -> None:
    plain = fit(make_session(six_rows, **ONE_STEP))
    trainer = fit(make_session(six_rows, z_coefficient=0.1, **ONE_STEP))
    extra = logged(trainer, "loss")[0] - logged(plain, "loss")[0]
    assert extra == pytest.approx(0.1 * logged(trainer, "z_loss")[0], rel=1e-3) and extra > 0.01


def test_every_epoch_sees_every_row_once_in_another_order(
    make_session: Any, six_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    compute = RoutedTrainer.compute_loss

    def spy(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            seen.append(tuple(ids[mask.bool()].tolist()))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RoutedTrainer, "compute_loss", spy)
    changes: dict[str, Any] = {"max_steps": None, "num_epochs": 2, "batch_size": 1, "gradient_accumulation_steps": 2}
    orders = {}
    for seed in (0, 0, 1):
        seen.clear()
        trainer = fit(make_session(six_rows, seed=seed, **changes))
        assert trainer.state.global_step == 6
        first, second = seen[:6], seen[6:]
        assert sorted(first) == sorted(second) == sorted(row.input_ids for row in six_rows)
        assert first != second
        assert orders.setdefault(seed, list(seen)) == seen
    assert orders[0] != orders[1]


def test_figures_are_those_of_the_steps_since_the_last_line(make_session: Any, six_rows: Any) -> None:
    changes = {"batch_size": 6, "max_steps": 4, "logging_steps": 2, "num_epochs": 4, "granularity": "token"}
    reports: list[tuple[int, str, RoutingReport]] = []
    session = make_session(six_rows, **changes)
    trainer = new_trainer(session)
    trainer.record_routing = lambda step, split, report: reports.append((step, split, report))
    trainer.train()
    tokens = sum(map(len, six_rows))
    assert logged(trainer, "tokens") == [2 * tokens, 4 * tokens]
    assert all(speed > 0 for speed in logged(trainer, "tokens_per_second"))
    assert [(step, split, report.units) for step, split, report in reports] == [
        (2, "train", 2 * tokens),
        (4, "train", 2 * tokens),
    ]
    for _, _, report in reports:
        assert report.domains == ("capitals", "functions", "sums")
        assert [round(sum(row), 5) for row in report.table] == [1, 1, 1]
    last, line = reports[-1][2], [line for line in trainer.state.log_history if "loss" in line][-1]
    assert (line["load_entropy"], line["router_entropy"]) == (last.load_entropy, last.decision_entropy)
    assert (line["max_violation"], line["dead_experts"]) == (last.max_violation, len(last.dead))
    assert [line[f"load_expert_{index}"] for index in range(3)] == list(last.load)


def test_measuring_again_without_a_step_costs_nothing(make_session: Any, six_rows: Any) -> None:
    trainer = new_trainer(make_session(six_rows, **ONE_STEP, learning_rate=0.5, warmup_ratio=0))
    before = trainer.measure()
    assert trainer.measure() is before
    trainer.train()
    after = trainer.measure()
    assert after is not before and after.mean_loss != before.mean_loss
    assert trainer.measure() is after


def test_the_base_is_not_changed_by_training(make_session: Any, six_rows: Any, loaded: Any) -> None:
    session = make_session(six_rows, learning_rate=0.1, max_steps=3)
    lm = session.model.lm
    weights = {name: p for name, p in lm.named_parameters() if "lora_" not in name and not p.requires_grad}
    before = {name: p.detach().clone() for name, p in weights.items()}
    assert sum(p.numel() for p in before.values()) == sum(p.numel() for p in loaded[0].model.parameters())
    adapters = {name: v.clone() for name, v in lm.state_dict().items() if ".lora_" in name}
    fit(session)
    assert all(torch.equal(p, before[name]) for name, p in weights.items())
    after = lm.state_dict()
    assert not any(torch.equal(value, after[name]) for name, value in adapters.items())


def test_checkpointing_computes_the_same_step(make_session: Any, six_rows: Any, gradients: Any) -> None:
    for is_on in (False, True):
        session = make_session(six_rows, **ONE_STEP, gradient_checkpointing=is_on, granularity="token", top_k=2)
        fit(session, gradients)
        layers = session.model.lm.model.layers
        assert all(bool(layer.gradient_checkpointing) is is_on for layer in layers)
    plain, checkpointed = gradients.steps
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-4, atol=1e-7)


def test_what_checkpointing_keeps_can_be_held_elsewhere(
    make_session: Any, six_rows: Any, gradients: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[dict[str, Any]] = []
    elsewhere = torch.autograd.graph.save_on_cpu

    def noted(**kwargs: Any) -> Any:
        entered.append(kwargs)
        return elsewhere(**kwargs | {"pin_memory": kwargs["pin_memory"] and torch.cuda.is_available()})

    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", noted, raising=False)
    for is_on in (False, True):
        session = make_session(six_rows, **ONE_STEP, gradient_checkpointing=True, activation_offload=is_on)
        fit(session, gradients)
        assert bool(entered) is is_on
    here, offloaded = gradients.steps
    assert all(torch.equal(offloaded[name], grad) for name, grad in here.items())


def test_a_plan_cuts_batches_and_evaluations(make_session: Any) -> None:
    session = make_session(eval_batch_size=5)
    trainer = build_trainer(session, stop=StopSignals(), tell=print)
    plan = plan_memory(session, trainer)
    trainer.use_plan(replace(plan, split=3, evaluation_split=2))
    assert (trainer.parts, trainer.evaluator.rows) == (3, 3)
    trainer.use_plan(replace(plan, split=1, evaluation_split=1))
    assert (trainer.parts, trainer.evaluator.rows) == (3, 3)
