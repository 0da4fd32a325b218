"""Memory that runs out changes how a batch is computed, and nothing of what is learned."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.train.whole import HARD, outcome

from dylora_moe.config import RunConfig
from dylora_moe.errors import RunError
from dylora_moe.run_dir import RunDir
from dylora_moe.train import evaluator
from dylora_moe.train.parts import is_out_of_memory, split_batch
from dylora_moe.train.run import train
from dylora_moe.train.session import Stages
from dylora_moe.train.stopping import Stopped, StopSignals
from dylora_moe.train.trainer import RoutedTrainer

NO_DROPOUT = {**HARD, "lora_dropout": 0.0, "max_steps": 7, "eval_steps": 3}
KINDS = [
    {"balance_coefficient": 1.0, "z_coefficient": 0.1},
    {"num_experts": 1, "lora_r": 4},
    {"granularity": "token", "top_k": 2, "router_scope": "per_layer", "balance_coefficient": 1.0},
    {"packing": True, "max_length": 96, "balance_coefficient": 1.0},
]


@given(rows=st.integers(1, 9), parts=st.integers(1, 16))
def test_parts_are_the_rows_in_order_and_as_equal_as_can_be(rows: int, parts: int) -> None:
    batch = {"input_ids": torch.arange(rows * 2).reshape(rows, 2), "domain": torch.arange(rows)}
    found = split_batch(batch, parts)
    assert len(found) == min(parts, rows)
    for name, value in batch.items():
        assert torch.equal(torch.cat([part[name] for part in found]), value)
    sizes = [len(part["domain"]) for part in found]
    assert max(sizes) - min(sizes) <= 1


def test_what_a_device_says_is_recognised() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def fail_above(patch: pytest.MonkeyPatch, *, rows: int, from_call: int = 1) -> list[list[Any]]:
    """Run out of memory in the backward pass of more than so many rows; gives the rows of all that went well."""
    step, went, calls = RoutedTrainer.compute_loss, [], []

    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def limited(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        batch = inputs["input_ids"].tolist()
        loss = step(self, model, inputs, *args, **kwargs)
        if len(batch) > rows and len(calls) >= from_call:
            return Fail.apply(loss)
        went.append(batch)
        return loss

    patch.setattr(RoutedTrainer, "compute_loss", limited)
    return went


def fail_evaluations_above(patch: pytest.MonkeyPatch, *, rows: int) -> list[int]:
    """Run out of memory in evaluations of more than so many rows at a time; gives the rows of every one."""
    evaluate, sizes = evaluator.evaluate_domains, []

    def limited(*args: Any, batch_size: int, **kwargs: Any) -> Any:
        sizes.append(batch_size)
        if batch_size > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return evaluate(*args, batch_size=batch_size, **kwargs)

    patch.setattr(evaluator, "evaluate_domains", limited)
    return sizes


def losses(config: RunConfig) -> list[float]:
    return [line["loss"] for line in RunDir(config.run_dir).read_lines("metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("changes", KINDS, ids=["sequence", "single", "token", "packed"])
@pytest.mark.parametrize("from_call", [1, 2, 8], ids=["first pass", "second pass", "later"])
def test_a_step_is_done_again_in_parts(
    tiny_config: Callable[..., RunConfig], changes: dict[str, Any], from_call: int
) -> None:
    whole, config = (tiny_config(**NO_DROPOUT | changes, run_name=name) for name in ("whole", "small"))
    train(whole)
    console, told = Listener(), []
    console.told = told
    with pytest.MonkeyPatch.context() as patch:
        fail_above(patch, rows=2, from_call=from_call)
        train(config, Stages(console=console))  # type: ignore[arg-type]
    (text,) = (text for text in told if "Memory ran out" in text)
    assert re.fullmatch(r"Memory ran out in step \d\. .* each batch is computed in 2 parts; .* stays the same\.", text)
    if "packing" not in changes:  # whose batches are not all of one size
        assert f"step {(from_call + 1) // 2}." in text
    assert losses(config) == pytest.approx(losses(whole), rel=2e-5)
    one, other = (outcome(RunDir(run.run_dir)) for run in (whole, config))
    for name, tensors in one["weights"].items():
        for key, value in tensors.items():
            expected, found = (
                torch.frombuffer(bytearray(data), dtype=torch.float32) for data in (value, other["weights"][name][key])
            )
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4, msg=key)
    assert one["result"]["trained"] == other["result"]["trained"]


def test_a_batch_is_halved_until_it_fits(tiny_config: Callable[..., RunConfig]) -> None:
    """Also where a batch that went well before does not fit in the parts that it is done again in."""
    whole, config = (tiny_config(**NO_DROPOUT, run_name=name) for name in ("whole", "small"))
    train(whole)
    console = Listener()
    console.told = []
    with pytest.MonkeyPatch.context() as patch:
        fail_above(patch, rows=1, from_call=2)
        train(config, Stages(console=console))  # type: ignore[arg-type]
    assert [re.findall(r"in (\d) parts", text) for text in console.told if "Memory ran" in text] == [["4"]]
    assert losses(config) == pytest.approx(losses(whole), rel=2e-5)


class Listener:
    """As much of a console as a run needs."""

    told: list[str]
    is_terminal, quiet = False, True  # as of output that goes nowhere

    def print(self, text: Any = "", *args: Any, **kwargs: Any) -> None:
        self.told.append(str(text))


def test_the_same_rows_come_in_the_same_order(tiny_config: Callable[..., RunConfig]) -> None:
    orders = []
    for name, rows in (("whole", 99), ("small", 2)):
        with pytest.MonkeyPatch.context() as patch:
            went = fail_above(patch, rows=rows, from_call=8)
            train(tiny_config(**NO_DROPOUT, run_name=name))
        # What was done again came twice: of it the last time counts.
        orders.append([row for batch in went for row in batch])
    whole, small = orders
    assert len(small) == len(whole) + 4 and [row for row in small[:24]] == whole[:24]
    assert small[28:] == whole[24:]


def test_parts_are_remembered_across_a_stop(tiny_config: Callable[..., RunConfig]) -> None:
    """A run that goes on does not run out of memory first, and ends bit for bit as one that was not stopped."""
    runs = [tiny_config(**HARD, run_name=name) for name in ("whole", "stopped")]
    with pytest.MonkeyPatch.context() as patch:
        fail_above(patch, rows=2)
        fail_evaluations_above(patch, rows=2)
        train(runs[0])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped), StopSignals() as stop:
        fail_above(patch, rows=2)
        fail_evaluations_above(patch, rows=2)
        patch.setattr(stop, "check", stop_after(60))
        train(runs[1], stop=stop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoutedTrainer, "_take_back", None)  # it must not be needed
        sizes = fail_evaluations_above(patch, rows=2)
        train(runs[1])
    assert set(sizes) == {2}
    assert outcome(RunDir(runs[0].run_dir)) == outcome(RunDir(runs[1].run_dir))


def stop_after(calls: int) -> Callable[[], None]:
    made = []

    def check() -> None:
        made.append(1)
        if len(made) > calls:
            raise Stopped("SIGTERM")

    return check


def test_a_row_that_does_not_fit_is_told(tiny_config: Callable[..., RunConfig]) -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(RunError, match=r"one row of .* tokens does not.*Lower max_length"),
    ):
        fail_above(patch, rows=0)
        train(tiny_config(**NO_DROPOUT))


def test_an_evaluation_takes_fewer_rows_and_training_is_as_it_was(tiny_config: Callable[..., RunConfig]) -> None:
    told = []
    whole, config = (tiny_config(**NO_DROPOUT, run_name=name) for name in ("whole", "small"))
    train(whole)
    console = Listener()
    console.told = told
    with pytest.MonkeyPatch.context() as patch:
        sizes = fail_evaluations_above(patch, rows=2)
        train(config, Stages(console=console))  # type: ignore[arg-type]
    assert sizes[:3] == [8, 4, 2] and set(sizes[3:]) == {2}
    assert [text for text in told if "Memory ran out" in text] == [
        "Memory ran out in an evaluation. From here on it takes 2 rows at a time."
    ]
    assert losses(config) == losses(whole)


def test_an_evaluation_that_cannot_be_is_told(tiny_config: Callable[..., RunConfig]) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match="evaluation must fit into memory"):
        patch.setattr(evaluator, "evaluate_domains", fail)
        train(tiny_config(**NO_DROPOUT))
