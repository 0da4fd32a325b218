"""The prototype router: nearest skill, sure or not; the base's own bits where not, and old ones after growth."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from dylora_moe.errors import TunerError
from dylora_moe.tuner import DyLoraModel, ExpertConfig, PrototypeRouter, load_model, save_model

ROUTING = {"router": "prototype", "granularity": "sequence"}
EXECUTIONS = ("reference", "bottleneck", "rowwise", "grouped")


def router_of(centres: list[list[float]], radii: list[float], experts: list[int], num_experts: int) -> PrototypeRouter:
    """In a space of the first features as they are."""
    router = PrototypeRouter(8, num_experts)
    places = torch.tensor(centres)
    router.set_skills(
        projection=torch.eye(8)[:, : places.shape[1]],
        centres=places,
        radii=torch.tensor(radii),
        expert_of_skill=experts,
    )
    return router


def know(
    model: DyLoraModel, batch: dict[str, Tensor], rows: list[int], experts: list[str], radius: float = 1e-3
) -> None:
    """Make each of these rows of the batch the centre of a skill."""
    features = model.prompt_features([batch])
    places = (features / features.pow(2).mean(1, keepdim=True).sqrt())[rows]
    model.set_prototypes(torch.eye(places.shape[1]), places, torch.full((len(rows),), radius), experts)


@pytest.fixture
def long(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with every row of 40 tokens."""
    ids = batch["input_ids"].repeat(1, 4)[:, :40]
    ids[2] = ids[2].clamp_min(3)
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_logits_are_squared_distances_to_the_nearest_skill_of_each_expert() -> None:
    router = router_of([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]], [0.5, 2.0, 0.5], [0, 2, 2], 3)
    features = torch.ones(4, 8)  # of unit root mean square, and so wherever they are scaled to
    logits = router(features * torch.tensor([[1.0], [3.0], [1e-4], [100.0]]))
    torch.testing.assert_close(logits[:, 0], torch.full((4,), -1.0))
    torch.testing.assert_close(logits[:, 2], torch.full((4,), -0.5))
    assert (logits[:, 1] < -1000).all() and logits.isfinite().all() and logits.dtype == torch.float32
    assert (logits.softmax(-1)[:, 1] == 0).all()
    assert router.distances(features).shape == (4, 3)


def test_a_unit_is_sure_within_the_radius_of_its_nearest_skill() -> None:
    features = torch.ones(1, 8)
    assert router_of([[1.5, 1.0], [3.0, 1.0]], [0.5, 9.0], [0, 1], 2).sure(features).all()
    assert not router_of([[1.5, 1.0], [3.0, 1.0]], [0.4, 9.0], [0, 1], 2).sure(features).any(), "the nearest counts"
    assert router_of([[1.5, 1.0], [3.0, 1.0]], [float("inf"), 0.0], [0, 1], 2).sure(features).all()


