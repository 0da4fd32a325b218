"""What a run will need: against what tensors really take, by torch's own hooks and a count of live memory."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dylora_moe.bases import EMBEDDED
from dylora_moe.cache.store import cache_folder, is_complete
from dylora_moe.errors import RunError
from dylora_moe.train.fit import Calibration, Changes, Estimator, Pass, Workload, choose_split, make_plan, suggest
from dylora_moe.train.fit.trace import Meter, StepTrace, trace_evaluation, trace_step
from dylora_moe.train.fit.twin import Kept, choose_layers, make_twin
from dylora_moe.tuner import DyLoraModel, ExpertConfig, LoadWindow
from dylora_moe.tuner.head import read_head

CPU = torch.device("cpu")
ALL = ExpertConfig(rank=8, alpha=12, dropout=0.1)
FEW = ExpertConfig(rank=8, alpha=12, dropout=0.1, target_modules=("v_proj", "down_proj"))
FEW_WIDE = replace(FEW, rank=16)


@pytest.fixture(scope="module")
def make_deep(make_base: Callable[..., Any], make_model: Callable[..., DyLoraModel]) -> Callable[..., DyLoraModel]:
    """(experts, architecture, expert, **routing) -> a mixture over six layers, in training mode, with dropout."""

    def make(experts: int = 4, architecture: str = "llama", expert: ExpertConfig = FEW, **routing: Any) -> DyLoraModel:
        sizes: dict[str, Any] = {"num_hidden_layers": 6, "vocab_size": 999, "hidden_size": 64, "intermediate_size": 160}
        if architecture == "gemma3":
            kinds = ["full_attention" if index in (3, 5) else "sliding_attention" for index in range(6)]
            sizes |= {"head_dim": 16, "layer_types": kinds}
        base = make_base(architecture, **sizes)
        return make_model(experts, architecture, base=base, expert=expert, **routing).train()

    return make


def batch_of(shape: Pass) -> dict[str, Tensor]:
    """Padded rows; the labelled positions are as many as the shape says."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (shape.rows, shape.tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    labels = torch.full_like(ids, -100)
    flat = labels[:, 1:].reshape(-1)
    flat[-shape.num_labelled :] = 5
    labels[:, 1:] = flat.view(shape.rows, -1)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_of(model: DyLoraModel, shape: Pass) -> Tensor:
    batch = batch_of(shape)
    nll = read_head(model.lm).nll(model(hidden_only=True, **batch), batch["labels"])
    return nll.sum() + model.auxiliary_losses(LoadWindow()).balance


def count_step(model: DyLoraModel, shape: Pass) -> StepTrace:
    """What `trace_step` says, counted while the real thing runs."""
    batch, head, meter = batch_of(shape), read_head(model.lm), Meter(CPU)
    model.state.decisions = {}
    meter.leave_out([*model.parameters(), *model.buffers()])
    with meter:
        hidden = model(hidden_only=True, **batch)
        forward, kept = meter.restart(), meter.live
        nll = head.nll(hidden, batch["labels"])
        loss = nll.sum() + model.auxiliary_losses(LoadWindow()).balance
        of_loss = meter.restart() - kept
        del nll, hidden
        loss.backward()
        backward = meter.restart()
    model.zero_grad(set_to_none=True)
    return StepTrace(activations=kept, forward=forward, loss=of_loss, backward=backward)


def check(got: StepTrace, expected: StepTrace, within: float) -> None:
    for name in ("activations", "forward", "loss", "backward"):
        assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=within), name


SHAPE = Pass(rows=3, tokens=48, labelled=0.5)

CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("llama", 4, {"granularity": "sequence"}),
    ("llama", 4, {"granularity": "token"}),
    ("llama", 4, {"granularity": "token", "top_k": 2, "execution": "bottleneck"}),
    ("llama", 1, {}),
    ("llama", 3, {"granularity": "sequence", "tap_layer": 4}),
    ("llama", 3, {"granularity": "token", "router_scope": "per_layer"}),
    ("gemma3", 4, {"granularity": "sequence"}),
    ("gemma2", 2, {"granularity": "token", "tap_layer": 1}),
    ("phi", 2, {"granularity": "sequence"}),
    ("qwen2", 2, {"granularity": "sequence"}),
]


