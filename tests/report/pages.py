"""A page read back: its text, its tags, its tables by their headings, and the tips of its charts."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from dylora_moe.evaluate.stream import read_stream
from dylora_moe.report.records import read_run
from dylora_moe.report.run import render_run
from dylora_moe.run_dir import RunDir


class Page(HTMLParser):
    """Text outside the head, in one line; tags; the rows of all tables; titles in charts; links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source, self.text = text, ""
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.styles: list[list[str]] = []
        self.tips: list[str] = []
        self.headings: list[str] = []
        self.links: list[str] = []
        self._inside: list[str] = []
        self._parts: list[tuple[str, str]] = []
        self.feed(text[text.index("<body>") :])
        self.text = re.sub(r"\s+", " ", self.text)
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.links += [values[name] or "" for name in ("href", "src") if name in values]
        if tag == "tr":
            self.rows.append([])
            self.styles.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.styles[-1].append(f"{values.get('style') or ''} {values.get('class') or ''}")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")
            self._parts.append(("", ""))
        elif tag == "title":
            self.tips.append("")
        elif tag == "br":
            self.handle_data(" ")
        if tag not in ("td", "th", "tr", "br", "rect", "line", "path", "circle", "meta"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while tag in self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "title" in self._inside:
            self.tips[-1] += data
            return
        self.text += data
        if self._inside and self._inside[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data
            self._parts[-1] = self.headings[-1], ""
        elif self._parts:
            heading, text = self._parts[-1]
            self._parts[-1] = heading, text + data
        if "table" in self._inside and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def row(self, *begin: str) -> list[str]:
        """The first row that begins with these texts."""
        return next(row for row in self.rows if row[: len(begin)] == list(begin))

    def section(self, title: str) -> str:
        """The text under a heading, to the next one."""
        return re.sub(r"\s+", " ", next(text for heading, text in self._parts if heading == title))


def page_of(run: Path, **options: Any) -> Page:
    """The page of a run's folder, as the command makes it."""
    record = read_run(run)
    stream = read_stream(RunDir(run)) if record.is_stream and not record.result else None
    return Page(render_run(record, stream, **options))
