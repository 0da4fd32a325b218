"""Ours beside what sees the skills in sequence, and what sees them all: the standard orders of the O-LoRA benchmark.

Ours: `mode: continual`, whose novelty test decides; oracle: its experts, each prompt sent to that of its skill;
sequential: one LoRA trained on one skill after the other; orthogonal: a new LoRA for each skill beside the old ones,
which stay, kept orthogonal to them by O-LoRA's penalty (arXiv 2310.14152, equation 8, lambda 0.5), all of them in use;
joint: one LoRA trained on all at once. Same base, rows, steps, rank and rate for all. A prompt names the labels to
choose from, as that benchmark's do, but not, as they do, the data set. Each run has a JSON file of its
own, and those that are there are left alone, so that the work can be divided and gone on with; the table is of what
is there. Run with --help for the settings.
"""

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch
from _measure import environment
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, set_seed

from dylora_moe.bases import LoadedBase
from dylora_moe.config import RunConfig, make_config
from dylora_moe.data.build import build_run_data
from dylora_moe.data.example import Example
from dylora_moe.data.sources import parse_dataset_spec, read_source
from dylora_moe.data.templates import end_token_id
from dylora_moe.evaluate.accuracy import measure_accuracy
from dylora_moe.run_dir import FINAL, RunDir
from dylora_moe.train.fitting import fit
from dylora_moe.train.run import train
from dylora_moe.train.session import Session, Stages, build_model, load_run_base
from dylora_moe.train.stopping import StopSignals
from dylora_moe.train.trackers import Trackers
from dylora_moe.tuner import DyLoraModel, load_model
from dylora_moe.tuner.head import read_head

ORDERS = {
    1: ("dbpedia", "amazon", "yahoo", "agnews"),
    2: ("dbpedia", "amazon", "agnews", "yahoo"),
    3: ("yahoo", "amazon", "agnews", "dbpedia"),
}
METHODS = ("ours", "oracle", "sequential", "orthogonal", "joint")
PENALTY = 0.5
_ROOT = Path(__file__).parents[1]
_RANK = 8

Accuracies = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One of the four sets: training rows in a file, and test rows."""

    name: str
    train: Path
    test: list[Example]

    @property
    def dataset(self) -> dict[str, Any]:
        """As an entry of a recipe."""
        return {"path": str(self.train), "domain": self.name}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """What every run of one order and seed has in common."""

    tasks: tuple[Task, ...]
    settings: dict[str, Any]
    seed: int

    def config(self, tasks: Iterable[Task], name: str) -> RunConfig:
        """One LoRA on these sets at once."""
        return make_config(
            self.settings
            | {"datasets": [task.dataset for task in tasks], "num_experts": 1, "seed": self.seed, "run_name": name}
        )

    def base(self) -> LoadedBase:
        """Loaded anew: a model changes it in place."""
        return load_run_base(self.config(self.tasks[:1], "base"), Stages())


def make_tasks(data: Path, names: Sequence[str], folder: Path, *, rows: int, tests: int, words: int, seed: int) -> Any:
    """The sets in their order; the seed draws the training rows, the test rows are the same for all seeds."""
    return tuple(_make_task(data / name, folder / name, rows, tests, words, seed) for name in names)


def _make_task(source: Path, folder: Path, rows: int, tests: int, words: int, seed: int) -> Task:
    folder.mkdir()
    shutil.copy(source / "labels.json", folder)
    return Task(
        name=folder.name,
        train=_cut(source / "train.jsonl", folder / "train.jsonl", rows, words, seed),
        test=_read(_cut(source / "test.jsonl", folder / "test.jsonl", tests, words, 0)),
    )


def _cut(source: Path, target: Path, number: int, words: int, seed: int) -> Path:
    lines = source.read_text(encoding="utf-8").splitlines()
    drawn = [json.loads(line) for line in random.Random(seed).sample(lines, number)]
    cut = [row | {"sentence": " ".join(row["sentence"].split()[:words])} for row in drawn]
    target.write_text("".join(json.dumps(row) + "\n" for row in cut), encoding="utf-8")
    return target


def _read(path: Path) -> list[Example]:
    found: list[Example] = []
    read_source(parse_dataset_spec({"path": str(path)}), seed=0, add=lambda item: found.append(item.example))
    return found


def learn(
    lab: Lab,
    base: LoadedBase,
    model: DyLoraModel,
    tasks: Sequence[Task],
    name: str,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train the one LoRA of the model on these sets, one epoch."""
    config = lab.config(tasks, name)
    data = build_run_data(config, base.tokenizer)
    run = RunDir(config.run_dir)
    set_seed(config.seed)
    session = Session(config=config, run=run, base=base, data=data, model=model.train(), head=read_head(model.lm))
    trackers = Trackers((), folder=run / "trackers", run_name=name, config={}, environment={}, tell=lambda text: None)
    fit(session, None, trackers, Stages(), StopSignals(), callbacks=callbacks)
    model.eval()


