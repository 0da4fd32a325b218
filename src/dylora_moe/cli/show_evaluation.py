"""What a person sees of a measured run."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dylora_moe.cli.show import printable, show_routing

_UNLIKELY = 0.05  # p below which a difference is told from chance


def show_measured(console: Console, measured: Mapping[str, Mapping[str, Any]]) -> None:
    """Losses of each speaker on each domain, and the mixture's routing."""
    for record in measured.values():
        _show_losses(console, record)
    for record in measured.values():
        show_routing(console, record["routing"])


def _show_losses(console: Console, record: Mapping[str, Any]) -> None:
    title = f"{_speaker(record)}: loss on {record['split']} rows (nats per answer token)"
    table = Table(title=title, title_justify="left")
    beside_base = any("against_base" in domain for domain in record["domains"])
    than_base = ("less than\nthe base",) if beside_base else ()
    for column in ("domain", "loss", *than_base, "perplexity", "bits/byte", "next\ntoken\nright", "rows"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for domain in record["domains"]:
        compared = [_less_than_base(domain["against_base"])] if beside_base else []
        table.add_row(
            escape(domain["domain"]),
            _figure(domain, "loss", 3),
            *compared,
            _figure(domain, "perplexity", 2),
            _figure(domain, "bits_per_byte", 3),
            _figure(domain, "accuracy", 1, share=True),
            f"{domain['rows']:,}",
        )
    console.print(table)
    p = "; p: how often chance alone makes such a difference (paired rows, signs tossed, Holm)" if beside_base else ""
    console.print(f"Below a figure its 95 % interval over rows{p}.", style="dim", highlight=False)


def _figure(domain: Mapping[str, Any], name: str, places: int, *, share: bool = False) -> str:
    """A figure, and its interval in the line below with a digit less, so that the table fits a terminal."""
    value, interval = domain[name], domain[f"{name}_interval"]
    if value is None:
        return ""
    factor, unit = (100, "%") if share else (1, "")
    shown = f"{factor * value:.{places}f}{unit}"
    if interval is None:
        return shown
    low, high = (f"{factor * end:.{places - 1}f}" for end in interval)
    return f"{shown}\n[dim]{low}-{high}{unit}[/]"


def _less_than_base(difference: Mapping[str, Any]) -> str:
    p = difference["p_holm"]
    style = "dim" if p >= _UNLIKELY else "green" if difference["difference"] < 0 else "red"
    return f"[{style}]{-difference['difference']:.3f}[/]\n[dim]p {p:.2g}[/]"


def show_matrix(console: Console, matrix: Mapping[str, Any]) -> None:
    """Loss of every speaker on every domain, the best single expert of each set off."""
    table = Table(title=f"Loss on {matrix['split']} rows (nats per answer token)", title_justify="left")
    table.add_column("answers")
    for domain in matrix["domains"]:
        table.add_column(escape(domain), justify="right")
    best = matrix["oracle"]["by_domain"]
    for row in matrix["rows"]:
        alone = row["speaker"].startswith("expert ")
        cells = [
            f"[bold reverse]{loss:.3f}[/]" if alone and loss == least else f"{loss:.3f}"
            for loss, least in zip(row["losses"], best, strict=True)
        ]
        table.add_row(escape(row["speaker"]), *cells)
    table.add_section()
    table.add_row("best expert of each row", *[f"{loss:.3f}" for loss in matrix["oracle"]["by_row"]])
    console.print(table)


def show_similarity(console: Console, record: Mapping[str, Any]) -> None:
    """How alike the experts' changes of the base are."""
    if len(record["experts"]) < 2:
        return
    table = Table(
        title="How alike the experts are", title_justify="left", caption="cosine of their changes of the base"
    )
    table.add_column("")
    for name in record["experts"]:
        table.add_column(escape(name), justify="right")
    for name, row in zip(record["experts"], record["similarity"], strict=True):
        table.add_row(escape(name), *[f"{value:+.2f}" for value in row])
    console.print(table)


def show_comparison(console: Console, record: Mapping[str, Any]) -> None:
    """One run beside others, on the rows of both."""
    for other in record["others"]:
        title = escape(f"{record['run']} against {other['run']}, {record['split']} rows")
        table = Table(title=title, title_justify="left")
        for column in ("domain", "this run", "the other", "difference", "95 % interval", "p", "unit", "rows"):
            table.add_column(column, justify="left" if column in ("domain", "unit") else "right")
        for domain in other["domains"]:
            style = "" if domain["p_holm"] >= _UNLIKELY else "green" if domain["difference"] < 0 else "red"
            table.add_row(
                escape(domain["domain"]),
                f"{domain['ours']:.3f}",
                f"{domain['theirs']:.3f}",
                f"{domain['difference']:+.3f}",
                _interval(domain["interval"], "+.3f"),
                f"{domain['p_holm']:.2g}",
                domain["unit"],
                f"{domain['rows']:,}" + (f", {domain['rows_apart']:,} apart" if domain["rows_apart"] else ""),
                style=style,
            )
        console.print(table)
    console.print(
        "Lower is better: a difference below 0 is this run's advantage. Coloured where chance alone would rarely make "
        f"it, p < {_UNLIKELY} (paired rows, signs tossed; Holm's correction for the number of domains). It speaks of "
        "these two models on other such rows, not of what training with other seeds would give.",
        highlight=False,
    )


def show_answers(console: Console, record: Mapping[str, Any]) -> None:
    """Share of right answers of each speaker in each domain."""
    table = Table(title=f"Right answers, {record['split']} rows", title_justify="left")
    speakers = list(record["domains"][0]["speakers"])
    for column in ("domain", "what is compared", "rows"):
        table.add_column(column, justify="right" if column == "rows" else "left")
    for speaker in speakers:
        table.add_column(_speaker({"speaker": speaker}), justify="right")
    beside_base = record["domains"][0]["against_base"] is not None
    if beside_base:
        table.add_column("more than the base", justify="right")
    kinds = {"label": "the label", "final": "what stands after ####", "exact": "the whole answer"}
    for domain in record["domains"]:
        shares = [_share(domain["speakers"][speaker]) for speaker in speakers]
        part = "" if domain["rows"] == domain["rows_there"] else f" of {domain['rows_there']:,}"
        more = [_more_than_base(domain["against_base"])] if beside_base else []
        table.add_row(escape(domain["domain"]), kinds[domain["kind"]], f"{domain['rows']:,}{part}", *shares, *more)
    console.print(table)
    if record["free_text"]:
        names = ", ".join(record["free_text"])
        console.print(f"Free text, which has no one right form: {names}.", highlight=False, markup=False)


def show_code(console: Console, record: Mapping[str, Any]) -> None:
    """Problems solved by each speaker, and one answer to read."""
    each = "1 sample" if record["samples"] == 1 else f"{record['samples']:,} samples"
    title = f"{record['name']}, {record['split']} split: {record['problems']:,} problems, {each} each"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("answers")
    for k in record["k"]:
        table.add_column(f"pass@{k}", justify="right")
    table.add_column("what became of the programs")
    for each in record["speakers"]:
        shares = [_share({"share": each["pass"][str(k)], "interval": each["interval"][str(k)]}) for k in record["k"]]
        ended = ", ".join(f"{name} {count:,}" for name, count in sorted(each["ended"].items(), key=lambda x: -x[1]))
        table.add_row(escape(_speaker(each)), *shares, ended)
    console.print(table)
    if record["against_base"]:
        console.print(f"More than the base: {_more_than_base(record['against_base'])}.", highlight=False)
    console.print(
        f"All {record['references_passed']:,} reference solutions passed first. Sandbox: {record['sandbox']}.",
        highlight=False,
    )
    example = record["example"]
    console.print(f"\n[bold]{escape(printable(example['problem']))}[/], asked:", highlight=False)
    for head, text in (("", example["prompt"]), ("answered:", example["answer"]), ("and run:", example["program"])):
        console.print(head, style="bold")
        console.print("\n".join("    " + line for line in printable(text).splitlines()), markup=False, highlight=False)
    verdict = printable(f"Verdict: {example['verdict']}. {example['detail']}")
    console.print(verdict, highlight=False, markup=False)


def show_tasks(console: Console, record: Mapping[str, Any]) -> None:
    """Figures of public tasks."""
    table = Table(title=f"Tasks of lm-evaluation-harness {record['lm_eval']}", title_justify="left")
    for column in ("task", "metric", "figure", "standard error", "rows", "examples shown"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for name, task in record["tasks"].items():
        for metric in task["metrics"]:
            table.add_row(
                escape(name),
                escape(metric["metric"] + ("" if metric["filter"] == "none" else f", {metric['filter']}")),
                f"{metric['value']:.4f}",
                "" if metric["stderr"] is None else f"{metric['stderr']:.4f}",
                "" if task["rows"] is None else f"{task['rows']:,}",
                str(task["num_fewshot"] or 0),
            )
    console.print(table)


def show_levels(console: Console, record: Mapping[str, Any]) -> None:
    """Levels asked for and found of a model's answers."""
    told = record["levels_found"]
    names = list(record["levels"])
    table = Table(title="Levels asked for, and those of the answers", title_justify="left")
    for column in (
        "asked for",
        *(map(escape, told["levels"]) if told else ()),
        "too short to tell",
        "all together",
        "pass",
        "words",
    ):
        table.add_column(column, justify="left" if column == "asked for" else "right")
    for name in names:
        level = record["levels"][name]
        found = told["counts"][told["levels"].index(name)] if told else []
        counts = (f"{count:,}" for count in (*found, level["answers"] - sum(found)))
        table.add_row(escape(name), *counts, level["together"] or "", f"{level['passed']:,}", f"{level['words']:.0f}")
    console.print(table)
    if told:
        console.print(
            f"Agreement {told['kappa']:.2f} (weighted kappa: 1 for the levels asked for, 0 for what chance gives).",
            highlight=False,
        )
    wrong = ", ".join(f"{reason} {count:,}" for reason, count in sorted(record["wrong"].items(), key=lambda x: -x[1]))
    if wrong:
        console.print(f"Answers that would not pass: {wrong}.", highlight=False)


def _speaker(record: Mapping[str, Any]) -> str:
    names = {"routed": "The mixture", "base": "The base alone", "dense": "All experts together"}
    speaker: str = record["speaker"]
    return names.get(speaker) or speaker.replace("expert-", "Expert ", 1)


def _share(figure: Mapping[str, Any]) -> str:
    interval = figure["interval"]
    return f"{figure['share']:.1%}" + (f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval else "")


def _more_than_base(difference: Mapping[str, Any]) -> str:
    return f"{100 * difference['difference']:+.1f} points, p {difference['p']:.2g}"


def _interval(interval: Sequence[float] | None, form: str = ".3f") -> str:
    return "" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"
