"""Measuring training steps: interleaved CPU time, bytes saved for backward, a line through the times, the machine."""

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

Forward = Callable[[], Tensor]
CPU = torch.device("cpu")


@dataclass(slots=True, kw_only=True)
class Timed:
    """Something to time: its forward passes (most have one), whose losses are summed, and its optimizer."""

    forwards: Sequence[Forward]
    optimizer: torch.optim.Optimizer
    max_repeats: int | None = None
    """Timed in this many rounds only, for what is slow and whose ratio is known roughly anyway."""
    device: torch.device = CPU
    seconds: list[tuple[float, float, float]] = field(default_factory=list)
    """Of forward, backward, and optimizer step with zero_grad, for each repeat, as `now` counts them."""

    def step(self) -> tuple[float, float, float]:
        """One whole training step; returns the seconds of its three phases."""
        forward = backward = 0.0
        for run in self.forwards:
            start = now(self.device)
            loss = run()
            between = now(self.device)
            loss.backward()
            backward += now(self.device) - between
            forward += between - start
        start = now(self.device)
        self._update()
        return forward, backward, now(self.device) - start

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def synchronisations(self) -> int | None:
        """How often a step makes the host wait for the GPU; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                for run in self.forwards:
                    run().backward()
                self._update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in found)

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


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of one large product of matrices, the most of five tries: the roof that training is under."""
    size = 8192 if device.type == "cuda" else 2048
    one, other = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        start = now(device)
        torch.mm(one, other)
        seconds.append(now(device) - start)
    return 2 * size**3 / min(seconds)


def now(device: torch.device) -> float:
    """Seconds: CPU time of this process, or on a GPU the time of day when all that it was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


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
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def finish(report: dict[str, Any], judged: Sequence[bool], out: Path | None, console: Console) -> None:
    """Complete a report, write it, and leave with code 2 where a self-check failed.

    Args:
        report: Has an `environment`; changed.
        judged: Whether each self-check passed; none in a quick run, which proves nothing.
        out: File to write, or None.
        console: Where to say so.
    """
    # Known only now: whoever else ran meanwhile shows here.
    report["environment"]["load_average_at_end"] = list(os.getloadavg())
    report["valid"] = all(judged) if judged else None
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if report["valid"] is False:
        console.print("VOID: a self-check failed, so these figures prove nothing. Run again on a quiet machine.")
        sys.exit(2)


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