def test(
    base: LoadedBase, model: DyLoraModel, tasks: Iterable[Task], expert: Mapping[str, str] | None = None
) -> Accuracies:
    """Share of exactly right labels of each set; with the expert of each set where they are given."""
    ends = [end_token_id(base.tokenizer)]
    found = {}
    for task in tasks:
        with model.forced(expert[task.name] if expert else None):
            found[task.name] = measure_accuracy(model, base.tokenizer, task.test, batch_size=16, end_token_ids=ends)
    return found


def sequential(lab: Lab) -> dict[str, Any]:
    base = lab.base()
    set_seed(lab.seed)
    model, learned = build_model(lab.config(lab.tasks, "model"), base), {}
    for place, task in enumerate(lab.tasks):
        learn(lab, base, model, [task], f"sequential-{place}")
        learned |= test(base, model, [task])
    return {"learned": learned, "last": test(base, model, lab.tasks)}


def joint(lab: Lab) -> dict[str, Any]:
    base = lab.base()
    set_seed(lab.seed)
    model = build_model(lab.config(lab.tasks, "model"), base)
    learn(lab, base, model, lab.tasks, "joint")
    return {"learned": {}, "last": test(base, model, lab.tasks)}


def orthogonal(lab: Lab) -> dict[str, Any]:
    """All LoRAs as one of their ranks together, of which only the rows of the newest learn."""
    old: dict[str, torch.Tensor] = {}
    learned: Accuracies = {}
    base = model = None
    for place, task in enumerate(lab.tasks):
        base, rank = lab.base(), _RANK * (place + 1)
        shape = {"lora_r": rank, "lora_alpha": 2.0 * rank}
        set_seed(lab.seed + place)
        model = build_model(lab.config([task], "model").model_copy(update=shape), base)
        weights = factors(model)
        keep = KeepOld(weights, old)
        keep.put_back()
        hooks = [weights[name].register_hook(teach_newest(name, weights, old)) for name in old]
        learn(lab, base, model, [task], f"orthogonal-{place}", [keep])
        for hook in hooks:
            hook.remove()
        assert factors(model).keys() == weights.keys()
        assert all(torch.equal(old_part(name, weights[name], rank - _RANK), weight) for name, weight in old.items())
        old = {name: weight.detach().clone() for name, weight in weights.items()}
        learned |= test(base, model, [task])
    assert base is not None and model is not None
    return {"learned": learned, "last": test(base, model, lab.tasks)}


class KeepOld(TrainerCallback):
    """Old LoRAs stay as they are: AdamW shrinks what has no gradient, too."""

    def __init__(self, weights: Mapping[str, torch.Tensor], old: Mapping[str, torch.Tensor]) -> None:
        self._weights, self._old = weights, old

    @torch.no_grad()
    def put_back(self) -> None:
        """Make them what they were."""
        for name, weight in self._old.items():
            rank = weight.shape[0 if is_a(name) else 1]
            old_part(name, self._weights[name], rank).copy_(weight)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer's step."""
        self.put_back()


def factors(model: DyLoraModel) -> dict[str, torch.Tensor]:
    """Name -> A (rank, features_in) or B (features_out, rank) of every Linear of the one LoRA, which is not packed."""
    found = {name: weight for name, weight in model.lm.named_parameters() if is_a(name) or ".lora_B." in name}
    assert found and all(weight.requires_grad for weight in found.values())
    return found


def is_a(name: str) -> bool:
    """Whether a parameter is an A."""
    return ".lora_A." in name


def old_part(name: str, weight: torch.Tensor, rank: int) -> torch.Tensor:
    """What older LoRAs have of a factor."""
    return weight[:rank] if is_a(name) else weight[:, :rank]


