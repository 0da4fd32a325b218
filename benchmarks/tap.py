"""Where should the router read? Validation loss after the same rows, and step time, for several taps and granularities.

    python benchmarks/tap.py --base pypi:smollm2 --data DATA --out benchmarks/results/tap-smollm2.json

Each variant is a whole run of `train` on real domains (Code Alpaca, GSM8K, MBPP, Dolly), same rows in the same order.
Step time is the CPU time of forward and backward of one fixed batch, variants interleaved, one thread, medians.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dylora_moe.bases import load_base
from dylora_moe.config import RunConfig
from dylora_moe.data.batching import Collator, pad_token_id
from dylora_moe.data.build import build_run_data
from dylora_moe.run_dir import environment
from dylora_moe.train.run import train
from dylora_moe.train.session import Stages, build_model
from dylora_moe.tuner import LoadWindow
from dylora_moe.tuner.head import read_head
from dylora_moe.tuner.inspect import decoder_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to place the router."""

    name: str
    tap_layer: int
    router_scope: str
    granularity: str


def variants(layers: int) -> list[Variant]:
    """Taps at 0, L/6 and L/3 and a router in every layer, at both granularities."""
    found = []
    for granularity in ("sequence", "token"):
        for part in (0, layers // 6, layers // 3):
            name = f"{granularity}, tap {part}"
            found.append(Variant(name=name, tap_layer=part, router_scope="shared", granularity=granularity))
        found.append(
            Variant(name=f"{granularity}, per layer", tap_layer=0, router_scope="per_layer", granularity=granularity)
        )
    return found


def settings(arguments: argparse.Namespace, variant: Variant, folder: Path, seed: int) -> RunConfig:
    """The run of one variant."""
    data = Path(arguments.data)
    rows = {"num_examples": arguments.rows, "on_bad_row": "skip"}
    return RunConfig(
        base_model=arguments.base,
        output_dir=folder,
        run_name=f"{variant.granularity}-{variant.router_scope}-{variant.tap_layer}-{seed}",
        seed=seed,
        datasets=(
            {"path": str(data / "code_alpaca/new_codealpaca.json"), "domain": "code_alpaca", **rows},
            {"path": str(data / "gsm8k/train.jsonl"), "domain": "gsm8k", **rows},
            {"path": str(data / "mbpp/mbpp.jsonl"), "domain": "mbpp", **rows},
            {"path": str(data / "alpaca/alpaca_5000.json"), "domain": "alpaca", **rows},
        ),
        max_length=384,
        overlong="drop",
        granularity=variant.granularity,  # type: ignore[arg-type]
        router_scope=variant.router_scope,  # type: ignore[arg-type]
        tap_layer=variant.tap_layer,
        num_experts=4,
        lora_dropout=0.0,
        learning_rate=arguments.learning_rate,
        batch_size=8,
        max_steps=arguments.steps,
        eval_subset=arguments.eval_subset,
        logging_steps=10,
        sample_tokens=0,
    )


def quality(arguments: argparse.Namespace, chosen: list[Variant], console: Console) -> list[dict[str, Any]]:
    """Train every variant with every seed; losses, routing and CPU seconds."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            for variant in chosen:
                start = time.process_time()
                result = train(settings(arguments, variant, Path(folder), seed), Stages())
                routing = result["after"]["routing"]
                record = {
                    "variant": variant.name,
                    "seed": seed,
                    "before": result["before"]["mean_loss"],
                    "after": result["after"]["mean_loss"],
                    "domains": {d["domain"]: d["loss"] for d in result["after"]["domains"]},
                    "tokens": result["tokens"],
                    "mutual_information": routing["mutual_information"],
                    "load_entropy": routing["load_entropy"],
                    "dead": len(routing["dead"]),
                    "cpu_s": time.process_time() - start,
                }
                found.append(record)
                fall = record["before"] - record["after"]
                console.print(
                    f"{variant.name:24} seed {seed}: {record['after']:.4f} (fall {fall:.4f})", highlight=False
                )
    return found


def step_times(arguments: argparse.Namespace, chosen: list[Variant]) -> dict[str, float]:
    """Median CPU seconds of forward and backward of one batch, variants in turn, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps = {}
    for variant in chosen:
        config = settings(arguments, variant, Path("."), 0)
        base = load_base(config.base_model, dtype=torch.float32, progress=lambda line: None)
        data = build_run_data(config, base.tokenizer)
        batch = Collator(pad_token_id=pad_token_id(base.tokenizer))(data.train[:4])
        batch.pop("domain")
        model = build_model(config, base)
        steps[variant.name] = (model, read_head(model.lm), batch)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(arguments.repeats + 1):
        for name, (model, head, batch) in steps.items():
            start = time.process_time()
            loss = head.nll(model(hidden_only=True, **batch), batch["labels"]).mean()
            (loss + 0.01 * model.auxiliary_losses(LoadWindow()).balance).backward()
            if repeat:
                times[name].append(time.process_time() - start)
    torch.set_num_threads(threads)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="pypi:smollm2")
    parser.add_argument("--data", required=True, help="folder with code_alpaca, gsm8k, mbpp and alpaca")
    parser.add_argument("--rows", type=int, default=400, help="rows of each domain")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--eval-subset", type=float, default=40)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="part of the names of the variants to run")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    console = Console()
    base = load_base(arguments.base, dtype=torch.float32, progress=console.print)
    chosen = [v for v in variants(len(decoder_layers(base.model)[1])) if not arguments.only or arguments.only in v.name]
    del base
    times = step_times(arguments, chosen)
    records = quality(arguments, chosen, console)
    table = Table(title=f"Taps on {arguments.base}", title_justify="left")
    for column in ("variant", "loss", "fall", "step time, tap 0 = 1", "information, bits", "dead"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    reference = times[chosen[0].name]
    for variant in chosen:
        mine = [r for r in records if r["variant"] == variant.name]
        after, before = (statistics.mean(r[key] for r in mine) for key in ("after", "before"))
        information = statistics.mean(r["mutual_information"] for r in mine)
        dead = max(r["dead"] for r in mine)
        ratio = times[variant.name] / reference
        table.add_row(
            variant.name, f"{after:.4f}", f"{before - after:.4f}", f"{ratio:.2f}", f"{information:.2f}", str(dead)
        )
    console.print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    # The command line would tell where this machine keeps its files; the settings are what counts.
    machine = {key: value for key, value in environment().items() if key != "command"}
    places = ("data", "out")
    given = {key: value for key, value in vars(arguments).items() if key not in places}
    report = {"environment": machine, "settings": given, "records": records, "step_cpu_s": times}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
