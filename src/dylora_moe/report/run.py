"""One run -> its page, in the order in which a person asks; what the run does not have is left out."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from dylora_moe.errors import RunError
from dylora_moe.report import story
from dylora_moe.report.curves import changes_chart, entropy_chart, load_chart, loss_chart, range_of_losses, small_charts
from dylora_moe.report.evaluations import expert_matrix, splits, task_records, top_tokens, trained_routing
from dylora_moe.report.figures import DomainFigures, domain_figures, in_a_row, number, progress_of
from dylora_moe.report.page import GENERATOR, render, render_generation
from dylora_moe.report.records import Record, RunRecord
from dylora_moe.report.settings import command_of, same_again, unlike_defaults, without_secrets

# What a record of another version may lack or hold otherwise.
MISSHAPEN = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# Tokens of rows that are shown with each of their own span, over all domains: about 1 MB of a page.
_MOST_TOKENS = 16_000
_MOST_WARNINGS = 20
# What of an environment is told, by its name there: nothing else of it is.
_TOLD = ("python", "platform", "processor", "cores", "device", "gpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page: where links lead, its heading, and its HTML."""

    id: str
    title: str
    html: str


class Sections:
    """The parts of a page, in their order; a part whose record cannot be told is named in `broken` instead."""

    def __init__(self, broken: Sequence[str] = ()) -> None:
        self.parts: list[Section] = []
        self.broken = list(broken)

    def add(self, id: str, title: str, make: Callable[[], str]) -> None:
        """Add what `make` gives, if anything."""
        try:
            html = make()
        except MISSHAPEN as error:
            self.broken.append(f"{title}: a record is not as this version writes it ({type(error).__name__}: {error}).")
            return
        if html.strip():
            self.parts.append(Section(id=id, title=title, html=html))

    def html(self) -> list[str]:
        """All parts, each under its heading."""
        return [render("section.html", {"part": part}) for part in self.parts]


def render_run(run: RunRecord, stream: Mapping[str, Any] | None = None, *, now: float | None = None) -> str:
    """The page of a run.

    Args:
        run: As read from its folder.
        stream: Of a stream, what it has come to so far; taken from its result where it has one.
        now: Seconds of the epoch at which the page is made.

    Raises:
        RunError: It is a generation without a result.
    """
    now = time.time() if now is None else now
    if run.is_generation:
        if not run.result:
            raise RunError(
                f"{run.path} must hold the result of `dylora generate`, which is not at its end. Let the same command "
                "go on."
            )
        return render_generation(run.result)
    found, step = domain_figures(run)
    stream = with_names(run.result or stream) if run.is_stream else None
    sections = Sections([f"{name} cannot be read." for name in run.broken])
    sections.add("warnings", "Warnings", lambda: _warnings(run))
    if stream is not None:
        sections.add("stream", "Stream of skills", lambda: _stream(stream))
    sections.add("losses", "Losses", lambda: _losses(run, found, step))
    sections.add("test", "Losses on test rows", lambda: _test_losses(run))
    sections.add("curves", "Curves", lambda: _curves(run))
    sections.add("routing", "Routing", lambda: _routing(run))
    sections.add("experts", "Experts by domain", lambda: _experts(run))
    sections.add("beside", "Beside other runs", lambda: _beside(run))
    sections.add("tasks", "Tasks", lambda: render("tasks.html", task_records(run.evaluations)))
    sections.add("samples", "Before and after", lambda: _samples(run, found))
    sections.add("data", "Data", lambda: _data(run))
    again = Sections()
    again.add("again", "How it was made", lambda: _again(run, sections.broken))
    sections.parts += again.parts
    lead = render(
        "overview.html",
        {
            "unfinished": story.unfinished(run, progress_of(run), now),
            "lead": story.lead(run, found, step, stream),
            "tiles": story.tiles(run, found, stream),
            "folder": str(run.path),
            "made": story.moment(now),
            "sections": [(part.id, part.title) for part in sections.parts],
        },
    )
    return render("page.html", {"title": run.name, "sections": [lead, *sections.html()], "generator": GENERATOR})


