"""Does a new expert learn better alone, among the old ones at first, or from the weights of the nearest?

Short streams of the same rows, steps and seeds, once for each way; what is compared is the loss of the expert of each
skill but the first, once learned, on its validation rows, and the tokens a second of all of its training. A stream that
is there already is not run again. Run with --help for the settings.
"""

import json
import random
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import click
import torch
from _measure import environment
from rich.console import Console
from rich.table import Table
from stream import skills

from dylora_moe.config import make_config
from dylora_moe.run_dir import METRICS, RunDir
from dylora_moe.skills.library import load_library
from dylora_moe.train.run import train

WAYS: dict[str, dict[str, Any]] = {
    "alone": {},
    "immature for 0.3": {"maturity_ratio": 0.3},
    "immature for 0.6": {"maturity_ratio": 0.6},
    "warm start": {"warm_start": True},
}
LEARNED = ("code_alpaca", "mbpp", "gsm8k", "requests")
_ROOT = Path(__file__).resolve().parents[1]


def learn(data: Path, folder: Path, way: str, *, seed: int, rows: int, steps: int, base: str) -> list[dict[str, Any]]:
    """One stream; the first skill, the same in every way, is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {entry["skill"]: entry for entry in skills(data, folder, 0, rows)[0]}
    config = make_config(
        {
            "mode": "continual",
            "skills": [
                entries[name] | {"decision": "grow"} for name in random.Random(seed).sample(LEARNED, len(LEARNED))
            ],
            "base_model": base,
            "output_dir": str(folder),
            "run_name": way.replace(" ", "-"),
            "max_length": 256,
            "overlong": "truncate",
            "validation_split": 0.2,
            "lora_dropout": 0.0,
            "target_modules": "attention",
            "batch_size": 4,
            "learning_rate": 1e-3,
            "max_steps": steps,
            "warmup_ratio": 0.1,
            "logging_steps": max(1, steps // 5),
            "sample_tokens": 0,
            "seed": seed,
            "bf16": True,
            **WAYS[way],
        }
    )
    result = train(config)
    found = []
    for number, stage in enumerate(result["stages"][1:], start=2):
        run = RunDir(config.run_dir / "stages" / f"{number:02}-{stage['skill']}")
        lines = run.read_lines(METRICS)
        steps = [line for line in lines if "tokens" in line]
        found.append(
            {
                "skill": stage["skill"],
                "nearest": stage["decision"]["nearest"],
                "base_loss": stage["base_loss"],
                "loss": load_library(run.path).skills[stage["skill"]].record.loss,
                "tokens_per_second": steps[-1]["tokens"] / (steps[-1]["seconds"] - lines[0]["seconds"]),
            }
        )
    return found


def show(runs: list[dict[str, Any]], console: Console) -> None:
    """Loss beside that of an expert that learned alone, of the same seed."""
    alone = {(run["seed"], each["skill"]): each for run in runs if run["way"] == "alone" for each in run["skills"]}
    table = Table(
        title="Validation loss less that of an expert alone, nats a token: mean over seeds and skills (deviation)"
    )
    for column in ("way", *LEARNED, "all", "better", "tokens/s"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way in WAYS:
        pairs = [
            (each["skill"], each["loss"] - other["loss"], each["tokens_per_second"] / other["tokens_per_second"])
            for run in runs
            if run["way"] == way
            for each in run["skills"]
            for other in [alone[run["seed"], each["skill"]]]
        ]
        if not pairs:
            continue
        by_skill = [[change for skill, change, _ in pairs if skill == name] for name in LEARNED]
        changes = [change for _, change, _ in pairs]
        table.add_row(
            way,
            *(f"{mean(values):+.3f}" if values else "" for values in by_skill),
            f"{mean(changes):+.3f} ({stdev(changes):.3f})",
            f"{sum(change < 0 for change in changes)} of {len(changes)}",
            f"{median(ratio for *_, ratio in pairs):.2f}",
        )
    console.print(table)


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="As for stream.py.")
@click.option("--runs", type=click.Path(path_type=Path), required=True, help="Folder of the runs.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--rows", default=150, show_default=True, help="Of a skill; a fifth of them validates.")
@click.option("--steps", default=25, show_default=True, help="Of a skill.")
@click.option("--base", default="pypi:smollm2", show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
def main(data: Path, runs: Path, seeds: str, rows: int, steps: int, base: str, threads: int, out: Path) -> None:
    console = Console(width=140)
    torch.set_num_threads(threads)
    found = []
    for seed in map(int, seeds.split(",")):
        for way in WAYS:
            folder = runs.absolute() / str(seed)
            learned = learn(data.absolute(), folder, way, seed=seed, rows=rows, steps=steps, base=base)
            console.print(
                f"seed {seed}, {way}: " + ", ".join(f"{each['skill']} {each['loss']:.3f}" for each in learned)
            )
            found.append({"way": way, "seed": seed, "skills": learned})
            record = {"rows": rows, "steps": steps, "base": base, "runs": found, "environment": environment(_ROOT)}
            out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    show(found, console)


if __name__ == "__main__":
    main()