@pytest.mark.parametrize(("architecture", "experts", "routing"), CASES)
def test_a_traced_step_takes_what_a_real_one_takes(
    make_deep: Callable[..., DyLoraModel], architecture: str, experts: int, routing: dict[str, Any]
) -> None:
    model = make_deep(experts, architecture, ALL if architecture in ("phi", "gemma3") else FEW, **routing)
    check(trace_step(make_twin(model), SHAPE), count_step(model, SHAPE), 0.03)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_checkpointing_is_traced_as_it_is(make_deep: Callable[..., DyLoraModel], architecture: str) -> None:
    model = make_deep(2, architecture, granularity="sequence")
    traced = trace_step(make_twin(model), SHAPE, checkpointing=True)
    model.gradient_checkpointing_enable()
    check(traced, count_step(model, SHAPE), 0.05)


@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_a_base_in_bfloat16(
    make_base: Callable[..., Any], make_model: Callable[..., DyLoraModel], granularity: str
) -> None:
    base = make_base("llama", num_hidden_layers=5, vocab_size=999).to(torch.bfloat16)
    model = make_model(4, base=base, expert=FEW, granularity=granularity).train()
    check(trace_step(make_twin(model), SHAPE), count_step(model, SHAPE), 0.03)


def test_mixed_precision_is_traced(make_deep: Callable[..., DyLoraModel]) -> None:
    model = make_deep(2, granularity="token")
    traced = trace_step(make_twin(model), SHAPE, autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        check(traced, count_step(model, SHAPE), 0.05)


def test_frozen_experts_and_dense_collaboration_are_traced(make_deep: Callable[..., DyLoraModel]) -> None:
    model = make_deep(4, granularity="token")
    model.freeze_expert("expert_1")
    model.set_maturity("expert_2", 0.5)
    twin = make_twin(model)
    assert twin.model.experts == model.experts
    check(trace_step(twin, SHAPE), count_step(model, SHAPE), 0.03)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_activations_are_what_autograd_keeps(make_deep: Callable[..., DyLoraModel], architecture: str) -> None:
    """The same figure from torch's own hooks, which know nothing of our count."""
    model = make_deep(4, architecture, granularity="sequence")
    own = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or its address would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_of(model, SHAPE)
    assert trace_step(make_twin(model), SHAPE).activations == pytest.approx(sum(kept.values()), rel=0.15)


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(make_deep: Callable[..., DyLoraModel]) -> None:
    twin = make_twin(make_deep(4, granularity="sequence"))
    one = trace_step(twin, SHAPE).activations
    assert trace_step(twin, replace(SHAPE, rows=6)).activations == pytest.approx(2 * one, rel=0.02)
    longer = trace_step(twin, replace(SHAPE, tokens=96)).activations
    assert 1.9 * one < longer < 2.5 * one  # attention masks grow with the square
    assert trace_step(twin, SHAPE, checkpointing=True).activations < 0.1 * one
    assert trace_step(twin, SHAPE).activations == one  # checkpointing is off again


def test_layers_below_the_tap_keep_nothing(make_deep: Callable[..., DyLoraModel]) -> None:
    def activations(tap: int) -> int:
        return trace_step(make_twin(make_deep(2, granularity="sequence", tap_layer=tap)), SHAPE).activations

    assert activations(4) == pytest.approx(activations(0) / 3, rel=0.1)


def test_the_parts_are_what_is_allocated(make_deep: Callable[..., DyLoraModel]) -> None:
    model = make_deep(4, granularity="sequence")
    model.freeze_expert("expert_3")
    estimate = Estimator(model, process=0)(Workload(train=SHAPE))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    loss_of(model, SHAPE).backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert estimate.gradients == sum(value.grad.nbytes for value in trained if value.grad is not None)
    assert estimate.optimizer == sum(value.nbytes for value in states)
    parts = [part.untyped_storage() for part in [*model.parameters(), *model.buffers()]]
    assert estimate.base + estimate.experts == sum({part.data_ptr(): part.nbytes() for part in parts}.values())
    layers, experts, rank, width, inner, values = 6, 4, 8, 64, 160, 32
    factors = layers * experts * rank * (width + values + inner + width)
    router = experts * width + 2 * width  # with its mean and deviation
    assert estimate.experts == 4 * (factors + router)
    traced = trace_step(make_twin(model), SHAPE)
    worst = max(traced.activations + traced.loss, traced.forward, traced.backward)
    assert estimate.peak == estimate.base + estimate.experts + estimate.optimizer + worst


def test_earlier_passes_of_a_step_leave_their_gradients(make_deep: Callable[..., DyLoraModel]) -> None:
    estimator = Estimator(make_deep(4, granularity="sequence"), process=0)
    alone, among = (estimator(Workload(train=SHAPE, accumulates=flag)) for flag in (False, True))
    assert among.gradients * 0.9 < among.peak - alone.peak < among.gradients * 1.1
    assert among.activations == pytest.approx(alone.activations, rel=0.01)


def test_evaluation_keeps_no_activations(make_deep: Callable[..., DyLoraModel]) -> None:
    model = make_deep(4, granularity="sequence")
    twin = make_twin(model)
    traced = trace_evaluation(twin, SHAPE)
    assert traced < 0.2 * trace_step(twin, SHAPE).activations
    batch, head, meter = batch_of(SHAPE), read_head(model.lm), Meter(CPU)
    model.eval().state.decisions = {}
    meter.leave_out([*model.parameters(), *model.buffers()])
    with torch.no_grad(), meter:
        head.nll(model(hidden_only=True, **batch), batch["labels"])
    assert traced == pytest.approx(meter.peak, rel=0.05)


def test_changes_are_what_a_changed_model_would_need(make_deep: Callable[..., DyLoraModel]) -> None:
    work = Workload(train=SHAPE)
    wide = FEW_WIDE
    estimator = Estimator(make_deep(4, granularity="sequence", expert=wide), process=0)
    for changes, other in (
        (Changes(num_experts=2), make_deep(2, granularity="sequence", expert=wide)),
        (Changes(rank=8), make_deep(4, granularity="sequence")),
        (Changes(tap_layer=3), make_deep(4, granularity="sequence", expert=wide, tap_layer=3)),
    ):
        said, real = estimator(work, changes), Estimator(other, process=0)(work)
        assert said.activations == real.activations
        assert said.gradients == pytest.approx(real.gradients, rel=0.05)
        assert said.peak == pytest.approx(real.peak, rel=0.05)
    half = estimator(work, Changes(dtype=torch.bfloat16))
    assert half.base == pytest.approx(estimator(work).base / 2, rel=0.05)
    assert half.activations < 0.8 * estimator(work).activations


def test_an_estimate_leaves_its_model_as_it_was(make_deep: Callable[..., DyLoraModel]) -> None:
    model = make_deep(2, granularity="sequence")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    Estimator(model)(Workload(train=SHAPE, gradient_checkpointing=True, evaluation=SHAPE), Changes(rank=8))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.lm.is_gradient_checkpointing
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_layer_stands_for_those_that_are_alike() -> None:
    kinds = ["a", "a", "a", "b", "a", "b", "a"]
    assert choose_layers(kinds, 0) == [
        Kept(index=0, stands_for=1),
        Kept(index=1, stands_for=3),
        Kept(index=3, stands_for=2),
        Kept(index=6, stands_for=1),
    ]
    assert [layer.index for layer in choose_layers(kinds, 5)] == [4, 5, 6]
    assert choose_layers(["a"], 0) == [Kept(index=0, stands_for=1)]
    assert sum(layer.stands_for for layer in choose_layers(["a"] * 30, 0)) == 30


@pytest.mark.parametrize(
    ("rows", "most", "expected"),
    [(8, 8, 1), (8, 7, 2), (8, 3, 4), (8, 1, 8), (8, 0, None), (6, 1, None), (6, 2, 4), (1, 1, 1)],
)
def test_the_smallest_split_that_fits(rows: int, most: int, expected: int | None) -> None:
    assert choose_split(lambda part: part <= most, rows) == expected


@pytest.fixture(scope="module")
def estimator(make_deep: Callable[..., DyLoraModel]) -> Estimator:
    return Estimator(make_deep(4, granularity="sequence", expert=FEW_WIDE), process=10_000)


def test_a_plan_splits_training_and_evaluation_each_for_itself(estimator: Estimator) -> None:
    work = Workload(train=Pass(rows=8, tokens=64), evaluation=Pass(rows=8, tokens=64))
    whole = estimator(work)
    assert make_plan(estimator, work, whole.peak * 2).split == 1
    halved = make_plan(estimator, work, round(whole.peak / 0.9) - 1)
    assert (halved.split, halved.evaluation_split) == (2, 1)
    assert halved.estimate.peak < whole.peak
    many = replace(work, evaluation=Pass(rows=512, tokens=64))
    assert estimator(many).worst == "evaluation"
    plan = make_plan(estimator, many, round(whole.peak / 0.9) + 1)
    assert plan.split == 1
    assert plan.evaluation_split > 1
    assert plan.estimate.peak <= whole.peak


def test_memory_is_given_back_where_it_is_short(estimator: Estimator) -> None:
    work = Workload(train=Pass(rows=2, tokens=64))
    peak = estimator(work).peak
    assert make_plan(estimator, work, peak * 2 - 1, margin=0).gives_back  # glibc may keep as much again
    plan = make_plan(estimator, work, peak * 2, margin=0)
    assert not plan.gives_back
    assert plan.estimate.peak == peak + plan.estimate.allocator  # what it keeps is part of the estimate
    assert plan.estimate.activations > plan.estimate.allocator > 0
    plan = make_plan(estimator, replace(work, gradient_checkpointing=True), peak * 2, margin=0)
    assert plan.gives_back and plan.estimate.allocator == 0


def test_what_cannot_fit_is_refused_with_what_to_change(estimator: Estimator) -> None:
    work = Workload(train=Pass(rows=4, tokens=256), evaluation=Pass(rows=1, tokens=16))
    room = estimator(replace(work, train=Pass(rows=1, tokens=256), accumulates=True)).peak
    with pytest.raises(RunError, match=r"with one row at a time.*256 tokens.*worst moment") as refused:
        make_plan(estimator, work, room - 1000, margin=0)
    text = str(refused.value)
    for setting in ("gradient_checkpointing", "max_length 128", "num_experts 2", "lora_r 8", "tap_layer 3", "bf16"):
        assert f"--{setting} saves" in text
    assert "--gradient_checkpointing saves" in text and "makes it fit" in text


def test_suggestions_are_sorted_by_what_they_save(estimator: Estimator) -> None:
    work = Workload(train=Pass(rows=1, tokens=256), accumulates=True)
    peak = estimator(work).peak
    found = suggest(estimator, work, peak // 2)
    savings = [suggestion.saving for suggestion in found]
    assert savings == sorted(savings, reverse=True)
    assert min(savings) > 0
    assert all(suggestion.peak == peak - suggestion.saving for suggestion in found)
    assert [suggestion.fits for suggestion in found] == [suggestion.peak <= peak // 2 for suggestion in found]


def test_disk_and_time(estimator: Estimator) -> None:
    estimate = estimator(Workload(train=SHAPE))
    assert estimate.checkpoint == estimate.gradients + estimate.optimizer
    assert estimate.disk(kept=3, data=7) == 5 * estimate.checkpoint + estimate.experts + 7
    calibration = Calibration(step_s=2.0, evaluation_s=30.0, save_s=1.0)
    assert calibration.run_s(steps=100, evaluations=3, saves=2) == 292.0


@pytest.mark.slow
def test_the_estimate_of_a_real_base_is_near_what_its_training_takes(tmp_path: Path) -> None:
    entry = EMBEDDED["pypi:smollm2"]
    folder = cache_folder(None, os.environ) / "bases" / entry.folder_name
    if not is_complete(folder, f"{entry.key} {entry.gguf_sha256}"):
        pytest.skip(f"{entry.key} is not in the cache")
    root = Path(__file__).resolve().parents[2]
    out = tmp_path / "fit.json"
    command = [sys.executable, str(root / "benchmarks" / "fit.py"), "--bases", "pypi:smollm2", "--only", "2 x 256"]
    done = subprocess.run([*command, "--steps", "2", "--output", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert case["ratio"] == pytest.approx(1, abs=0.15)
