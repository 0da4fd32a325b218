"""Who answers: rows of one batch that go different ways, caches put together from others, and what was decided."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from dylora_moe.errors import TunerError
from dylora_moe.tuner import BASE, ROUTED, DyLoraModel, ExpertConfig

ROUTINGS = {
    "token": {"granularity": "token"},
    "token, two of four": {"granularity": "token", "top_k": 2},
    "document": {"granularity": "sequence"},
    "document, two of four, by groups": {"granularity": "sequence", "top_k": 2, "execution": "grouped"},
    "each layer": {"granularity": "sequence", "router_scope": "per_layer"},
    "reference": {"granularity": "token", "top_k": 3, "execution": "reference"},
}
ROWS = [2, ROUTED, BASE, 0, ROUTED, 3]


@pytest.fixture(params=ROUTINGS)
def model(request: Any, make_model: Callable[..., Any]) -> DyLoraModel:
    return make_model(4, **ROUTINGS[request.param])


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Six rows of 10 tokens, padded on the left."""
    ids = torch.randint(3, 99, (6, 10), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    for row, length in enumerate((10, 7, 9, 4, 10, 6)):
        mask[row, : 10 - length] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def speaking(model: DyLoraModel, row: int) -> AbstractContextManager[None]:
    if row == BASE:
        return model.disabled()
    return nullcontext() if row == ROUTED else model.forced(model.expert_names[row])


@torch.no_grad()
def test_a_merged_expert_is_the_forced_one_and_leaves_no_trace(model: DyLoraModel, inputs: dict[str, Tensor]) -> None:
    def weights() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in model.state_dict().items()}

    before, routed = weights(), model(**inputs).logits
    with model.forced("expert_2"):
        expected = model(**inputs).logits
    with model.merged("expert_2"):
        found, text = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3, do_sample=False)
        with pytest.raises(TunerError, match="while the base answers alone"), model.merged("expert_1"):
            pass
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    assert (routed - found)[real].abs().max() > 0.01 and text.shape == (6, 13)
    with pytest.raises(ZeroDivisionError), model.merged("expert_1"):
        1 / 0  # noqa: B018
    after = weights()
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(model(**inputs).logits, routed)
    with pytest.raises(TunerError, match="no expert 'maths'"), model.merged("maths"):
        pass


@torch.no_grad()
def test_each_row_is_answered_as_if_alone(model: DyLoraModel, inputs: dict[str, Tensor]) -> None:
    real = inputs["attention_mask"].bool()
    with model.by_rows(ROWS):
        together = model(prompt_mask=real, **inputs).logits
    for row, speaker in enumerate(ROWS):
        own = {name: value[row : row + 1] for name, value in inputs.items()}
        with speaking(model, speaker):
            alone = model(prompt_mask=real[row : row + 1], **own).logits
        torch.testing.assert_close(together[row][real[row]], alone[0][real[row]], rtol=1e-4, atol=1e-5)
    with model.disabled():
        base = model(**inputs).logits
    assert (together - base)[3].abs().max() > 0.01 and torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_rows_are_generated_as_if_alone(model: DyLoraModel, inputs: dict[str, Tensor]) -> None:
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with model.by_rows(ROWS):
        together = model.generate(**inputs, **how)
    for row, speaker in enumerate(ROWS):
        own = {name: value[row : row + 1] for name, value in inputs.items()}
        with speaking(model, speaker):
            assert torch.equal(model.generate(**own, **how)[0], together[row])


@torch.no_grad()
@pytest.mark.parametrize("rank", [8, 5])
def test_a_mixture_of_one_expert_has_rows_too(make_model: Callable[..., Any], inputs: Any, rank: int) -> None:
    model = make_model(1, expert=ExpertConfig(rank=rank, target_modules=("v_proj",)))
    with model.by_rows([0, ROUTED, BASE] * 2):
        together = model(**inputs).logits
    with model.disabled():
        base = model(**inputs).logits
    expected = model(**inputs).logits.clone()
    expected[[2, 5]] = base[[2, 5]]
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
    assert (expected - base)[0].abs().max() > 0.01


@torch.no_grad()
def test_rows_without_a_say_are_as_before(model: DyLoraModel, inputs: dict[str, Tensor]) -> None:
    before = model(**inputs).logits
    with model.by_rows([ROUTED] * 6):
        assert torch.equal(model(**inputs).logits, before)
    assert torch.equal(model(**inputs).logits, before)