def test_no_skill_is_sure_of_nothing_and_one_skill_of_everything() -> None:
    features = torch.randn(5, 8)
    fresh = PrototypeRouter(8, 3)
    assert torch.equal(fresh(features), torch.zeros(5, 3)) and not fresh.sure(features).any()
    only = router_of([[]], [0.0], [1], 3)
    assert only.sure(features).all() and (only(features).argmax(1) == 1).all()
    assert not list(only.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_of_the_model_leave_the_statistics_alone(dtype: torch.dtype) -> None:
    router = router_of([[0.123456, 7.654321]], [0.1234567], [0], 2)
    before = {name: value.clone() for name, value in router.named_buffers()}
    router.to(dtype)
    assert all(torch.equal(value, before[name]) for name, value in router.named_buffers())
    features = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        under = router(features)
    assert torch.equal(under, router(features)) and router(features.to(dtype)).dtype == torch.float32


def test_the_spread_is_the_usual_distance_between_skills_of_different_experts() -> None:
    # Of experts 0, 0, 1, 2: the nearest of another one are 6, 5, 5 and 20 away.
    router = router_of([[0.0], [1.0], [6.0], [26.0]], [1.0] * 4, [0, 0, 1, 2], 3)
    assert float(router.spread()) == 5**2 / 2
    assert float(router_of([[0.0], [9.0]], [1.0] * 2, [0, 0], 2).spread()) == 1.0, "one expert serves both"
    assert float(router_of([[]], [1.0], [0], 2).spread()) == float(PrototypeRouter(8, 2).spread()) == 1.0
    assert float(router_of([[0.0], [0.1]], [1.0] * 2, [0, 1], 2).spread()) == 1.0, "never harder than the logits are"


def test_immature_experts_are_helped_however_far_apart_skills_are(make_model: Any, batch: dict[str, Tensor]) -> None:
    """All at first, as the temperature says; nearly none in the end."""
    model = make_model(2, **ROUTING, temperature=1.0)
    features = model.prompt_features([batch])
    places = 100 * features / features.pow(2).mean(1, keepdim=True).sqrt()
    model.set_prototypes(100 * torch.eye(places.shape[1]), places[:2], torch.full((2,), 1e3), model.expert_names)
    helped = []
    for maturity in (0.0, 0.5, 0.99):
        model.set_maturity("expert_1", maturity)
        model(**batch)
        (decision,) = model.decisions.values()
        helped.append(float(decision.weights[0, 1]))
    assert helped[:2] == pytest.approx([1 / (1 + np.e), 1 / (1 + np.e**2)], abs=1e-3) and helped[2] < 1e-6


def test_resizing_takes_the_skills_of_removed_experts_along() -> None:
    router = router_of([[0.0], [1.0], [2.0], [3.0]], [0.1, 0.2, 0.3, 0.4], [0, 1, 2, 1], 3)
    router.resize([2, 0], added=1)
    assert router.num_experts == 3 and router.expert_of_skill.tolist() == [1, 0]
    assert router.centres.flatten().tolist() == [0, 2]
    torch.testing.assert_close(router.radii, torch.tensor([0.1, 0.3]))
    assert router(torch.ones(2, 8)).shape == (2, 3)
    router.resize([2], added=1)
    assert router.expert_of_skill.tolist() == [] and not router.sure(torch.ones(2, 8)).any()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"projection": torch.ones(7, 2)}, "another tap or base"),
        ({"projection": torch.ones(8, 3)}, "shapes"),
        ({"radii": torch.ones(3)}, "shapes"),
        ({"expert_of_skill": [0]}, "shapes"),
        ({"centres": torch.full((2, 2), float("nan"))}, "finite"),
        ({"radii": torch.tensor([1.0, -1.0])}, "radii 0 or more"),
        ({"expert_of_skill": [0, 2]}, "one of the 2"),
        ({"expert_of_skill": [-1, 0]}, "one of the 2"),
    ],
    ids=str,
)
def test_prototypes_that_do_not_fit_are_refused(wrong: dict[str, Any], text: str) -> None:
    router = PrototypeRouter(8, 2)
    good = {
        "projection": torch.ones(8, 2),
        "centres": torch.ones(2, 2),
        "radii": torch.ones(2),
        "expert_of_skill": [0, 1],
    }
    router.set_skills(**good)
    with pytest.raises(TunerError, match=text):
        router.set_skills(**good | wrong)
    assert torch.equal(router.centres, good["centres"])


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("execution", [*EXECUTIONS, "auto"])
def test_what_no_skill_is_near_is_answered_by_the_base_bit_for_bit(
    make_model: Any, long: dict[str, Tensor], architecture: str, execution: str
) -> None:
    model = make_model(3, architecture, execution=execution, **ROUTING)
    inputs = {**long, "prompt_mask": long["labels"] == -100}
    with model.disabled():
        base = model(**inputs).logits
    unknown = model(**inputs).logits
    assert torch.equal(unknown, base), "no skill is known yet"
    know(model, long, [0, 1], ["expert_2", "expert_0"])
    found = model(**inputs).logits
    decision = model.decisions[None]
    assert decision.sure is not None and decision.sure.tolist() == [True, True, False]
    assert torch.equal(found[2], base[2])
    for row, name in ((0, "expert_2"), (1, "expert_0")):
        with model.forced(name):
            torch.testing.assert_close(found[row], model(**inputs).logits[row], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found[row], base[row], atol=0.1)
    assert decision.load().tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("experts", "tokens"),
    # One expert alone is no batched product, and at a single token a row it rounds otherwise: (1, 1) is left out.
    [(experts, tokens) for experts in (1, 2, 4) for tokens in (1, 5, 12, 40) if experts * tokens > 1],
)
def test_a_new_skill_leaves_the_answers_of_old_experts_bit_for_bit(
    make_model: Any, randomise: Any, long: dict[str, Tensor], architecture: str, experts: int, tokens: int
) -> None:
    """Whatever the other rows do: here one leaves an old expert for the new one."""
    model = make_model(experts, architecture, execution="auto", **ROUTING)
    inputs = {"input_ids": long["input_ids"][:, :tokens], "prompt_mask": torch.arange(tokens).expand(3, tokens) < 4}
    prompts = {**long, "labels": torch.where(torch.arange(40) < min(4, tokens), -100, long["input_ids"])}
    names = [model.expert_names[-1], "expert_0"]
    know(model, prompts, [0, 1], names, radius=100.0)
    before = model(**inputs).logits
    model.add_expert("new", maturity=1.0)
    know(model, prompts, [0, 1, 2], [*names, "new"])
    after = model(**inputs).logits
    expert = model.decisions[None].experts
    assert expert is not None and expert[:, 0].tolist() == [experts - 1, 0, experts]
    assert torch.equal(after[:2], before[:2])
    with model.disabled():
        assert torch.equal(after[2], model(**inputs).logits[2]), "the new one is still zero"


