"""Experts merged, compared and copied, beside dense matrices that obviously do the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from dylora_moe.errors import TunerError
from dylora_moe.tuner import DyLoraModel, ExpertConfig, export_expert, load_model, save_model
from dylora_moe.tuner.merge import copy_expert_weights, merge_experts, merge_factors, similarity

Factors = tuple[Tensor, Tensor, float]


def draw(rank: int, scaling: float, *, seed: int, out: int = 20, width: int = 14) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator), scaling


def dense(factors: list[Factors], weights: list[float]) -> Tensor:
    return sum(
        (w * s * b.double() @ a.double() for w, (a, b, s) in zip(weights, factors, strict=True)), torch.zeros(())
    )


def change(linear: Any, name: str) -> Tensor:
    """What an expert adds to a Linear's weight."""
    if name not in linear.lora_A:
        return torch.zeros(linear.out_features, linear.in_features, dtype=torch.float64)
    b, a = linear.lora_B[name].weight.detach().double(), linear.lora_A[name].weight.detach().double()
    return linear.scaling[name] * b @ a


def changes(model: DyLoraModel, name: str) -> dict[str, Tensor]:
    return {key: change(linear, name) for key, linear in model.routed_linears()}


def weights_of(model: DyLoraModel, name: str) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if f".{name}." in key}


def frozen_bytes(model: DyLoraModel) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.lm.named_parameters() if ".lora_" not in n and ".packed_" not in n}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def forced(model: DyLoraModel, name: str, batch: dict[str, Tensor]) -> Tensor:
    with model.forced(name), torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("rank", [1, 5, 9, 14, 17])
@pytest.mark.parametrize("scaling", [0.25, 3.0, -2.0])
def test_the_best_approximation_of_a_sum(rank: int, scaling: float, assert_near: Any) -> None:
    factors, weights = [draw(4, 2.0, seed=0), draw(8, 0.5, seed=1), draw(3, -1.0, seed=2)], [0.2, 1.5, -0.7]
    lora_a, lora_b = merge_factors(factors, weights, rank, scaling)
    assert (lora_a.shape, lora_b.shape, lora_a.dtype) == ((rank, 14), (20, rank), torch.float32)
    left, values, right = torch.linalg.svd(dense(factors, weights), full_matrices=False)
    best = left[:, :rank] @ values[:rank].diag() @ right[:rank]
    assert_near(scaling * lora_b.double() @ lora_a.double(), best, 1e-6)
    shared = (values[:rank] / abs(scaling)).sqrt()
    for lengths in (lora_a.norm(dim=1), lora_b.norm(dim=0)):
        assert_near(lengths[: len(values)].double(), shared, 1e-5)
        assert not lengths[len(values) :].any()


def test_merging_an_expert_with_itself_gives_it_back(assert_near: Any) -> None:
    one = draw(6, 1.5, seed=0)
    lora_a, lora_b = merge_factors([one, one], [0.5, 0.5], 6, 1.5)
    assert_near(1.5 * lora_b @ lora_a, dense([one], [1.0]).float())


