"""Growing, forcing, freezing, renaming; dense collaboration; the losses over an optimizer step."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from dylora_moe.errors import TunerError
from dylora_moe.tuner import DyLoraModel, ExpertConfig, LoadWindow, RoutingConfig


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_dense_collaboration_is_a_weighted_loop_over_stock_adapters(
    make_model: Any,
    make_loop: Any,
    batch: Any,
    gradients: Any,
    assert_near: Any,
    granularity: str,
    temperature: float,
) -> None:
    model = make_model(3, granularity=granularity, temperature=temperature, top_k=2)
    model.set_maturity("expert_2", 0.0)
    found = model(**batch)
    decision = model.decisions[None]
    units = torch.arange(36) if decision.unit_of_token is None else decision.unit_of_token
    weights = (decision.logits / temperature).softmax(-1)[units].detach()
    loop = make_loop(model, lambda layer: weights)
    expected = loop(**batch)
    assert_near(found.logits, expected.logits)
    found.loss.backward()
    expected.loss.backward()
    stock = {f"peft_model.base_model.model.{name}": p.grad for name, p in loop.named_parameters() if p.requires_grad}
    assert len(stock) == 2 * 3 * 9
    assert_near({name: grad for name, grad in gradients(model).items() if not name.startswith("routers")}, stock)
    assert model.routers["shared"].weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_mature_experts_answer_together_where_that_is_asked_for(
    make_model: Any, make_loop: Any, batch: Any, assert_near: Any, granularity: str
) -> None:
    model = make_model(3, granularity=granularity, temperature=2.0)
    routed = model(**batch).logits
    with model.dense():
        found = model(**batch).logits
        decision = model.decisions[None]
    assert decision.experts is None
    units = torch.arange(36) if decision.unit_of_token is None else decision.unit_of_token
    weights = (decision.logits / 2.0).softmax(-1)[units].detach()
    assert_near(found, make_loop(model, lambda layer: weights)(**batch).logits)
    assert not torch.allclose(found, routed, atol=1e-4)
    assert torch.equal(model(**batch).logits, routed), "the router's own again"


@pytest.mark.parametrize(("maturity", "temperature"), [(0.0, 9.0), (0.5, 3.0)])
def test_the_temperature_falls_to_one_as_an_expert_matures(
    make_model: Any, batch: Any, maturity: float, temperature: float
) -> None:
    model = make_model(temperature=9.0)
    model.set_maturity("expert_1", maturity)
    model(**batch)
    (decision,) = model.decisions.values()
    torch.testing.assert_close(decision.weights, (decision.logits / temperature).softmax(-1))


def test_maturity_decides_between_all_experts_and_the_best(make_model: Any, batch: Any) -> None:
    model = make_model(3)
    sparse = model(**batch).logits
    assert model.decisions[None].experts is not None
    model.set_maturity("expert_1", 0.99)
    assert not torch.allclose(model(**batch).logits, sparse)
    assert model.decisions[None].experts is None
    model.set_maturity("expert_1", 1.0)
    assert torch.equal(model(**batch).logits, sparse)
    with pytest.raises(TunerError, match="between 0 and 1"):
        model.set_maturity("expert_1", 1.5)
    with pytest.raises(TunerError, match="no expert 'none'"):
        model.set_maturity("none", 1.0)


def mean_losses(batches: list[tuple[Tensor, Tensor, Tensor]]) -> list[float]:
    """Balance loss after each pass, by hand: (probs, chosen one-hot, valid) of each, f over all passes so far."""
    losses, counts = [], torch.zeros(batches[0][0].shape[1])
    for probs, chosen, valid in batches:
        for unit in range(len(valid)):
            if valid[unit]:
                counts += chosen[unit]
        mean = probs[valid].mean(0)
        losses.append(float(len(counts) * sum(f * p for f, p in zip(counts / counts.sum(), mean, strict=True))))
    return losses


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("router_scope", ["shared", "per_layer"])
def test_auxiliary_losses_equal_a_hand_written_reference_over_a_window(
    make_model: Any, batch: Any, granularity: str, router_scope: str
) -> None:
    model = make_model(4, granularity=granularity, router_scope=router_scope)
    other = {name: value.flip(0)[:2] for name, value in batch.items()}
    window, seen, found = LoadWindow(), {}, []
    for inputs in (batch, other):
        model(**inputs)
        found.append(model.auxiliary_losses(window))
        rows = inputs["attention_mask"].bool()
        valid = rows.flatten() if granularity == "token" else rows.any(1)
        for key, decision in model.decisions.items():
            probs = decision.logits.detach().softmax(-1)
            seen.setdefault(key, []).append((probs, torch.eye(4)[probs.argmax(1)], valid))
    balance = [sum(values) / len(seen) for values in zip(*map(mean_losses, seen.values()), strict=True)]
    assert [float(losses.balance) for losses in found] == pytest.approx(balance, rel=1e-5)
    last = [decision.logits.detach()[valid].logsumexp(-1).pow(2).mean() for decision in model.decisions.values()]
    assert float(found[1].z) == pytest.approx(float(sum(last) / len(last)), rel=1e-5)
    window.clear()
    again = model.auxiliary_losses(window)
    assert float(again.balance) != pytest.approx(balance[1], rel=1e-4), "a new step begins with no load"


def test_one_expert_has_no_router_and_no_auxiliary_losses(make_model: Any, batch: Any) -> None:
    model = make_model(1)
    model(**batch)
    assert not model.routers and not model.decisions
    losses = model.auxiliary_losses(LoadWindow())
    assert losses.balance == losses.z == 0


def test_a_forced_expert_serves_everything(make_model: Any, make_loop: Any, batch: Any, assert_near: Any) -> None:
    model = make_model(3, top_k=2)
    routed = model(**batch).logits
    for index, name in enumerate(model.expert_names):
        loop = make_loop(model, lambda layer, index=index: torch.eye(3)[index].expand(36, 3))
        with model.forced(name), model.forced(name):
            assert_near(model(**batch).logits, loop(**batch).logits)
            assert not model.decisions
    assert torch.equal(model(**batch).logits, routed)
    with pytest.raises(TunerError, match="no expert 'none'"), model.forced("none"):
        pass
    with pytest.raises(ZeroDivisionError), model.forced("expert_0"):
        1 / 0  # noqa: B018
    assert model.state.forced is None


def test_recording_keeps_every_decision_of_every_pass(make_model: Any, batch: Any) -> None:
    model = make_model(2, router_scope="per_layer", tap_layer=1).train()
    model.activation_checkpointing_enable()
    with model.recording() as decisions:
        model(**batch).loss.backward()
        model(**batch)
    model(**batch)
    assert len(decisions) == 4, "two layers, two passes; recomputing in backward is no pass"


def test_features_leave_padding_out_and_calibrate_the_routers(make_model: Any, make_base: Any, batch: Any) -> None:
    model = make_model(3, tap_layer=1, router_scope="per_layer").train()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    features = model.router_features([inputs, inputs])
    assert model.training
    assert {key: value.shape for key, value in features.items()} == {1: (66, 32), 2: (66, 32)}
    states = make_base()(**inputs, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(features[1][:33], states[inputs["attention_mask"].bool()])
    model.calibrate([inputs])
    for key, router in (("1", features[1]), ("2", features[2])):
        seen = model.routers[key].normalise(router)
        torch.testing.assert_close(seen.mean(0), torch.zeros(32), atol=1e-4, rtol=0)


def test_features_of_documents_are_the_means_of_their_prompts(make_model: Any, make_base: Any, batch: Any) -> None:
    model = make_model(2, granularity="sequence")
    features = model.router_features([batch])[None]
    embedded = make_base().get_input_embeddings()(batch["input_ids"])
    expected = torch.stack([row[:length].mean(0) for row, length in zip(embedded, (3, 4, 5), strict=True)])
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("tap_layer", [0, 2])
@pytest.mark.parametrize("experts", [1, 3])
def test_features_of_prompts_are_the_bases_own_at_the_tap(
    make_model: Any, make_base: Any, batch: Any, tap_layer: int, experts: int
) -> None:
    model = make_model(experts, tap_layer=tap_layer).train()
    features = model.prompt_features([batch, {name: value[2:] for name, value in batch.items()}])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    states = make_base()(**inputs, output_hidden_states=True).hidden_states[tap_layer]
    expected = torch.stack([row[:length].mean(0) for row, length in zip(states, (3, 4, 5), strict=True)])
    torch.testing.assert_close(features, torch.cat([expected, expected[2:]]))
    assert model.training and not model.state.disabled
    model(**batch).loss.backward()  # nothing is left behind that would stop it


def test_features_of_prompts_run_no_layer_above_the_tap(make_model: Any, batch: Any) -> None:
    model = make_model(2, tap_layer=1)
    above = []
    for layer in model.lm.get_decoder().layers[1:]:
        layer.self_attn.register_forward_hook(lambda *_: above.append(1))
    model.prompt_features([batch])
    assert not above


def test_a_row_without_a_prompt_has_no_features(make_model: Any, batch: Any) -> None:
    batch["labels"][1] = batch["input_ids"][1]
    with pytest.raises(TunerError, match="row 1 has none"):
        make_model(2).prompt_features([batch])


def test_removed_experts_leave_the_others_as_they_were(make_model: Any, batch: Any) -> None:
    model = make_model(3)
    rows = model.routers["shared"].weight.detach().clone()
    answers = {}
    for name in ("expert_0", "expert_2"):
        with model.forced(name):
            answers[name] = model(**batch).logits
    model.remove_expert("expert_1")
    assert model.expert_names == ("expert_0", "expert_2")
    assert torch.equal(model.routers["shared"].weight, rows[[0, 2]])
    for name, logits in answers.items():
        with model.forced(name):
            assert torch.equal(model(**batch).logits, logits)
    assert model(**batch).loss.isfinite()
    assert not any("expert_1" in name for name in model.state_dict())
    model.remove_expert("expert_0")
    assert torch.equal(model(**batch).logits, answers["expert_2"]), "one expert alone serves everything"
    with pytest.raises(TunerError, match="at least one expert"):
        model.remove_expert("expert_2")


def test_removing_below_top_k_is_refused(make_model: Any) -> None:
    with pytest.raises(TunerError, match="Lower top_k"):
        make_model(2, top_k=2).remove_expert("expert_0")


def test_a_linear_that_lost_its_last_expert_is_the_base_again(make_model: Any, batch: Any, randomise: Any) -> None:
    model = make_model(2, expert=ExpertConfig(rank=8, target_modules="attention"))
    expected = model(**batch).logits
    model.add_expert("wide", ExpertConfig(rank=8), maturity=1.0)
    randomise(model)
    with model.forced("wide"):
        assert not torch.allclose(model(**batch).logits, expected)
    model.remove_expert("wide")
    randomise(model)
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("old", ["expert_0", "expert_1", "expert_2"])
def test_renaming_changes_the_name_only(make_model: Any, batch: Any, old: str) -> None:
    model = make_model(3)
    model.set_maturity(old, 0.5)
    model.freeze_expert(old)
    expected = model(**batch).logits
    model.rename_expert(old, "python")
    names = [name if name != old else "python" for name in ("expert_0", "expert_1", "expert_2")]
    assert list(model.expert_names) == names
    assert torch.equal(model(**batch).logits, expected)
    renamed = next(expert for expert in model.experts if expert.name == "python")
    assert renamed.maturity == 0.5 and renamed.frozen
    assert not any(f".{old}." in name for name in model.state_dict())
    with pytest.raises(TunerError, match="different"):
        model.rename_expert("python", names[0] if names[0] != "python" else names[1])
    model.add_expert(old)
    model.remove_expert("python")
    assert model(**batch).loss.isfinite()


def test_names_that_peft_would_confuse_are_refused(make_model: Any, make_base: Any) -> None:
    base, model = make_base(), make_model(1)
    for name in (
        *("1", "a.b", "", "a b", "keys", "pop", "training", "_modules"),
        *("q_proj", "layers", "model", "mlp", "default"),
        *("lora_A", "lora_B", "base_layer", "lora_dropout"),
    ):
        with pytest.raises(TunerError, match="name"):
            DyLoraModel(base, [name, "good"])
        with pytest.raises(TunerError, match="name"):
            model.add_expert(name)
        with pytest.raises(TunerError, match="name"):
            model.rename_expert("expert_0", name)
    assert model.expert_names == ("expert_0",)


def test_names_given_twice_are_refused(make_model: Any) -> None:
    with pytest.raises(TunerError, match="'a' twice"):
        make_model(["a", "a"])
    with pytest.raises(TunerError, match="'expert_1' twice"):
        make_model(2).add_expert("expert_1")


def test_names_that_begin_like_another_do_not_mix(make_model: Any, batch: Any) -> None:
    """PEFT looks for names as substrings."""
    model = make_model(["code", "code_2", "code-2"])
    answers = []
    for name in model.expert_names:
        with model.forced(name):
            answers.append(model(**batch).logits)
    model.remove_expert("code")
    for name, expected in zip(model.expert_names, answers[1:], strict=True):
        with model.forced(name):
            assert torch.equal(model(**batch).logits, expected)


def test_impossible_mixtures_are_refused(make_base: Any) -> None:
    with pytest.raises(TunerError, match="at least one expert"):
        DyLoraModel(make_base(), [])
    with pytest.raises(TunerError, match=r"number of experts 2, got 3"):
        DyLoraModel(make_base(), ["a", "b"], routing=RoutingConfig(top_k=3))
    with pytest.raises(TunerError, match=r"3 layers.*got 3"):
        DyLoraModel(make_base(), ["a", "b"], routing=RoutingConfig(tap_layer=3))
    with pytest.raises(TunerError, match=r"w_proj.*there are down_proj"):
        DyLoraModel(make_base(), ["a", "b"], expert_config=ExpertConfig(target_modules=("w_proj",)))


def test_attention_targets_leave_the_mlp_alone(make_model: Any) -> None:
    model = make_model(2, expert=ExpertConfig(rank=8, target_modules="attention"))
    assert {name.rpartition(".")[2] for name, _ in model.routed_linears()} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_layers_below_the_tap_carry_no_adapter(make_model: Any) -> None:
    model = make_model(2, tap_layer=2)
    assert {name.split(".")[2] for name, _ in model.routed_linears()} == {"2"}


def test_a_failed_growth_leaves_the_model_as_it_was(make_model: Any, batch: Any) -> None:
    model = make_model(2, tap_layer=1)
    before, keys = model(**batch).logits, list(model.state_dict())
    with pytest.raises(TunerError, match="w_proj"):
        model.add_expert("new", ExpertConfig(target_modules=("w_proj",)))
    assert model.expert_names == ("expert_0", "expert_1")
    assert list(model.state_dict()) == keys
    assert torch.equal(model(**batch).logits, before)


def test_a_new_expert_has_the_shape_of_the_first_and_changes_nothing_yet(make_model: Any, batch: Any) -> None:
    model = make_model(1, expert=ExpertConfig(rank=24, alpha=12, target_modules="attention"))
    model.add_expert("new")
    linear = next(iter(model.routed_linears()))[1]
    assert linear.lora_A["new"].weight.shape == linear.lora_A["expert_0"].weight.shape
    assert linear.scaling["new"] == linear.scaling["expert_0"]
    with model.disabled():
        base = model(**batch).logits
    with model.forced("new"):
        assert torch.equal(model(**batch).logits, base)
    assert model.experts[1].maturity == 0


def test_position_ids_alone_pack_the_row_whatever_the_cache_setting(make_model: Any, batch: Any) -> None:
    """transformers sees the borders of packed documents only without a cache, which its configs have on."""
    model = make_model(2)
    ids, positions = batch["input_ids"][:1], torch.cat([torch.arange(5), torch.arange(7)])[None]
    assert model.config.use_cache
    expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert torch.equal(model(input_ids=ids, position_ids=positions).logits, expected)
    hidden = model(input_ids=ids, position_ids=positions, hidden_only=True)
    torch.testing.assert_close(model.lm.lm_head(hidden), expected)


@pytest.mark.parametrize("name", ["expert_0", "expert_2"])
def test_no_warning_is_given_where_an_expert_goes(make_model: Any, batch: Any, name: str) -> None:
    """Not even where it was the one that PEFT calls active."""
    model = make_model(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.remove_expert(name)
    assert name not in model.expert_names and model(**batch).loss.isfinite()
