"""Sections -> a page of HTML."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dylora_moe.report.wording import left_out, visible

# The page's own name for who made it, by which a file is known to be one of these pages.
GENERATOR = "dylora report"
_NOT_MEASURED = "not measured"
# Characters of a text that are shown; the run folder has the rest.
_MOST_TEXT = 6000
_DECISIONS = {
    "grow": "a new skill, so a new expert, {expert}",
    "extend": "a known skill that its expert did badly, so {expert} was trained further",
    "reuse": "a known skill, so {expert} answers it as it is",
    "import": "a skill that came with its expert, {expert}",
    "merge": "experts merged into {expert}",
    "remove": "expert {expert} removed",
}
# The strongest colour of a cell, in percent over the page: text keeps a contrast of 4.5 to 1, light and dark.
_FULL_COLOUR = 50


def render_data(view: Mapping[str, Any]) -> str:
    """A page of what went into a run: rows, lengths, what was left out, and samples with every token.

    Args:
        view: The record `data.json` of a run, or what `dylora data inspect --json` prints.
    """
    return _render("Data", [render("data.html", view)])


def render_stream(record: Mapping[str, Any]) -> str:
    """A page of a stream of skills: every decision, what was kept and forgotten, and who answers what.

    Args:
        record: `run` and `base_model`, names; `stages`, each with its `name`, its `skill` (None for a change by hand),
            its `decision` (`kind`, `expert`, `reason` and `numbers`, name -> number) and its `figures`, a
            `StageFigures`; and `summary`, a `StreamSummary`. All as JSON has them.
    """
    return _render("Skills", [render("stream.html", record)])


def render_generation(record: Mapping[str, Any]) -> str:
    """A page of data that a second model wrote: what they are made of, what did not pass and why, answers to read.

    Args:
        record: The result of a generation, as JSON has it.
    """
    return _render("Made data", [render("generate.html", record)])


def _render(title: str, sections: Sequence[str]) -> str:
    """Sections are HTML, in which their templates have escaped what came from data."""
    return render("page.html", {"title": title, "sections": sections, "generator": GENERATOR})


def render(template: str, record: Mapping[str, Any]) -> str:
    """HTML by one of the templates here, with what a record brings escaped.

    Raises:
        TemplateError: The record lacks something that the template needs.
    """
    return _TEMPLATES.get_template(template).render(record)


def _decided(decision: Mapping[str, Any]) -> str:
    text = _DECISIONS.get(decision["kind"], "{kind}, {expert}")
    return text.format(kind=decision["kind"], expert=decision["expert"] or "no expert")


def _figure(value: float | str | None, places: int | None = None) -> str:
    """A number with that many decimals, or with four digits; what is no number stays as it is."""
    if value is None:
        return _NOT_MEASURED
    if isinstance(value, (bool, str)) or not math.isfinite(value):
        return str(value)
    if places is not None:
        return f"{value:,.{places}f}"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def change(value: float | None, places: int, missing: str = _NOT_MEASURED) -> str:
    """A difference with its sign; zero has none, however it came about."""
    if value is None or not math.isfinite(value):
        return missing if value is None else str(value)
    rounded = round(value, places)
    return f"{rounded:+.{places}f}" if rounded else f"{0:.{places}f}"


def _points(value: float | None) -> str:
    """A difference of two shares in percentage points."""
    return change(None if value is None else 100 * value, 1)


def _share(value: float | None, missing: str = _NOT_MEASURED) -> str:
    return missing if value is None else f"{value:.1%}"


def _percent_change(value: float | None) -> str:
    """A change as a share of what it was; nothing where it was not measured."""
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:+.0%}" if round(value, 2) else "0%"


def _cut(text: str, most: int = _MOST_TEXT) -> str:
    """A text no longer than a person reads here."""
    return text if len(text) <= most else f"{text[:most]} \u2026 ({len(text) - most:,} more characters)"


def _spelled(token: str) -> str:
    """A token alone, with its spaces to be seen, too."""
    return visible(token).replace("\n", "").replace(" ", "\u2423") or "\u2205"


def _shade_between(value: float | None, least: float | None, full: float | None) -> str:
    """The style of a cell by where its value lies between the one without colour and the one with the full colour."""
    if value is None or least is None or full is None or not math.isfinite(value):
        return _colour("var(--bar)", 0.0)
    return _colour("var(--bar)", (value - least) / (full - least) if full != least else 1.0)


def _magnitude(value: float | None) -> float:
    return abs(value or 0.0)


def _shade(value: float | None) -> str:
    """The style of a cell that holds a share of 0 to 1."""
    return _colour("var(--bar)", value or 0.0)


def _shade_change(value: float | None, learned: float | None, full: float) -> str:
    """The style of a cell by what became of its value since it was learned.

    Args:
        value: In the cell.
        learned: Right after the skill was learned.
        full: The change for the better that has the full colour; negative where lower is better.
    """
    if value is None or learned is None:
        return _colour("var(--bar)", 0.0)
    better = (value - learned) / full
    return _colour("var(--bar)" if better > 0 else "darkorange", abs(better))


def _colour(colour: str, strength: float) -> str:
    percent = _FULL_COLOUR * min(strength, 1.0) if math.isfinite(strength) else _FULL_COLOUR
    return f"background: color-mix(in srgb, {colour} {percent:.1f}%, transparent)"


_TEMPLATES = Environment(
    loader=PackageLoader("dylora_moe.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"left_out": left_out, "visible": visible, "count": "{:,}".format, "percent": "{:.0%}".format}
_TEMPLATES.filters |= {"figure": _figure, "change": change, "points": _points, "share": _share, "decided": _decided}
_TEMPLATES.filters |= {"shade": _shade, "shade_change": _shade_change, "shade_between": _shade_between}
_TEMPLATES.filters |= {"percent_change": _percent_change, "magnitude": _magnitude, "cut": _cut, "spelled": _spelled}
