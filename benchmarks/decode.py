"""What a token costs when a mixture writes: beside the base, and beside one stock PEFT LoRA that is not merged.

Each contender reads a prompt and writes tokens one by one with a cache, always the likeliest. Timed is the writing, by
CPU time of one thread (on a GPU by its own clock), contenders in turn, and the ratio of a round counts. The bases have
random weights of true shapes, which cost what trained ones do. Run with --help for the settings.
"""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, get_args

import click
import torch
from _contenders import SHAPES, Workshop
from _measure import environment, now
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from dylora_moe.tuner.config import Granularity

_ROOT = Path(__file__).resolve().parents[1]
BASE, LORA = "base", "PEFT LoRA, not merged"


@dataclass(slots=True, kw_only=True)
class Writer:
    """Something that writes, and how long each of its rounds took."""

    name: str
    model: nn.Module
    merged: str | None = None
    """Expert whose products are in the base's weights meanwhile."""
    seconds: list[float] = field(default_factory=list)

    @torch.no_grad()
    def write(self, prompts: Tensor, tokens: int) -> tuple[float, Tensor]:
        """Seconds of all tokens but the first, which the prompt's pass gives; and what was written."""
        with self.model.merged(self.merged) if self.merged else nullcontext():  # pyright: ignore
            return self._write(prompts, tokens)

    def _write(self, prompts: Tensor, tokens: int) -> tuple[float, Tensor]:
        model: Callable[..., Any] = self.model
        out = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        written = [out.logits[:, -1].argmax(-1, keepdim=True)]
        start = now(prompts.device)
        for _ in range(tokens - 1):
            out = model(input_ids=written[-1], past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            written.append(out.logits[:, -1].argmax(-1, keepdim=True))
        return now(prompts.device) - start, torch.cat(written, 1)


def writers(workshop: Workshop, counts: tuple[int, ...], rows: int) -> list[Writer]:
    """The base, one LoRA, and mixtures; under token granularity where every row would have the same expert else."""
    found = [Writer(name=BASE, model=workshop.base), Writer(name=LORA, model=workshop.lora().model)]
    for experts in counts:
        for granularity in get_args(Granularity) if experts > 1 else ("sequence",):
            ours = workshop.ours(experts, granularity=granularity)
            found.append(Writer(name=_name(experts, granularity), model=ours.model))
    merged = f"{found[-1].name}, one expert merged"
    found.append(Writer(name=merged, model=found[-1].model, merged="expert_0"))
    for writer in found:
        writer.model.eval()
    return found


def _name(experts: int, granularity: Granularity) -> str:
    return "ours, N=1" if experts == 1 else f"ours, N={experts}, {granularity}"


def measure(shape: str, rows: int, settings: dict[str, Any], tick: Callable[[], None]) -> dict[str, Any]:
    """Times of all writers with so many rows."""
    workshop = Workshop(
        shape, rows=rows, tokens=settings["prompt"], seed=settings["seed"], layers=1 if settings["quick"] else None
    )
    all_writers = writers(workshop, settings["experts"], rows)
    prompts = workshop.batch.input_ids
    for number in range(settings["repeats"] + 1):
        shift = number % len(all_writers)
        for writer in [*all_writers[shift:], *all_writers[:shift]]:
            seconds, _ = writer.write(prompts, settings["tokens"])
            if number:
                writer.seconds.append(seconds)
            tick()
    by_name = {writer.name: writer.seconds for writer in all_writers}
    return {
        "shape": shape,
        "rows": rows,
        "writers": {
            name: {
                "seconds": seconds,
                "ms_per_token": 1000 * median(seconds) / (settings["tokens"] - 1),
                "of": {
                    other: median(mine / theirs for mine, theirs in zip(seconds, by_name[other], strict=True))
                    for other in by_name
                    if other in (BASE, LORA, _name(1, "sequence"))
                },
            }
            for name, seconds in by_name.items()
        },
    }


def judge(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row: at most 1.15 of the base and 1.00 of a LoRA at 32 experts; eight: at most 25 % more than with one."""
    bars = []
    for result in results:
        for granularity in get_args(Granularity):
            name = _name(32, granularity)
            if name not in result["writers"]:
                continue
            ratios = result["writers"][name]["of"]
            limits = {BASE: 1.15, LORA: 1.00} if result["rows"] == 1 else {_name(1, "sequence"): 1.25}
            bars += [
                {
                    "name": f"{result['shape']}, {result['rows']} rows: {name} / {other}",
                    "limit": limit,
                    "value": ratios[other],
                    "passed": ratios[other] <= limit,
                }
                for other, limit in limits.items()
            ]
    return bars


def show(result: dict[str, Any], console: Console) -> None:
    table = Table("", "ms a token", *(f"of {other}" for other in (BASE, LORA, _name(1, "sequence"))))
    table.title = f"{result['shape']}, {result['rows']} rows"
    for name, each in result["writers"].items():
        table.add_row(name, f"{each['ms_per_token']:.1f}", *(f"{ratio:.3f}" for ratio in each["of"].values()))
    console.print(table)


def _numbers(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    return tuple(sorted({1, *(int(part) for part in value.split(","))}))


@click.command(context_settings={"show_default": True})
@click.option("--shapes", default="smollm2", help=f"Of {', '.join(SHAPES)}, separated by commas.")
@click.option("--experts", default="8,32", callback=_numbers, help="Values of N, beside one.")
@click.option("--rows", "row_counts", default="1,8", callback=_numbers, help="Rows at a time.")
@click.option("--prompt", default=32, type=click.IntRange(2), help="Tokens of the prompt.")
@click.option("--tokens", default=24, type=click.IntRange(2), help="Written in a round.")
@click.option("--repeats", default=7, type=click.IntRange(1))
@click.option("--quick", is_flag=True, help="Only see that it runs: one layer, nothing is judged.")
@click.option("--seed", default=0)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures to this JSON file.")
def main(out: Path | None, shapes: str, row_counts: tuple[int, ...], **settings: Any) -> None:
    """Measure the time of a written token."""
    torch.set_num_threads(1)
    if settings["quick"]:
        settings |= {"repeats": 1, "tokens": 3, "prompt": 4}
    console = Console(width=None if sys.stdout.isatty() else 120)
    results = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("writing", total=None)
        for shape in shapes.split(","):
            for rows in row_counts:
                results.append(measure(shape, rows, settings, lambda: progress.advance(task)))
                show(results[-1], console)
    bars = [] if settings["quick"] else judge(results)
    for bar in bars:
        console.print(f"{'PASS' if bar['passed'] else 'FAIL'} {bar['name']}: {bar['value']:.3f} (<= {bar['limit']})")
    if out is not None:
        report = {"benchmark": "decode", "environment": environment(_ROOT), "settings": settings}
        out.write_text(json.dumps(report | {"results": results, "bars": bars}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
