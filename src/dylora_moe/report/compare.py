"""Several runs -> one page with them side by side: what differs, losses, curves, speed; a few words on each."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from dylora_moe.errors import RunError
from dylora_moe.report import story
from dylora_moe.report.charts import Axes, Line, line_chart
from dylora_moe.report.figures import (
    DomainFigures,
    Points,
    curve,
    domain_figures,
    in_a_row,
    loss_curves,
    mean,
    number,
    progress_of,
)
from dylora_moe.report.page import GENERATOR, render
from dylora_moe.report.records import Record, RunRecord
from dylora_moe.report.run import MISSHAPEN, Sections, with_names
from dylora_moe.report.settings import unlike_each_other
from dylora_moe.report.wording import listed

_SMALL = (
    ("Training loss", "loss", None),
    ("Tokens a second", "tokens_per_second", 0.0),
    ("Memory, GB", "memory_gb", 0.0),
    ("Learning rate", "learning_rate", 0.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A run among others.

    Attributes:
        name: By which it is told from the others.
        record: As read from its folder.
        stream: Of a stream, what it has come to.
        found: Its domains, or skills, before and after.
        step: Of the latest evaluation, where the run is not at its end.
        lines: Of figures; of a stream those of all stages, one after the other.
        curves: Domain -> validation loss by step.
    """

    name: str
    record: RunRecord
    stream: Mapping[str, Any] | None
    found: Sequence[DomainFigures]
    step: int | None
    lines: Sequence[Record]
    curves: Mapping[str, Points]


def render_comparison(
    runs: Sequence[RunRecord], streams: Sequence[Mapping[str, Any] | None], *, now: float | None = None
) -> str:
    """The page of several runs.

    Args:
        runs: As read from their folders.
        streams: Of each that is a stream without a result, what it has come to so far.
        now: Seconds of the epoch at which the page is made.

    Raises:
        RunError: One of them is a generation.
    """
    now = time.time() if now is None else now
    for run in runs:
        if run.is_generation:
            raise RunError(
                f"runs side by side must be of `dylora train`, and {run.path} made data. Ask for its page alone."
            )
    compared = [_compared(name, run, stream) for name, run, stream in zip(_names(runs), runs, streams, strict=True)]
    sections = Sections([f"{run.name}: {name} cannot be read." for run in runs for name in run.broken])
    sections.add("losses", "Losses", lambda: _losses(compared))
    sections.add("settings", "Settings that differ", lambda: _settings(compared))
    sections.add("curves", "Validation loss by step", lambda: _curves(compared))
    sections.add("speed", "Training, speed and memory", lambda: _speed(compared))
    sections.add("runs", "Each run", lambda: _each(compared, now))
    lead = render(
        "overview.html",
        {
            "unfinished": [f"{run.name} is not finished." for run in compared if not run.record.result],
            "lead": [],
            "tiles": [],
            "folder": None,
            "made": story.moment(now),
            "sections": [(part.id, part.title) for part in sections.parts],
        },
    )
    title = listed([run.name for run in compared], 3)
    broken = render("broken.html", {"broken": sections.broken})
    return render("page.html", {"title": title, "sections": [lead, *sections.html(), broken], "generator": GENERATOR})


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Their names; with the folders around them, and numbers at the last, where several have one name."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = ["/".join(run.path.resolve().parts[-2:]) for run in runs]
    return names if len(set(names)) == len(names) else [f"{place + 1}. {name}" for place, name in enumerate(names)]


def _compared(name: str, run: RunRecord, stream: Mapping[str, Any] | None) -> Compared:
    if run.is_stream:
        told = with_names(run.result or stream)
        try:
            found = _skills(told) if told is not None else []
        except MISSHAPEN:
            told, found = None, []
        return Compared(
            name=name, record=run, stream=told, found=found, step=None, lines=in_a_row(run)[0], curves=_by_skill(run)
        )
    found, step = domain_figures(run)
    return Compared(
        name=name, record=run, stream=None, found=found, step=step, lines=run.metrics, curves=loss_curves(run.metrics)
    )


def _skills(stream: Mapping[str, Any]) -> list[DomainFigures]:
    before = {stage["skill"]: stage.get("base_loss") for stage in stream["stages"]}
    return [
        DomainFigures(
            domain=skill["skill"],
            before={"loss": before[skill["skill"]]} if number(before.get(skill["skill"])) is not None else None,
            after={"loss": skill["last"]} if number(skill["last"]) is not None else None,
        )
        for skill in stream["summary"]["loss"]["by_skill"]
    ]


