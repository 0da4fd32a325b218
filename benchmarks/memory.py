"""The most memory that training holds, beside one stock PEFT LoRA: each contender in a process of its own.

The peak counts from the end of the first step, when the optimizer has its moments, and leaves out what the interpreter
and its libraries hold before a model is made. More experts have more weights, gradients and moments, 16 bytes a
parameter in float32; these are taken off before the ratio, since every way to train so many experts has them. Run with
--help for the settings.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import click
import torch
from _contenders import SHAPES, Contender, Workshop
from _measure import environment
from _memory import GIVING_BACK, forget_peak, peak
from rich.console import Console
from rich.table import Table

from dylora_moe.tuner.config import Granularity

_ROOT = Path(__file__).resolve().parents[1]
_BAR = 1.05
_BYTES = 16  # of a trained parameter: itself, its gradient, and two moments, in float32
_ROW_TOKENS = 128
LORA = "PEFT LoRA"


def contenders(counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """What is measured, one LoRA first."""
    found: list[dict[str, Any]] = [{"name": LORA}]
    for experts in counts:
        for granularity in get_args(Granularity) if experts > 1 else ("sequence",):
            for top_k in (1, 2) if experts > 1 else (1,):
                name = f"N={experts}, {granularity}, k={top_k}" if experts > 1 else "N=1"
                found.append({"name": name, "experts": experts, "granularity": granularity, "top_k": top_k})
    return found


def measure(shape: str, tokens: int, contender: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps in this process."""
    at_start = forget_peak()
    rows = max(tokens // _ROW_TOKENS, 1)
    workshop = Workshop(shape, rows=rows, tokens=tokens // rows, seed=0)
    made: Contender
    if contender["name"] == LORA:
        made = workshop.lora()
    else:
        made = workshop.ours(**{key: contender[key] for key in ("experts", "granularity", "top_k")})
    before = 0
    for number in range(3):
        made.timed.step()
        if number == 0:
            before = forget_peak()
    return {
        "peak_bytes": peak() - at_start,
        "between_steps": before - at_start,
        "at_start": at_start,
        "trained": made.trainable,
    }


def in_a_process_of_its_own(shape: str, tokens: int, contender: dict[str, Any]) -> dict[str, Any]:
    job = json.dumps({"shape": shape, "tokens": tokens, "contender": contender})
    command = [sys.executable, __file__, "--job", job]
    quiet = os.environ | GIVING_BACK | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=quiet, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{contender['name']}: {done.stderr[-2000:]}")
    return contender | json.loads(done.stdout.splitlines()[-1])


def compare(records: list[dict[str, Any]]) -> None:
    """Add to each record what more experts must hold, and its ratio to one LoRA without that."""
    one = records[0]
    for record in records:
        record["more_bytes"] = (record["trained"] - one["trained"]) * _BYTES
        record["ratio"] = (record["peak_bytes"] - record["more_bytes"]) / one["peak_bytes"]


@click.command(context_settings={"show_default": True})
@click.option("--shape", default="tiny", type=click.Choice(list(SHAPES)))
@click.option("--tokens", default=1024, type=click.IntRange(1), help=f"Of a step, in rows of {_ROW_TOKENS}.")
@click.option("--experts", default="1,8,32,64", help="Values of N.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures to this JSON file.")
@click.option("--job", "one", hidden=True, help="Run this, as JSON, in this process.")
def main(shape: str, tokens: int, experts: str, out: Path | None, one: str | None) -> None:
    """Measure peaks of training."""
    torch.set_num_threads(1)
    if one is not None:
        print(json.dumps(measure(**json.loads(one))))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    counts = tuple(int(part) for part in experts.split(","))
    records = [in_a_process_of_its_own(shape, tokens, contender) for contender in contenders(counts)]
    compare(records)
    table = Table("", "peak MB", "more experts' own MB", "of one LoRA, without these")
    for record in records:
        sizes = (f"{record[name] / 1e6:.0f}" for name in ("peak_bytes", "more_bytes"))
        table.add_row(record["name"], *sizes, f"{record['ratio']:.3f}")
    console.print(table)
    most = max(record["ratio"] for record in records)
    name = "peak memory without more experts' weights, gradients and moments / one LoRA"
    bars = [{"name": name, "limit": _BAR, "value": most, "passed": most <= _BAR}]
    console.print(f"{'PASS' if bars[0]['passed'] else 'FAIL'} {name}: {most:.3f} (<= {_BAR})")
    if out is not None:
        report = {"benchmark": "memory", "environment": environment(_ROOT), "shape": shape, "tokens": tokens}
        out.write_text(json.dumps(report | {"contenders": records, "bars": bars}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
