"""How tokens are drawn from logits: by chance alone, within top_p, and by the row alone."""

import pytest
import torch

from dylora_moe.serve.sampling import Draw, choose


def draws(number: int, temperature: float = 1.0, top_p: float = 1.0) -> list[Draw]:
    return [Draw(temperature=temperature, top_p=top_p, chance=(n + 0.5) / number) for n in range(number)]


def shares(tokens: list[int], size: int) -> torch.Tensor:
    return torch.bincount(torch.tensor(tokens), minlength=size) / len(tokens)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature: float) -> None:
    logits = torch.tensor([1.0, 3.0, -2.0, 2.0, 0.0])
    found = shares(choose(logits.expand(2000, 5), draws(2000, temperature)), 5)
    torch.testing.assert_close(found, (logits / temperature).softmax(0), rtol=0, atol=1e-3)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    probs = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05])
    found = shares(choose(probs.log().expand(1000, 5), draws(1000, top_p=0.7)), 5)
    torch.testing.assert_close(found, torch.tensor([0, 0.625, 0, 0.375, 0]), rtol=0, atol=2e-3)
    assert set(choose(probs.log().expand(50, 5), draws(50, top_p=1e-9))) == {1}


def test_the_likeliest_is_taken_without_temperature_beside_rows_that_draw() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    mixed = [Draw(temperature=0.0 if row % 2 else 0.9, top_p=0.8, chance=0.99) for row in range(6)]
    together = choose(logits, mixed)
    assert together == [choose(logits[row : row + 1], [mixed[row]])[0] for row in range(6)]
    assert together[1::2] == logits.argmax(1)[1::2].tolist()


def test_edges_of_chance_give_tokens_that_may_be_drawn() -> None:
    logits = torch.tensor([[-1e9, 0.0, 0.0, -1e9]])
    for chance in (0.0, 0.4999, 0.5, 1 - 2**-53):
        assert choose(logits, [Draw(temperature=1e-4, top_p=0.99, chance=chance)])[0] in (1, 2)