def test_dense_collaboration_answers_where_it_is_asked_to(
    make_model: Any, make_loop: Any, long: dict[str, Tensor], assert_near: Any
) -> None:
    model = make_model(3, execution="auto", unsure="dense", temperature=2.0, **ROUTING)
    know(model, long, [0, 1], ["expert_2", "expert_0"])
    found = model(**long).logits
    decision = model.decisions[None]
    assert decision.experts is None and decision.sure is not None and decision.sure.tolist() == [True, True, False]
    (router,) = model.routers.values()
    assert isinstance(router, PrototypeRouter)
    mixed = (decision.logits[2] / (2 * router.spread())).softmax(-1)
    expected = torch.stack([torch.tensor([0.0, 0, 1]), torch.tensor([1.0, 0, 0]), mixed])
    assert 0.01 < expected[2].max() < 0.99
    torch.testing.assert_close(decision.weights, expected)
    gates = expected.repeat_interleave(40, 0)
    assert_near(found, make_loop(model, lambda layer: gates)(**long).logits)
    known = {name: value[:2] for name, value in long.items()}
    model(**known)
    assert model.decisions[None].experts is not None, "all are sure: nothing is computed densely"


@pytest.mark.parametrize("unsure", ["base", "dense"])
def test_padding_is_not_what_makes_a_pass_dense(make_model: Any, batch: dict[str, Tensor], unsure: str) -> None:
    model = make_model(2, unsure=unsure, **ROUTING)
    ids = batch["input_ids"][:2]
    positions = torch.stack([torch.arange(12) % 6, torch.arange(12)])
    model.set_prototypes(np.zeros((model.config.hidden_size, 0)), np.zeros((1, 0)), [0.0], ["expert_1"])
    model(input_ids=ids, position_ids=positions)
    decision = model.decisions[None]
    assert decision.valid.tolist() == [True, True, True, False] and decision.experts is not None
    know(model, batch, [0], ["expert_1"])
    model(input_ids=ids, position_ids=positions)
    assert (model.decisions[None].experts is None) == (unsure == "dense")


@pytest.mark.parametrize("unsure", ["base", "dense"])
def test_an_immature_expert_makes_everything_dense(make_model: Any, batch: dict[str, Tensor], unsure: str) -> None:
    model = make_model(2, unsure=unsure, temperature=3.0, **ROUTING)
    know(model, batch, [0, 1], ["expert_0", "expert_1"])
    model.set_maturity("expert_1", 0.5)
    model(**batch)
    decision = model.decisions[None]
    assert decision.experts is None
    (router,) = model.routers.values()
    assert isinstance(router, PrototypeRouter) and router.spread() > 2
    torch.testing.assert_close(decision.weights, (decision.logits / (3 * 0.5 * router.spread())).softmax(-1))
    assert decision.sure is not None and decision.sure.tolist() == [True, True, False], "still said"


