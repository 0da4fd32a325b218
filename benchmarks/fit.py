"""How near the estimate of `train/fit` is to the memory that training takes, and what giving memory back costs.

Each case runs in a process of its own, one after the other: it loads a base, estimates, takes a few real steps and
an evaluation at that shape, and reports the most that it held. Run with --help for the settings.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
from _measure import environment
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dylora_moe.bases import load_base
from dylora_moe.evaluate.machine import base_dtype
from dylora_moe.train.fit import Estimator, Pass, Workload, make_plan
from dylora_moe.train.memory import available_memory, peak_memory, resident_memory, return_freed_memory
from dylora_moe.tuner import DyLoraModel, ExpertConfig, LoadWindow, RoutingConfig
from dylora_moe.tuner.head import Head, read_head

_ROOT = Path(__file__).resolve().parents[1]
_BASES = ("pypi:smollm2", "pypi:gemma3-270m")
_SHAPES = ((2, 256), (8, 256), (4, 1024))
_LABELLED = 0.6
_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What one process trains."""

    name: str
    base: str
    rows: int
    tokens: int
    experts: int = 4
    rank: int = 16
    routing: dict[str, Any] = field(default_factory=lambda: {"granularity": "sequence"})
    checkpointing: bool = False
    documents: int = 1
    steps: int = 3
    gives_back: bool | None = None
    """Whether freed memory is given back; None as a run decides."""


def make_cases(bases: Sequence[str], steps: int) -> list[Case]:
    """Three shapes of every base, whose estimates are to be within 15 %; and on the smallest shape other models."""
    cases = []
    for base in bases:
        plain = [
            Case(name=f"{rows} x {tokens}", base=base, rows=rows, tokens=tokens, steps=steps)
            for rows, tokens in _SHAPES
        ]
        small = plain[0]
        sequence, token = {"granularity": "sequence"}, {"granularity": "token"}
        cases += [
            *plain,
            replace(small, name="one expert", experts=1),
            replace(plain[1], name="8 x 256, checkpointing", checkpointing=True),
            replace(small, name="tap at layer 9", routing=sequence | {"tap_layer": 9}),
            replace(small, name="router per layer", routing=token | {"router_scope": "per_layer"}),
            replace(small, name="token granularity", routing=token),
            replace(small, name="packed, 4 a row", documents=4),
        ]
    return cases


def run_case(case: Case, threads: int) -> dict[str, Any]:
    """Estimate, train, and compare; in this process, whose peak counts from its start."""
    torch.set_num_threads(threads)
    dtype = base_dtype(bf16=None, fp16=False)
    base = load_base(case.base, dtype=dtype)
    if torch.cuda.is_available():
        base.model.to("cuda")  # type: ignore[arg-type]
    model = build_model(case, base.model)
    head = read_head(model.lm)
    started = time.process_time()
    shape = Pass(rows=case.rows, tokens=case.tokens, labelled=_LABELLED, documents=case.documents)
    estimator = Estimator(model)
    work = Workload(train=shape, evaluation=shape, gradient_checkpointing=case.checkpointing)
    plan = make_plan(estimator, work, available_memory(model.device))
    estimating = time.process_time() - started
    if plan.split > 1:
        raise click.ClickException(f"{case.name} does not fit into this machine's memory in one part.")
    estimate = plan.estimate
    gives_back = plan.gives_back if case.gives_back is None else case.gives_back
    if gives_back:
        return_freed_memory()
    before = resident_memory()
    seconds = train(model, head, case)
    measured = peak_memory(model.device)
    return {
        "case": asdict(case),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(model.device),
        "estimate": estimate.parts(),
        "worst": estimate.worst,
        "gives_back": gives_back,
        "peak_estimated": estimate.peak,
        "peak_measured": measured,
        "ratio": estimate.peak / measured,
        "reserved": torch.cuda.max_memory_reserved() if model.device.type == "cuda" else None,
        "resident_before": before,
        "resident_after": resident_memory(),
        "estimating_cpu_s": estimating,
        "step_cpu_s": seconds,
    }


def build_model(case: Case, base: Any) -> DyLoraModel:
    model = DyLoraModel(
        base,
        [f"expert_{index}" for index in range(case.experts)],
        expert_config=ExpertConfig(rank=case.rank, alpha=2 * case.rank, dropout=0.05),
        routing=RoutingConfig(**case.routing),
    ).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    return model


