"""Does the mixture win? One base, real data of six domains, the same rows and steps for every contender.

Contenders: one LoRA of the rank that a token meets in the mixture (equal active rank), one LoRA of the rank of all
experts together (equal total rank), mixtures that decide once a document and once a token, and a LoRA for each domain,
trained on that domain alone and asked about it alone (an oracle: somebody must know the domain). Each tries the same
learning rates with the first seed, on validation rows; with the best of them all seeds are trained, and measured on
test rows that nothing was chosen by. Every run has a folder of its own, and one that is finished is not made again, so
that the work can be interrupted. Run with --help for the settings.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
from _measure import environment
from rich.console import Console

from dylora_moe.config import make_config
from dylora_moe.evaluate.intervals import holm, paired_difference
from dylora_moe.evaluate.load import Speaker
from dylora_moe.evaluate.run import evaluate_run, is_measured, read_rows
from dylora_moe.run_dir import RunDir
from dylora_moe.train.run import train

ALONE = "a LoRA for each domain"
BASE = "base"
MEAN = "mean"
_ROOT = Path(__file__).resolve().parents[1]
_LONGEST = 900  # characters of a row: all fit into max_length whole, and none takes most of the time

Pair = tuple[str, str]
Row = dict[str, Any]


def contenders(experts: int, rank: int) -> dict[str, dict[str, Any]]:
    """Name -> its settings."""
    one = {"num_experts": 1, "lora_r": rank, "lora_alpha": 2 * rank}
    mixture = {"num_experts": experts, "lora_r": rank, "lora_alpha": 2 * rank}
    return {
        f"one LoRA, rank {rank}": one,
        f"one LoRA, rank {experts * rank}": one | {"lora_r": experts * rank, "lora_alpha": 2 * experts * rank},
        "mixture, a decision a document": mixture | {"granularity": "sequence"},
        "mixture, a decision a token": mixture | {"granularity": "token"},
        ALONE: one,
    }


def _json_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def maths(data: Path) -> dict[str, list[Pair]]:
    """GSM8K, its own splits."""
    return {
        side: [(row["question"], row["answer"]) for row in _json_lines(data / "gsm8k" / f"{side}.jsonl")]
        for side in ("train", "test")
    }


def sql(data: Path) -> dict[str, list[Pair]]:
    """WikiSQL as text; its test file is small, so that its validation file is tested on, too."""

    def read(name: str) -> list[Pair]:
        texts = [row["text"].split("\nA: ", maxsplit=1) for row in _json_lines(data / "wikisql" / f"{name}.jsonl")]
        return [(prompt, answer) for prompt, answer in texts]

    return {"train": read("train"), "test": read("test") + read("valid")}


def python(data: Path) -> dict[str, list[Pair]]:
    """MBPP, its own splits: test is tasks 11 to 510, training 601 to 974."""
    rows = _json_lines(data / "mbpp" / "mbpp.jsonl")
    for row in rows:
        row["pair"] = (f"{row['text']}\n\n{row['test_list'][0]}", row["code"].replace("\r\n", "\n"))
    return {
        "train": [row["pair"] for row in rows if row["task_id"] >= 601],
        "test": [row["pair"] for row in rows if 11 <= row["task_id"] <= 510],
    }


def instructions(data: Path) -> dict[str, list[Pair]]:
    """Alpaca, which has no splits."""
    rows = json.loads((data / "alpaca" / "alpaca_5000.json").read_text(encoding="utf-8"))
    return {"all": [(f"{row['instruction']}\n{row['input']}".strip(), row["output"]) for row in rows if row["output"]]}


def italian(data: Path) -> dict[str, list[Pair]]:
    """Tatoeba, English to Italian, which has no splits."""
    folder = data / "tatoeba"
    sides = [(folder / f"tatoeba.ita-eng.{side}").read_text(encoding="utf-8").splitlines() for side in ("eng", "ita")]
    return {"all": [(f"Translate into Italian: {eng}", ita) for eng, ita in zip(*sides, strict=True)]}


def news(data: Path) -> dict[str, list[Pair]]:
    """AG News: choose a topic; the splits of the O-LoRA benchmark."""

    def read(name: str) -> list[Pair]:
        rows = _json_lines(data / "continual" / "agnews" / f"{name}.jsonl")
        return [(f"World, Sports, Business or Sci/Tech?\n\n{row['sentence']}", row["label"]) for row in rows]

    return {"train": read("train"), "test": read("test")}


DOMAINS: dict[str, Callable[[Path], dict[str, list[Pair]]]] = {
    "maths": maths,
    "sql": sql,
    "python": python,
    "instructions": instructions,
    "italian": italian,
    "news": news,
}


def prepare(data: Path, folder: Path, *, train_rows: int, validation_rows: int, test_rows: int) -> dict[str, Path]:
    """A folder of three files for each domain, rows drawn with one seed; prompts differ between the three."""
    found = {}
    for name, read in DOMAINS.items():
        there = {
            side: list({pair[0]: pair for pair in pairs if sum(map(len, pair)) <= _LONGEST}.values())
            for side, pairs in read(data).items()
        }
        draw = random.Random(f"quality/{name}")
        for pairs in there.values():
            draw.shuffle(pairs)
        wanted = {"train": train_rows, "validation": validation_rows, "test": test_rows}
        sides: dict[str, list[Pair]] = {}
        for side, number in wanted.items():
            pool = there.get("all") or there["test" if side == "test" else "train"]
            sides[side] = [pool.pop() for _ in range(min(number, len(pool)))]
        prompts = [prompt for pairs in sides.values() for prompt, _ in pairs]
        if len(prompts) < sum(wanted.values()) or len(set(prompts)) < len(prompts):
            raise click.ClickException(
                f"{name} must have {sum(wanted.values())} different prompts on its sides, got {len(set(prompts))}. Ask "
                "for fewer rows."
            )
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        for side, pairs in sides.items():
            lines = (json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs)
            (target / f"{side}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        found[name] = target
    return found


class Bench:
    """Trains and measures contenders; every run in a folder of its own."""

    def __init__(self, runs: Path, domains: Mapping[str, Path], settings: Mapping[str, Any], console: Console) -> None:
        self._runs, self._domains, self._settings, self._console = runs, domains, settings, console

    def run(self, name: str, settings: Mapping[str, Any], rate: float, seed: int) -> list[Path]:
        """Train one contender: one folder, or one a domain. What is there is left alone."""
        groups = [[domain] for domain in self._domains] if name == ALONE else [list(self._domains)]
        return [self._train(name, settings, rate, seed, group) for group in groups]

    def _train(self, name: str, settings: Mapping[str, Any], rate: float, seed: int, domains: Sequence[str]) -> Path:
        label = "-".join(name.replace(",", "").split()) + ("" if len(domains) > 1 else f"-{domains[0]}")
        steps = round(self._settings["max_steps"] * len(domains) / len(self._domains))
        config = make_config(
            {
                **self._settings,
                **settings,
                "datasets": [{"path": str(self._domains[domain]), "domain": domain} for domain in domains],
                "output_dir": str(self._runs),
                "run_name": f"{label}-{rate:g}-{seed}",
                "learning_rate": rate,
                "max_steps": steps,
                "seed": seed,
            }
        )
        finished = RunDir(config.run_dir).is_finished
        result = train(config)
        if not finished:
            self._console.print(f"{config.run_name}: {_mean_loss(result['after']):.4f}", highlight=False)
        return config.run_dir

    def validation(self, folders: Sequence[Path]) -> float:
        """Mean loss over the domains on validation rows, by which a learning rate is chosen."""
        results = [RunDir(folder).read("result.json")["after"]["domains"] for folder in folders]
        return mean(domain["loss"] for domains in results for domain in domains)

    def test_rows(self, folders: Sequence[Path], speaker: Speaker) -> list[Row]:
        """The figures of every test row."""
        rows: list[Row] = []
        for folder in folders:
            if not is_measured(RunDir(folder), speaker, "test"):
                evaluate_run(folder, [speaker], split="test", tell=lambda line: None)
            rows += read_rows(RunDir(folder), speaker, "test")
        return rows


def _mean_loss(evaluation: Mapping[str, Any]) -> float:
    return mean(domain["loss"] for domain in evaluation["domains"])


def tuned(bench: Bench, name: str, settings: Mapping[str, Any], rates: Sequence[float], seed: int) -> dict[str, float]:
    """Learning rate -> validation loss."""
    return {f"{rate:g}": bench.validation(bench.run(name, settings, rate, seed)) for rate in rates}


def figures(rows_by_seed: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Loss and accuracy of the next token by domain, and their plain means, over seeds."""
    domains = list(dict.fromkeys(row["domain"] for row in rows_by_seed[0]))

    def ratio(rows: Sequence[Row], domain: str, top: str) -> float:
        own = [row for row in rows if row["domain"] == domain]
        return sum(row[top] for row in own) / sum(row["tokens"] for row in own)

    losses = [{domain: ratio(rows, domain, "nll") for domain in domains} for rows in rows_by_seed]
    right = [{domain: ratio(rows, domain, "right") for domain in domains} for rows in rows_by_seed]
    means = [mean(each.values()) for each in losses]
    return {
        "loss": {domain: mean(each[domain] for each in losses) for domain in domains},
        "accuracy": {domain: mean(each[domain] for each in right) for domain in domains},
        "mean_loss": mean(means),
        "mean_loss_by_seed": means,
        "mean_accuracy": mean(mean(each.values()) for each in right),
    }


