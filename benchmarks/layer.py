"""What one adapted Linear costs by each execution, forward and backward, against one stock PEFT LoRA layer.

Run `python benchmarks/layer.py --help`. On a CPU seconds are those of one thread's CPU time, on a GPU those between
CUDA events. Exit code 2 means that the self-check failed and the figures are void.
"""

import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, get_args

import click
import torch
from _layers import Bench, Layer, operations
from _measure import environment, finish, interleave, ratios, saved_bytes, spread
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dylora_moe.tuner import kernels
from dylora_moe.tuner.config import Execution, Granularity

_ROOT = Path(__file__).resolve().parents[1]

_GRADIENT_BAR = 1e-5  # in float32; a GPU takes bfloat16 here, whose products have three digits

SHAPES = {
    "smollm2-up": (576, 1536),
    "smollm2-down": (1536, 576),
    "gemma-up": (640, 2048),
    "llama-1b-o": (2048, 2048),
    "llama-1b-up": (2048, 8192),
}
"""(features in, features out) of Linears in SmolLM2-135M, Gemma-3-270M and Llama-3.2-1B."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run was asked to do."""

    shapes: tuple[str, ...]
    batches: tuple[tuple[int, int], ...]
    """Rows, and tokens of each."""
    experts: tuple[int, ...]
    ranks: tuple[int, ...]
    top_k: tuple[int, ...]
    warmups: int
    repeats: int
    device: str
    quick: bool
    seed: int


def measure(shape: str, rank: int, batch: tuple[int, int], settings: Settings, progress: Progress) -> dict[str, Any]:
    """Time all layers of one shape, rank and batch against each other."""
    rows, tokens = batch
    inputs, outputs = SHAPES[shape]
    bench = Bench(
        inputs,
        outputs,
        rows=rows,
        tokens=tokens,
        rank=rank,
        seed=settings.seed,
        device=settings.device,
    )
    layers = list(_layers(bench, settings))
    total = len(layers) * (settings.warmups + settings.repeats)
    task = progress.add_task(f"{shape}, {rows} x {tokens} tokens, r={rank}", total=total)
    interleave(
        [layer.timed for layer in layers],
        warmups=settings.warmups,
        repeats=settings.repeats,
        progress=lambda: progress.advance(task),
    )
    references = [layer.timed.totals for layer in layers if layer.execution == "peft"]
    records = [_record(layer, references) | {"gradient_off": bench.gradient_off(layer)} for layer in layers]
    first, again = (record["ratio"]["paired"] for record in records if record["execution"] == "peft")
    return {
        "shape": shape,
        "features": [inputs, outputs],
        "rank": rank,
        "rows": rows,
        "tokens": tokens,
        "layers": records,
        "again": again / first,
        "valid": None if settings.quick else is_sound(again / first),
    }


def _layers(bench: Bench, settings: Settings) -> Iterator[Layer]:
    yield bench.lora("PEFT LoRA")
    by_token: list[Execution] = ["bottleneck", "grouped"]
    if _has_triton(bench):
        by_token.append("triton")
    executions: dict[Granularity, list[Execution]] = {"token": by_token, "sequence": [*by_token, "rowwise"]}
    for experts in settings.experts:
        if experts == 1:
            yield bench.alone()
            continue
        for granularity in get_args(Granularity):
            for top_k in settings.top_k:
                yield from bench.routed(experts, top_k, granularity, executions[granularity])
    yield bench.lora("PEFT LoRA, again")


def _has_triton(bench: Bench) -> bool:
    return kernels.takes_triton(torch.empty(1, dtype=bench.dtype, device=bench.device), bench.rank)


def _record(layer: Layer, references: list[list[float]]) -> dict[str, Any]:
    totals, (forward,) = layer.timed.totals, layer.timed.forwards
    operations_asked, launches = operations(forward)
    layer.timed.optimizer.zero_grad(set_to_none=True)
    saved = saved_bytes(forward, not_counted=layer.living(), side=list)
    layer.timed.optimizer.zero_grad(set_to_none=True)
    return {
        "name": layer.name,
        "execution": layer.execution,
        "granularity": layer.granularity,
        "experts": layer.experts,
        "top_k": layer.top_k,
        "is_auto": layer.is_auto,
        "seconds": totals,
        "median_s": median(totals),
        "spread": spread(totals),
        "forward_s": median(seconds[0] for seconds in layer.timed.seconds),
        "backward_s": median(seconds[1] for seconds in layer.timed.seconds),
        "ratio": ratios(totals, references),
        "operations": operations_asked,
        "triton_launches": launches,
        "saved_bytes": saved,
    }


def is_sound(again: float) -> bool:
    """Whether a second layer of the same LoRA took the time of the first, as in benchmarks/step.py."""
    return 0.93 <= again <= 1.07


