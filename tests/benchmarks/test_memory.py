"""benchmarks/memory.py: a contender is weighed for real, and what more experts must hold is taken off."""

from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def memory(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("memory")


def test_one_lora_is_first_and_all_others_are_ours(memory: ModuleType) -> None:
    names = [contender["name"] for contender in memory.contenders((1, 8))]
    assert names[:2] == ["PEFT LoRA", "N=1"] and len(names) == 6 and names[-1] == "N=8, sequence, k=2"


@pytest.mark.slow
def test_a_contender_is_weighed_in_a_process_of_its_own(memory: ModuleType) -> None:
    lora, ours = memory.contenders((1,))
    found = [memory.in_a_process_of_its_own("tiny", 128, contender) for contender in (lora, ours)]
    base = 26e6 * 4
    assert all(base < each["between_steps"] < each["peak_bytes"] for each in found)
    assert found[0]["trained"] == found[1]["trained"]


def test_more_experts_own_memory_is_taken_off(memory: ModuleType) -> None:
    records = [{"peak_bytes": 1000, "trained": 10}, {"peak_bytes": 1380, "trained": 30}]
    memory.compare(records)
    assert [record["ratio"] for record in records] == [1.0, 1.06]
