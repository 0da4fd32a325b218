"""Sections -> a page of HTML."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dylora_moe.report.wording import left_out, visible


def render_data(view: Mapping[str, Any]) -> str:
    """A page of what went into a run: rows, lengths, what was left out, and samples with every token.

    Args:
        view: The record `data.json` of a run, or what `dylora data inspect --json` prints.
    """
    return _render("Data", [_TEMPLATES.get_template("data.html").render(view)])


def _render(title: str, sections: Sequence[str]) -> str:
    """Sections are HTML, in which their templates have escaped what came from data."""
    return _TEMPLATES.get_template("page.html").render(title=title, sections=sections)


_TEMPLATES = Environment(
    loader=PackageLoader("dylora_moe.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"left_out": left_out, "visible": visible, "count": "{:,}".format, "percent": "{:.0%}".format}