@pytest.mark.parametrize("unsure", ["base", "dense"])
def test_mature_experts_answer_together_on_the_prototypes_scale(make_model: Any, batch: Any, unsure: str) -> None:
    model = make_model(2, unsure=unsure, temperature=3.0, **ROUTING)
    know(model, batch, [0, 1], ["expert_0", "expert_1"])
    with model.dense():
        model(**batch)
    (decision,), (router,) = model.decisions.values(), model.routers.values()
    assert decision.experts is None and isinstance(router, PrototypeRouter)
    torch.testing.assert_close(decision.weights, (decision.logits / (3 * router.spread())).softmax(-1))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("unsure", ["base", "dense"])
def test_generation_keeps_what_the_prompt_decided(
    make_model: Any, long: dict[str, Tensor], architecture: str, unsure: str
) -> None:
    model = make_model(3, architecture, execution="auto", unsure=unsure, temperature=200.0, **ROUTING)
    prompt = {"input_ids": long["input_ids"][:, :5], "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    know(model, long, [0, 1], ["expert_2", "expert_0"])
    common = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with model.recording() as decisions:
        cached = model.generate(**prompt, **common)
    assert len(decisions) == 6
    assert all(decision.sure.tolist() == [True, True, False] for decision in decisions)
    assert torch.equal(cached, model.generate(**prompt, **common, use_cache=False))
    with model.disabled():
        base = model.generate(**prompt, **common)
    assert not torch.equal(cached[:2], base[:2])
    assert unsure == "dense" or torch.equal(cached[2], base[2])
    assert all((decision.experts is None) == (unsure == "dense") for decision in decisions)


def test_decoding_by_hand_gives_the_base_its_own_bits(make_model: Any, long: dict[str, Tensor]) -> None:
    model = make_model(3, execution="auto", **ROUTING)
    know(model, long, [0, 1], ["expert_2", "expert_0"])

    def decode() -> Tensor:
        cache = DynamicCache(config=model.config)
        prompt = torch.ones(3, 5, dtype=torch.bool)
        first = model(input_ids=long["input_ids"][:, :5], prompt_mask=prompt, past_key_values=cache).logits
        rest = [model(input_ids=long["input_ids"][:, [at]], past_key_values=cache).logits for at in range(5, 9)]
        return torch.cat([first, *rest], 1)

    found = decode()
    with model.disabled():
        base = decode()
    assert torch.equal(found[2], base[2]) and not torch.allclose(found[:2], base[:2], atol=0.1)


def test_a_forced_expert_serves_what_no_skill_is_near(make_model: Any, long: dict[str, Tensor]) -> None:
    model, plain = make_model(3, **ROUTING), make_model(3, granularity="sequence")
    with model.forced("expert_1"), plain.forced("expert_1"):
        assert torch.equal(model(**long).logits, plain(**long).logits)


def test_experts_come_go_and_change_names(make_model: Any, batch: dict[str, Tensor]) -> None:
    model = make_model(3, **ROUTING)
    know(model, batch, [0, 1, 2], ["expert_0", "expert_1", "expert_2"])
    model.rename_expert("expert_2", "law")
    model.remove_expert("expert_1")
    model.add_expert("new", maturity=1.0)
    model(**batch)
    decision = model.decisions[None]
    assert decision.sure.tolist() == [True, False, True]
    assert decision.load().tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    know(model, batch, [1], ["new"])
    model(**batch)
    assert model.decisions[None].load().tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    for name in ("law", "new"):
        model.remove_expert(name)
    assert not model.routers
    know(model, batch, [0], ["expert_0"])  # one expert serves all
    model.add_expert("again", maturity=1.0)
    model(**batch)
    assert not model.decisions[None].sure.any(), "a router with experts to choose from begins without skills"


def test_wrong_calls_are_refused(make_model: Any, batch: dict[str, Tensor]) -> None:
    model = make_model(2, **ROUTING)
    with pytest.raises(TunerError, match="no expert 'expert_7'"):
        know(model, batch, [0], ["expert_7"])
    with pytest.raises(TunerError, match="shapes"):
        know(model, batch, [0, 1], ["expert_0"])
    with pytest.raises(TunerError, match="set_prototypes"):
        model.calibrate([batch])
    with pytest.raises(TunerError, match="router prototype"):
        know(make_model(2, granularity="sequence"), batch, [0], ["expert_0"])
    torch.testing.assert_close(model.router_features([batch])[None], model.prompt_features([batch]))


def test_the_router_has_nothing_to_train(make_model: Any, batch: dict[str, Tensor], full_loss: Any) -> None:
    model = make_model(2, **ROUTING).train()
    know(model, batch, [0, 1], ["expert_0", "expert_1"])
    before = {name: value.clone() for name, value in model.routers.named_buffers()}
    full_loss(model, batch).backward()
    assert not list(model.routers.parameters())
    gradients = [value.grad.abs().max() for value in model.parameters() if value.requires_grad]
    assert gradients and max(gradients) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.routers.named_buffers())


