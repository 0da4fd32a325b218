"""Fill the tables of README.md, docs/index.md and docs/paper.md, and the paper's pictures, from benchmarks/results.

As `performance.py` does for docs/performance.md: what stands between `<!-- NAME -->` and `<!-- /NAME -->` is made here.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import click
import performance
from performance import alone, filled, table

from dylora_moe.report.charts import MIDDLE, Axes, range_chart

_ROOT = Path(__file__).resolve().parents[1]
README, INDEX, PAPER = _ROOT / "README.md", _ROOT / "docs" / "index.md", _ROOT / "docs" / "paper.md"
KEPT, MIXED = _ROOT / "docs" / "paper-kept.svg", _ROOT / "docs" / "paper-mixed.svg"
_TINY, _SMOLLM2, _GEMMA = "step-tiny-64", "step-smollm2", "step-gemma"
_METHODS = {
    "ours": "ours, `mode: continual`",
    "oracle": "its experts, each prompt to that of its set",
    "sequential": "one LoRA in sequence",
    "orthogonal": "O-LoRA's penalty",
    "joint": "one LoRA on all sets at once",
}
Record = Mapping[str, Any]


def contenders(name: str) -> dict[str, Record]:
    """Of a benchmark of steps, by their names."""
    (shape,) = performance.read(name)["shapes"]
    return {each["name"]: each for each in shape["contenders"]}


def _times(found: Mapping[str, Record], name: str, digits: int = 2) -> str:
    return f"{found[name]['ratio']['paired']:.{digits}f}" if name in found else ""


def steps() -> str:
    """Whole training steps at three shapes."""
    shapes = [contenders(name) for name in (_TINY, _SMOLLM2, _GEMMA)]
    tiny = shapes[0]
    rows = {
        "8 experts, a decision a document": "DyLoRA-MoE, N=8, sequence",
        "32 experts, a decision a document": "DyLoRA-MoE, N=32, sequence",
        "64 experts, a decision a document": "DyLoRA-MoE, N=64, sequence",
        "8 experts, a decision a token": "DyLoRA-MoE, N=8, token",
        "32 experts, a decision a token": "DyLoRA-MoE, N=32, token",
        "64 experts, a decision a token": "DyLoRA-MoE, N=64, token",
        "8 experts, a token, top 2": "DyLoRA-MoE, N=8, token, top 2",
        "8 full passes": "8 full passes",
        "PEFT, 32 adapters active": "PEFT, 32 adapters active",
        "PEFT X-LoRA, 8 adapters": "PEFT X-LoRA, 8 adapters",
    }
    lines = []
    for said, name in rows.items():
        saved = tiny[name]["saved_ratio"]
        lines.append([said, *(_times(shape, name) for shape in shapes), f"{saved:.2f}" if saved else ""])
    head = [
        "",
        "26 M Llama, 1,024 tokens",
        "SmolLM2-135M's shape, 1,024",
        "Gemma-3-270M's shape, 512",
        "saved activations",
    ]
    dates = ", ".join(
        f"`{name}.json` of {performance.read(name)['environment']['date'][:10]}" for name in (_TINY, _SMOLLM2, _GEMMA)
    )
    return f"{table(head, lines)}\n\nIn `benchmarks/results`: {dates}. Saved activations are those of the first shape."


def kept() -> dict[str, list[Record]]:
    """Method -> its runs on the sets of O-LoRA's benchmark."""
    runs: dict[str, list[Record]] = {method: [] for method in _METHODS}
    for path in sorted((_ROOT / "benchmarks" / "results" / "olora").glob("*.json")):
        run = performance.read(f"olora/{path.stem}")
        runs[run["method"]].append(run)
    return runs


def _points(runs: Sequence[Record]) -> str:
    return f"{mean(run['average'] for run in runs):.1f}"


def olora() -> str:
    """Sets that come one after the other."""
    rows = []
    for method, runs in kept().items():
        averages, lost = [run["average"] for run in runs], [run["forgetting"] for run in runs]
        forgotten = "" if None in lost else f"{mean(lost):.1f}"
        row = [
            _METHODS[method],
            str(len(runs)),
            _points(runs),
            f"{min(averages):.1f} to {max(averages):.1f}",
            forgotten,
        ]
        rows.append(row)
    head = ["method", "runs", "points after the last set", "least and greatest run", "forgetting"]
    return f"{table(head, rows)}\n\n`benchmarks/results/olora`, a file a run."