def test_signs_do_not_depend_on_the_order_or_the_split(assert_near: Any) -> None:
    one, two = draw(4, 2.0, seed=0), draw(4, 0.5, seed=1)
    turned = -one[0].flip(0), -one[1].flip(1), one[2]
    expected = merge_factors([one, two], [1.0, 1.0], 5, 1.0)
    for factors in ([one, two], [two, one], [turned, two]):
        for found, value in zip(merge_factors(factors, [1.0, 1.0], 5, 1.0), expected, strict=True):
            assert_near(found, value)
    largest = expected[0].gather(1, expected[0].abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    again = merge_factors([one, two], [1.0, 1.0], 5, 1.0)
    assert all(torch.equal(found, value) for found, value in zip(again, expected, strict=True))


@pytest.mark.parametrize("others", [0, 3])
def test_room_that_the_sum_leaves_can_still_be_trained(others: int) -> None:
    """Where A and B are both zero no gradient ever flows."""
    a, b, scaling = draw(8, 2.0, seed=0)
    b[:, others:] = 0
    lora_a, lora_b = merge_factors([(a, b, scaling)] * 2, [0.5, 0.5], 8, 1.0)
    assert (lora_b.norm(dim=0) > 0).tolist() == [True] * others + [False] * (8 - others)
    assert (lora_a.norm(dim=1) > 0.5).all()
    torch.testing.assert_close(lora_b.double() @ lora_a.double(), dense([(a, b, scaling)], [1.0]), atol=1e-5, rtol=0)


def test_factors_of_16_bits_come_back_in_16_bits() -> None:
    a, b, scaling = draw(4, 2.0, seed=0)
    lora_a, lora_b = merge_factors([(a.bfloat16(), b.bfloat16(), scaling)], [1.0], 4, 2.0)
    assert lora_a.dtype == lora_b.dtype == torch.bfloat16


def test_wrong_factors_are_refused() -> None:
    one = draw(4, 2.0, seed=0)
    for factors, weights, rank, scaling, match in (
        ([], [], 4, 1.0, "at least one expert"),
        ([one], [1.0, 1.0], 4, 1.0, "one finite weight"),
        ([one], [float("nan")], 4, 1.0, "one finite weight"),
        ([one], [1.0], 0, 1.0, "at least 1, got 0"),
        ([one], [1.0], 4, 0.0, "other than 0"),
    ):
        with pytest.raises(TunerError, match=match):
            merge_factors(factors, weights, rank, scaling)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("weights", [None, [0.3, 1.2]])
def test_two_experts_become_their_best_sum(
    make_model: Any, batch: Any, assert_near: Any, architecture: str, weights: list[float] | None
) -> None:
    model = make_model(4, architecture)
    model.freeze_expert("expert_0")
    names = ["expert_3", "expert_1"]
    first, second = weights or (0.5, 0.5)
    one, two = changes(model, names[0]), changes(model, names[1])
    sums = {key: first * one[key] + second * two[key] for key in one}
    others = {name: (weights_of(model, name), forced(model, name, batch)) for name in ("expert_0", "expert_2")}
    base, rows = frozen_bytes(model), model.routers["shared"].weight.detach().clone()
    merged = merge_experts(model, names, "expert_1", weights=weights)
    assert model.expert_names == ("expert_0", "expert_1", "expert_2")
    assert (merged.into, merged.removed) == ("expert_1", ("expert_3",))

    best, kept, total = {}, 0.0, 0.0
    for key, value in sums.items():
        left, values, right = torch.linalg.svd(value, full_matrices=False)
        best[key] = left[:, :8] @ values[:8].diag() @ right[:8]
        kept, total = kept + float(values[:8].square().sum()), total + float(values.square().sum())
    assert_near(changes(model, "expert_1"), best)
    assert merged.kept == pytest.approx(kept / total, rel=1e-9) and 0.4 < merged.kept < 0.999

    for name, (bytes_before, logits) in others.items():
        assert_same(weights_of(model, name), bytes_before)
        assert torch.equal(forced(model, name, batch), logits)
    assert_same(frozen_bytes(model), base)
    assert torch.equal(model.routers["shared"].weight, rows[:3])
    assert [expert.frozen for expert in model.experts] == [True, False, False]
    assert not any("expert_3" in name for name in model.state_dict())


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_merge_with_room_answers_like_the_sum(
    make_model: Any, batch: Any, randomise: Any, assert_near: Any, architecture: str
) -> None:
    """Ranks, scalings and targets differ; the narrow expert leaves two of three Linears alone."""
    model = make_model(2, architecture)
    model.add_expert("narrow", ExpertConfig(rank=4, alpha=7, target_modules=("v_proj",)), maturity=1.0)
    model.add_expert("wide", ExpertConfig(rank=24, alpha=5, target_modules=("k_proj", "v_proj", "down_proj")))
    randomise(model)
    names = ["expert_0", "narrow", "wide"]
    expected = {
        key: 0.5 * change(linear, "expert_0") + 2 * change(linear, "narrow") for key, linear in model.routed_linears()
    }
    reference = make_model(1, architecture).lm
    with torch.no_grad():
        for key, value in expected.items():
            part: Any = reference.get_submodule(key)
            part.base_layer.weight += value.float()
            part.lora_B["expert_0"].weight.zero_()
        logits = reference(**batch).logits
    merged = merge_experts(model, names, "wide", weights=[0.5, 2.0, 0.0])
    assert merged.kept == pytest.approx(1, abs=1e-12)
    assert model.expert_names == ("expert_1", "wide")
    assert_near(changes(model, "wide"), expected)
    assert_near(forced(model, "wide", batch), logits, 1e-4)
    assert not torch.allclose(forced(model, "expert_1", batch), logits, atol=0.1)
    maturities = {expert.name: expert.maturity for expert in model.experts}
    assert maturities == {"expert_1": 1.0, "wide": 0.0}


def test_linears_that_the_merged_expert_leaves_alone_are_said_to_be_lost(make_model: Any, randomise: Any) -> None:
    model = make_model(2)
    model.add_expert("narrow", ExpertConfig(rank=32, target_modules=("v_proj",)))
    randomise(model)
    sums = {
        key: 0.5 * change(linear, "expert_0") + 0.5 * change(linear, "narrow") for key, linear in model.routed_linears()
    }
    energies = {key: float(value.square().sum()) for key, value in sums.items()}
    share = sum(value for key, value in energies.items() if key.endswith("v_proj")) / sum(energies.values())
    merged = merge_experts(model, ["expert_0", "narrow"], "narrow")
    assert merged.kept == pytest.approx(share, rel=1e-9) and share < 0.9


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_an_expert_merged_with_its_copy_is_itself(
    make_model: Any, batch: Any, assert_near: Any, architecture: str
) -> None:
    model = make_model(3, architecture)
    expected, before = forced(model, "expert_0", batch), changes(model, "expert_0")
    copy_expert_weights(model, "expert_0", "expert_2")
    merged = merge_experts(model, ["expert_0", "expert_2"], "expert_2")
    assert merged.kept == 1
    assert_near(changes(model, "expert_2"), before)
    assert_near(forced(model, "expert_2", batch), expected)


def test_experts_that_change_nothing_stay_trainable(make_model: Any, batch: Any) -> None:
    model = make_model(1)
    for name in ("new", "newer"):
        model.add_expert(name)
    assert similarity(model, "new", "newer") == similarity(model, "new", "expert_0") == 0
    assert merge_experts(model, ["new", "newer"], "new").kept == 1
    model.train()
    with model.forced("new"):
        model(**batch).loss.backward()
    linear: Any = dict(model.routed_linears())["model.layers.1.mlp.down_proj"]
    assert linear.packed_B.runs[0].grad[1].abs().max() > 0


@pytest.mark.parametrize("frozen", [(), ("expert_0",), ("expert_0", "expert_1", "expert_2")])
def test_packed_memory_stays_right(make_model: Any, batch: Any, frozen: tuple[str, ...]) -> None:
    """An optimizer's step after the merge reaches the merged expert where it trains, and nobody frozen."""
    model = make_model(4)
    for name in frozen:
        model.freeze_expert(name)
    merge_experts(model, ["expert_1", "expert_3"], "expert_1")
    for _, linear in model.routed_linears():
        for packed, factors in ((linear.packed_A, linear.lora_A), (linear.packed_B, linear.lora_B)):
            weights: list[Any] = [factors[name].weight for name in model.expert_names]
            assert packed.holds(weights)
            assert torch.equal(packed(), torch.stack([weight.detach() for weight in weights]))
    before = {name: weights_of(model, name) for name in model.expert_names}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    with model.forced("expert_1"):
        loss = model(**batch).loss
    if "expert_1" not in frozen:
        loss.backward()
        optimizer.step()
    changed = {
        name
        for name in model.expert_names
        if any(not torch.equal(value, before[name][key]) for key, value in weights_of(model, name).items())
    }
    assert changed == {"expert_1"} - set(frozen)
    if changed:
        assert not torch.equal(model.eval()(**batch).loss, loss)


def test_memory_shared_with_an_optimizer_is_written_in_place(make_model: Any, batch: Any) -> None:
    """A copy of weights gives no parameter other memory, so moments and hooks stay where they are."""
    model = make_model(3)
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    copy_expert_weights(model, "expert_0", "expert_1")
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is old and after[name].data_ptr() == place for name, (old, place) in before.items())
    assert torch.equal(forced(model, "expert_1", batch), forced(model, "expert_0", batch))