def train(model: DyLoraModel, head: Head, case: Case) -> list[float]:
    """A few steps and an evaluation, as `train/trainer.py` does them; returns CPU seconds of each step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    seconds = []
    for step in range(case.steps):
        inputs = make_batch(model, case, seed=step)
        start = time.process_time()
        nll = head.nll(model(hidden_only=True, **inputs), inputs["labels"])
        (nll.mean() + 0.01 * model.auxiliary_losses(LoadWindow()).balance).backward()
        del nll
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - start)
    model.eval()
    with torch.no_grad():
        head.nll(model(hidden_only=True, **inputs), inputs["labels"])
    return seconds


def make_batch(model: DyLoraModel, case: Case, seed: int) -> dict[str, Tensor]:
    """Random tokens; all rows but one are full, as a batch of rows of like length is."""
    torch.manual_seed(seed)
    size = (case.rows, case.tokens)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, size, device=model.device)
    labels = ids.masked_fill(torch.arange(case.tokens, device=model.device) < case.tokens * (1 - _LABELLED), -100)
    if case.documents > 1:
        length = -(-case.tokens // case.documents)
        positions = (torch.arange(case.tokens, device=model.device) % length).expand(size)
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
    mask = torch.ones_like(ids)
    mask[0, -case.tokens // 8 :] = 0
    return {"input_ids": ids, "labels": labels.masked_fill(mask == 0, -100), "attention_mask": mask}


def in_a_process_of_its_own(case: Case, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--threads", str(threads), "--case", json.dumps(asdict(case))]
    quiet = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=quiet, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{case}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_giving_back(bases: Sequence[str], steps: int, rounds: int, threads: int, console: Console) -> list[Any]:
    """Peaks and CPU time of steps with and without giving memory back, processes in turn."""
    records = []
    for base in bases:
        for rows, tokens in _SHAPES[:2]:
            runs: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
            for _ in range(rounds):
                for gives_back, found in runs.items():
                    case = Case(name="", base=base, rows=rows, tokens=tokens, steps=steps, gives_back=gives_back)
                    found.append(in_a_process_of_its_own(case, threads))
            record: dict[str, Any] = {"base": base, "rows": rows, "tokens": tokens}
            for gives_back, found in runs.items():
                name = "given_back" if gives_back else "kept"
                record[f"{name}_peak"] = max(run["peak_measured"] for run in found)
                # The first step draws memory either way.
                record[f"{name}_step_cpu_s"] = statistics.median(s for run in found for s in run["step_cpu_s"][1:])
            console.print(record)
            records.append(record)
    return records


@click.command(context_settings={"show_default": True})
@click.option("--bases", default=",".join(_BASES), help="Bases, separated by commas.")
@click.option("--only", default="", help="Cases whose name has this in it.")
@click.option("--steps", type=click.IntRange(2), default=3, help="The optimizer has its state from the second on.")
@click.option("--threads", type=click.IntRange(1), default=1)
@click.option("--giving-back", "rounds", type=int, default=0, help="Measure that instead, in so many rounds.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the figures here, as JSON.")
@click.option("--case", "one", hidden=True, help="Run this case, as JSON, in this process.")
def main(bases: str, only: str, steps: int, threads: int, rounds: int, output: Path | None, one: str | None) -> None:
    """Compare estimated with measured peaks, each case in a fresh process."""
    if one is not None:
        print(json.dumps(run_case(Case(**json.loads(one)), threads)))
        return
    console, chosen = Console(), bases.split(",")
    if rounds:
        records = compare_giving_back(chosen, steps, rounds, threads, console)
    else:
        records = []
        for case in make_cases(chosen, steps):
            if only in case.name:
                records.append(in_a_process_of_its_own(case, threads))
                console.print(f"{case.base}, {case.name}: {records[-1]['ratio']:.3f}")
        show(records, console)
    if output is not None:
        settings = {"steps": steps, "threads": threads, "labelled": _LABELLED}
        result = {"settings": settings, "cases": records, **environment(_ROOT)}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def show(records: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table("base", "case", "estimate GB", "measured GB", "ratio", "worst moment", "activations GB")
    for record in records:
        case = record["case"]
        figures = (record["peak_estimated"], record["peak_measured"])
        cells = [f"{figure / _GB:.2f}" for figure in figures]
        activations = f"{record['estimate']['activations'] / _GB:.2f}"
        table.add_row(case["base"], case["name"], *cells, f"{record['ratio']:.3f}", record["worst"], activations)
    console.print(table)


if __name__ == "__main__":
    main()
