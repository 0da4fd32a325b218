"""Balance and z-loss, by hand."""

import math

import pytest
import torch

from dylora_moe.tuner.auxiliary import balance_loss, z_loss


def test_balance_loss_is_one_when_even_and_the_number_of_experts_when_collapsed() -> None:
    valid = torch.ones(6, dtype=torch.bool)
    even = torch.full((6, 3), 1 / 3)
    assert balance_loss(torch.full((3,), 1 / 3), even, valid).item() == pytest.approx(1)
    collapsed = torch.tensor([[1.0, 0.0, 0.0]]).expand(6, 3)
    assert balance_loss(torch.tensor([1.0, 0.0, 0.0]), collapsed, valid).item() == pytest.approx(3)


def test_losses_equal_a_hand_written_sum_without_padding() -> None:
    logits = torch.randn(5, 3, requires_grad=True)
    valid = torch.tensor([True, True, False, True, False])
    share = torch.tensor([0.5, 0.3, 0.2])
    rows = [logits.detach()[index] for index in (0, 1, 3)]
    mean = [sum(float(row.softmax(-1)[expert]) for row in rows) / 3 for expert in range(3)]
    expected = 3 * sum(float(share[expert]) * mean[expert] for expert in range(3))
    assert balance_loss(share, logits.softmax(-1), valid).item() == pytest.approx(expected, rel=1e-5)
    squares = [math.log(sum(math.exp(value) for value in row.tolist())) ** 2 for row in rows]
    loss = z_loss(logits, valid)
    assert loss.item() == pytest.approx(sum(squares) / 3, rel=1e-5)
    loss.backward()
    assert logits.grad is not None and (logits.grad[~valid] == 0).all() and (logits.grad[valid] != 0).any()


def test_losses_of_padding_alone_are_zero() -> None:
    nothing = torch.zeros(4, dtype=torch.bool)
    assert balance_loss(torch.ones(2) / 2, torch.full((4, 2), 0.5), nothing).item() == 0
    assert z_loss(torch.randn(4, 2), nothing).item() == 0