def test_merging_all_experts_leaves_one_that_serves_everything(make_model: Any, batch: Any, assert_near: Any) -> None:
    model = make_model(3)
    merge_experts(model, model.expert_names, "expert_1")
    assert model.expert_names == ("expert_1",) and not model.routers
    assert torch.equal(model(**batch).logits, forced(model, "expert_1", batch))


def test_a_prototype_router_sends_all_skills_of_a_merge_to_it(make_model: Any, batch: Any) -> None:
    model = make_model(4, router="prototype", granularity="sequence")
    rows = model.prompt_features([batch]).double()
    rows = rows / rows.square().mean(1, keepdim=True).sqrt()
    skills = ["expert_3", "expert_1", "expert_0"]
    model.set_prototypes(torch.eye(32), rows, torch.ones(3), skills)
    model(**batch)
    assert model.decisions[None].load().tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]]
    merge_experts(model, ["expert_2", "expert_0", "expert_3"], "expert_2")
    assert model.expert_names == ("expert_1", "expert_2")
    model(**batch)
    assert model.decisions[None].sure.all()
    assert model.decisions[None].load().tolist() == [[0, 1], [1, 0], [0, 1]]


def test_a_merge_of_16_bits(make_model: Any, batch: Any, assert_near: Any) -> None:
    model = make_model(2).bfloat16()
    before = changes(model, "expert_0")
    copy_expert_weights(model, "expert_0", "expert_1")
    merge_experts(model, ["expert_0", "expert_1"], "expert_0")
    assert_near(changes(model, "expert_0"), before, 0.02)
    assert {value.dtype for value in weights_of(model, "expert_0").values()} == {torch.bfloat16}
    assert model(**batch).logits.isfinite().all()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_merged_experts_are_saved_and_exported(
    make_model: Any, make_base: Any, batch: Any, assert_near: Any, tmp_path: Path, architecture: str
) -> None:
    model = make_model(3, architecture)
    merge_experts(model, ["expert_2", "expert_0"], "expert_2")
    expected = forced(model, "expert_2", batch)
    save_model(model, tmp_path / "model", base_name="b")
    loaded = load_model(make_base(architecture), tmp_path / "model")
    assert loaded.experts == model.experts
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert torch.equal(forced(loaded, "expert_2", batch), expected)
    export_expert(model, "expert_2", tmp_path / "adapter", base_name="b")
    stock = PeftModel.from_pretrained(make_base(architecture), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert_near(stock(**batch).logits, expected)


def test_impossible_merges_leave_the_model_as_it_was(make_model: Any) -> None:
    model = make_model(4, top_k=2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("2.mlp.down_proj.lora_B.expert_3.weight"):
                weight[0, 0] = float("nan")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for names, into, weights, match in (
        (["expert_0"], "expert_0", None, "two different experts or more, got expert_0"),
        ([], "expert_0", None, "got none"),
        (["expert_0", "expert_0"], "expert_0", None, "two different"),
        (["expert_0", "none"], "expert_0", None, "no expert 'none'; there are expert_0"),
        (["expert_0", "expert_1"], "expert_2", None, "one of expert_0, expert_1, got 'expert_2'"),
        (["expert_0", "expert_1"], "expert_0", [1.0], "one finite weight for each of the 2"),
        (["expert_0", "expert_1"], "expert_0", [1.0, float("inf")], "one finite weight"),
        (["expert_0", "expert_1", "expert_2", "expert_3"], "expert_0", None, "Lower top_k"),
        (["expert_0", "expert_3"], "expert_0", None, r"'expert_3' in model\.layers\.2\.mlp\.down_proj"),
    ):
        with pytest.raises(TunerError, match=match):
            merge_experts(model, names, into, weights=weights)
    with pytest.raises(TunerError, match="must be finite"):
        similarity(model, "expert_0", "expert_3")
    after = model.state_dict()
    assert model.expert_names == tuple(f"expert_{index}" for index in range(4))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) or value.isnan().any() for name, value in before.items())