def _by_skill(run: RunRecord) -> dict[str, Points]:
    """Skill -> its loss at the end of each stage since it was learned, by steps over all stages."""
    curves, steps = dict[str, Points](), 0.0
    for stage in run.stages:
        steps += max((number(line.get("step")) or 0.0 for line in stage.metrics), default=0.0)
        for skill, loss in ((stage.figures or {}).get("losses") or {}).items():
            if (value := number(loss)) is not None:
                curves.setdefault(str(skill), []).append((steps, value))
    return curves


def _domains(compared: Sequence[Compared]) -> list[str]:
    return list(dict.fromkeys(row.domain for run in compared for row in run.found))


def _losses(compared: Sequence[Compared]) -> str:
    same_base = len({str(run.record.settings.get("base_model")) for run in compared}) == 1
    rows = []
    for domain in _domains(compared):
        cells = [next((row for row in run.found if row.domain == domain), None) for run in compared]
        rows.append({"domain": domain, **_best_of(cells, marked=same_base)})
    if not rows:
        return ""
    shared = [row["domain"] for row in rows if all(cell["after"] is not None for cell in row["cells"])]
    means = [
        mean(number(row.after["loss"]) for row in run.found if row.domain in shared and row.after is not None)
        for run in compared
    ]
    return render(
        "compare_losses.html",
        {
            "runs": [run.name + ("" if run.step is None else f", step {run.step:,}") for run in compared],
            "rows": rows,
            "means": means if len(shared) > 1 else [],
            "best": _best(means) if same_base else None,
            "same_base": same_base,
            "shared": len(shared),
            "has_interval": any(cell["interval"] for row in rows for cell in row["cells"]),
        },
    )


def _best_of(cells: Sequence[DomainFigures | None], *, marked: bool) -> dict[str, Any]:
    told = [
        {
            "before": cell.before["loss"] if cell is not None and cell.before else None,
            "after": cell.after["loss"] if cell is not None and cell.after else None,
            "interval": cell.after.get("loss_interval") if cell is not None and cell.after else None,
        }
        for cell in cells
    ]
    return {"cells": told, "best": _best([cell["after"] for cell in told]) if marked else None}


def _best(losses: Sequence[float | None]) -> float | None:
    """The lowest as it is shown; None where that is the only one, or all are the same."""
    shown = [round(loss, 3) for loss in losses if loss is not None]
    return min(shown) if len(set(shown)) > 1 else None


def _settings(compared: Sequence[Compared]) -> str:
    rows = unlike_each_other([run.record for run in compared])
    return render("compare_settings.html", {"runs": [run.name for run in compared], "rows": rows})


def _curves(compared: Sequence[Compared]) -> str:
    domains = list(dict.fromkeys(domain for run in compared for domain in run.curves))
    drawn = [
        (domain, _overlaid(compared, f"Validation loss of {domain}", [run.curves.get(domain, []) for run in compared]))
        for domain in domains
    ]
    return _charts(drawn)


def _speed(compared: Sequence[Compared]) -> str:
    return _charts(
        [
            (title, _overlaid(compared, title, [curve(run.lines, key) for run in compared], low))
            for title, key, low in _SMALL
        ]
    )


def _overlaid(compared: Sequence[Compared], title: str, curves: Sequence[Points], low: float | None = None) -> Markup:
    lines = [
        Line(label=run.name, points=points, colour=place, dashed=bool(place % 2))
        for place, (run, points) in enumerate(zip(compared, curves, strict=True))
        if points
    ]
    last = max((number(line.get("step")) or 0.0 for run in compared for line in run.lines), default=0.0)
    return line_chart(lines, Axes(title=f"{title} by step", low=low, span=(0.0, max(last, 1.0))))


def _charts(drawn: Sequence[tuple[str, Markup]]) -> str:
    small = [(title, each) for title, each in drawn if each]
    return render("charts.html", {"main": "", "main_title": "", "small": small, "note": ""}) if small else ""


def _each(compared: Sequence[Compared], now: float) -> str:
    runs = [
        {
            "name": run.name,
            "folder": str(run.record.path),
            "unfinished": story.unfinished(run.record, progress_of(run.record), now),
            "lead": story.lead(run.record, run.found, run.step, run.stream),
            "tiles": story.tiles(run.record, run.found, run.stream),
        }
        for run in compared
    ]
    return render("compare_runs.html", {"runs": runs})
