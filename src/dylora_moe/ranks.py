"""Processes that train one model together: which of them this one is, and what they tell each other.

Alone, as nearly always, each function gives back what it was given.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from dylora_moe.errors import DyLoraError, OnlyHere, OtherFailed, RunError

T = TypeVar("T")

# A process that ends is noticed at once; a first process that writes or generates for long is waited for.
_PATIENCE = timedelta(days=1)
# Those that end by an error of all come to the same place within a step.
_MEETING_PATIENCE = timedelta(minutes=1)
# What gloo and NCCL call a process that is gone; their errors are of no kind of their own.
_BROKEN = ("Connection", "gloo", "NCCL")
_talk: Any = None  # a group of its own, on the CPU: what is told there waits for no GPU
_meeting: Any = None  # another one, in which nobody is waited for long
_told: BaseException | None = None  # what this process failed by while the others waited: they are ending by now


def reaches_all(error: BaseException) -> bool:
    """Whether all processes end by this, a signal or an error of the run, at one place: they can still act together.

    Where others do not ask within a minute, they do not.
    """
    if isinstance(error, OtherFailed | OnlyHere) or error is _told:
        return False
    if isinstance(error, Exception) and not isinstance(error, RunError):
        return False
    try:
        dist.barrier(_meeting)
    except RuntimeError:
        return False
    return True


@contextmanager
def explained() -> Iterator[None]:
    """Inside the block, what a broken connection raises says what it means.

    Raises:
        OtherFailed: Another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if count() == 1 or isinstance(error, DyLoraError) or not any(word in text for word in _BROKEN):
            raise
        raise OtherFailed(
            "Another process of this run ended, so that this one cannot go on. Unless it was killed, it says why. The "
            "same command goes on from the newest checkpoint."
        ) from error


def join() -> None:
    """Meet the processes that torchrun or `accelerate launch` started with this one, once; alone, do nothing.

    Raises:
        RunError: They cannot meet, or are more than there are GPUs for.
    """
    global _talk, _meeting
    if _talk is not None or int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available() and here > torch.cuda.device_count():
        raise RunError(
            f"each process must have a GPU of its own, and there are {here} processes and {torch.cuda.device_count()} "
            "GPUs on this machine. Start fewer."
        )
    try:
        # transformers' Trainer meets them in the same way, and then finds the group that is there.
        PartialState(cpu=not torch.cuda.is_available())
    except (RuntimeError, ValueError) as error:
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise RunError(
            f"the processes of this run must meet at {place}, and this one cannot: {error}. Start them by --nproc, "
            "torchrun or accelerate launch, and see that the port is free and nothing between them is closed."
        ) from error
    _talk = dist.new_group(backend="gloo", timeout=_PATIENCE)
    _meeting = dist.new_group(backend="gloo", timeout=_MEETING_PATIENCE)


def count() -> int:
    """How many there are."""
    if _talk is None:
        return 1
    return dist.get_world_size()


def rank() -> int:
    """The number of this one, from 0."""
    if _talk is None:
        return 0
    return dist.get_rank()


def is_first() -> bool:
    """True for the one that writes and talks."""
    return rank() == 0


def on_this_machine() -> int:
    """How many of them share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if count() > 1 else 1


def total(tensor: Tensor) -> Tensor:
    """The sum over all, each giving a tensor of one shape."""
    if count() == 1:
        return tensor
    summed = tensor.clone()
    dist.all_reduce(summed, group=_talk if tensor.device.type == "cpu" else None)
    return summed


def most(number: int) -> int:
    """The largest that any of them gives."""
    if count() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_talk)
    return int(largest)


def of_each(tensor: Tensor) -> list[Tensor]:
    """What each of them gives, in their order; tensors of one shape, on the CPU."""
    if count() == 1:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(count())]
    dist.all_gather(found, tensor.contiguous(), group=_talk)
    return found


def of_first(tensor: Tensor) -> Tensor:
    """What the first of them gives, in place of what this one gave; tensors of one shape, on the CPU."""
    if count() > 1:
        dist.broadcast(tensor, src=0, group=_talk)
    return tensor


def to_first(tensor: Tensor) -> list[Tensor]:
    """What each of them gives, in their order, for the first one; the others get nothing. As `of_each` takes it."""
    if count() == 1:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(count())] if is_first() else None
    dist.gather(tensor.contiguous(), found, group=_talk)
    return found or []


def gather(value: Any) -> list[Any]:
    """What each of them gives, in their order, as JSON has it."""
    if count() == 1:
        return [value]
    content = json.dumps(value).encode()
    padded = torch.zeros(most(len(content)), dtype=torch.uint8)
    padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    sizes = of_each(torch.tensor(len(content)))
    return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(of_each(padded), sizes, strict=True)]


def agree(value: T) -> T:
    """What the first of them gives, as JSON has it."""
    return gather(value if is_first() else None)[0]


def by_first(act: Callable[[], T]) -> T:
    """Let the first one act while the others wait; all get what it gives, as JSON has it.

    Raises:
        OtherFailed: It failed, for the others; for itself, what it failed by.
    """
    global _told
    if count() == 1:
        return act()
    value = None
    if is_first():
        try:
            value = act()
        except BaseException as error:
            _told = error
            gather({"error": str(error) if isinstance(error, DyLoraError) else repr(error)})
            raise
    told = gather({"value": value})[0]
    if "error" in told:
        raise OtherFailed(f"The first process of this run failed: {told['error']}")
    return told["value"]


def in_turn(act: Callable[[], T]) -> T:
    """Let the first one act, then each of the others for itself: what it made is there by then.

    Raises:
        OtherFailed: The first one failed.
    """
    made: list[T] = []
    by_first(lambda: made.append(act()))
    return made[0] if made else act()


def share_random() -> None:
    """Let all draw the random numbers of torch from where the first one does."""
    if count() == 1:
        return
    torch.set_rng_state(of_each(torch.get_rng_state())[0])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(of_each(torch.cuda.get_rng_state())[0])