def with_names(stream: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Older results name skills only, not stages."""
    if stream is None:
        return None
    return {**stream, "stages": [{"name": stage["skill"], **stage} for stage in stream["stages"]]}


def _stream(stream: Mapping[str, Any]) -> str:
    return render("stream.html", {**without_secrets(stream), "heading": "h3"})


def _warnings(run: RunRecord) -> str:
    told = [
        {"step": None, "seen": "", "advice": "", **line, "where": stage.name}
        for stage in (run, *run.stages)
        for line in stage.warnings
    ]
    shown = [line | {"where": line["where"] if run.stages else ""} for line in told[:_MOST_WARNINGS]]
    if not told and not run.stale:
        return ""
    return render("warnings.html", {"stale": run.stale, "warnings": shown, "more": len(told) - len(shown)})


def _losses(run: RunRecord, found: Sequence[DomainFigures], step: int | None) -> str:
    after = "after" if step is None else f"at step {step:,}"
    best = number(run.result.get("best_step"))
    return loss_table(found, rows_of="validation", after=after, best_step=best) if found else ""


def _test_losses(run: RunRecord) -> str:
    before, after = splits(run.evaluations, "test")
    names = dict.fromkeys([*before, *after])
    found = [DomainFigures(domain=name, before=before.get(name), after=after.get(name)) for name in names]
    return loss_table(found, rows_of="test") if found else ""


def loss_table(
    found: Sequence[DomainFigures], *, rows_of: str, after: str = "after", best_step: float | None = None
) -> str:
    """Losses before and after, as a picture and as a table."""
    measured = [each for row in found for each in (row.before, row.after) if each is not None]
    rows = [
        {
            "domain": row.domain,
            "before": _whole(row.before),
            "after": _whole(row.after),
            "change": row.change,
        }
        for row in found
    ]
    return render(
        "losses.html",
        {
            "rows": rows,
            "drawn": range_of_losses(found),
            "after_word": after,
            "rows_of": rows_of,
            "best_step": best_step,
            "has_after": any(row.after is not None for row in found),
            "has_bits": any(number(each.get("bits_per_byte")) is not None for each in measured),
            "has_accuracy": any(number(each.get("accuracy")) is not None for each in measured),
            "has_interval": any(each.get("loss_interval") for each in measured),
            "has_p": any(each.get("against_base") for each in measured),
        },
    )


def _whole(measured: Record | None) -> Record | None:
    return None if measured is None else {"perplexity": None, "against_base": None, **measured}


def _curves(run: RunRecord) -> str:
    lines, marks = in_a_row(run) if run.is_stream else (run.metrics, [])
    note = (
        "A stage's steps follow those of the stage before; skills that an expert already did well were not trained."
        if run.is_stream
        else ""
    )
    title = "Loss of each stage, training and validation" if run.is_stream else "Loss, training and validation"
    main, small = loss_chart(lines, marks), small_charts(lines, marks)
    return (
        render("charts.html", {"main": main, "main_title": title, "small": small, "note": note})
        if main or small
        else ""
    )


def _routing(run: RunRecord) -> str:
    routing, when = trained_routing(run)
    load = load_chart(run.routing)
    entropy, more = entropy_chart(run.metrics)
    tokens, changes = top_tokens(routing), changes_chart((routing or {}).get("changes") or ())
    if not (routing or load or entropy or tokens):
        return ""
    return render(
        "routing.html",
        {
            "routing": routing,
            "when": when,
            "unit": "prompts" if run.settings.get("granularity") == "sequence" else "tokens",
            "most_bits": story.most_bits(routing),
            "load": load,
            "entropy": entropy,
            "more": [*more, *changes],
            "top_tokens": tokens,
        },
    )


def _experts(run: RunRecord) -> str:
    similarity = run.evaluations.get("similarity")
    tables = [found for split in ("validation", "test") if (found := expert_matrix(run.evaluations, split))]
    return render("experts.html", {"tables": tables, "similarity": similarity}) if tables or similarity else ""


def _beside(run: RunRecord) -> str:
    found = [run.evaluations[name] for name in ("compare", "test-compare") if name in run.evaluations]
    return "".join(render("beside.html", {"compared": compared}) for compared in found)


def _samples(run: RunRecord, found: Sequence[DomainFigures]) -> str:
    told = run.result.get("samples") or []
    samples = [{"domain": each["domain"], "prompt": each["after"]["prompt"], **_both(each)} for each in told]
    if not samples:  # of a run that goes on, what the base said
        names = [row.domain for row in found]
        answers = run.start.get("answers") or []
        samples = [
            {"domain": name, "prompt": answer["prompt"], "before": answer, "after": None}
            for name, answer in zip(names, answers, strict=False)
        ]
    return render("samples.html", {"samples": samples}) if samples else ""


def _both(sample: Record) -> Record:
    return {"before": sample["before"], "after": sample["after"]}


def _data(run: RunRecord) -> str:
    views = [run.data] if run.data else [stage.data for stage in run.stages if stage.data]
    if not views:
        return ""
    domains = list({domain["domain"]: domain for view in views for domain in view["domains"]}.values())
    rows = {name: kept for view in views for name, kept in view["samples"].items()}
    samples, cut = dict[str, list[Any]](), dict[str, int]()
    room = max(1, _MOST_TOKENS // max(1, sum(map(len, rows.values()))))
    for domain in domains:
        name = domain["domain"]
        samples[name] = [tokens[:room] for tokens in rows.get(name, ())]
        if left := sum(len(tokens) - min(len(tokens), room) for tokens in rows.get(name, ())):
            cut[name] = left
    view = {"batches": None, **views[-1], "domains": without_secrets(domains), "samples": samples, "cut": cut}
    if len(views) > 1:
        view["batches"] = None
    return render("data_section.html", view)


def _again(run: RunRecord, broken: Sequence[str]) -> str:
    environment = run.environment
    told = [(name.capitalize(), str(environment[name])) for name in _TOLD if environment.get(name)]
    packages = environment.get("packages")
    if isinstance(packages, Mapping):
        told.append(("Packages", ", ".join(f"{name} {version}" for name, version in packages.items() if version)))
    if seconds := progress_of(run).seconds:
        told.append(("Time", story.duration(seconds)))
    command = command_of(run)
    return render(
        "again.html",
        {
            "command": command,
            "recipe": story.recipe_of(run) if command else None,
            "again": same_again(run),
            "unlike": unlike_defaults(run.settings),
            "environment": told,
            "parameters": run.result.get("parameters") or [],
            "broken": broken,
        },
    )
