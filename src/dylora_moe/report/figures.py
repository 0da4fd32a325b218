"""Records of a run -> the figures that its page tells: how far it came, losses before and after, curves."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dylora_moe.report.records import Record, RunRecord

Points = list[tuple[float, float]]
# Marks a line between two stages, which no curve goes through.
_GAP = "gap between stages"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run came.

    Attributes:
        finished: Whether its result is there.
        done: Optimizer steps by the last line of figures; of a stream, skills learned.
        total: Of those planned, where it can be told.
        seconds: Of training and evaluating so far.
        current: Of a stream, the stage under way.
    """

    finished: bool
    done: int
    total: int | None
    seconds: float
    current: RunRecord | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainFigures:
    """A domain before and after; each with `loss`, `perplexity` and what else was measured. None where it was not."""

    domain: str
    before: Record | None
    after: Record | None

    @property
    def change(self) -> float | None:
        """Of the loss, as a share of what it was."""
        if self.before is None or self.after is None or not self.before["loss"]:
            return None
        return self.after["loss"] / self.before["loss"] - 1


def progress_of(run: RunRecord) -> Progress:
    """How far a run came, by its lines of figures."""
    if run.is_stream:
        under_way = [stage for stage in run.stages if not stage.counts]
        learned = sum(stage.counts for stage in run.stages)
        planned = run.settings.get("skills")
        return Progress(
            finished=bool(run.result),
            done=learned,
            total=max(len(planned), learned) if isinstance(planned, list) else None,
            seconds=sum(_seconds(stage.metrics) for stage in run.stages),
            current=under_way[-1] if under_way else None,
        )
    done = int(max((number(line.get("step")) or 0 for line in run.metrics), default=0))
    done = int(number(run.result.get("steps")) or done)
    return Progress(finished=bool(run.result), done=done, total=_planned_steps(run), seconds=_seconds(run.metrics))


def _planned_steps(run: RunRecord) -> int | None:
    steps, epochs = number(run.settings.get("max_steps")), number(run.settings.get("num_epochs"))
    if steps is not None and steps > 0:
        return int(steps)
    told = [(number(line.get("step")), number(line.get("epoch"))) for line in run.metrics]
    rates = [step / epoch for step, epoch in told if step and epoch]
    return round(rates[-1] * epochs) if rates and epochs else None


def _seconds(metrics: Sequence[Record]) -> float:
    """Of all processes that worked on a run: each counts from its own start."""
    clocks = [seconds for line in metrics if (seconds := number(line.get("seconds"))) is not None]
    ends = [earlier for earlier, later in pairwise(clocks) if later < earlier]
    return math.fsum([*ends, *clocks[-1:]])


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def domain_figures(run: RunRecord) -> tuple[list[DomainFigures], int | None]:
    """Every domain before and after; and the step of the latest evaluation, where the run has not come to its end."""
    before = _measured(run, "base") or by_domain(run.start.get("before") or run.result.get("before"))
    after = _measured(run, "routed") or by_domain(run.result.get("after"))
    step = None
    if not before or not after:
        found = [(line, losses) for line in run.metrics if (losses := _evaluated(line))]
        if found and not before and not number(found[0][0].get("step")):
            before = found[0][1]
        if found and not after and number(found[-1][0].get("step")):
            step, after = int(found[-1][0]["step"]), found[-1][1]
    names = dict.fromkeys([*before, *after])
    return [DomainFigures(domain=name, before=before.get(name), after=after.get(name)) for name in names], step


def _measured(run: RunRecord, who: str) -> dict[str, Record]:
    """What `eval/` has of validation rows."""
    evaluation = run.evaluations.get(who, {})
    return by_domain(evaluation) if evaluation.get("split", "validation") == "validation" else {}


def by_domain(evaluation: Any) -> dict[str, Record]:
    """Domain -> what was measured of it, of domains that have a loss."""
    domains = evaluation.get("domains") if isinstance(evaluation, Mapping) else None
    found = [each for each in domains or () if isinstance(each, Mapping) and number(each.get("loss")) is not None]
    return {str(each.get("domain")): dict(each) for each in found}


def _evaluated(line: Record) -> dict[str, Record]:
    return {name: {"loss": loss, "perplexity": _exp(loss)} for name, loss in eval_losses(line)}


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def eval_losses(line: Record) -> Iterator[tuple[str, float]]:
    """(domain, loss) of a line that tells an evaluation."""
    for key, value in line.items():
        is_domain = key.startswith("eval_") and key.endswith("_loss") and key != "eval_loss"
        if is_domain and (loss := number(value)) is not None:
            yield key.removeprefix("eval_").removesuffix("_loss"), loss


def curve(metrics: Iterable[Record], key: str) -> Points:
    """(step, value) of one figure, where it was logged; a value that is no number where the curve has a gap."""
    told = ((number(line.get("step")), math.nan if line.get(_GAP) else number(line.get(key))) for line in metrics)
    return [(step, value) for step, value in told if step is not None and value is not None]


def loss_curves(metrics: Sequence[Record]) -> dict[str, Points]:
    """Domain -> its validation loss by step."""
    curves = dict[str, Points]()
    for line in metrics:
        if (step := number(line.get("step"))) is not None:
            for domain, loss in eval_losses(line):
                curves.setdefault(domain, []).append((step, loss))
    return curves


def in_a_row(run: RunRecord) -> tuple[list[Record], list[tuple[str, float]]]:
    """Lines of all stages of a stream with steps counted on and gaps between; and (stage, step at which it began)."""
    lines, begun, offset = list[Record](), list[tuple[str, float]](), 0.0
    for stage in run.stages:
        steps = [step for line in stage.metrics if (step := number(line.get("step"))) is not None]
        if steps:
            begun.append((stage.name.partition("-")[2], offset))
            lines += [line | {"step": offset + (number(line.get("step")) or 0)} for line in stage.metrics]
            offset += max(steps)
            lines.append({"step": offset, _GAP: True})
    return lines, begun


def median_of(metrics: Sequence[Record], key: str) -> float | None:
    """The middle value of a figure."""
    values = sorted(value for line in metrics if (value := number(line.get(key))) is not None)
    return values[len(values) // 2] if values else None


def most_of(metrics: Sequence[Record], key: str) -> float | None:
    """The highest value of a figure."""
    return max((value for line in metrics if (value := number(line.get(key))) is not None), default=None)


def loads(routing: Sequence[Record]) -> tuple[list[str], list[tuple[float, list[float]]]]:
    """Experts; and (step, share of each) of training, line by line."""
    lines = [line for line in routing if line.get("split") == "train" and line.get("experts")]
    names = [str(name) for name in lines[-1]["experts"]] if lines else []
    shares = [(number(line.get("step")), line.get("load")) for line in lines]
    return names, [
        (step, [number(share) or 0.0 for share in load])
        for step, load in shares
        if step is not None and isinstance(load, list) and len(load) == len(names)
    ]


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that there are; None of none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
