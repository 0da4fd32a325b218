"""Fill the tables and the picture of docs/performance.md from benchmarks/results; run after the benchmarks.

What stands between `<!-- NAME -->` and `<!-- /NAME -->` is made here; all else on the page is written by hand. Each
block names the file that it is of, so that a page with other figures than its files does not pass the tests.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
from _contenders import RANK

from dylora_moe.report.charts import MIDDLE, Axes, Line, line_chart

_ROOT = Path(__file__).resolve().parents[1]
_RESULTS = _ROOT / "benchmarks" / "results"
PAGE, PICTURE = _ROOT / "docs" / "performance.md", _ROOT / "docs" / "performance-growth.svg"
_STYLE = """
svg { --c0: #0067a5; --c1: #b84a00; --c2: #007a56; --faint: #5a6472; --line: #d7dce2; --page: #fff; background: #fff }
text { fill: var(--faint); font: 12px system-ui, sans-serif }
text.name { fill: var(--s) } .grid { stroke: var(--line) } .dot { fill: var(--s) } .hit { fill: transparent }
.line { fill: none; stroke: var(--s); stroke-width: 2 } .interval { stroke: var(--s); stroke-width: 7; opacity: .3 }
"""

Record = Mapping[str, Any]


def read(name: str) -> Any:
    """A file of results."""
    return json.loads((_RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown, numbers to the right."""
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def measured(name: str, environment: Record) -> str:
    """Where figures come from."""
    load = environment.get("load_average_at_end") or environment["load_average"]
    return (
        f"`benchmarks/results/{name}.json`, {environment['date'][:10]}, {environment['cpu']}, "
        f"{environment['threads']} thread, load {load[0]:.1f}, torch {environment['torch']}."
    )


def bars_of(bars: Sequence[Record]) -> str:
    """A list of what was asked and what came out."""
    return "\n".join(
        f"- {bar['name']}: **{bar['value']:{'.3f' if bar['value'] >= 0.001 else '.0e'}}**"
        + (f" ({bar['limit']})" if isinstance(bar["limit"], str) else f" (bar {bar['limit']})")
        + ("" if bar["passed"] else ", missed")
        for bar in bars
        if bar["value"] is not None
    )


def step(name: str) -> str:
    """Whole training steps."""
    report = read(name)
    parts = []
    for shape in report["shapes"]:
        rows = [
            [
                r["name"],
                f"{r['trainable_parameters'] / 1e6:.2f}",
                f"{r['median_s']:.2f}",
                f"{r['ratio']['paired']:.3f}",
                f"{r['saved_ratio']:.3f}" if r["saved_ratio"] else "",
            ]
            for r in shape["contenders"]
        ]
        parts.append(table(["", "trained, M", "CPU s", "of one LoRA", "saved activations"], rows))
        parts.append(bars_of(shape["bars"]))
    void = "" if report["valid"] else " Void by its own checks."
    return "\n\n".join([*parts, measured(name, report["environment"]) + void])


def growth() -> str:
    """The picture of step time over experts."""
    return f"![Time of a step by the number of experts, in steps of one PEFT LoRA]({PICTURE.name})"


def picture() -> str:
    """Ratio to one LoRA over N, of the tiny shape."""
    (shape,) = read("step-tiny-64")["shapes"]
    lines = []
    for place, kind in enumerate(("token", "sequence")):
        points = [
            (float(r["experts"]), r["ratio"]["paired"])
            for r in shape["contenders"]
            if r["style"] == "ours" and r["top_k"] == 1 and (r["experts"] == 1 or r["granularity"] == kind)
        ]
        lines.append(Line(label="by token" if kind == "token" else "by document", points=points, colour=place))
    wide = [r for r in shape["contenders"] if r["style"] == "lora total rank"]
    points = [(r["rank"] / RANK, r["ratio"]["paired"]) for r in wide]
    if points:
        lines.append(Line(label="one LoRA, 16 N", points=[(1.0, 1.0), *points], colour=2))
    axes = Axes(title="Time of a step by the number of experts", x="experts", y="steps of one PEFT LoRA", low=0.8)
    return alone(line_chart(lines, axes, MIDDLE))


def alone(drawn: object) -> str:
    """A chart of a report as a file of its own, with the colours that the report's page gives it."""
    return (
        str(drawn)
        .replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        .replace(">", f"><style>{_STYLE}</style>", 1)
    )


def memory(name: str) -> str:
    """Peaks of training."""
    report = read(name)
    rows = [
        [each["name"], f"{each['peak_bytes'] / 1e6:.0f}", f"{each['more_bytes'] / 1e6:.0f}", f"{each['ratio']:.3f}"]
        for each in report["contenders"]
    ]
    head = ["", "peak, MB", "of that more experts' own", "of one LoRA, without these"]
    return "\n\n".join([table(head, rows), bars_of(report["bars"]), measured(name, report["environment"])])


def ranks(name: str) -> str:
    """One Linear by rank and number of experts, as `auto` computes it."""
    report = read(name)
    kinds = [(kind, top_k) for kind in ("token", "sequence") for top_k in report["settings"]["top_k"]]
    rows = []
    for result in report["results"]:
        lora = result["layers"][0]
        for experts in report["settings"]["experts"]:
            taken = {
                (each["granularity"], each["top_k"]): each
                for each in result["layers"]
                if each["experts"] == experts and (each["is_auto"] or each["execution"] == "alone")
            }
            found = [taken.get(kind) or taken.get((None, 1)) for kind in kinds]
            rows.append(
                [
                    f"r={result['rank']}, N={experts}",
                    *(f"{each['ratio']['paired']:.2f}" for each in found),
                    " / ".join(str(each["operations"]) for each in found),
                    " / ".join(f"{each['saved_bytes'] / lora['saved_bytes']:.1f}" for each in found),
                ]
            )
    names = {("token", 1): "by token", ("sequence", 1): "by document"}
    titles = [names.get(kind) or f"top {kind[1]}" for kind in kinds]
    head = ["", *titles, "operations", "saved bytes"]
    return "\n\n".join([table(head, rows), bars_of(report["bars"]), measured(name, report["environment"])])


def batches(name: str) -> str:
    """One Linear by rows and tokens of a row, by each execution."""
    report = read(name)
    kinds = ("grouped", "rowwise", "bottleneck")
    rows = []
    for result in report["results"]:
        for contest in result["contests"]:
            by = "token" if contest["granularity"] == "token" else "document"
            ratios = [contest["ratios"].get(kind) for kind in kinds]
            name_of_row = f"{result['rows']} x {result['tokens']}, N={contest['experts']}, by {by}"
            told = [f"{ratio:.2f}" if ratio else "" for ratio in ratios]
            rows.append([name_of_row, *told, contest["fastest"], contest["auto"]])
    head = ["", *kinds, "fastest", "`auto` takes"]
    return "\n\n".join([table(head, rows), bars_of(report["bars"]), measured(name, report["environment"])])


def decode(name: str) -> str:
    """Written tokens."""
    report = read(name)
    parts = []
    for result in report["results"]:
        others = list(next(iter(result["writers"].values()))["of"])
        rows = [
            [writer, f"{each['ms_per_token']:.1f}", *(f"{each['of'][other]:.3f}" for other in others)]
            for writer, each in result["writers"].items()
        ]
        word = "row" if result["rows"] == 1 else "rows"
        head = [f"{result['shape']}, {result['rows']} {word}", "ms a token", *(f"of {other}" for other in others)]
        parts.append(table(head, rows))
    return "\n\n".join([*parts, bars_of(report["bars"]), measured(name, report["environment"])])


def loss(name: str) -> str:
    """The head."""
    report = read(name)
    rows = [
        [
            f"{way}, {case['labelled']:.0%} labelled",
            f"{median(each['seconds']):.2f}",
            f"{each['ratio']:.3f}",
            f"{each['peak_bytes'] / 2**20:.0f}",
            f"{each['peak_ratio']:.3f}",
            f"{each['gradient_off']:.0e}",
        ]
        for case in report["cases"]
        for way, each in case["losses"].items()
    ]
    head = ["", "CPU s", "of full logits", "extra peak, MiB", "of full logits", "gradient off by"]
    return "\n\n".join([table(head, rows), bars_of(report["bars"]), measured(name, report["environment"])])


def peers(name: str) -> str:
    """Training end to end."""
    report = read(name)
    others = list(next(iter(report["summary"].values()))["times_as_fast_as"])
    rows = [
        [
            contender,
            f"{each['tokens_per_cpu_s']:.1f}",
            *(f"{each['times_as_fast_as'][other]:.2f}" for other in others),
            f"{each['filled_share']:.0%}",
            f"{each['roof_share']:.0%}",
            f"{each['peak_bytes'] / 1e9:.2f}",
            f"{each['loss']:.3f}",
        ]
        for contender, each in report["summary"].items()
    ]
    head = [
        "",
        "tokens a CPU s",
        *(f"times {other}" for other in others),
        "filled up",
        "of a large product",
        "peak, GB",
        "loss",
    ]
    where = measured(name, report["environment"] | {"threads": report["settings"]["threads"]})
    void = "" if not report["void"] else f" Void: {'; '.join(report['void'])}."
    return "\n\n".join([table(head, rows), bars_of(report["bars"]), where + void])


BLOCKS: dict[str, Callable[[], str]] = {
    "step": lambda: step("step-tiny-64"),
    "growth": growth,
    "memory": lambda: memory("memory"),
    "ranks": lambda: ranks("layer-ranks"),
    "batches": lambda: batches("layer-batches"),
    "decode": lambda: decode("decode"),
    "loss": lambda: loss("loss"),
    "peers": lambda: peers("train-vs-peers"),
}


def filled(page: str, blocks: Mapping[str, Callable[[], str]] = BLOCKS, called: str = PAGE.name) -> str:
    """The page with all blocks made anew."""
    for name, make in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise click.ClickException(f"{called} must have one block {name}.")
        text = make()
        page = pattern.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
    return page


@click.command()
def main() -> None:
    """Write docs/performance.md and its picture."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURE.write_text(picture() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
