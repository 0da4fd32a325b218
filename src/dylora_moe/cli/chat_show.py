"""Answers on a terminal: who spoke which token, in colours or in words, and several answers side by side."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.style import Style
from rich.table import Table
from rich.text import Text

from dylora_moe.cli.show import printable

if TYPE_CHECKING:
    from dylora_moe.evaluate.load import Speaker
    from dylora_moe.serve.request import Piece
    from dylora_moe.serve.talk import Answer

# Okabe and Ito's colours, which differ for colour-blind eyes too; as grounds with their own ink, so that light and
# dark terminals show the same.
_GROUNDS = (
    "black on #56b4e9",
    "black on #e69f00",
    "black on #009e73",
    "black on #cc79a7",
    "black on #f0e442",
    "white on #0072b2",
    "black on #d55e00",
    "black on #b0b0b0",
)
_MORE = ("", " underline", " italic", " underline italic")
_COLUMN = 30  # characters of the narrowest column that is read with ease


class Show:
    """Writes answers to one console and all else to another, which on a terminal are the same.

    Args:
        answers: Of standard output.
        asides: Of standard error.
        experts: In the router's order.
    """

    def __init__(self, answers: Console, asides: Console, experts: Sequence[str]) -> None:
        self._answers, self._asides = answers, asides
        self._styles = {
            name: Style.parse(_GROUNDS[place % len(_GROUNDS)] + _MORE[place // len(_GROUNDS) % len(_MORE)])
            for place, name in enumerate(experts)
        }
        self.has_colours = answers.color_system in ("256", "truecolor") and not answers.no_color
        self.routes = False
        self._marked: str | None = None

    def tell(self, text: str) -> None:
        """A line beside the answers."""
        self._asides.print(Text(printable(text), style="dim"), soft_wrap=True)

    def begin(self, name: str) -> None:
        """Say who begins to answer."""
        self._marked = None
        if self._answers.is_terminal:
            self._answers.out(f"{printable(name)}> ", end="", style="bold", highlight=False)

    def piece(self, piece: "Piece") -> None:
        """One more token of an answer."""
        for text, style in self._parts(piece):
            self._answers.out(text, end="", style=style, highlight=False)
        self._answers.file.flush()

    def end(self) -> None:
        """The answer is complete."""
        self._answers.out("", highlight=False)

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Inside, a terminal shows that something is being done."""
        with self._asides.status(text):
            yield

    def legend(self, shares: Mapping[str, float] | None = None) -> None:
        """Who has which colour: all experts, or those of an answer with their shares; the rest is the base's."""
        parts = []
        for name in self._styles if shares is None else sorted(shares, key=lambda name: -shares[name]):
            part = (f" {printable(name)} ", self._styles[name]) if self.has_colours else printable(name)
            parts.append(Text.assemble(part, "" if shares is None else f" {shares[name]:.0%}"))
        rest = 1 - sum((shares or {}).values())
        if rest >= 0.005:
            whole = "base, without colour" if self.has_colours else "base"
            parts.append(Text(whole if shares is None else f"base {rest:.0%}"))
        line = Text("tokens by ") + Text("  " if self.has_colours else ", ").join(parts)
        if not self.has_colours and shares is None:
            line.append("; where another begins, [=NAME] stands before its tokens")
        self._asides.print(line, soft_wrap=not self._asides.is_terminal, highlight=False)

    def beside(self, answers: Sequence["Answer"]) -> None:
        """Several answers in columns, or one under the other where those would be narrow."""
        named = [(name_of(answer.speaker), self._text(answer)) for answer in answers]
        if not self._answers.is_terminal or self._answers.width < _COLUMN * len(named):
            for name, text in named:
                self._answers.print(Text(f"{printable(name)}:", style="bold"), soft_wrap=True)
                self._answers.print(text, soft_wrap=True)
            return
        table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
        for name, _ in named:
            table.add_column(escape(printable(name)), ratio=1, overflow="fold")
        table.add_row(*(text for _, text in named))
        self._answers.print(table)

    def _text(self, answer: "Answer") -> Text:
        self._marked = None
        whole = Text(overflow="fold")
        for piece in answer.pieces:
            for text, style in self._parts(piece):
                whole.append(text, style or "")
        return whole

    def _parts(self, piece: "Piece") -> list[tuple[str, Style | None]]:
        """What is written of a token, and how."""
        text = printable(piece.text)
        if not text or not self.routes:
            return [(text, None)] if text else []
        name = speaker_of(piece)
        if self.has_colours:
            style = self._styles[name] if name else None
            # The end of a line has no ground: a terminal may colour the rest of the line with it.
            return [(part, style if part != "\n" else None) for part in re.split("(\n)", text) if part]
        mark = "" if (name or "base") == self._marked else f"[={printable(name or 'base')}]"
        self._marked = name or "base"
        return [(mark + text, None)]


def speaker_of(piece: "Piece") -> str | None:
    """The expert with the most weight in a token; None where the base served."""
    experts = piece.experts
    return max(experts, key=lambda name: experts[name]) if experts else None


def name_of(speaker: "Speaker") -> str:
    """As a person knows who answers."""
    return speaker.expert or {"routed": "mixture"}.get(speaker.kind, speaker.kind)
