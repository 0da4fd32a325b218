"""What was measured after each stage of a stream of skills -> what was kept, forgotten and carried over. Pure numbers.

R[i][j] is how well skill j is done after stage i. Sources: average, backward and forward transfer are those of
Lopez-Paz and Ranzato 2017 (arXiv 1706.08840, section 2), with the base in place of a random start; forgetting is that
of Chaudhry et al. 2018 (arXiv 1801.10112, definition 1).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dylora_moe.errors import DataError

Matrix = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFigures:
    """What was measured after one stage of a stream: after a skill was learned, or experts were changed by hand.

    Attributes:
        skill: That was learned; None where none was.
        expert: Who serves it; None where nobody does.
        before: Loss on it just before it was learned, by the routed model of the stage before; the base at first.
        losses: Loss of every skill seen so far, this one included, in nats a labelled token.
        accuracies: Share of right answers, 0 to 1, of those that are classification skills.
        routed: Skill -> expert -> share of the skill's validation prompts that it answered.
        unsure: Skill -> share of its validation prompts that were left to the base.
        general: Loss on general text, in nats a token; None where it is not measured.
    """

    skill: str | None
    expert: str | None
    before: float | None
    losses: Mapping[str, float]
    accuracies: Mapping[str, float]
    routed: Mapping[str, Mapping[str, float]]
    unsure: Mapping[str, float]
    general: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SkillFigures:
    """One skill by one measure; None where it was not measured, or where no stage came before or after.

    Attributes:
        skill: Its name.
        learned: Right after it was learned, R[j][j].
        last: After the last stage, R[T][j].
        backward_transfer: What the stages after it changed, R[T][j] against R[j][j]; positive is better.
        forward_transfer: What the stages before it had gained on the base; positive is better.
        forgetting: From the best of all stages but the last to the last; positive is worse, negative has never been
            as good as at the end.
    """

    skill: str
    learned: float | None
    last: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    forgetting: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureFigures:
    """The stream by one measure: nats a token for losses, a share of 0 to 1 for accuracies.

    Attributes:
        matrix: R, one row a stage, changes by hand among them, one column a skill; None where a skill was not seen
            yet or is not measured so.
        average: Mean over skills after the last stage.
        backward_transfer: Mean over all skills but the last; positive is better, for losses too.
        forward_transfer: Mean over all skills but the first; positive is better. None for accuracies.
        forgetting: Mean over all skills but the last; positive is worse.
        by_skill: The same of each skill, in the order of the stream.
    """

    matrix: Matrix
    average: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    forgetting: float | None
    by_skill: tuple[SkillFigures, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingFigures:
    """Where the prompts of each skill went after the last stage.

    Attributes:
        experts: Names, in the order of the columns.
        confusion: Share of each skill's prompts that each expert answered, one row a skill; None if not measured.
        unsure: Share of each skill's prompts that was left to the base.
        served_by: The expert that each skill's prompts should go to; None where there is none.
        by_skill: Share of each skill's prompts that went there; None where no expert is right or none was measured.
        accuracy: Mean of `by_skill` over the skills that have it.
    """

    experts: tuple[str, ...]
    confusion: Matrix
    unsure: tuple[float | None, ...]
    served_by: tuple[str | None, ...]
    by_skill: tuple[float | None, ...]
    accuracy: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSummary:
    """A stream of skills in figures.

    Attributes:
        skills: Names, in the order learned: the columns of every matrix.
        loss: By loss.
        accuracy: By share of right answers; None where no skill is a classification skill.
        routing: Who answered what.
        general_change: Loss on general text after the last stage less the base's, in nats a token; positive is worse.
    """

    skills: tuple[str, ...]
    loss: MeasureFigures
    accuracy: MeasureFigures | None
    routing: RoutingFigures
    general_change: float | None


def summarise(
    stages: Sequence[StageFigures],
    *,
    base_losses: Mapping[str, float],
    base_general: float | None,
    experts: Mapping[str, str],
) -> StreamSummary:
    """Figures of a stream, or of as much of it as is done.

    Args:
        stages: In their order; a skill that came again under another name counts as another skill.
        base_losses: Skill -> loss of the untrained base.
        base_general: Loss of the untrained base on general text.
        experts: Skill -> the expert that serves it now.

    Raises:
        DataError: No stage, two of one name, or one that did not measure the loss of a skill seen so far.
    """
    learned_at = {stage.skill: place for place, stage in enumerate(stages) if stage.skill is not None}
    skills = tuple(learned_at)
    _check(stages, learned_at)
    gains = [_gain(base_losses.get(skill), stages[place].before) for skill, place in learned_at.items()]
    losses, accuracies = [stage.losses for stage in stages], [stage.accuracies for stage in stages]
    last = stages[-1]
    return StreamSummary(
        skills=skills,
        loss=_measure(learned_at, losses, [None, *gains[1:]], higher_is_better=False),
        accuracy=_measure(learned_at, accuracies, [None] * len(skills), higher_is_better=True)
        if any(accuracies)
        else None,
        routing=_routing(skills, last, experts),
        general_change=None if last.general is None or base_general is None else last.general - base_general,
    )


def _gain(base: float | None, before: float | None) -> float | None:
    return None if base is None or before is None else base - before


def _check(stages: Sequence[StageFigures], learned_at: Mapping[str, int]) -> None:
    if not learned_at or stages[0].skill is None:
        raise DataError("a summary needs the figures of a stage that learned a skill first, got none. Train one.")
    named = [stage.skill for stage in stages if stage.skill is not None]
    twice = [skill for place, skill in enumerate(named) if skill in named[:place]]
    if twice:
        raise DataError(f"every skill must have a name of its own, got {twice[0]!r} twice. Rename one.")
    for place, stage in enumerate(stages):
        missing = [skill for skill, learned in learned_at.items() if learned <= place and skill not in stage.losses]
        if missing:
            raise DataError(
                f"stage {place + 1}, {stage.skill or 'a change by hand'}, must hold the loss of every skill seen so "
                f"far, but has none of {', '.join(missing)}. Measure them."
            )


def _measure(
    learned_at: Mapping[str, int],
    rows: Sequence[Mapping[str, float]],
    forward: Sequence[float | None],
    *,
    higher_is_better: bool,
) -> MeasureFigures:
    matrix = tuple(
        tuple(row.get(skill) if learned <= stage else None for skill, learned in learned_at.items())
        for stage, row in enumerate(rows)
    )
    by_skill = tuple(
        _of_skill(skill, [row[column] for row in matrix[learned_at[skill] :]], gain, higher_is_better)
        for column, (skill, gain) in enumerate(zip(learned_at, forward, strict=True))
    )
    return MeasureFigures(
        matrix=matrix,
        average=_mean(matrix[-1]),
        backward_transfer=_mean(figures.backward_transfer for figures in by_skill),
        forward_transfer=_mean(forward),
        forgetting=_mean(figures.forgetting for figures in by_skill),
        by_skill=by_skill,
    )


def _of_skill(
    skill: str, column: Sequence[float | None], forward: float | None, higher_is_better: bool
) -> SkillFigures:
    """`column` runs from the stage that learned the skill to the last."""
    learned, last = column[0], column[-1]
    earlier = [value for value in column[:-1] if value is not None]
    backward = forgetting = None
    if last is not None and earlier:
        best = max(earlier) if higher_is_better else min(earlier)
        forgetting = best - last if higher_is_better else last - best
        if learned is not None:
            backward = last - learned if higher_is_better else learned - last
    return SkillFigures(
        skill=skill,
        learned=learned,
        last=last,
        backward_transfer=backward,
        forward_transfer=forward,
        forgetting=forgetting,
    )


def _routing(skills: Sequence[str], last: StageFigures, experts: Mapping[str, str]) -> RoutingFigures:
    serving = [experts[skill] for skill in skills if skill in experts]
    others = sorted({expert for skill in skills for expert in last.routed.get(skill, {})} - set(serving))
    names = tuple(dict.fromkeys([*serving, *others]))
    confusion = tuple(
        tuple(last.routed[skill].get(name, 0.0) if skill in last.routed else None for name in names) for skill in skills
    )
    right = tuple(
        last.routed[skill].get(experts[skill], 0.0) if skill in experts and skill in last.routed else None
        for skill in skills
    )
    return RoutingFigures(
        experts=names,
        confusion=confusion,
        unsure=tuple(last.unsure.get(skill) for skill in skills),
        served_by=tuple(experts.get(skill) for skill in skills),
        by_skill=right,
        accuracy=_mean(right),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that there are; None of none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