def compare() -> str:
    """The first screen's answer to: and beside others?"""
    tiny, runs = contenders(_TINY), kept()
    peers = performance.read("train-vs-peers")
    speed = {name: f"{each['tokens_per_cpu_s']:.1f}" for name, each in peers["summary"].items()}
    quality = {name: f"{each['mean_loss']:.3f}" for name, each in performance.read("quality")["test"].items()}
    few = ", on few tokens (void by the benchmark's own check)" if peers["void"] else ""
    eight, sixty_four = (_times(tiny, f"DyLoRA-MoE, N={count}, sequence") for count in (8, 64))
    passes, x_lora = _times(tiny, "8 full passes"), _times(tiny, "PEFT X-LoRA, 8 adapters")
    rows = [
        [
            "CPU time of a training step, one PEFT LoRA being 1",
            f"8 experts: {eight}; 64 experts: {sixty_four}",
            f"8 full passes: {passes}; PEFT X-LoRA with 8: {x_lora}; "
            f"PEFT with 32 active: {_times(tiny, 'PEFT, 32 adapters active')}",
        ],
        [
            f"tokens a CPU second, Gemma-3-270M{few}",
            f"8 experts: {speed['ours, eight experts']}",
            f"TRL with PEFT, one LoRA: {speed['TRL + PEFT, its defaults']}; tuned: {speed['TRL + PEFT, tuned']}",
        ],
        [
            "right answers after four skills in sequence, %",
            _points(runs["ours"]),
            f"one LoRA: {_points(runs['sequential'])}; O-LoRA's penalty: {_points(runs['orthogonal'])}; "
            f"one LoRA on all at once: {_points(runs['joint'])}",
        ],
        [
            "test loss on six domains at once, 80 rows each; less is better",
            f"{quality['mixture, a decision a token']}; not a win",
            f"one LoRA of as many weights: {quality['one LoRA, rank 48']}; of one expert's rank: "
            f"{quality['one LoRA, rank 8']}",
        ],
    ]
    lines = ["| measured | here | beside it |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def quality() -> str:
    """Losses on test rows, of `quality.json`."""
    found = performance.read("quality")["test"]
    domains = list(found["base"]["loss"])
    rows = [
        [
            name,
            *(f"{each['loss'][domain]:.3f}" for domain in domains),
            f"{each['mean_loss']:.3f}",
            "" if name == "base" else _range(_by_seed(each)),
        ]
        for name, each in found.items()
    ]
    return table(["", *domains, "mean", "of the seeds"], rows) + "\n\n`benchmarks/results/quality.json`."


def _by_seed(each: Record) -> list[float]:
    losses = each["mean_loss_by_seed"]
    return list(losses.values()) if isinstance(losses, dict) else list(losses)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def streams() -> str:
    """Sixteen skills in three orders."""
    rows = []
    for order in range(3):
        found = performance.read(f"stream-order-{order}")
        summary, decisions = found["summary"], found["decisions"]
        kinds = [each["kind"] for each in decisions]
        rows.append(
            [
                f"order {order}",
                str(len(decisions)),
                str(sum(not each["right"] for each in decisions)),
                str(kinds.count("grow")),
                f"{summary['routing']['accuracy']:.1%}",
                f"{summary['accuracy']['forgetting']:.3f}",
                f"{summary['loss']['backward_transfer']:+.3f}",
                f"{summary['general_change']:+.3f}",
            ]
        )
    head = [
        "",
        "decisions",
        "wrong",
        "experts grown",
        "routed right",
        "forgetting, accuracy",
        "backward transfer, nats",
    ]
    where = "`stream-order-0.json`, `stream-order-1.json` and `stream-order-2.json`."
    return f"{table([*head, 'general text, nats'], rows)}\n\n{where}"


def novelty() -> str:
    """Detectors of new skills."""
    found = performance.read("novelty")
    measures = list(next(iter(found["summary"].values())))[:4]
    names = {"two_sample": "two samples", "mahalanobis": "Mahalanobis, above 2", "cosine": "cosine, below 0.75"}
    rows = [
        [names[detector], *(f"{each[measure][0]} of {each[measure][1]}" for measure in measures)]
        for detector, each in found["summary"].items()
    ]
    rates = found["rates"]["prompts"]
    low, high = rates["interval"]
    return (
        f"{table(['detector', *measures], rows)}\n\nTwo samples of one skill were called new {rates['new']} time in "
        f"{rates['total']} by prompts ({low:.2%} to {high:.2%}), stated {rates['stated']:.0%}. "
        "`benchmarks/results/novelty.json`."
    )


def tap() -> str:
    """Where the router reads."""
    found = performance.read("tap-smollm2")
    rows = [
        [
            each["variant"],
            f"{each['before']:.3f}",
            f"{each['after']:.3f}",
            f"{found['step_cpu_s'][each['variant']]:.2f}",
        ]
        for each in found["records"]
    ]
    return (
        table(["", "loss before", "after", "CPU s a step"], rows)
        + "\n\n`benchmarks/results/tap-smollm2.json`, one seed."
    )


def maturity() -> str:
    """A new expert alone, or among the others at first."""
    runs = performance.read("maturity")["runs"]
    ways = list(dict.fromkeys(run["way"] for run in runs))
    rows = []
    for seed in sorted({run["seed"] for run in runs}):
        by_way = {run["way"]: run["skills"] for run in runs if run["seed"] == seed}
        for place, skill in enumerate(by_way["alone"]):
            cells = (f"{by_way[way][place]['loss']:.3f}" if way in by_way else "" for way in ways)
            rows.append([f"{skill['skill']}, seed {seed}", *cells])
    return table(["validation loss", *ways], rows) + "\n\n`benchmarks/results/maturity.json`."


def fit() -> str:
    """Memory estimated and measured."""
    files = {"SmolLM2-135M": "fit-smollm2-as-run", "Gemma-3-270M": "fit-gemma-as-run"}
    found = {name: performance.read(file)["cases"] for name, file in files.items()}
    cases = [each["case"]["name"] for each in next(iter(found.values()))]
    rows = []
    for name, each in found.items():
        by_name = {case["case"]["name"]: f"{case['ratio']:.2f}" for case in each}
        rows.append([name, *(by_name.get(case, "") for case in cases)])
    return table(["estimate / measured peak", *cases], rows) + "\n\n`benchmarks/results/fit-*-as-run.json`."


def assemble() -> str:
    """Independent LoRAs behind a router made of rows."""
    routers = performance.read("assemble")["routers"]
    kinds = list(dict.fromkeys(each["router"] for each in routers))
    found = {(each["rows"], each["router"]): f"{each['right']:.1%}" for each in routers}
    counts = sorted({each["rows"] for each in routers})
    rows = [[str(count), *(found.get((count, kind), "") for kind in kinds)] for count in counts]
    return table(["rows of each", *kinds], rows) + "\n\n`benchmarks/results/assemble.json`."


def interruptions() -> str:
    """Runs that were ended again and again."""
    rows = [
        [
            each["kind"] + (f", disk lost {each['wiped']} times" if each.get("wiped") else ""),
            *(each["signal"], str(each["times"]), str(each["compared"]), str(len(each["different"]))),
        ]
        for name in ("interruptions", "interruptions-remote")
        for each in performance.read(name)["results"]
    ]
    stream = performance.read("stream-interruptions")
    rows.append(
        ["stream", "SIGKILL", str(len(stream["kills"])), str(stream["files_compared"]), str(len(stream["different"]))]
    )
    head = ["run", "signal", "times", "files and records compared", "different"]
    return (
        table(head, rows)
        + "\n\n`benchmarks/results/interruptions.json`, `interruptions-remote.json` and `stream-interruptions.json`."
    )


def serve() -> str:
    """Many requests in one pass."""
    found = performance.read("serve")
    together = found["together"]
    return (
        f"{together['clients']} clients for {together['seconds']:.0f} seconds: {together['answers']} answers, "
        f"{together['errors']} errors, {together['other_than_alone']} other than alone; "
        f"{found['tokens_per_s_together']:.0f} tokens a second together, {found['tokens_per_s_alone']:.0f} one at a "
        f"time ({found['times_faster']:.1f} times). `benchmarks/results/serve.json`."
    )


BLOCKS: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"compare": compare, "steps": steps},
    INDEX: {"compare": compare},
    PAPER: {
        "steps": steps,
        "decode": lambda: performance.decode("decode"),
        "loss": lambda: performance.loss("loss"),
        "peers": lambda: performance.peers("train-vs-peers"),
        "fit": fit,
        "tap": tap,
        "quality": quality,
        "olora": olora,
        "streams": streams,
        "novelty": novelty,
        "maturity": maturity,
        "assemble": assemble,
        "interruptions": interruptions,
        "serve": serve,
    },
}


