"""A skill that comes, measured: how its prompts compare with known ones, and how well the nearest expert does it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from dylora_moe.config import RunConfig
from dylora_moe.data.bundle import DataBundle
from dylora_moe.data.stream import Skill
from dylora_moe.errors import DataError
from dylora_moe.skills.growth import Decision, Kind, Limits, Losses, decide, nearest_skill
from dylora_moe.skills.library import Features, Sample, SkillLibrary
from dylora_moe.skills.novelty import MIN_ROWS, Cosine, Detector, Mahalanobis, Novelty, TwoSample
from dylora_moe.train.evaluator import Evaluator
from dylora_moe.tuner import DyLoraModel
from dylora_moe.tuner.merge import similarity


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What was found out about a skill before anything was trained for it, as `decision.json` has it.

    Attributes:
        data: Hash of its rows.
        decision: What to do about it.
        base_loss: The base's loss on its validation rows, nats a token.
        before: That of the model as it was, with its routing.
        merge: Two experts to merge into the first of them, to make room; None where there is room.
        wanted: What the recipe said to do.
    """

    data: str
    decision: Decision
    base_loss: float
    before: float
    merge: tuple[str, str] | None = None
    wanted: Kind | None = None


def detector_of(config: RunConfig) -> Detector:
    """The detector that a run asks for."""
    kinds: Mapping[str, Detector] = {
        "two_sample": TwoSample(false_growth_rate=config.false_growth_rate, seed=config.seed),
        "mahalanobis": Mahalanobis(),
        "cosine": Cosine(),
    }
    return kinds[config.novelty_detector]


def examine(
    model: DyLoraModel,
    evaluator: Evaluator,
    library: SkillLibrary,
    data: DataBundle,
    sample: Sample,
    config: RunConfig,
    *,
    wanted: Kind | None,
) -> Arrival:
    """Look at a skill that comes, and decide.

    Args:
        model: As the stage before left it.
        evaluator: Of the skill's validation rows.
        library: Of the skills learned so far.
        data: The skill's rows.
        sample: Features of some of its rows.
        config: Of the stream.
        wanted: What the recipe says to do.

    Returns:
        What was found. Losses are over all validation rows of the skill; the evaluator leaves the model's mode alone.
    """
    with model.disabled():
        base_loss = evaluator.run(model).mean_loss
    digest, losses = data_hash(data), None
    before = evaluator.run(model).mean_loss if library.skills else base_loss
    prompts = _compare_prompts(library, sample.prompts, config)
    answers = _compare_answers(library, sample.answers, config) if prompts.is_new else None
    if (nearest := nearest_skill(prompts, answers)) is not None:
        home = library.skills[nearest].record
        with model.forced(home.expert):
            expert = evaluator.run(model).mean_loss
        losses = Losses(base=base_loss, expert=expert, home_base=home.base_loss, home_expert=home.loss)
    decision = decide(
        prompts,
        answers,
        experts=library.experts,
        losses=losses,
        limits=Limits(
            may_grow=config.allow_expert_growth is not False,
            max_experts=config.max_experts,
            merges=config.at_max_experts == "merge",
            served_share=config.served_share,
        ),
        wanted=wanted,
        same_data=next((known for known, skill in library.skills.items() if skill.record.data == digest), None),
    )
    merge = None
    if decision.needs_room:
        merge = into, gone = _most_alike(model)
        reason = f"{decision.reason} To make room, {into} and {gone}, the most alike, become {into}."
        decision = replace(decision, reason=reason)
    return Arrival(data=digest, decision=decision, base_loss=base_loss, before=before, merge=merge, wanted=wanted)


def _most_alike(model: DyLoraModel) -> tuple[str, str]:
    """The two experts whose changes of the base have the largest cosine."""
    return max(combinations(model.expert_names, 2), key=lambda pair: similarity(model, *pair))


def data_hash(data: DataBundle) -> str:
    """Of the rows of a skill."""
    return data.summary.domains[0].sha256


def check_rows(skill: Skill, data: DataBundle) -> None:
    """See that there are prompts to know the skill by, and enough of them to decide.

    Raises:
        DataError: There are too few, and the recipe does not say what to do with the skill; or a row has none.
    """
    examples = data.validation_examples[skill.name]  # drawn from the same rows
    if bare := sum(not any(message.content.strip() for message in example.prompt) for example in examples):
        raise DataError(
            f"skill {skill.name} must have prompts, by which it is known, and {bare} of {len(examples)} validation "
            "rows have none. Give them one, or leave them out; text without prompts is learned with mode: joint."
        )
    if len(data.train) < 2:
        raise DataError(f"skill {skill.name} must have at least 2 training rows, got {len(data.train)}. Add rows.")
    if len(data.train) < MIN_ROWS and skill.decision is None and skill.adapter is None:
        raise DataError(
            f"skill {skill.name} must have at least {MIN_ROWS} training rows for a decision on what is new, got "
            f"{len(data.train)}. Add rows, or say what to do with it: {{skill: {skill.name}, datasets: [...], "
            "decision: grow}."
        )


def _compare_prompts(library: SkillLibrary, prompts: Features, config: RunConfig) -> Novelty:
    """Skills that came with too few prompts to compare are left out; their recipe said what to do with them.

    Where none is left the nearest is that of the nearest mean, and what is not the very same counts as new: an expert
    is not trained further for what may be another skill.
    """
    known = _enough(library.prompts)
    if len(prompts) >= MIN_ROWS and (known or not library.skills):
        return detector_of(config).judge(prompts, known)
    distances = {other: float(np.linalg.norm(prompts.mean(0) - skill.mean)) for other, skill in library.skills.items()}
    nearest = min(distances, key=distances.__getitem__) if distances else None
    return Novelty(distances=distances, nearest=nearest, threshold=0.0)


def _compare_answers(library: SkillLibrary, answers: Features, config: RunConfig) -> Novelty | None:
    """None where there are too few, or none to compare them with."""
    known = _enough(library.answers)
    return detector_of(config).judge(answers, known) if known and len(answers) >= MIN_ROWS else None


def _enough(samples: Mapping[str, Features]) -> dict[str, Features]:
    return {name: sample for name, sample in samples.items() if len(sample) >= MIN_ROWS}
