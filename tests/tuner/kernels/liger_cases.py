"""Run by test_triton.py in a process of its own: a head's loss by Liger's kernels against the loss of all logits.

On the CPU under TRITON_INTERPRET=1, which must be set before triton is imported; else on a GPU.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from dylora_moe.tuner import head as head_module
from dylora_moe.tuner.head import Head

pytest.importorskip("liger_kernel", reason="needs the extra `liger`")

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
# In the interpreter a softcap, which is a number, is not what Triton's compiler makes of it.
CAPS = [None] if IS_INTERPRETED else [None, 3.0]


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernels are taken wherever there is a row; has the number of rows of each call."""
    found: list[int] = []
    compute = head_module.by_liger

    def by_liger(hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
        found.append(len(hidden))
        return compute(hidden, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(head_module, "_takes_liger", lambda hidden, head: len(hidden) > 0)
    monkeypatch.setattr(head_module, "by_liger", by_liger)
    return found


@pytest.mark.parametrize("chunk_elements", [2**24, 7 * 500])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_loss_and_gradient_equal_those_of_all_logits(
    tokens: int,
    softcap: float | None,
    has_bias: bool,
    chunk_elements: int,
    taken: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of an odd vocabulary, with labels left out, and a weight for each label."""
    monkeypatch.setattr(head_module, "_CHUNK_ELEMENTS", chunk_elements)
    draw = torch.Generator().manual_seed(tokens)
    weight = (torch.randn(501, 64, generator=draw) * 0.3).to(DEVICE)
    bias = torch.randn(501, generator=draw).to(DEVICE) if has_bias else None
    hidden = torch.randn(2, tokens, 64, generator=draw).to(DEVICE).requires_grad_()
    labels = torch.randint(0, 501, (2, tokens), generator=draw).to(DEVICE)
    labels[1, ::3] = -100
    labelled = int((labels[:, 1:] != -100).sum())
    of_label = torch.rand(labelled, generator=draw).to(DEVICE)

    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    every = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    expected = every[labels[:, 1:].flatten() != -100]
    (expected_gradient,) = torch.autograd.grad((expected * of_label).sum(), hidden)

    found = Head(weight=weight, bias=bias, softcap=softcap).nll(hidden, labels)
    (gradient,) = torch.autograd.grad((found * of_label).sum(), hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    assert taken == ([labelled] if labelled else [])


def test_without_gradients_there_are_none() -> None:
    hidden, weight = torch.randn(1, 6, 64, device=DEVICE), torch.randn(99, 64, device=DEVICE)
    with torch.no_grad():
        found = Head(weight=weight).nll(hidden, torch.arange(6, device=DEVICE)[None])
    expected = F.cross_entropy(F.linear(hidden, weight)[0, :-1], torch.arange(1, 6, device=DEVICE), reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not found.requires_grad
