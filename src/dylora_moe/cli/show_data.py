"""What a run would learn from: rows, lengths, what was left out, and every token of some rows."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

_LEFT_OUT = (
    ("num_filtered", "by the entry's filter"),
    ("num_test", "official test split"),
    ("num_unused", "splits of no use here"),
    ("num_overlong", "too long"),
    ("num_bad_rows", "unreadable"),
)
_REMOVED = (
    ("encoding", "wrongly decoded"),
    ("empty", "empty answer"),
    ("truncated", "cut answer"),
    ("duplicate", "duplicate"),
    ("near_duplicate", "near duplicate"),
    ("leak", "prompt that is validated or tested on"),
)
_BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


def show_data(console: Console, summary: Any) -> None:
    """Rows and tokens of each domain, from a data summary record."""
    table = Table(title="Data (rows to train and to validate on, training tokens)", title_justify="left")
    for column in ("domain", "licence", "train", "validate", "tokens", "labelled", "longest"):
        table.add_column(column, justify="left" if column in ("domain", "licence") else "right")
    for domain in summary.domains:
        share = domain.num_train_label_tokens / max(domain.num_train_tokens, 1)
        table.add_row(
            escape(domain.domain),
            escape(", ".join(licence or "unknown" for licence in domain.licences)),
            f"{domain.num_train:,}",
            f"{domain.num_validation:,}",
            f"{domain.num_train_tokens:,}",
            f"{share:.0%}",
            f"{domain.lengths.maximum:,}",
        )
    console.print(table)
    if summary.batches is not None:
        full = f"{summary.batches.fill_rate:.0%} of their tokens are no padding"
        console.print(f"an epoch: {summary.batches.num_batches:,} batches; {full}", highlight=False)
    for domain in summary.domains:
        counts = [(getattr(domain, name), text) for name, text in _LEFT_OUT]
        counts += [(domain.removed.get(reason, 0), text) for reason, text in _REMOVED]
        left_out = ", ".join(f"{text} {number:,}" for number, text in counts if number)
        if left_out:
            console.print(f"{escape(domain.domain)}: left out: {left_out}", highlight=False)
        if domain.formats:
            console.print(f"{escape(domain.domain)}: read as {escape('; '.join(domain.formats))}", highlight=False)
        if domain.num_cut:
            console.print(f"{escape(domain.domain)}: {domain.num_cut:,} rows cut to max_length", highlight=False)


def show_lengths(console: Console, summary: Any) -> None:
    """Tokens a row in each domain, with a small histogram."""
    table = Table(title="Tokens a row", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("domain", "shortest", "median", "90 %", "99 %", "longest", "0 to longest"):
        is_bars = column == "0 to longest"
        left = is_bars or column == "domain"
        table.add_column(
            column,
            justify="left" if left else "right",
            no_wrap=is_bars,
            min_width=len(summary.domains[0].lengths.histogram) if is_bars else None,
        )
    for domain in summary.domains:
        lengths = domain.lengths
        values = (lengths.minimum, lengths.median, lengths.p90, lengths.p99, lengths.maximum)
        table.add_row(escape(domain.domain), *[f"{value:,}" for value in values], bars(lengths.histogram))
    console.print(table)


def bars(counts: Sequence[int]) -> str:
    """One character a count, its height the count's share of the largest; a blank for none."""
    largest = max(counts)
    return "".join(_BARS[-(-count * len(_BARS) // largest) - 1] if count else " " for count in counts)


def show_tokens(console: Console, title: str, tokens: Sequence[Any]) -> None:
    """Every token of a row: learned ones in green, the prompt dim, special tokens inverted, borders by underlining.

    Where there is no colour, what is learned stands between guillemets.
    """
    text = Text()
    marks = console.color_system is None
    for index, token in enumerate(tokens):
        was_learned = index > 0 and tokens[index - 1].is_learned
        if marks and token.is_learned != was_learned:
            text.append("\u00ab" if token.is_learned else "\u00bb")
        style = "green" if token.is_learned else "dim"
        if token.is_special:
            style += " reverse"
        elif index % 2:
            style += " underline"
        text.append(_visible(token), style=style)
    if marks and tokens and tokens[-1].is_learned:
        text.append("\u00bb")
    learned = sum(token.is_learned for token in tokens)
    console.print(f"[bold]{escape(title)}[/], {len(tokens):,} tokens, {learned:,} learned", highlight=False)
    console.print(text, soft_wrap=True)
    console.print()


def _visible(token: Any) -> str:
    """A token's text with its line ends marked."""
    return token.text.replace("\r", "\u240d").replace("\n", "\u240a\n")