def test_dense_collaboration_has_rows_too(make_model: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    model = make_model(4, granularity="sequence")
    with torch.no_grad(), model.dense():
        with model.by_rows(ROWS):
            together = model(**inputs).logits
        routed = model(**inputs).logits
    with torch.no_grad(), model.forced("expert_2"):
        forced = model(**inputs).logits
    torch.testing.assert_close(together[0], forced[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], routed[1], rtol=1e-4, atol=1e-5)


def test_rows_that_cannot_be_are_told(model: DyLoraModel, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(TunerError, match="one of the 4 experts"), model.by_rows([4]):
        pass
    with (
        pytest.raises(TunerError, match="as many as the batch has, 6, got 2"),
        model.by_rows([0, 1]),
    ):
        model(**inputs)
    assert model.state.rows is None


@torch.no_grad()
def test_a_cache_put_together_from_others_goes_on_as_they_would(model: DyLoraModel, inputs: dict[str, Tensor]) -> None:
    """Rows of two batches go on in one, as a server joins requests."""
    real = inputs["attention_mask"].bool()
    new = torch.tensor([[11], [12], [13]])
    rows, taken = [(0, [2, 0]), (1, [1])], [2, 0, 4]  # rows of the halves, and of all

    def fill(half: int) -> DynamicCache:
        part = {name: value[half * 3 : half * 3 + 3] for name, value in inputs.items()}
        part["position_ids"] = (part["attention_mask"].cumsum(1) - 1).clamp_min(0)  # as generate numbers them
        cache = DynamicCache(config=model.config)
        with model.by_rows([[BASE, 0, ROUTED], [ROUTED, 1, ROUTED]][half]):
            model(prompt_mask=real[half * 3 : half * 3 + 3], past_key_values=cache, use_cache=True, **part)
        return cache

    halves = [fill(0), fill(1)]
    joined = DynamicCache(config=model.config)
    for layer in range(len(halves[0].layers)):
        parts = [halves[half].layers[layer] for half, _ in rows]
        keys, values = (
            torch.cat([getattr(part, name)[index] for part, (_, index) in zip(parts, rows, strict=True)])
            for name in ("keys", "values")
        )
        joined.update(keys, values, layer)
    model.join_decisions(joined, [(halves[half], index) for half, index in rows])
    mask = torch.cat([inputs["attention_mask"][taken], torch.ones(3, 1, dtype=torch.long)], dim=1)
    positions = mask.sum(1, keepdim=True) - 1
    with model.by_rows([ROUTED, BASE, 1]):
        found = model(input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=joined).logits
    for place, (row, speaker) in enumerate(zip(taken, (ROUTED, BASE, 1), strict=True)):
        alone = torch.cat([inputs["input_ids"][row][real[row]], new[place]])[None]
        prompt = torch.ones_like(alone, dtype=torch.bool)
        prompt[0, -1] = False
        with speaking(model, speaker):
            expected = model(input_ids=alone, attention_mask=torch.ones_like(alone), prompt_mask=prompt).logits[0, -1]
        torch.testing.assert_close(found[place, -1], expected, rtol=1e-3, atol=1e-4)


def test_routing_tells_who_served_each_token(model: DyLoraModel, inputs: dict[str, Tensor]) -> None:
    assert model.routing() is None, "no pass yet"
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with model.recording() as decisions, model.by_rows(ROWS):
        written = model.generate(**inputs, **how)
    found = model.routing()
    assert found is not None and found.shape == (6, 12, 4) == (*written[:, :-1].shape, 4)
    assert torch.equal(found[0], torch.eye(4)[2].expand(12, 4)) and not found[2].any()
    torch.testing.assert_close(found[1].sum(-1), torch.ones(12))
    per_pass = len(decisions) // 3
    gates = torch.stack([each.token_gates() for each in decisions[-per_pass:]]).mean(0)
    torch.testing.assert_close(found[:, -1], gates)
    with torch.no_grad():
        model(**inputs)
        assert model.routing().shape == (6, 10, 4)  # type: ignore[union-attr]
        with model.disabled():
            model(**inputs)
        assert model.routing() is None
