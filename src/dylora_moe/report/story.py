"""What a run's page says in sentences: what was trained on what, what came of it, and how far it is."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from dylora_moe.report.figures import DomainFigures, Progress, mean, median_of, most_of, number, progress_of
from dylora_moe.report.page import change
from dylora_moe.report.records import Record, RunRecord
from dylora_moe.report.settings import without_secrets
from dylora_moe.report.wording import duration, listed, some

__all__ = ["duration", "lead", "moment", "most_bits", "recipe_of", "tiles", "unfinished"]

# Seconds in which a run that goes on writes a line, as a rule.
_RECENT = 600


def moment(seconds: float) -> str:
    """A time of the epoch as a person writes it, in the time of the world."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def unfinished(run: RunRecord, progress: Progress, now: float) -> list[str]:
    """Says that a run is not at its end, how far it came, and when it last wrote; nothing of a finished one."""
    if progress.finished:
        return []
    what = "skill" if run.is_stream else "step"
    of = f"{progress.done:,}" if progress.total is None else f"{progress.done:,} of {some(progress.total, what)}"
    last = "There is no line of figures yet."
    if run.last_line is not None:
        ago = now - run.last_line
        recently = " It may still be going." if ago < _RECENT else " The same command goes on with it."
        last = f"The last line of figures is of {moment(run.last_line)}, {duration(max(0.0, ago))} before this page."
        last += recently
    told = [f"Not finished: {of}. {last}"]
    if progress.current is not None:
        here = progress_of(progress.current)
        steps = f"{here.done:,} of {some(here.total, 'step')}" if here.total else some(here.done, "step")
        told.append(f"Under way: {progress.current.name.partition('-')[2]}, {steps}.")
    return told


def lead(
    run: RunRecord, found: Sequence[DomainFigures], step: int | None, stream: Mapping[str, Any] | None
) -> list[str]:
    """What was trained on what, and what came of it: a sentence or two each."""
    told = [_made_of(run), _learned_from(run)]
    told.append(_stream_result(stream) if stream is not None else _losses(found, step))
    return [line for line in told if line]


def _made_of(run: RunRecord) -> str:
    settings, base = run.settings, without_secrets(str(run.settings.get("base_model", "its base")))
    rank = settings.get("lora_r")
    size = f" of rank {rank}" if rank else ""
    if run.is_stream:
        return f"A stream of skills on {base}: an expert{size} is added where a skill is new."
    experts = int(number(settings.get("num_experts")) or 1)
    if experts == 1:
        return f"One LoRA{size} on {base}."
    unit = {"sequence": "prompt", "token": "token"}.get(str(settings.get("granularity")), "prompt")
    took = int(number(settings.get("top_k")) or 1)
    to = "one expert" if took == 1 else f"{took} experts"
    return f"{experts} experts{size} on {base}, trained together; a router sends each {unit} to {to}."


def _learned_from(run: RunRecord) -> str:
    views = [run.data] if run.data else [stage.data for stage in run.stages if stage.data]
    domains = list({each.get("domain"): each for view in views for each in view.get("domains", ())}.values())
    if not domains:
        return ""
    rows, tokens, held = (
        sum(int(number(domain.get(name)) or 0) for domain in domains)
        for name in ("num_train", "num_train_tokens", "num_validation")
    )
    names = listed([str(domain.get("domain")) for domain in domains])
    text = f"Data: {rows:,} rows of {names}, {tokens:,} tokens, and {held:,} rows to validate on."
    trained = run.result.get("trained")
    if isinstance(trained, list) and trained:
        seen = sum(int(each["rows"]) for each in trained)
        text += f" It saw {some(seen, 'row')} in {some(int(run.result['steps']), 'step')}."
    return text