def teach_newest(
    name: str, weights: Mapping[str, torch.Tensor], old: Mapping[str, torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A hook by which only the newest LoRA gets a gradient, and its A that of the penalty sum |A_old A_new^T|, too."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        rank = weights[name].shape[0 if is_a(name) else 1] - _RANK
        old_part(name, gradient, rank).zero_()
        if is_a(name):
            newest = weights[name].detach()[rank:]
            gradient[rank:] += PENALTY * (newest @ old[name].T).sign() @ old[name]
        return gradient

    return hook


def ours(lab: Lab) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Ours, and the oracle's answers with the same experts, where each skill has got one."""
    skills = [{"skill": task.name, "datasets": [task.dataset]} for task in lab.tasks]
    config = make_config(lab.settings | {"mode": "continual", "skills": skills, "seed": lab.seed, "run_name": "ours"})
    result = train(config)
    learned: Accuracies = {}
    for folder, task in zip(sorted((config.run_dir / "stages").iterdir()), lab.tasks, strict=True):
        base = lab.base()
        learned |= test(base, load_model(base.model, folder / FINAL), [task])
    base = lab.base()
    model = load_model(base.model, config.run_dir / FINAL)
    served_by = dict(zip(result["summary"]["skills"], result["summary"]["routing"]["served_by"], strict=True))
    decisions = {stage["skill"]: stage["decision"] for stage in result["stages"]}
    found = {"learned": learned, "last": test(base, model, lab.tasks)}
    found |= {"routing": result["summary"]["routing"], "decisions": decisions}
    if len(set(served_by.values())) != len(lab.tasks):
        return found, None  # the oracle needs an expert for each skill
    last = test(base, model, lab.tasks, served_by)
    return found, {"learned": last, "last": last}


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """Average accuracy at the end, and the mean fall since each skill but the last was learned, in points."""
    last, learned = found["last"], found["learned"]
    falls = [learned[name] - last[name] for name in list(learned)[:-1]]
    return found | {
        "average": 100 * mean(last.values()),
        "forgetting": 100 * mean(falls) if falls else None,
    }


def show(results: Path, console: Console) -> None:
    """The table of what is there."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    table = Table(title="Accuracy after the last skill, and forgetting, in points: mean over seeds (deviation)")
    table.add_column("method")
    for order in ORDERS:
        table.add_column(f"order {order}", justify="right")
    for column in ("all", "forgetting", "runs"):
        table.add_column(column, justify="right")
    for method in METHODS:
        mine = [record for record in records if record["method"] == method]
        orders = [[r["average"] for r in mine if r["order"] in (order, None)] for order in ORDERS]
        falls = [record["forgetting"] for record in mine if record["forgetting"] is not None]
        cells = [*map(_said, orders), _said([r["average"] for r in mine]), _said(falls), str(len(mine))]
        table.add_row(method, *cells)
    console.print(table)


def _said(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.1f}" + (f" ({stdev(values):.1f})" if len(values) > 1 else "")


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Folder of the four sets.")
@click.option("--results", type=click.Path(path_type=Path), required=True, help="Folder of the JSON files.")
@click.option("--orders", default="1,2,3", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--methods", default=",".join(METHODS), show_default=True, help="oracle comes with ours.")
@click.option("--rows", default=152, show_default=True, help="Rows of a set; 8 of them validate.")
@click.option("--tests", default=60, show_default=True, help="Test rows of a set.")
@click.option("--words", default=40, show_default=True, help="Of each text; longer ones are cut.")
@click.option("--rate", default=2e-3, show_default=True, help="Learning rate.")
@click.option("--base", default="pypi:smollm2", show_default=True)
@click.option("--float32", is_flag=True, help="Do not compute in bfloat16.")
@click.option("--threads", default=1, show_default=True)
def main(
    data: Path | None, results: Path, orders: str, seeds: str, methods: str, rows: int, tests: int, words: int,
    rate: float, base: str, float32: bool, threads: int,
) -> None:  # fmt: skip
    console = Console(width=120)
    torch.set_num_threads(threads)
    results.mkdir(parents=True, exist_ok=True)
    settings = {"rows": rows, "tests": tests, "words": words, "learning_rate": rate, "base": base, "rank": _RANK}
    settings |= {"dtype": "float32" if float32 else "bfloat16", "batch_size": 4, "validation_split": 8 / rows}
    jobs = [
        (int(seed), order, method)
        for seed in seeds.split(",")
        for order in map(int, orders.split(","))
        for method in methods.split(",")
    ]
    for seed, order, method in jobs if data else ():
        number = None if method == "joint" else order  # the same for every order
        files = {name: results / f"{name}-order{number or 's'}-seed{seed}.json" for name in METHODS}
        if method == "oracle" or files[method].exists():
            continue
        console.print(f"{method}, order {order}, seed {seed}")
        with tempfile.TemporaryDirectory(prefix="olora-") as temporary:
            folder = Path(temporary)
            assert data is not None
            drawn = make_tasks(data, ORDERS[order], folder, rows=rows, tests=tests, words=words, seed=seed)
            lab = Lab(tasks=drawn, seed=seed, settings={
                "base_model": base, "output_dir": str(folder / "runs"), "max_length": 256, "overlong": "truncate",
                "validation_split": settings["validation_split"], "lora_r": _RANK, "lora_alpha": 2 * _RANK,
                "lora_dropout": 0.0, "target_modules": "attention", "batch_size": 4, "eval_batch_size": 16,
                "learning_rate": rate, "warmup_ratio": 0.1, "num_epochs": 1, "logging_steps": 8, "sample_tokens": 0,
                "save_steps": 1000, "bf16": not float32,
            })  # fmt: skip
            start = time.monotonic()
            if method == "ours":
                found, upper = ours(lab)
                made = {"ours": found} | ({"oracle": upper} if upper else {})
            else:
                made = {method: {"sequential": sequential, "orthogonal": orthogonal, "joint": joint}[method](lab)}
            for name, record in made.items():
                record = {"method": name, "order": number, "seed": seed, **summarise(record)}
                record |= {"seconds": round(time.monotonic() - start), "settings": settings}
                scratch = files[name].with_suffix(".new")
                scratch.write_text(json.dumps(record | {"environment": environment(_ROOT)}, indent=2) + "\n", "utf-8")
                shutil.move(scratch, files[name])
                console.print(f"  {name}: {record['average']:.1f}, forgetting {record['forgetting']}; {record['last']}")
    show(results, console)


if __name__ == "__main__":
    main()
