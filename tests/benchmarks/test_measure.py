"""benchmarks/_measure.py: order of the rounds, ratios, bytes kept for backward."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def measure(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("_measure")


def timed(measure: ModuleType, name: str, log: list[str], **options: int) -> object:
    weight = torch.nn.Parameter(torch.ones(3))

    def forward() -> torch.Tensor:
        log.append(name)
        return weight.sum()

    return measure.Timed(forwards=[forward], optimizer=torch.optim.SGD([weight], lr=1.0), **options)


def test_contenders_take_turns_and_each_round_begins_elsewhere(measure: ModuleType) -> None:
    log: list[str] = []
    contenders = [timed(measure, name, log) for name in "ab"]
    measure.interleave(contenders, warmups=1, repeats=2)
    assert "".join(log) == "ababba"
    assert [len(contender.seconds) for contender in contenders] == [2, 2]  # type: ignore[attr-defined]


def test_slow_contender_skips_rounds(measure: ModuleType) -> None:
    log: list[str] = []
    contenders = [timed(measure, "a", log), timed(measure, "s", log, max_repeats=1)]
    measure.interleave(contenders, warmups=2, repeats=3)
    assert log.count("a") == 5
    assert log.count("s") == 2


def test_a_step_trains_on_all_forwards_and_clears_gradients(measure: ModuleType) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    forwards = [lambda: weight.sum(), lambda: 2 * weight.sum()]
    contender = measure.Timed(forwards=forwards, optimizer=torch.optim.SGD([weight], lr=1.0))
    assert len(contender.step()) == 3
    assert weight.tolist() == [-3.0, -3.0]
    assert weight.grad is None


def test_ratios_pool_the_references(measure: ModuleType) -> None:
    assert measure.ratios([3.0, 3.0], [[1.0, 1.0], [2.0, 2.0]]) == {"median": 2.0, "min": 3.0, "paired": 2.0}
    assert measure.ratios([8.0], [[2.0, 1.0]])["paired"] == 4.0


def test_slope(measure: ModuleType) -> None:
    assert measure.slope([1, 8, 32], [1.0, 1.07, 1.31]) == pytest.approx(0.01)


def test_saved_bytes_counts_each_storage_once_and_no_parameter(measure: ModuleType) -> None:
    x = torch.ones(10, 100, requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(100, 100))

    def forward() -> torch.Tensor:
        hidden = (x * 2) @ weight  # keeps x * 2 and the weight
        return (hidden * hidden.view(-1).view(10, 100)).sum()  # keeps hidden, twice

    kept = 2 * 10 * 100 * 4
    assert measure.saved_bytes(forward, not_counted=[weight], side=lambda: []) == kept
    extra = torch.ones(5)
    assert measure.saved_bytes(forward, not_counted=[weight], side=lambda: [extra, extra[:2]]) == kept + 20


def test_environment_without_git(measure: ModuleType, tmp_path: Path) -> None:
    assert measure.environment(tmp_path)["dylora_moe_revision"] is None
