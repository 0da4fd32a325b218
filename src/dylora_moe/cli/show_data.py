"""What a run would learn from: rows, lengths, what was left out, and every token of some rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dylora_moe.report.wording import left_out, visible

_BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


def show_data(console: Console, summary: Mapping[str, Any]) -> None:
    """Rows and tokens of each domain, from a data summary as JSON has it."""
    table = Table(title="Data (rows to train and to validate on, training tokens)", title_justify="left")
    for column in ("domain", "licence", "train", "validate", "tokens", "labelled", "longest"):
        table.add_column(column, justify="left" if column in ("domain", "licence") else "right")
    for domain in summary["domains"]:
        licences = ", ".join(licence or "unknown" for licence in domain["licences"])
        rows, validated, tokens = domain["num_train"], domain["num_validation"], domain["num_train_tokens"]
        share, longest = domain["num_train_label_tokens"] / max(tokens, 1), domain["lengths"]["maximum"]
        figures = (f"{rows:,}", f"{validated:,}", f"{tokens:,}", f"{share:.0%}", f"{longest:,}")
        table.add_row(escape(domain["domain"]), escape(licences), *figures)
    console.print(table)
    if batches := summary["batches"]:
        number, full = batches["num_batches"], batches["fill_rate"]
        console.print(f"an epoch: {number:,} batches; {full:.0%} of their tokens are no padding", highlight=False)
    for domain in summary["domains"]:
        remarks = []
        if reasons := left_out(domain):
            remarks.append("left out: " + ", ".join(f"{reason} {number:,}" for reason, number in reasons.items()))
        if formats := domain["formats"]:
            remarks.append("read as " + "; ".join(formats))
        if cut := domain["num_cut"]:
            remarks.append(f"{cut:,} rows cut to max_length")
        for remark in remarks:
            console.print(f"{domain['domain']}: {remark}", highlight=False, markup=False)


def show_lengths(console: Console, summary: Mapping[str, Any]) -> None:
    """Tokens a row in each domain, with a small histogram."""
    table = Table(title="Tokens a row", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("domain", "shortest", "median", "90 %", "99 %", "longest", "0 to longest"):
        is_bars = column == "0 to longest"
        left = is_bars or column == "domain"
        table.add_column(
            column,
            justify="left" if left else "right",
            no_wrap=is_bars,
            min_width=len(summary["domains"][0]["lengths"]["histogram"]) if is_bars else None,
        )
    for domain in summary["domains"]:
        lengths = domain["lengths"]
        values = [lengths[name] for name in ("minimum", "median", "p90", "p99", "maximum")]
        table.add_row(escape(domain["domain"]), *[f"{value:,}" for value in values], bars(lengths["histogram"]))
    console.print(table)


def bars(counts: Sequence[int]) -> str:
    """One character a count, its height the count's share of the largest; a blank for none."""
    largest = max(counts)
    return "".join(_BARS[-(-count * len(_BARS) // largest) - 1] if count else " " for count in counts)


def show_tokens(console: Console, title: str, tokens: Sequence[Mapping[str, Any]]) -> None:
    """Every token of a row: learned ones in green, the prompt dim, special tokens inverted, borders by underlining.

    Where there is no colour, what is learned stands between guillemets.
    """
    text = Text()
    marks = console.color_system is None
    for index, token in enumerate(tokens):
        was_learned = index > 0 and tokens[index - 1]["is_learned"]
        if marks and token["is_learned"] != was_learned:
            text.append("\u00ab" if token["is_learned"] else "\u00bb")
        style = "green" if token["is_learned"] else "dim"
        if token["is_special"]:
            style += " reverse"
        elif index % 2:
            style += " underline"
        text.append(visible(token["text"]), style=style)
    if marks and tokens and tokens[-1]["is_learned"]:
        text.append("\u00bb")
    learned = sum(token["is_learned"] for token in tokens)
    console.print(f"[bold]{escape(title)}[/], {len(tokens):,} tokens, {learned:,} learned", highlight=False)
    console.print(text, soft_wrap=True)
    console.print()
