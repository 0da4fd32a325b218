"""Where documents and prompts lie, what their features are, and when the hooks refuse a batch."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from dylora_moe.errors import TunerError
from dylora_moe.tuner import BASE, LoadWindow
from dylora_moe.tuner.decide import make_decision
from dylora_moe.tuner.routing import Layout
from dylora_moe.tuner.tap import find_documents, first_tokens, pool_prompts, prompt_of_labels

CPU = torch.device("cpu")
NOT = -100


def test_documents_begin_where_positions_restart() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 0]])
    assert find_documents((2, 5), positions, None, CPU).tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 2]]


def test_a_row_is_one_document_with_a_mask_or_while_decoding() -> None:
    positions, mask = torch.tensor([[0, 1, 0, 1]]), torch.ones(1, 4)
    assert find_documents((1, 4), positions, mask, CPU).tolist() == [[0, 0, 0, 0]]
    assert find_documents((1, 4), None, None, CPU).tolist() == [[0, 0, 0, 0]]
    assert find_documents((2, 1), torch.tensor([[7]]), None, CPU).tolist() == [[0], [0]]


def test_prompt_ends_before_the_first_trained_label_of_its_document() -> None:
    labels = torch.tensor([[NOT, NOT, 5, NOT, 6, NOT, 7], [5, 6, NOT, NOT, NOT, NOT, NOT]])
    document = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]])
    assert prompt_of_labels(labels, document).int().tolist() == [[1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1]]


def test_first_tokens_skip_padding_and_count_by_document() -> None:
    valid = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    document = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]])
    assert first_tokens(valid, document, 2).int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 0, 1, 1]]


def test_pooling_is_the_mean_over_each_prompt() -> None:
    features = torch.arange(12.0).view(2, 3, 2).bfloat16()
    layout = Layout(
        valid=torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(),
        document=torch.tensor([[0, 0, 1], [0, 0, 0]]),
        prompt=torch.tensor([[1, 1, 1], [0, 1, 0]]).bool(),
    )
    pooled, exists = pool_prompts(features, layout)
    assert pooled.dtype == torch.float32
    assert pooled.tolist() == [[1, 2], [4, 5], [8, 9], [0, 0]]
    assert exists.tolist() == [True, True, True, False]


def test_padding_and_missing_documents_are_no_units(make_model: Any, batch: Any) -> None:
    tokens = make_model(3)
    tokens(**batch)
    assert torch.equal(tokens.decisions[None].valid, batch["attention_mask"].flatten().bool())
    documents = make_model(3, granularity="sequence")
    ids = batch["input_ids"][:2]
    positions = torch.stack([torch.arange(12) % 6, torch.arange(12)])
    documents(input_ids=ids, position_ids=positions)
    decision = documents.decisions[None]
    assert decision.valid.tolist() == [True, True, True, False]
    assert decision.row_of_unit.tolist() == [0, 0, 1, 1]
    assert decision.unit_of_token is not None
    assert decision.unit_of_token.view(2, 12).tolist() == [[0] * 6 + [1] * 6, [2] * 12]


@pytest.mark.parametrize("router_scope", ["shared", "per_layer"])
def test_only_routers_of_layers_send_gradients_down(make_model: Any, batch: Any, router_scope: str) -> None:
    """What the shared router reads is a function of the frozen base alone, and stays one."""
    model = make_model(2, router_scope=router_scope)
    model(**batch)
    z = model.auxiliary_losses(LoadWindow()).z
    factors = [parameter for parameter in model.peft_model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(z, factors, allow_unused=True)
    assert any(gradient is not None for gradient in found) == (router_scope == "per_layer")


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_embeddings_given_by_hand_route_like_ids(make_model: Any, batch: Any, granularity: str) -> None:
    model = make_model(3, granularity=granularity)
    expected = model(**batch).logits
    embeddings = model.lm.get_input_embeddings()(batch["input_ids"])
    given = {name: value for name, value in batch.items() if name != "input_ids"}
    torch.testing.assert_close(model(inputs_embeds=embeddings, **given).logits, expected)


def four_dimensional(mask: Tensor) -> Tensor:
    causal = torch.ones(mask.shape[1], mask.shape[1]).tril().bool()
    return (causal[None, None] & mask[:, None, None].bool()).expand(len(mask), 1, -1, -1)


def test_a_mask_that_hides_the_padding_is_refused_for_sequences(make_model: Any, batch: Any) -> None:
    mask = four_dimensional(batch["attention_mask"])
    tokens, documents = make_model(3), make_model(3, granularity="sequence")
    expected = tokens(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    found = tokens(input_ids=batch["input_ids"], attention_mask=mask).logits
    torch.testing.assert_close(found[:2], expected[:2])
    with pytest.raises(TunerError, match="2-D mask"):
        documents(input_ids=batch["input_ids"], attention_mask=mask)
    documents(**batch)  # the failed pass left nothing behind


def test_removed_hooks_are_gone(make_model: Any, batch: Any) -> None:
    model = make_model(3)
    model(**batch)
    model.tap.remove()
    model.state.decisions = {}
    with pytest.raises(RuntimeError, match="before its router decided"):
        model(**batch)


@torch.no_grad()
def test_a_document_is_decided_once_and_anew_where_something_changed(
    make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(4, granularity="sequence", execution="auto").eval()
    made: list[bool] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs["dense"])
        return make_decision(*args, **kwargs)

    monkeypatch.setattr("dylora_moe.tuner.tap.make_decision", counted)
    ids = torch.randint(3, 98, (2, 12), generator=torch.Generator().manual_seed(3))
    prompt = torch.arange(12).expand(2, 12) < 6
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :6], prompt_mask=prompt[:, :6], past_key_values=cache)

    def step(position: int) -> Tensor:
        return model(input_ids=ids[:, position : position + 1], past_key_values=cache).logits[:, 0]

    for position in (6, 7, 8):
        step(position)
    assert made == [False, False]  # the prompt's, and that of a step
    with model.by_rows([1, BASE]):
        step(9)
    assert made == [False] * 3
    decided = model.decisions[None]
    assert decided.weights.tolist() == [[1.0], [0.0]] and decided.experts[0].item() == 1
    step(10)
    model.set_maturity("expert_0", 0.5)
    step(11)
    assert made == [False] * 4 + [True]
    assert model.decisions[None].experts is None