def test_similarity_is_the_cosine_of_the_dense_changes(make_model: Any, randomise: Any) -> None:
    model = make_model(2, "gemma3")
    model.add_expert("narrow", ExpertConfig(rank=4, alpha=7, target_modules=("v_proj",)))
    model.add_expert("copy", ExpertConfig(rank=8, alpha=12, target_modules=("k_proj", "v_proj", "down_proj")))
    randomise(model)
    copy_expert_weights(model, "expert_0", "copy")
    with torch.no_grad():
        for _, linear in model.routed_linears():
            noise = torch.randn(linear.lora_B["copy"].weight.shape, generator=torch.Generator().manual_seed(3))
            linear.lora_B["copy"].weight.add_(noise, alpha=0.05)
            linear.scaling["copy"] *= -1
    flat = {name: torch.cat([c.flatten() for c in changes(model, name).values()]) for name in model.expert_names}
    for one, first in flat.items():
        for other, second in flat.items():
            expected = float(torch.nn.functional.cosine_similarity(first, second, dim=0))
            assert similarity(model, one, other) == pytest.approx(expected, abs=1e-9)
    assert similarity(model, "expert_0", "copy") < -0.9
    with pytest.raises(TunerError, match="no expert 'none'"):
        similarity(model, "expert_0", "none")


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_warm_start_answers_like_its_source(make_model: Any, batch: Any, assert_near: Any, architecture: str) -> None:
    model = make_model(2, architecture)
    expected, before = forced(model, "expert_1", batch), weights_of(model, "expert_1")
    model.add_expert("same", maturity=1.0)
    model.add_expert("louder", ExpertConfig(rank=8, alpha=30, target_modules=("k_proj", "v_proj", "down_proj")))
    for target in ("same", "louder"):
        copy_expert_weights(model, "expert_1", target)
        assert_near(forced(model, target, batch), expected)
    renamed = {key.replace(".expert_1.", ".same."): value for key, value in before.items()}
    assert_same(weights_of(model, "same"), renamed)
    assert_same(weights_of(model, "expert_1"), before)


def test_unfitting_copies_are_refused(make_model: Any) -> None:
    model = make_model(2)
    model.add_expert("small", ExpertConfig(rank=4, target_modules=("k_proj", "v_proj", "down_proj")))
    model.add_expert("narrow", ExpertConfig(rank=8, target_modules=("k_proj",)))
    model.freeze_expert("expert_1")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = r"'expert_0' has rank 8 in 9 Linears \(down_proj, k_proj, v_proj\)"
    for target, match in (
        ("small", whole + r"; 'small' has rank 4 in 9 Linears \(down_proj, k_proj, v_proj\)"),
        ("narrow", whole + r"; 'narrow' has rank 8 in 3 Linears \(k_proj\)"),
        ("expert_1", "'expert_1' is frozen"),
        ("none", "no expert 'none'"),
    ):
        with pytest.raises(TunerError, match=match):
            copy_expert_weights(model, "expert_0", target)
    assert_same(model.state_dict(), before)
