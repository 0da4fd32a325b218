"""Training end to end against TRL with PEFT: the same base, rows and number of real tokens.

Every contender trains on the same rows of Code Alpaca in its own order, in a process of its own, until it has read so
many real tokens. Timed is what lies between the end of the first step and that of the last, loading of batches
included, by the CPU time of one thread; rounds of all contenders follow one another, and the ratio of a round counts.
Run with --help for the settings. Exit code 2 means that a self-check failed and the figures are void.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from _measure import environment
from _memory import GIVING_BACK
from _peers import Job, run
from rich.console import Console
from rich.table import Table

_ROOT = Path(__file__).resolve().parents[1]
DEFAULTS, TUNED, PACKED = "TRL + PEFT, its defaults", "TRL + PEFT, tuned", "TRL + PEFT, tuned and packed"
ONE, EIGHT = "ours, one expert", "ours, eight experts"
UNSLOTH = "Unsloth, tuned"
# What TRL offers against its defaults on a CPU: no recomputing of the forward pass, rows of like length together,
# the head's loss in chunks, the fused optimizer.
_TUNED = {
    "gradient_checkpointing": False,
    "train_sampling_strategy": "group_by_length",
    "loss_type": "chunked_nll",
    "optim": "adamw_torch_fused",
}
_AFTER_UNSLOTH = "import runpy, sys, unsloth; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    DEFAULTS: ("trl", {}),
    TUNED: ("trl", _TUNED),
    # The same number of tokens in a step as the others have.
    PACKED: ("trl", _TUNED | {"packing": True, "per_device_train_batch_size": 1}),
    ONE: ("ours", {"num_experts": 1}),
    EIGHT: ("ours", {"num_experts": 8}),
}
_BARS = {(ONE, DEFAULTS): 2.5, (ONE, TUNED): 1.2, (EIGHT, DEFAULTS): 2.3, (EIGHT, TUNED): 1.1}
# On a GPU, where alone Unsloth runs; and of what a large product does there.
_UNSLOTH_BAR, _ROOF_BAR = 0.9, 0.3
_RATE = "tokens_per_s" if torch.cuda.is_available() else "tokens_per_cpu_s"
if torch.cuda.is_available() and find_spec("unsloth"):
    CONTENDERS[UNSLOTH] = ("unsloth", _TUNED)
    _BARS[ONE, UNSLOTH] = _UNSLOTH_BAR


def write_rows(source: Path, folder: Path, *, rows: int, validation: int, longest: int, seed: int) -> None:
    """Draw rows of Code Alpaca, of at most so many characters, so that none is cut."""
    pairs = [
        {"prompt": f"{row['instruction']}\n{row['input']}".strip(), "completion": row["output"]}
        for row in json.loads(source.read_text(encoding="utf-8"))
        if row["output"].strip()
    ]
    there = {pair["prompt"]: pair for pair in pairs if sum(map(len, pair.values())) <= longest}
    chosen = random.Random(seed).sample(sorted(there), rows + validation)
    for side, names in (("train", chosen[:rows]), ("validation", chosen[rows:])):
        lines = (json.dumps(there[name]) for name in names)
        (folder / f"{side}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def in_a_process_of_its_own(job: Job, threads: int, **environment: str) -> dict[str, Any]:
    """The figures of one run."""
    # Unsloth wants to be imported before the libraries that it changes.
    script = [__file__] if job.library != "unsloth" else ["-c", _AFTER_UNSLOTH, __file__]
    command = [sys.executable, *script, "--job", json.dumps(asdict(job)), "--threads", str(threads)]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=os.environ | quiet | environment, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{job.library} {dict(job.settings)}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: Mapping[str, Sequence[Mapping[str, Any]]], peaks: Mapping[str, int]) -> dict[str, Any]:
    """Medians over the rounds, and how many times as fast as each of TRL's, paired by round."""
    found: dict[str, Any] = {}
    for name, each in runs.items():
        figures = {
            key: median(one[key] for one in each)
            for key in ("tokens_per_cpu_s", "tokens_per_s", "filled_share", "roof_share", "loss", "all_tokens", "steps")
        }
        figures["peak_bytes"] = peaks[name]
        rates = [one[_RATE] for one in each]
        figures["times_as_fast_as"] = {
            other: median(mine / theirs[_RATE] for mine, theirs in zip(rates, runs[other], strict=True))
            for other in runs
            if CONTENDERS[other][0] != "ours"
        }
        found[name] = figures
    return found


def check(summed: Mapping[str, Any]) -> list[str]:
    """What makes the figures void."""
    tokens = [each["all_tokens"] for each in summed.values()]
    losses = [each["loss"] for each in summed.values()]
    wrong = []
    if max(tokens) > 1.3 * min(tokens):
        wrong.append(f"all must train on about the same number of real tokens, got {tokens}")
    if max(losses) > 1.15 * min(losses):
        wrong.append(f"all must learn about as much, got losses of {[round(loss, 3) for loss in losses]}")
    return wrong


