"""Invariants 4 and 5: neither the company a row has in a batch nor the cache changes what it gets."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from dylora_moe.errors import TunerError
from dylora_moe.tuner import DyLoraModel

LENGTHS, PROMPTS = (5, 7, 12), (2, 3, 4)
CASES = [
    ("llama", {"granularity": "token", "router_scope": "shared", "top_k": 1}),
    ("llama", {"granularity": "token", "router_scope": "per_layer", "tap_layer": 1, "top_k": 2}),
    ("llama", {"granularity": "sequence", "router_scope": "shared", "tap_layer": 1, "top_k": 1}),
    ("llama", {"granularity": "sequence", "router_scope": "per_layer", "top_k": 2}),
    ("gemma3", {"granularity": "token", "router_scope": "shared", "top_k": 2}),
    ("gemma3", {"granularity": "sequence", "router_scope": "per_layer", "tap_layer": 1, "top_k": 1}),
]
KINDS = {"token": ["none"], "sequence": ["labels", "mask", "none"]}
each_case = pytest.mark.parametrize(
    ("architecture", "routing"), CASES, ids=["-".join(map(str, (name, *r.values()))) for name, r in CASES]
)


@pytest.fixture
def documents() -> list[Tensor]:
    random = torch.Generator().manual_seed(8)
    return [torch.randint(3, 99, (length,), generator=random) for length in LENGTHS]


def prompt_of(kind: str, ids: Tensor, starts: Tensor) -> dict[str, Tensor]:
    """The prompts of documents that begin at `starts` (document -> row, column), said in one of three ways."""
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for (row, column), length in zip(starts.tolist(), PROMPTS, strict=False):
        mask[row, column : column + length] = True
    if kind == "mask":
        return {"prompt_mask": mask}
    return {"labels": torch.where(mask, -100, ids)} if kind == "labels" else {}


def alone(model: DyLoraModel, document: Tensor, prompt: int, kind: str) -> Tensor:
    ids = document[None]
    mask = torch.arange(len(document))[None] < prompt
    given = {"mask": {"prompt_mask": mask}, "labels": {"labels": torch.where(mask, -100, ids)}, "none": {}}[kind]
    return model(input_ids=ids, **given).logits[0]


def padded(model: DyLoraModel, documents: list[Tensor], side: str, kind: str) -> list[Tensor]:
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    firsts = [12 - len(document) if side == "left" else 0 for document in documents]
    for row, (first, document) in enumerate(zip(firsts, documents, strict=True)):
        ids[row, first : first + len(document)] = document
        mask[row, first : first + len(document)] = 1
    given = prompt_of(kind, ids, torch.tensor(list(enumerate(firsts))))
    if kind == "labels":
        given["labels"][mask == 0] = -100
    if side == "left":  # as generate numbers them
        given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(input_ids=ids, attention_mask=mask, **given).logits
    return [logits[row, first : first + len(d)] for row, (first, d) in enumerate(zip(firsts, documents, strict=True))]


def packed(model: DyLoraModel, documents: list[Tensor], kind: str) -> list[Tensor]:
    """The two short documents share the first row, the long one has the second."""
    short, long = torch.cat(documents[:2]), documents[2]
    ids = torch.stack([short, long])
    positions = torch.stack([torch.cat([torch.arange(5), torch.arange(7)]), torch.arange(12)])
    given = prompt_of(kind, ids, torch.tensor([[0, 0], [0, 5], [1, 0]]))
    logits = model(input_ids=ids, position_ids=positions, **given).logits
    return [logits[0, :5], logits[0, 5:], logits[1]]


@pytest.mark.parametrize(
    ("architecture", "routing", "kind"),
    [(name, routing, kind) for name, routing in CASES for kind in KINDS[routing["granularity"]]],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_4_company_changes_nothing(
    make_model: Any, documents: list[Tensor], assert_near: Any, architecture: str, routing: Any, kind: str
) -> None:
    model = make_model(4, architecture, prefix_tokens=3, **routing)
    expected = [alone(model, document, prompt, kind) for document, prompt in zip(documents, PROMPTS, strict=True)]
    for found in (
        padded(model, documents, "right", kind),
        padded(model, documents, "left", kind),
        packed(model, documents, kind),
    ):
        for logits, wanted in zip(found, expected, strict=True):
            assert_near(logits, wanted)


def test_4_dense_collaboration_is_batch_invariant(make_model: Any, documents: list[Tensor], assert_near: Any) -> None:
    model = make_model(3, granularity="sequence")
    model.set_maturity("expert_1", 0.0)
    expected = [alone(model, document, prompt, "labels") for document, prompt in zip(documents, PROMPTS, strict=True)]
    for found in (padded(model, documents, "left", "labels"), packed(model, documents, "labels")):
        for logits, wanted in zip(found, expected, strict=True):
            assert_near(logits, wanted)


def left_padded(documents: list[Tensor]) -> dict[str, Tensor]:
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for row, document in enumerate(documents):
        ids[row, 12 - len(document) :] = document
        mask[row, 12 - len(document) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@each_case
def test_5_cached_generation_equals_uncached(
    make_model: Any, documents: list[Tensor], architecture: str, routing: Any
) -> None:
    model = make_model(4, architecture, prefix_tokens=3, **routing)
    inputs, common = left_padded(documents), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for beams in (1, 2):
        cached = model.generate(**inputs, **common, num_beams=beams, use_cache=True)
        assert torch.equal(cached, model.generate(**inputs, **common, num_beams=beams, use_cache=False))
        with model.disabled():
            assert not torch.equal(cached, model.generate(**inputs, **common, num_beams=beams))
    one = documents[0][None]
    by_itself = model.generate(input_ids=one, attention_mask=torch.ones_like(one), **common)
    in_company = model.generate(**inputs, **common)
    assert torch.equal(by_itself[0, 5:], in_company[0, 12:])


@each_case
def test_5_decoding_by_hand_equals_one_pass(
    make_model: Any, documents: list[Tensor], assert_near: Any, architecture: str, routing: Any
) -> None:
    """The decision of a document is made when its prompt fills the cache, and kept with that cache."""
    model = make_model(4, architecture, prefix_tokens=3, **routing)
    ids = documents[2][None].repeat(2, 1)
    ids[1] = (ids[1] + 17) % 96 + 3
    prompt = torch.arange(12).expand(2, 12) < 6
    expected = model(input_ids=ids, prompt_mask=prompt, use_cache=False).logits
    other = DynamicCache(config=model.config)
    model(input_ids=ids.flip(1), prompt_mask=prompt, past_key_values=other)
    cache = DynamicCache(config=model.config)
    parts = [model(input_ids=ids[:, :6], prompt_mask=prompt[:, :6], past_key_values=cache).logits]
    model(input_ids=ids[:, :1], past_key_values=other)
    for position in range(6, 12):
        parts.append(model(input_ids=ids[:, position : position + 1], past_key_values=cache).logits)
    assert_near(torch.cat(parts, 1), expected)


def test_5_generation_decides_by_the_whole_prompt(make_model: Any, documents: list[Tensor]) -> None:
    """Training routes a document by its prompt; generation must give that document the same expert."""
    model = make_model(6, granularity="sequence", prefix_tokens=1)
    for document in documents:
        ids = document[None]
        labels = torch.cat([torch.full_like(ids, -100), ids], 1)
        model(input_ids=torch.cat([ids, ids], 1), labels=labels)
        trained = model.decisions[None].logits
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
        torch.testing.assert_close(model.decisions[None].logits, trained, rtol=1e-5, atol=1e-5)


def test_5_a_cache_filled_elsewhere_is_refused(make_model: Any, documents: list[Tensor]) -> None:
    model = make_model(3, granularity="sequence")
    cache = DynamicCache(config=model.config)
    with model.disabled():
        model(input_ids=documents[0][None], past_key_values=cache)
    with pytest.raises(TunerError, match="empty cache"):
        model(input_ids=documents[0][None], past_key_values=cache)
    model(input_ids=documents[0][None])  # the failed pass left nothing behind
