"""Entries of `skills` -> skills by name, each with the data sets that it is learned from."""

import glob
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from dylora_moe.config import SKILL_KEYS, DatasetSpec, RunConfig, SkillSpec, unknown_skill_key
from dylora_moe.config.continual import Action
from dylora_moe.data.registry import REGISTRY, DataSource, registry_of
from dylora_moe.data.source_reader import SourceReader
from dylora_moe.data.sources import check_path, parse_dataset_spec
from dylora_moe.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Skill:
    """One skill of a stream.

    Attributes:
        name: Its own.
        datasets: What it is learned from, each with the name as its domain.
        decision: What the recipe says to do with it; None leaves it to the novelty test.
        rank: Of its expert, where the recipe says so.
        alpha: Of its expert, where the recipe says so.
        adapter: Folder of its expert, where it comes with one.
        finds_changes: True for rows of several skills, to be told apart.
        arrived: True for what a pattern found: more may come, under any name.
    """

    name: str
    datasets: tuple[dict[str, Any], ...]
    decision: Action | None = None
    rank: int | None = None
    alpha: float | None = None
    adapter: str | None = None
    finds_changes: bool = False
    arrived: bool = False


def parse_skills(entries: Sequence[object], registry: Mapping[str, DataSource] = REGISTRY) -> tuple[Skill, ...]:
    """The skills of a stream in their order, patterns replaced by the files and folders that they match.

    Raises:
        DataError: An entry that cannot be read, a pattern that matches nothing, or two skills of one name.
    """
    skills = []
    for entry in entries:
        values = _expand(entry)
        arrived = isinstance(entry, str) and is_pattern(entry)
        skills += [replace(_parse(value, registry), arrived=arrived) for value in values]
    check_names(skills)
    return tuple(skills)


def in_order(skills: Sequence[Skill], learned: Sequence[str]) -> tuple[Skill, ...]:
    """The skills with those that were learned first, in that order, where only patterns found them in another one.

    Args:
        skills: As the recipe has them now, those of a pattern by name.
        learned: Names, in the order in which they were learned.
    """
    by_name = {skill.name: skill for skill in skills}
    first = [by_name[name] for name in learned if name in by_name]
    arranged = (*first, *(skill for skill in skills if skill not in first))
    fixed, before = ([skill.name for skill in order if not skill.arrived] for order in (arranged, skills))
    return arranged if fixed == before else tuple(skills)


def check_names(skills: Sequence[Skill]) -> None:
    """See that every skill has a name of its own.

    Raises:
        DataError: Two have the same.
    """
    seen: dict[str, Skill] = {}
    for skill in skills:
        if skill.name in seen:
            raise DataError(
                f"skills must have different names, got {skill.name!r} twice. Name one of them otherwise, such as "
                f"{{skill: {skill.name}_2, datasets: [...]}}; the same data twice teaches nothing new."
            )
        seen[skill.name] = skill


def all_at_once(config: RunConfig) -> RunConfig:
    """A stream as a run of all its skills' data, to look at them; other runs as they are."""
    if config.mode == "joint":
        return config
    skills = parse_skills(config.skills, registry_of(config.data_registry))
    datasets = tuple(dataset for skill in skills for dataset in skill.datasets)
    return config.model_copy(update={"mode": "joint", "skills": (), "datasets": datasets})


def is_pattern(entry: str) -> bool:
    """True for what stands for all files and folders that it matches, such as `incoming/*`.

    What is there under that very name is no pattern: brackets may be in the name of a file.
    """
    return glob.has_magic(entry) and not Path(entry).expanduser().exists()


def is_skill_mapping(entry: Mapping[str, Any]) -> bool:
    """True for a mapping with the keys of `SkillSpec`, false for one data set."""
    return not set(entry).isdisjoint(SKILL_KEYS)


def _expand(entry: object) -> list[object]:
    if not isinstance(entry, str) or not is_pattern(entry):
        return [entry]
    found = sorted(glob.glob(str(Path(entry).expanduser())))
    if not found:
        raise DataError(
            f"A pattern in skills must match files or folders, got {entry!r}, which matches none. Mend it, or start "
            "when there are some."
        )
    return [DatasetSpec(path=path) for path in found]  # never a name of the registry


def _parse(entry: object, registry: Mapping[str, DataSource]) -> Skill:
    spec = _as_spec(entry)
    datasets = tuple(parse_dataset_spec(value, registry) for value in spec.datasets)
    for dataset in datasets:
        check_path(dataset, registry)
    name = spec.skill or SourceReader(datasets[0], seed=0, registry=registry).domain
    return Skill(
        name=name,
        datasets=tuple(_in_domain(dataset, name) for dataset in datasets),
        decision=spec.decision,
        rank=spec.lora_r,
        alpha=spec.lora_alpha,
        adapter=spec.adapter,
        finds_changes=spec.find_changes,
    )


def _as_spec(entry: object) -> SkillSpec:
    if not isinstance(entry, Mapping) or not is_skill_mapping(entry):
        return SkillSpec(datasets=(entry,))
    for key in entry:
        if key not in SKILL_KEYS:
            raise DataError(unknown_skill_key(str(key)))
    spec = SkillSpec(**entry)
    _check(spec, entry)
    return SkillSpec(**{**entry, "datasets": tuple(spec.datasets)})


def _check(spec: SkillSpec, entry: Mapping[str, Any]) -> None:
    if not isinstance(spec.datasets, list | tuple) or not spec.datasets:
        raise DataError(f"datasets of a skills entry must be a list of at least one data set, got {dict(entry)}.")
    if spec.skill is not None and not (isinstance(spec.skill, str) and spec.skill.strip()):
        raise DataError(f"skill of a skills entry must be a name, got {spec.skill!r}. Leave it out for the data's.")
    if spec.decision is not None and spec.decision not in get_args(Action):
        raise DataError(f"decision of a skill must be one of {', '.join(get_args(Action))}, got {spec.decision!r}.")
    if not isinstance(spec.find_changes, bool):
        raise DataError(f"find_changes of a skill must be true or false, got {spec.find_changes!r}.")
    if spec.adapter is not None:
        _check_adapter(spec)
    rank, alpha = spec.lora_r, spec.lora_alpha
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0 or rank % 8):
        raise DataError(f"lora_r of a skill must be a multiple of 8 above 0, got {rank!r}. Take 8 or 16.")
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if alpha is not None and not (is_number and 0 < alpha < math.inf):
        raise DataError(f"lora_alpha of a skill must be a number above 0, got {alpha!r}. Leave it out for the usual.")


def _check_adapter(spec: SkillSpec) -> None:
    if not isinstance(spec.adapter, str) or not spec.adapter.strip():
        raise DataError(f"adapter of a skill must be the folder of a PEFT LoRA, got {spec.adapter!r}. Mend the path.")
    given = [key for key in ("decision", "lora_r", "lora_alpha") if getattr(spec, key) is not None]
    if given or spec.find_changes:
        what = given[0] if given else "find_changes"
        raise DataError(f"a skill must have an adapter or {what}, and has both. The adapter is its expert as it is.")


def _in_domain(dataset: DatasetSpec, name: str) -> dict[str, Any]:
    """As an entry of `datasets`, which a run can be told of; what is not set is left out."""
    values = asdict(dataset) | {"domain": name}
    return {key: value for key, value in values.items() if value is not None and value is not False}
