"""Sections -> a page of HTML."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dylora_moe.report.wording import left_out, visible


def render_data(view: Mapping[str, Any]) -> str:
    """A page of what went into a run: rows, lengths, what was left out, and samples with every token.

    Args:
        view: The record `data.json` of a run, or what `dylora data inspect --json` prints.
    """
    return _render("Data", [_section("data.html", view)])


def _render(title: str, sections: list[Markup]) -> str:
    return _TEMPLATES.get_template("page.html").render(title=title, sections=sections)


def _section(template: str, record: Mapping[str, Any]) -> Markup:
    """A part of a page; its values are escaped by the template."""
    return Markup(_TEMPLATES.get_template(template).render(record))


_TEMPLATES = Environment(
    loader=PackageLoader("dylora_moe.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"left_out": left_out, "visible": visible, "count": "{:,}".format, "percent": "{:.0%}".format}