def test_recomputed_layers_read_the_same_decision(make_model: Any, long: dict[str, Tensor], gradients: Any) -> None:
    found = []
    for checkpointed in (False, True):
        model = make_model(3, tap_layer=1, **ROUTING).train()
        know(model, long, [0, 1], ["expert_2", "expert_0"])
        if checkpointed:
            model.activation_checkpointing_enable()
        model(**long).loss.backward()
        found.append(gradients(model))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


@pytest.mark.parametrize("skills", [0, 1, 3])
def test_a_saved_model_comes_back_with_as_many_skills(
    make_model: Any, make_base: Any, batch: dict[str, Tensor], tmp_path: Path, skills: int
) -> None:
    model = make_model(2, unsure="dense", temperature=3.0, **ROUTING)
    know(model, batch, [0, 1, 2][:skills], ["expert_0", "expert_1", "expert_0"][:skills])
    expected = model(**batch).logits
    save_model(model, tmp_path / "model", base_name="anything")
    loaded = load_model(make_base(), tmp_path / "model")
    assert loaded.routing_config == model.routing_config
    assert torch.equal(loaded(**batch).logits, expected)
    assert loaded.routers["shared"].centres.shape[0] == skills
    router = tmp_path / "model" / "router.safetensors"
    damaged = load_file(router)
    damaged["shared.radii"] = torch.ones(skills + 1)
    save_file(damaged, router)
    with pytest.raises(TunerError, match="router"):
        load_model(make_base(), tmp_path / "model")


def test_models_saved_before_there_were_prototypes_still_load(
    make_model: Any, make_base: Any, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model = make_model(2)
    save_model(model, tmp_path / "model", base_name="anything")
    path = tmp_path / "model" / "dylora_moe.json"
    description = json.loads(path.read_text())
    del description["routing"]["router"], description["routing"]["unsure"]
    path.write_text(json.dumps(description))
    assert torch.equal(load_model(make_base(), tmp_path / "model")(**batch).logits, model(**batch).logits)


def test_another_rank_keeps_the_base_answers(make_model: Any, long: dict[str, Tensor]) -> None:
    """Factors of different rank are padded to one; nothing of that may reach the base."""
    model = make_model(2, execution="auto", **ROUTING)
    model.add_expert("wide", ExpertConfig(rank=12, alpha=5, target_modules="attention"), maturity=1.0)
    know(model, long, [0, 1], ["wide", "expert_0"])
    found = model(**long).logits
    with model.disabled():
        assert torch.equal(found[2], model(**long).logits[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 12, 40])
def test_the_second_expert_changes_no_bit_of_the_first(
    make_base: Any, make_model: Any, long: dict[str, Tensor], dtype: torch.dtype, tokens: int
) -> None:
    """In 16 bits as in 32, for rows of any length; alone, forced, and found by the router."""
    model = make_model(1, base=make_base("llama").to(dtype), **ROUTING)
    batch = {"input_ids": long["input_ids"][:, :tokens], "attention_mask": long["attention_mask"][:, :tokens]}
    prompt = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    with torch.no_grad():
        alone = model(prompt_mask=prompt, **batch).logits
        with model.disabled():
            base = model(prompt_mask=prompt, **batch).logits
        model.add_expert("second", maturity=1.0)
        know(model, long, [0, 1, 2], ["expert_0", "expert_0", "second"], radius=1e9)
        with model.forced("expert_0"):
            forced = model(prompt_mask=prompt, **batch).logits
        know(model, long, [0, 1, 2], ["expert_0"] * 3, radius=1e9)
        found = model(prompt_mask=prompt, **batch).logits
    assert alone.dtype == dtype and not torch.equal(alone, base)
    assert torch.equal(alone, forced) and torch.equal(alone, found)