def compare(ours: Sequence[Sequence[Row]], theirs: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Ours less theirs on each domain, the rows' losses averaged over the seeds; below 0 ours is better."""
    one, other = (_over_seeds(each) for each in (ours, theirs))
    domains = list(dict.fromkeys(domain for domain, _ in one))
    sizes = {domain: sum(tokens for key, (_, tokens) in one.items() if key[0] == domain) for domain in domains}
    found = {}
    for domain in domains:
        keys = [key for key in one if key[0] == domain]
        nats = [[side[key][0] for key in keys] for side in (one, other)]
        found[domain] = asdict(paired_difference(*nats, [one[key][1] for key in keys]))
    # The mean over domains is a sum of rows, each by the tokens of its domain.
    parts = [[side[key][0] / sizes[key[0]] / len(domains) for key in one] for side in (one, other)]
    found[MEAN] = asdict(paired_difference(*parts, [1 / len(one)] * len(one)))
    return found


def _adjusted(compared: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same with p made larger for all cells of the table together."""
    cells = {(pair, domain): each["p"] for pair, found in compared.items() for domain, each in found.items()}
    adjusted = holm({json.dumps(cell): p for cell, p in cells.items()})
    return {
        pair: {domain: {**each, "p_holm": adjusted[json.dumps([pair, domain])]} for domain, each in found.items()}
        for pair, found in compared.items()
    }


def _over_seeds(rows_by_seed: Sequence[Sequence[Row]]) -> dict[tuple[str, str], tuple[float, int]]:
    together: dict[tuple[str, str], list[Row]] = {}
    for rows in rows_by_seed:
        for row in rows:
            together.setdefault((row["domain"], row["row"]), []).append(row)
    return {key: (mean(row["nll"] for row in each), each[0]["tokens"]) for key, each in together.items()}


def losses_table(record: Mapping[str, Any]) -> str:
    """Test losses in Markdown, as `docs/quality.md` has them: the best trained contender of each column in bold."""
    domains = list(DOMAINS)
    trained = {name: each for name, each in record["test"].items() if name != BASE}
    best = {domain: min(each["loss"][domain] for each in trained.values()) for domain in domains}
    best_mean = min(each["mean_loss"] for each in trained.values())
    lines = [
        f"| contender | learning rate | {' | '.join(domains)} | mean | of the seeds | next token right |",
        "| --- |" + " ---: |" * (len(domains) + 4),
    ]
    for name, each in record["test"].items():
        seeds = each["mean_loss_by_seed"]
        cells = [
            _bold(each["loss"][domain], name != BASE and each["loss"][domain] == best[domain]) for domain in domains
        ]
        mean_cell = _bold(each["mean_loss"], name != BASE and each["mean_loss"] == best_mean)
        spread = f"{min(seeds):.3f} to {max(seeds):.3f}" if len(seeds) > 1 else ""
        rate = f"{record['best'][name]:g}" if name in record["best"] else ""
        lines.append(
            f"| {name} | {rate} | {' | '.join(cells)} | {mean_cell} | {spread} | {each['mean_accuracy']:.1%} |"
        )
    return "\n".join(lines)


def differences_table(record: Mapping[str, Any]) -> str:
    """Mixtures less the others with 95 % intervals over rows, in Markdown; bold where chance would rarely make it."""
    domains = [*DOMAINS, MEAN]
    lines = [f"| first, less second | {' | '.join(domains)} |", "| --- |" + " ---: |" * len(domains)]
    for pair, found in record["compared"].items():
        cells = [
            ("**{:+.3f}**" if found[domain]["p_holm"] < 0.05 else "{:+.3f}").format(found[domain]["difference"])
            + " ({:+.3f} to {:+.3f})".format(*found[domain]["interval"])
            for domain in domains
        ]
        lines.append(f"| {pair.replace(' against ', ', less ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rates_table(record: Mapping[str, Any]) -> str:
    """Validation loss by learning rate, in Markdown; the one that was taken in bold."""
    rates = list(next(iter(record["validation"].values())))
    lines = [f"| contender | {' | '.join(rates)} |", "| --- |" + " ---: |" * len(rates)]
    for name, losses in record["validation"].items():
        cells = [_bold(losses[rate], losses[rate] == min(losses.values())) for rate in rates]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _bold(value: float, is_best: bool) -> str:
    return f"**{value:.3f}**" if is_best else f"{value:.3f}"


def measure(
    bench: Bench, entries: Mapping[str, Mapping[str, Any]], rates: Sequence[float], seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """What is known so far, after each contender of each seed."""
    validation, best = {}, {}
    for name, settings in entries.items():
        validation[name] = tuned(bench, name, settings, rates, seeds[0])
        best[name] = float(min(validation[name], key=validation[name].__getitem__))
        yield {"validation": validation, "best": best, "test": {}, "compared": {}}
    rows: dict[str, list[list[Row]]] = {}
    for seed in seeds:
        for name, settings in entries.items():
            folders = bench.run(name, settings, best[name], seed)
            if not rows:
                rows[BASE] = [bench.test_rows(folders, Speaker(kind="base"))]
            rows.setdefault(name, []).append(bench.test_rows(folders, Speaker()))
            mixtures = [each for each in rows if each.startswith("mixture")]
            others = [each for each in rows if each not in (*mixtures, BASE)]
            yield {
                "validation": validation,
                "best": best,
                "test": {each: figures(found) for each, found in rows.items()},
                "compared": _adjusted(
                    {
                        f"{one} against {other}": compare(rows[one], rows[other])
                        for one in mixtures
                        for other in others
                        if len(rows[one]) == len(rows[other])
                    }
                ),
            }


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of the data sets.")
@click.option("--runs", type=click.Path(path_type=Path), required=True, help="Folder of the runs.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--rates", default="3e-4,1e-3,3e-3,1e-2", show_default=True, help="Learning rates that each one tries.")
@click.option("--rows", default=80, show_default=True, help="To train on, of a domain.")
@click.option("--test-rows", default=60, show_default=True, help="To measure on, of a domain.")
@click.option("--batch-size", default=4, show_default=True)
@click.option("--epochs", default=1, show_default=True)
@click.option("--experts", default=6, show_default=True)
@click.option("--rank", default=8, show_default=True, help="Of an expert.")
@click.option("--base", default="pypi:smollm2", show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
def main(
    data: Path,
    runs: Path,
    seeds: str,
    rates: str,
    rows: int,
    test_rows: int,
    batch_size: int,
    epochs: int,
    experts: int,
    rank: int,
    base: str,
    threads: int,
    out: Path,
) -> None:
    console = Console(width=170)
    torch.set_num_threads(threads)
    wanted = {"train_rows": rows, "validation_rows": max(8, rows // 5), "test_rows": test_rows}
    shutil.rmtree(runs / "data", ignore_errors=True)
    domains = prepare(data.absolute(), runs.absolute() / "data", **wanted)
    settings = {
        "mode": "joint",
        "base_model": base,
        "max_length": 512,
        "overlong": "drop",
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "batch_size": batch_size,
        "max_steps": epochs * rows * len(domains) // batch_size,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "sample_tokens": 0,
        "save_total_limit": 1,
    }
    entries = contenders(experts, rank)
    bench = Bench(runs.absolute(), domains, settings, console)
    record: dict[str, Any] = {}
    for found in measure(bench, entries, [float(rate) for rate in rates.split(",")], [*map(int, seeds.split(","))]):
        about = {"rows": wanted, "settings": settings, "contenders": entries, "seeds": seeds, "rates": rates}
        record = {**about, **found, "environment": environment(_ROOT)}
        out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for table in (rates_table, losses_table, differences_table):
        console.print(table(record) + "\n", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