def show(summed: Mapping[str, Any], bars: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = Table(
        "",
        "tokens/CPU s",
        "tokens/s",
        "x defaults",
        "x tuned",
        "x packed",
        "filled up",
        "of a product",
        "peak GB",
        "loss",
    )
    for name, each in summed.items():
        times = [f"{each['times_as_fast_as'][other]:.2f}" for other in (DEFAULTS, TUNED, PACKED)]
        table.add_row(
            name,
            f"{each['tokens_per_cpu_s']:.1f}",
            f"{each['tokens_per_s']:.1f}",
            *times,
            f"{each['filled_share']:.0%}",
            f"{each['roof_share']:.0%}",
            f"{each['peak_bytes'] / 1e9:.2f}",
            f"{each['loss']:.3f}",
        )
    console.print(table)
    for bar in bars:
        word = "PASS" if bar["passed"] else "FAIL"
        console.print(f"{word} {bar['name']}: {bar['value']:.2f} (>= {bar['limit']})", highlight=False)


@click.command(context_settings={"show_default": True})
@click.option(
    "--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Rows as Code Alpaca's file."
)
@click.option("--base", default="pypi:gemma3-270m")
@click.option("--rows", default=1600, type=click.IntRange(2), help="To draw the epoch from.")
@click.option("--tokens", default=6_000, type=click.IntRange(1), help="Real ones that a run reads.")
@click.option("--validation", default=16, type=click.IntRange(1), help="Rows that the losses are of.")
@click.option("--repeats", default=3, type=click.IntRange(1), help="Rounds of all contenders.")
@click.option("--batch", default=8, type=click.IntRange(1), help="Rows of a step.")
@click.option("--longest", default=1200, help="Characters of a row.")
@click.option("--threads", default=1, type=click.IntRange(1))
@click.option("--seed", default=0)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures to this JSON file.")
@click.option("--job", "one", hidden=True, help="Run this, as JSON, in this process.")
def main(data: Path | None, out: Path | None, one: str | None, threads: int, **options: Any) -> None:
    """Measure real tokens a second of training, ours beside TRL's."""
    torch.set_num_threads(threads)
    if one is not None:
        print(json.dumps(run(Job(**json.loads(one)))))
        return
    if data is None:
        raise click.UsageError("--data must name Code Alpaca's file.")
    console = Console(width=None if sys.stdout.isatty() else 160)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    peaks: dict[str, int] = {}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "rows"
        folder.mkdir()
        drawn = {name: options[name] for name in ("rows", "validation", "longest", "seed")}
        write_rows(data, folder, **drawn)
        job = Job(
            base=options["base"],
            folder=str(folder),
            work="",
            library="",
            **{name: options[name] for name in ("tokens", "batch", "seed")},
        )
        jobs = {
            name: replace(job, library=library, settings=settings) for name, (library, settings) in CONTENDERS.items()
        }
        for number in range(options["repeats"]):
            for place, (name, mine) in enumerate(jobs.items()):
                mine = replace(mine, work=str(Path(scratch) / f"{number}-{place}"))
                runs[name].append(in_a_process_of_its_own(mine, threads))
                rate = runs[name][-1]["tokens_per_cpu_s"]
                console.print(f"round {number + 1}, {name}: {rate:.1f} tokens per CPU second", highlight=False)
        for place, (name, mine) in enumerate(jobs.items()):
            mine = replace(mine, work=str(Path(scratch) / f"memory-{place}"), tokens=mine.tokens // 3)
            peaks[name] = in_a_process_of_its_own(mine, threads, **GIVING_BACK)["peak_bytes"]
    summed = summary(runs, peaks)
    bars = [
        {
            "name": f"{mine} / {theirs}",
            "limit": limit,
            "value": summed[mine]["times_as_fast_as"][theirs],
            "passed": summed[mine]["times_as_fast_as"][theirs] >= limit,
        }
        for (mine, theirs), limit in _BARS.items()
    ]
    if torch.cuda.is_available():
        share = summed[ONE]["roof_share"]
        roof = {"name": f"{ONE} / a large product", "limit": _ROOF_BAR, "value": share, "passed": share >= _ROOF_BAR}
        bars.append(roof)
    show(summed, bars, console)
    wrong = check(summed)
    if out is not None:
        report = {
            "benchmark": "train_vs_peers",
            "environment": environment(_ROOT) | {"trl": version("trl")},
            "settings": options | {"threads": threads},
            "summary": summed,
            "bars": bars,
            "void": wrong,
            "runs": runs,
        }
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if wrong:
        console.print(f"VOID: {'; '.join(wrong)}.")
        sys.exit(2)


if __name__ == "__main__":
    main()
