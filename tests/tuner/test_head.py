"""The loss without the logits against the loss from all of them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dylora_moe.errors import TunerError
from dylora_moe.tuner import head as head_module
from dylora_moe.tuner.head import read_head


def full_loss(lm: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """The loss of each labelled token from all logits, as transformers makes them."""
    logits = lm.lm_head(hidden)
    if cap := getattr(lm.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none")
    return losses[labels[:, 1:].flatten() != -100]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi", "gemma3"])
@pytest.mark.parametrize("chunk_rows", [1000, 4])
def test_loss_and_gradient_equal_those_of_all_logits(
    make_base: Any, batch: Any, assert_near: Any, monkeypatch: Any, architecture: str, chunk_rows: int
) -> None:
    monkeypatch.setattr(head_module, "_CHUNK_ELEMENTS", chunk_rows * 99)
    lm = make_base(architecture).requires_grad_(False)
    hidden = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight = torch.rand(int((batch["labels"][:, 1:] != -100).sum()), generator=torch.Generator().manual_seed(2))
    expected = full_loss(lm, hidden, batch["labels"])
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), hidden)
    found = read_head(lm).nll(hidden, batch["labels"])
    (found_grad,) = torch.autograd.grad((found * weight).sum(), hidden)
    assert_near(found, expected)
    assert_near(found_grad, expected_grad)


def test_the_mean_is_the_models_own_loss(make_model: Any, batch: Any, gradients: Any, assert_near: Any) -> None:
    model = make_model(2).train()
    loss = model(**batch).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    found = read_head(model.lm).nll(model(hidden_only=True, **batch), batch["labels"]).mean()
    found.backward()
    assert_near(found, loss)
    assert_near(gradients(model), expected)


def test_no_label_at_all_is_no_loss_and_no_gradient(make_base: Any, batch: Any) -> None:
    hidden = torch.randn(3, 12, 32, requires_grad=True)
    losses = read_head(make_base()).nll(hidden, torch.full_like(batch["labels"], -100))
    assert losses.shape == (0,) and losses.dtype == torch.float32
    losses.sum().backward()
    assert hidden.grad is None or not hidden.grad.any()


def test_bfloat16_heads_lose_in_float32(make_base: Any, batch: Any) -> None:
    lm = make_base().bfloat16()
    hidden = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    found = read_head(lm).nll(hidden, batch["labels"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, full_loss(lm, hidden, batch["labels"]))
    found.mean().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_a_model_that_changes_its_logits_otherwise_is_refused(make_base: Any) -> None:
    lm = make_base()
    lm.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(TunerError, match="changes its logits"):
        read_head(lm)
