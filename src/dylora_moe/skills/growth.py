"""What to do about a skill that comes: reuse an expert, train it further, or grow a new one. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dylora_moe.skills.novelty import Novelty

Kind = Literal["reuse", "extend", "grow", "import"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """What an expert does to the loss, nats a token, on new data and on the validation rows of the skill it is for.

    Attributes:
        base: The base's on the new data.
        expert: The expert's on the new data.
        home_base: The base's on the expert's own skill.
        home_expert: The expert's on its own skill, when it was learned.
    """

    base: float
    expert: float
    home_base: float
    home_expert: float

    @property
    def share(self) -> float:
        """The expert's gain on the new data over its gain at home, each a share of the base's loss there.

        1 where it does the new data as well as its own, 0 where it does nothing for it; below 0 where it harms.
        """
        home = 1 - self.home_expert / self.home_base
        return (1 - self.expert / self.base) / home if home > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a stream may do.

    Attributes:
        may_grow: Whether experts may be added at all.
        max_experts: The most there may be; None for no limit.
        merges: Whether two experts become one where there are that many.
        served_share: `Losses.share` from which on an expert serves new data.
    """

    may_grow: bool
    max_experts: int | None
    served_share: float
    merges: bool = False

    def are_reached(self, count: int) -> bool:
        """True where no expert may come to so many."""
        return self.max_experts is not None and count >= self.max_experts

    def can_merge(self, count: int) -> bool:
        """True where two of so many may become one."""
        return self.merges and count > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is done about a skill, and why.

    Attributes:
        kind: `reuse` (nothing is trained), `extend` (the expert is trained further), `grow` (a new expert) or `import`
            (the skill comes with one); of a change by hand `merge` or `remove`.
        expert: That serves the skill from now on; None for a new one.
        nearest: The known skill that it is most like, as `nearest_skill` has it; None for the first.
        reason: In a sentence.
        numbers: What it was decided by.
        needs_room: True where two experts have to become one before the new one comes.
    """

    kind: Kind | Literal["merge", "remove"]
    expert: str | None
    nearest: str | None
    reason: str
    numbers: Mapping[str, float]
    needs_room: bool = False


def nearest_skill(prompts: Novelty, answers: Novelty | None) -> str | None:
    """The known skill whose expert may serve: that of the nearest prompts, unless they are new and the answers are not.

    Answers tell a known skill in other words from a new one.
    """
    if prompts.is_new and answers is not None and not answers.is_new:
        return answers.nearest
    return prompts.nearest


def decide(
    prompts: Novelty,
    answers: Novelty | None,
    *,
    experts: Mapping[str, str],
    losses: Losses | None,
    limits: Limits,
    wanted: Kind | None = None,
    same_data: str | None = None,
) -> Decision:
    """Decide.

    Args:
        prompts: How the new prompts compare with those of known skills.
        answers: How the new answers do; None where that is not known, or the prompts are not new.
        experts: Known skill -> its expert.
        losses: Of the expert of `nearest_skill`; None where no skill is known.
        limits: What may be done.
        wanted: What the recipe says, which is done whatever the numbers are; `import` where it gives an expert.
        same_data: The known skill that was learned from the very same rows, if there is one.
    """
    nearest = nearest_skill(prompts, answers)
    numbers = _numbers(prompts, answers, losses)
    if nearest is None or losses is None:
        reason = "It is the first skill, so it gets an expert."
        if wanted == "import":
            return Decision(
                kind="import", expert=None, nearest=None, reason="It comes with its expert.", numbers=numbers
            )
        if wanted in ("reuse", "extend"):
            reason = f"{reason} The recipe says {wanted}, but there is none yet."
        return Decision(kind="grow", expert=None, nearest=None, reason=reason, numbers=numbers)
    if same_data is not None and wanted is None:
        reason = f"Its rows are those of {same_data}, which is learned already."
        return Decision(kind="reuse", expert=experts[same_data], nearest=same_data, reason=reason, numbers=numbers)
    expert, count = experts[nearest], len(set(experts.values()))
    kind, reason = _choose(prompts, answers, nearest, expert, losses, limits.served_share)
    if wanted is not None:
        why = "It comes with its expert" if wanted == "import" else f"The recipe says {wanted}"
        kind, reason = wanted, f"{why}. By the numbers it would have been {kind}: {reason}"
    elif kind == "grow" and (refusal := _refusal(limits, count)):
        kind = "extend"
        reason = f"{reason} But {refusal}, so expert {expert} takes it."
    is_new = kind in ("grow", "import")
    return Decision(
        kind=kind,
        expert=None if is_new else expert,
        nearest=nearest,
        reason=reason,
        numbers=numbers,
        needs_room=kind == "grow" and limits.are_reached(count) and limits.can_merge(count),
    )


def _choose(
    prompts: Novelty, answers: Novelty | None, nearest: str, expert: str, losses: Losses, served_share: float
) -> tuple[Kind, str]:
    served, share = losses.share >= served_share, f"{losses.share:.0%} of what it gains at home"
    if not prompts.is_new:
        seen = f"Its prompts are like those of {_compared(prompts)}"
        if served:
            return "reuse", f"{seen}, and expert {expert} does it: {share}."
        return "extend", f"{seen}, but expert {expert} gains {share} only."
    seen = f"Its prompts differ from those of every known skill, the nearest {_compared(prompts)}"
    if answers is not None:
        if answers.is_new:
            return "grow", f"{seen}, and so do its answers, the nearest {_compared(answers)}."
        seen = f"{seen}, yet its answers are like those of {_compared(answers)}"
    if served:
        return "reuse", f"{seen}, and expert {expert} does it: {share}."
    return "grow", f"{seen}, but expert {expert} gains {share} only."


def _compared(novelty: Novelty) -> str:
    assert novelty.nearest is not None
    sign = ">" if novelty.is_new else "<="
    return f"{novelty.nearest} ({novelty.distances[novelty.nearest]:.3f} {sign} {novelty.threshold:.3f})"


def _refusal(limits: Limits, count: int) -> str:
    if not limits.may_grow:
        return "experts may not be added (allow_expert_growth)"
    if limits.are_reached(count) and not limits.can_merge(count):
        return f"there are {count} experts and max_experts is {limits.max_experts}"
    return ""


def _numbers(prompts: Novelty, answers: Novelty | None, losses: Losses | None) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for what, novelty in (("prompts", prompts), ("answers", answers)):
        if novelty is not None:
            numbers |= {f"{what}: distance to {name}": distance for name, distance in novelty.distances.items()}
            numbers[f"{what}: threshold"] = novelty.threshold
    if losses is not None:
        numbers |= {
            "base loss": losses.base,
            "expert loss": losses.expert,
            "base loss at home": losses.home_base,
            "expert loss at home": losses.home_expert,
            "share of the gain at home": losses.share,
        }
    return numbers
