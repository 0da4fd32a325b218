"""What a person sees of a stream of skills: what was decided and why, how each is done, what was forgotten."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_STYLES = {"grow": "green", "extend": "yellow", "reuse": "cyan", "import": "green"}


def show_stream(console: Console, result: Mapping[str, Any]) -> None:
    """Decisions, the matrix of losses, and what follows from them."""
    summary = result["summary"]
    stages = [{"name": stage["skill"], **stage} for stage in result["stages"]]  # older results name skills only
    _show_decisions(console, stages)
    names = [stage["name"] for stage in stages]
    for measure, title, form in (
        (summary["loss"], "Validation loss after each skill", "{:.3f}"),
        (summary["accuracy"], "Right answers after each skill", "{:.0%}"),
    ):
        if measure is not None:
            _show_matrix(console, names, summary["skills"], measure["matrix"], title, form)
    _show_routing(console, summary["skills"], summary["routing"])
    for line in _sentences(summary, stages):
        console.print(line, highlight=False, markup=False)


def _show_decisions(console: Console, stages: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="Skills in their order", title_justify="left")
    for column in ("skill", "decision", "expert", "base loss", "before", "after"):
        table.add_column(column, justify="right" if "loss" in column or column in ("before", "after") else "left")
    for stage in stages:
        decision, figures, skill = stage["decision"], stage["figures"], stage["skill"]
        kind = decision["kind"]
        losses = stage["base_loss"], figures["before"], figures["losses"].get(skill)
        table.add_row(
            escape(skill or ""),
            f"[{_STYLES[kind]}]{kind}[/]" if kind in _STYLES else kind,
            decision["expert"],
            *["" if loss is None else f"{loss:.3f}" for loss in losses],
        )
    console.print(table)
    for stage in stages:
        console.print(f"  {stage['name']}: {stage['decision']['reason']}", highlight=False, markup=False)
    console.print()


def _show_matrix(
    console: Console,
    names: Sequence[str],
    skills: Sequence[str],
    matrix: Sequence[Sequence[float | None]],
    title: str,
    form: str,
) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("after")
    for name in skills:
        table.add_column(escape(name), justify="right")
    for name, row in zip(names, matrix, strict=True):
        table.add_row(escape(name), *["" if value is None else form.format(value) for value in row])
    console.print(table)


def _show_routing(console: Console, skills: Sequence[str], routing: Mapping[str, Any]) -> None:
    table = Table(title="Which expert answers which skill", title_justify="left")
    table.add_column("skill")
    for name in (*routing["experts"], "unsure"):
        table.add_column(name, justify="right")
    for place, name in enumerate(skills):
        shares = [*routing["confusion"][place], routing["unsure"][place]]
        right = routing["served_by"][place]
        cells = ["" if share is None else f"{share:.0%}" for share in shares]
        named = zip((*routing["experts"], "unsure"), cells, strict=True)
        table.add_row(
            escape(name), *[f"[bold reverse]{cell}[/]" if column == right else cell for column, cell in named]
        )
    console.print(table)


def _sentences(summary: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The figures of the whole, those that could be measured, each with what is good."""
    loss, routing = summary["loss"], summary["routing"]
    experts = len(set(routing["served_by"]))
    lines = [f"{len(summary['skills'])} skills, {experts} experts; mean loss {loss['average']:.3f}."]
    if loss["backward_transfer"] is not None:
        lines.append(
            f"Backward transfer {loss['backward_transfer']:+.4f} (0 is nothing forgotten, below 0 is forgotten)."
        )
        lines.append(f"Forgetting {loss['forgetting']:+.4f} (0 or below is none).")
        lines.append(f"Forward transfer {loss['forward_transfer']:+.4f} (above 0: earlier skills helped).")
    if routing["accuracy"] is not None:
        lines.append(f"Routing: {routing['accuracy']:.1%} of the validation prompts went to the right expert.")
    if summary["general_change"] is not None:
        lines.append(f"General text: loss {summary['general_change']:+.4f} against the base (0 is unchanged).")
    return lines