def contests(result: dict[str, Any]) -> list[dict[str, Any]]:
    """For each decision: its executions' ratios to PEFT, the fastest, and what `auto` takes."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in result["layers"]:
        if record["granularity"] is None:
            continue
        key = (record["granularity"], record["top_k"], record["experts"])
        contest = found.setdefault(key, {"ratios": {}, "auto": None})
        contest["ratios"][record["execution"]] = record["ratio"]["paired"]
        if record["is_auto"]:
            contest["auto"] = record["execution"]
    names = ("granularity", "top_k", "experts")
    return [
        dict(zip(names, key, strict=True)) | contest | {"fastest": min(contest["ratios"], key=contest["ratios"].get)}
        for key, contest in sorted(found.items(), key=lambda item: (item[0][0], item[0][1], item[0][2]))
    ]


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table of one shape, rank and batch."""
    inputs, outputs = result["features"]
    batch = f"{result['rows']} rows of {result['tokens']} tokens"
    title = f"{result['shape']}: {inputs} -> {outputs}, {batch}, r={result['rank']}"
    table = Table(title=title)
    times = ("median ms", "forward", "backward", "spread", "ratio")
    for column in ("", *times, "operations", "launches", "saved KiB", "off"):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for record in result["layers"]:
        table.add_row(
            record["name"] + (" (auto)" if record["is_auto"] else ""),
            *(f"{record[key] * 1000:.2f}" for key in ("median_s", "forward_s", "backward_s")),
            f"{record['spread']:.0%}",
            f"{record['ratio']['paired']:.3f}",
            str(record["operations"]),
            str(record["triton_launches"] or ""),
            f"{record['saved_bytes'] / 2**10:.0f}",
            "" if record["gradient_off"] is None else f"{record['gradient_off']:.0e}",
        )
    console.print(table)
    for contest in result["contests"]:
        figures = ", ".join(f"{name} {ratio:.2f}" for name, ratio in contest["ratios"].items())
        head = f"{contest['granularity']}, top {contest['top_k']}, N={contest['experts']}"
        console.print(f"{head}: {figures}; fastest {contest['fastest']}, auto takes {contest['auto']}")
    word = {True: "PASS", False: "FAIL", None: "not judged"}[result["valid"]]
    console.print(f"{word} check: a second layer of the same LoRA / the first: {result['again']:.3f} (0.93 to 1.07)")


def _numbers(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        found = tuple(sorted({int(part) for part in value.split(",")}))
    except ValueError as error:
        raise click.BadParameter(f"must be whole numbers between commas, got {value!r}.") from error
    if found[0] < 1:
        raise click.BadParameter(f"must be at least 1, got {value!r}.")
    return found


def _batches(context: click.Context, option: click.Parameter, value: str) -> tuple[tuple[int, int], ...]:
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part) for part in value.split(",")]
    if not all(found):
        raise click.BadParameter(f"must be rows by tokens between commas, as 8x128,2x512, got {value!r}.")
    return tuple((int(each[1]), int(each[2])) for each in found if each)


def _names(context: click.Context, option: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(value.split(","))
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise click.BadParameter(f"must be of {', '.join(SHAPES)}, got {', '.join(unknown)}.")
    return names


def _hardware(device: str) -> dict[str, Any]:
    """What `environment` leaves out: the GPU, and the Triton in use."""
    if torch.device(device).type != "cuda":
        return {"device": "cpu", "machine": platform.machine()}
    import triton

    found = torch.cuda.get_device_properties(device)
    return {
        "device": found.name,
        "capability": [found.major, found.minor],
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


@click.command()
@click.option("--shapes", default="smollm2-up,gemma-up,llama-1b-o", callback=_names, help=f"Of {', '.join(SHAPES)}.")
@click.option("--batches", default="8x128", show_default=True, callback=_batches, help="Rows by tokens of each.")
@click.option("--experts", default="1,2,4,8,16,32,64", show_default=True, callback=_numbers, help="Values of N.")
@click.option("--ranks", default="8,16,64", show_default=True, callback=_numbers)
@click.option("--top_k", default="1,2", show_default=True, callback=_numbers, help="Experts a token.")
@click.option("--warmups", default=1, show_default=True, type=click.IntRange(1), help="Untimed rounds.")
@click.option("--repeats", default=7, show_default=True, type=click.IntRange(1), help="Timed rounds.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--quick", is_flag=True, help="Only see that it runs: few, tiny steps, nothing is judged.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures to this JSON file.")
def main(out: Path | None, **options: Any) -> None:
    """Measure one adapted Linear, forward and backward, by each execution."""
    torch.set_num_threads(1)
    if options["quick"]:
        options |= {"shapes": ("smollm2-up",), "batches": ((4, 16),), "experts": (1, 2, 4), "ranks": (8,), "repeats": 1}
    settings = Settings(**options)
    if any(1 < experts < max(settings.top_k) for experts in settings.experts):
        raise click.BadParameter(f"top_k must be at most every N above 1, got {max(settings.top_k)}.")
    console = Console(width=None if sys.stdout.isatty() else 160)
    report: dict[str, Any] = {
        "benchmark": "layer",
        "environment": environment(_ROOT) | _hardware(settings.device),
        "settings": asdict(settings),
        "results": [],
    }
    with Progress(console=console, transient=True) as progress:
        for shape in settings.shapes:
            for rank, batch in product(settings.ranks, settings.batches):
                result = measure(shape, rank, batch, settings, progress)
                result["contests"] = contests(result)
                show(result, console)
                report["results"].append(result)
    off = [each["gradient_off"] or 0.0 for result in report["results"] for each in result["layers"]]
    most = max(off, default=0.0)
    name = "gradients off the reference"
    report["bars"] = [{"name": name, "limit": _GRADIENT_BAR, "value": most, "passed": most <= _GRADIENT_BAR}]
    console.print(f"{'PASS' if most <= _GRADIENT_BAR else 'FAIL'} {name}: {most:.1e} (<= {_GRADIENT_BAR})")
    finish(report, [result["valid"] for result in report["results"] if result["valid"] is not None], out, console)


if __name__ == "__main__":
    main()