def picture_of_kept() -> str:
    """Points after the last set, mean and range of the runs."""
    rows = []
    for method, runs in kept().items():
        points = [run["average"] for run in runs]
        rows.append((_METHODS[method].replace("`", ""), None, mean(points), (min(points), max(points))))
    axes = Axes(
        title="Right answers after four sets in sequence", x="points; the bar is from the least run to the greatest"
    )
    return alone(range_chart(rows, axes, MIDDLE))


def picture_of_mixed() -> str:
    """Mean test loss, mean and range of the seeds."""
    rows = []
    for name, each in performance.read("quality")["test"].items():
        if name != "base":
            losses = _by_seed(each)
            rows.append((name, None, each["mean_loss"], (min(losses), max(losses))))
    axes = Axes(
        title="Loss on test rows of six domains", x="nats a token, less is better; the bar is that of the seeds"
    )
    return alone(range_chart(rows, axes, MIDDLE))


PICTURES: dict[Path, Callable[[], str]] = {KEPT: picture_of_kept, MIXED: picture_of_mixed}


@click.command()
def main() -> None:
    """Write the tables of README.md, docs/index.md and docs/paper.md, and the paper's pictures."""
    for page, blocks in BLOCKS.items():
        page.write_text(filled(page.read_text(encoding="utf-8"), blocks, page.name), encoding="utf-8")
    for path, draw in PICTURES.items():
        path.write_text(draw() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
