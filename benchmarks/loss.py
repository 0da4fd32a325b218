"""The loss of a large vocabulary: ours without the logits, beside full logits and PyTorch's own loss in chunks.

Timed is the loss and the gradient of the hidden states under a frozen head, by CPU time of one thread, interleaved;
on a GPU by its own clock. Peaks are the most that a process of its own holds above what it held before, with memory
given back as soon as it is freed. Run with --help for the settings.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.nn.functional as F
from _measure import environment, now
from _memory import GIVING_BACK, forget_peak, peak
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dylora_moe.tuner.head import Head

_ROOT = Path(__file__).resolve().parents[1]
FULL, CHUNKED, OURS = "full logits", "PyTorch, in chunks", "ours"
TIME_BAR, PEAK_BAR = 1.1, 0.15

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def full(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As models compute it: logits of every position, those without a label too."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`linear_cross_entropy`, with its own choice of chunks."""
    rows, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.linear_cross_entropy(rows, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As the trainer computes it."""
    return Head(weight=weight).nll(hidden, labels).mean()


LOSSES: dict[str, Loss] = {FULL: full, CHUNKED: chunked, OURS: ours}


class Case:
    """One size: hidden states, a head, and labels of the last share of each row."""

    def __init__(self, *, tokens: int, features: int, vocabulary: int, labelled: float, device: str, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(2, tokens // 2, features, generator=draw).to(device)
        self.weight = (torch.randn(vocabulary, features, generator=draw) * 0.05).to(device)
        labels = torch.randint(0, vocabulary, (2, tokens // 2), generator=draw)
        labels[:, : round((1 - labelled) * (tokens // 2))] = -100
        self.labels = labels.to(device)

    def run(self, name: str) -> tuple[float, Tensor, Tensor]:
        """Seconds, loss, and gradient."""
        hidden = self.hidden.clone().requires_grad_()
        start = now(self.hidden.device)
        loss = LOSSES[name](hidden, self.weight, self.labels)
        loss.backward()
        seconds = now(self.hidden.device) - start
        assert hidden.grad is not None
        return seconds, loss.detach(), hidden.grad


def peak_of(case: Case, name: str) -> int:
    """Most bytes above those held before; on a CPU in a process that does nothing else."""
    before = forget_peak()
    case.run(name)
    return peak() - before


def measure(sizes: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Times and differences of all three at one size."""
    case = Case(**sizes)
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    found: dict[str, Tensor] = {}
    for number in range(repeats + 1):
        for name in LOSSES:
            took, loss, grad = case.run(name)
            if number:
                seconds[name].append(took)
            else:
                found[name] = torch.cat([loss[None], grad.flatten()])
    return {
        name: {
            "seconds": took,
            "ratio": median(mine / theirs for mine, theirs in zip(took, seconds[FULL], strict=True)),
            "loss_off": float((found[name][0] - found[FULL][0]).abs()),
            "gradient_off": float((found[name][1:] - found[FULL][1:]).abs().max() / found[FULL][1:].abs().max()),
        }
        for name, took in seconds.items()
    }


def peak_in_a_process(sizes: dict[str, Any], name: str) -> int:
    command = [sys.executable, __file__, "--peak", json.dumps(sizes | {"name": name})]
    environment = os.environ | GIVING_BACK | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


@click.command(context_settings={"show_default": True})
@click.option("--vocabulary", default=262_144, type=click.IntRange(2), help="As Gemma's.")
@click.option("--features", default=640, type=click.IntRange(1), help="As Gemma-3-270M's.")
@click.option("--tokens", default=1_024, type=click.IntRange(4), help="Of a batch of two rows.")
@click.option("--repeats", default=5, type=click.IntRange(1))
@click.option("--seed", default=0)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures to this JSON file.")
@click.option("--peak", "one", hidden=True, help="Run this, as JSON, in this process.")
def main(out: Path | None, one: str | None, repeats: int, **sizes: Any) -> None:
    """Measure time and memory of the loss with all positions labelled, and with half of them."""
    torch.set_num_threads(1)
    if one is not None:
        wanted = json.loads(one)
        name = wanted.pop("name")
        print(peak_of(Case(**wanted), name))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    records = []
    table = Table("labelled", "", "median s", "of full", "peak MiB", "of full", "loss off", "gradient off")
    for labelled in (1.0, 0.5):
        mine = sizes | {"labelled": labelled, "device": device}
        figures = measure(mine, repeats)
        for name, each in figures.items():
            each["peak_bytes"] = peak_in_a_process(mine, name)
            each["peak_ratio"] = each["peak_bytes"] / figures[FULL]["peak_bytes"]
            table.add_row(
                f"{labelled:.0%}",
                name,
                f"{median(each['seconds']):.2f}",
                f"{each['ratio']:.3f}",
                f"{each['peak_bytes'] / 2**20:.0f}",
                f"{each['peak_ratio']:.3f}",
                f"{each['loss_off']:.1e}",
                f"{each['gradient_off']:.1e}",
            )
        records.append({"labelled": labelled, "losses": figures})
    console.print(table)
    all_labelled = records[0]["losses"][OURS]
    bars = [
        {"name": f"{what} of ours / full logits", "limit": limit, "value": value, "passed": value <= limit}
        for what, limit, value in (
            ("time", TIME_BAR, all_labelled["ratio"]),
            ("extra peak", PEAK_BAR, all_labelled["peak_ratio"]),
        )
    ]
    for bar in bars:
        console.print(f"{'PASS' if bar['passed'] else 'FAIL'} {bar['name']}: {bar['value']:.3f} (<= {bar['limit']})")
    if out is not None:
        settings = sizes | {"repeats": repeats, "device": device}
        report = {"benchmark": "loss", "environment": environment(_ROOT), "settings": settings}
        out.write_text(json.dumps(report | {"cases": records, "bars": bars}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
