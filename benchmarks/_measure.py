"""Measuring training steps: interleaved CPU time, bytes saved for backward, a line through the times, the machine."""

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[], Tensor]


@dataclass(slots=True, kw_only=True)
class Timed:
    """Something to time: its forward passes (most have one), whose losses are summed, and its optimizer."""

    forwards: Sequence[Forward]
    optimizer: torch.optim.Optimizer
    max_repeats: int | None = None
    """Timed in this many rounds only, for what is slow and whose ratio is known roughly anyway."""
    seconds: list[tuple[float, float, float]] = field(default_factory=list)
    """CPU time of forward, backward, and optimizer step with zero_grad, for each repeat."""

    def step(self) -> tuple[float, float, float]:
        """One whole training step; returns CPU seconds of its three phases."""
        forward = backward = 0.0
        for run in self.forwards:
            start = time.process_time()
            loss = run()
            between = time.process_time()
            loss.backward()
            backward += time.process_time() - between
            forward += between - start
        start = time.process_time()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return forward, backward, time.process_time() - start

    @property
    def totals(self) -> list[float]:
        """CPU seconds of each timed step."""
        return [sum(phases) for phases in self.seconds]


def interleave(
    contenders: Sequence[Timed], *, warmups: int, repeats: int, progress: Callable[[], None] = lambda: None
) -> None:
    """Time all contenders in turn, round by round; each round begins with another one, so that none has a fixed place.

    Args:
        contenders: what to time; the results are appended to their `seconds`.
        warmups: untimed rounds; those with `max_repeats` take part in none but the last.
        repeats: timed rounds.
        progress: called after every step.
    """
    for warmup in range(warmups):
        for contender in contenders:
            if contender.max_repeats is None or warmup == warmups - 1:
                contender.step()
            progress()
    gc.collect()
    gc.freeze()  # else every collection walks all models, at the cost of whoever runs at that moment
    for repeat in range(repeats):
        shift = repeat * len(contenders) // repeats
        for contender in [*contenders[shift:], *contenders[:shift]]:
            if contender.max_repeats is None or len(contender.seconds) < contender.max_repeats:
                gc.collect()
                contender.seconds.append(contender.step())
            progress()
    gc.unfreeze()


def ratios(seconds: Sequence[float], references: Sequence[Sequence[float]]) -> dict[str, float]:
    """Three ratios to the reference: of medians, of minima, and the median of the ratios within each round.

    Args:
        seconds: steps of the contender, by round.
        references: steps of models that are the reference, by round; two of them halve its noise.
    """
    pooled = [step for reference in references for step in reference]
    rounds = [statistics.mean(steps) for steps in zip(*references, strict=True)]
    # Those that take part in the first rounds only are compared with these alone.
    paired = [mine / theirs for mine, theirs in zip(seconds, rounds, strict=False)]
    return {
        "median": statistics.median(seconds) / statistics.median(pooled),
        "min": min(seconds) / min(pooled),
        "paired": statistics.median(paired),
    }


def spread(seconds: Sequence[float]) -> float:
    """(slowest - fastest) / median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the least-squares line through the points."""
    return statistics.linear_regression(x, y).slope


def saved_bytes(forward: Forward, *, not_counted: Iterable[Tensor], side: Callable[[], Iterable[Tensor]]) -> int:
    """Bytes that one forward pass keeps for backward, each storage once; the graph is freed by a backward pass.

    Args:
        forward: makes the loss.
        not_counted: parameters and buffers, which live anyway.
        side: tensors that are kept past the hooks of autograd, asked for after the forward pass.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in not_counted}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    for tensor in side():
        note(tensor)
    loss.backward()
    return sum(storages.values())


def environment(root: Path) -> dict[str, Any]:
    """Versions, revision, processor, load: what a reader needs to judge a figure."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
        "dylora_moe_revision": _git(root, "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git(root, "status", "--porcelain", "--", "src", "benchmarks")),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
