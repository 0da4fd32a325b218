"""Settings of a stream of skills: which, when an expert is added for one, and who answers what."""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from dylora_moe.config.advice import Advice

Mode = Literal["joint", "continual"]
Action = Literal["reuse", "extend", "grow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SkillSpec:
    """One entry of `skills` where a data set alone does not say enough.

    Attributes:
        skill: Its name; default: the domain of its first data set.
        datasets: Entries as in `datasets`, learned together.
        decision: What to do with it, whatever the novelty test says: `reuse`, `extend` or `grow`.
        lora_r: Rank of its expert, where it gets one; default: that of the run.
        lora_alpha: Of its expert; default: in proportion to the rank.
        adapter: Folder of its expert, a plain PEFT LoRA: nothing is trained.
        find_changes: Its rows, in their order, are of several skills: find where one ends and the next begins.
    """

    skill: str | None = None
    datasets: tuple[Any, ...] = ()
    decision: Action | None = None
    lora_r: int | None = None
    lora_alpha: float | None = None
    adapter: str | None = None
    find_changes: bool = False


SKILL_KEYS = tuple(field.name for field in fields(SkillSpec))


class ContinualSettings(BaseModel, use_attribute_docstrings=True):
    """How skills are learned one after the other."""

    mode: Annotated[Mode, Advice(note="joint learns datasets, continual learns skills.")] = "joint"
    """All data at once, or skills one after the other, with a new expert where a skill is new."""

    skills: Annotated[
        tuple[str | dict[str, Any], ...],
        Advice(
            values="a list of names, paths, patterns such as incoming/*, or mappings",
            note="Only with mode: continual. Entries may be added at the end of the list later: the same command goes "
            "on. docs/continual.md has the keys of a mapping.",
        ),
    ] = ()
    """Skills in the order in which they come: data sets as in datasets, or mappings (skill, datasets, decision, lora_r,
    lora_alpha, adapter, find_changes). As a flag: a,b,c."""

    allow_expert_growth: Annotated[
        bool | None,
        Advice(note="Without it every skill after the first goes to the nearest expert, reused or trained further."),
    ] = None
    """Add an expert where a skill is new. Not given: yes with mode: continual, no with joint."""

    max_experts: Annotated[
        int | None,
        Advice(
            unit="experts",
            more="room for more skills, one adapter of memory each",
            less="less memory, skills that have to share",
            note="Only with mode: continual.",
        ),
    ] = Field(default=None, ge=1)
    """Most experts that a stream may grow to; no limit when not given."""

    at_max_experts: Annotated[
        Literal["refuse", "merge"], Advice(note="merge changes the two experts and may cost their skills something.")
    ] = "refuse"
    """What a new skill gets at max_experts: refuse, the nearest expert; merge, its own, in the room of two experts that
    are most alike and become one."""

    novelty_detector: Annotated[
        Literal["two_sample", "mahalanobis", "cosine"],
        Advice(note="cosine is the rule of the first design, for comparison: it misses most new skills (docs/log.md)."),
    ] = "two_sample"
    """How prompts, and answers where these look new, are compared with those of known skills."""

    false_growth_rate: Annotated[
        float,
        Advice(
            unit="share of decisions",
            low=0.001,
            high=0.05,
            more="fewer new skills that are missed, more experts for skills that are known",
            less="fewer experts for skills that are known, small differences overlooked",
            note="Of two_sample, whose threshold is calibrated to it, and is an AUROC of 0.7 at least.",
        ),
    ] = Field(default=0.01, gt=0, lt=0.5)
    """Largest share of the repeats of a known skill that may be taken for new."""

    feature_rows: Annotated[
        int,
        Advice(
            unit="rows",
            low=100,
            high=1000,
            more="surer decisions and routing, a larger library",
            less="a smaller library, decisions that chance moves",
            note="Drawn from the training rows; a skill with fewer rows gives all that it has.",
        ),
    ] = Field(default=200, ge=20)
    """Rows of each skill the features of whose prompts and answers are read, compared and kept."""

    served_share: Annotated[
        float,
        Advice(
            low=0.5,
            high=0.95,
            more="more training of what is known",
            less="more that is left as it is",
            note="An expert lowers the base's loss by so much on its own validation rows; a sample of which it lowers "
            "the loss by this share of that is served by it.",
        ),
    ] = Field(default=0.7, gt=0)
    """Part of an expert's gain at home from which on it does new data well enough to be reused."""

    stream_router: Annotated[
        Literal["prototype", "learned"],
        Advice(
            note="learned is trained anew after every skill, on the prompts that the library keeps: what it says of "
            "old skills may change, and it is never unsure."
        ),
    ] = "prototype"
    """Who sends prompts to experts: prototype, the nearest skill; learned, a linear map."""

    unsure_rate: Annotated[
        float,
        Advice(
            unit="share of prompts",
            low=0.001,
            high=0.1,
            more="more foreign prompts that are left to unsure_answer, and more of one's own",
            less="fewer of one's own prompts refused, and fewer foreign ones",
            note="Of the prompts that are kept of each skill; a foreign prompt as near as they are is not told. 0 "
            "where no foreign prompt comes: the nearest skill's expert answers all.",
        ),
    ] = Field(default=0.01, ge=0, lt=0.5)
    """Share of prompts of known skills that the router may call unknown: its confidence is one minus this. With 0 it
    calls none unknown."""

    unsure_answer: Annotated[Literal["base", "dense"], Advice(note="dense mixes all experts by their nearness.")] = (
        "base"
    )
    """Who answers prompts that are like no known skill's."""

    maturity_ratio: Annotated[
        float,
        Advice(
            unit="share of the steps",
            high=0.5,
            more="longer help of the old experts, slower steps",
            less="an expert that stands alone sooner",
            note="0 lets it work alone from its first step. Without effect on the first expert, which has no others. "
            "Needs stream_router prototype.",
        ),
    ] = Field(default=0.0, ge=0, le=1)
    """Share of a new expert's steps in which it is immature: all experts work together, less and less, until it is
    mature and works alone."""

    warm_start: Annotated[
        bool, Advice(note="Needs the same rank and targets as the nearest expert; otherwise it starts from nothing.")
    ] = False
    """Begin a new expert with the weights of the nearest one."""