def _losses(found: Sequence[DomainFigures], step: int | None) -> str:
    both = [row for row in found if row.before is not None and row.after is not None]
    if not both:
        return ""
    before = mean(row.before["loss"] for row in both if row.before is not None)
    after = mean(row.after["loss"] for row in both if row.after is not None)
    when = "" if step is None else f" by step {step:,}"
    each = ", ".join(f"{row.domain} {_both(row)}" for row in both[:8]) if len(both) > 1 else ""
    each = f": {each}{f', and {len(both) - 8} more' if len(both) > 8 else ''}" if each else ""
    mean_of = f", mean of {len(both)} domains" if len(both) > 1 else ""
    return f"Validation loss went from {before:.3f} to {after:.3f} nats a token{when}{mean_of}{each}."


def _both(row: DomainFigures) -> str:
    assert row.before is not None and row.after is not None
    return f"{row.before['loss']:.2f} to {row.after['loss']:.2f}"


def _stream_result(stream: Mapping[str, Any]) -> str:
    summary = stream["summary"]
    experts = len(set(summary["routing"]["served_by"]))
    text = f"{some(len(summary['skills']), 'skill')} learned with {some(experts, 'expert')}; "
    text += f"mean loss {summary['loss']['average']:.3f} nats a token"
    if (forgetting := summary["loss"]["forgetting"]) is not None:
        text += f", forgetting {change(forgetting, 3)} (0 or below is none)"
    if (routed := summary["routing"]["accuracy"]) is not None:
        text += f"; {routed:.1%} of the prompts go to the expert of their skill"
    return f"{text}."


def tiles(run: RunRecord, found: Sequence[DomainFigures], stream: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(figure, what it is) of what a person looks for first."""
    progress = progress_of(run)
    metrics = [line for part in (run, *run.stages) for line in part.metrics]
    told = list[tuple[str, str]]()
    if stream is not None:
        told += _stream_tiles(stream["summary"])
    else:
        share = mean(row.change for row in found)
        if share is not None:
            told.append((f"{share:+.0%}", "validation loss, mean over domains"))
        of = f" of {progress.total:,}" if progress.total and not progress.finished else ""
        told.append((f"{progress.done:,}{of}", "optimizer steps"))
    if tokens := number(run.result.get("tokens")):
        told.append((f"{tokens:,.0f}", "tokens trained on"))
    if progress.seconds:
        told.append((duration(progress.seconds), "training and evaluating"))
    if (speed := median_of(metrics, "tokens_per_second")) is not None:
        told.append((f"{speed:,.0f}", "tokens a second, median"))
    if (memory := most_of(metrics, "memory_gb")) is not None:
        told.append((f"{memory:.2f} GB", "memory at the most"))
    parts = run.result.get("parameters")
    if isinstance(parts, list) and parts:
        trainable, frozen = (sum(int(part[name]) for part in parts) for name in ("trainable", "frozen"))
        told.append((_large(trainable), f"parameters trained, {trainable / max(trainable + frozen, 1):.1%} of all"))
    return told


def _stream_tiles(summary: Record) -> list[tuple[str, str]]:
    told = [
        (f"{len(summary['skills'])}", "skills learned"),
        (f"{len(set(summary['routing']['served_by']))}", "experts"),
    ]
    told.append((f"{summary['loss']['average']:.3f}", "mean loss, nats a token"))
    if (forgetting := summary["loss"]["forgetting"]) is not None:
        told.append((change(forgetting, 3), "forgetting; 0 or below is none"))
    if (routed := summary["routing"]["accuracy"]) is not None:
        told.append((f"{routed:.1%}", "prompts to their skill's expert"))
    return told


def _large(count: int) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,}"


def most_bits(routing: Record | None) -> float | None:
    """What an expert can tell of the domain at the most: all of it, or as much as there are experts."""
    if routing is None:
        return None
    return math.log2(max(1, min(len(routing["domains"]), len(routing["experts"]))))


def recipe_of(run: RunRecord) -> str | None:
    """The recipe file that the command line named."""
    command = run.environment.get("command")
    parts = [part for part in command or () if isinstance(part, str)]
    found = [part for part in parts[2:3] if PurePath(part).suffix in (".yaml", ".yml")]
    return found[0] if found else None
