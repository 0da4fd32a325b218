"""The skills that a model knows: what their prompts look like at the tap, and which expert serves each."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dylora_moe.errors import RunError

RECORD, TENSORS = "skills.json", "skills.safetensors"
_FORMAT = 2

Features = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SkillRecord:
    """What is known of a skill besides its features.

    Attributes:
        name: Of the skill.
        expert: That serves it.
        num_rows: Prompts that its mean is over.
        data: Hash of the rows that it was learned from.
        base_loss: The base's loss on its validation rows, nats a token.
        loss: Its expert's loss on them.
    """

    name: str
    expert: str
    num_rows: int
    data: str
    base_loss: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Features of some rows of a skill at the tap.

    Attributes:
        prompts: Of their prompts, (rows, features).
        answers: Of their answers, each read by itself, (rows, features).
    """

    prompts: Features
    answers: Features


@dataclass(frozen=True, slots=True, kw_only=True)
class Skill:
    """One skill.

    Attributes:
        record: What is known of it in words and numbers.
        mean: Of the features of its prompts, (features,).
        sample: Some of its rows, for later tests.
    """

    record: SkillRecord
    mean: Features
    sample: Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What features are a function of; those of another source cannot be compared.

    Attributes:
        base: Name of the base.
        revision: Of the base, where it has one.
        tap_layer: Decoder layer whose input they are read from.
    """

    base: str
    revision: str | None
    tap_layer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SkillLibrary:
    """All skills of a model, in the order in which they came. Never changed: another one is made.

    Attributes:
        source: Of the features.
        skills: Name -> skill.
    """

    source: Source
    skills: Mapping[str, Skill]

    @property
    def prompts(self) -> dict[str, Features]:
        """Skill -> prompts of its sample, as a detector takes them."""
        return {name: skill.sample.prompts for name, skill in self.skills.items()}

    @property
    def answers(self) -> dict[str, Features]:
        """Skill -> answers of its sample."""
        return {name: skill.sample.answers for name, skill in self.skills.items()}

    @property
    def experts(self) -> dict[str, str]:
        """Skill -> the expert that serves it."""
        return {name: skill.record.expert for name, skill in self.skills.items()}

    def with_skill(self, skill: Skill) -> "SkillLibrary":
        """With one more skill.

        Raises:
            RunError: There is one of that name, or its features have another size.
        """
        name = skill.record.name
        if name in self.skills:
            raise RunError(f"A skill must have a name of its own, and there is one named {name!r}. Choose another.")
        for other in self.skills.values():
            if other.mean.shape != skill.mean.shape:
                raise RunError(
                    f"Features of a skill must have the size of the others, {other.mean.shape[0]}, got "
                    f"{skill.mean.shape[0]} for {name!r}."
                )
        return replace(self, skills={**self.skills, name: skill})

    def with_loss(self, name: str, loss: float) -> "SkillLibrary":
        """With another loss of a skill, as measured once it was learned."""
        skill = self.skills[name]
        return replace(self, skills={**self.skills, name: replace(skill, record=replace(skill.record, loss=loss))})

    def with_expert(self, gone: str, by: str) -> "SkillLibrary":
        """With the skills of one expert served by another."""
        skills = {
            name: replace(skill, record=replace(skill.record, expert=by)) if skill.record.expert == gone else skill
            for name, skill in self.skills.items()
        }
        return replace(self, skills=skills)

    def check_source(self, source: Source) -> None:
        """See that features read now can be compared with those of the library.

        Raises:
            RunError: They are of another base or tap.
        """
        if source != self.source:
            raise RunError(
                f"A skill library must be of the base and tap that are used, and it is of {_said(self.source)}, not of "
                f"{_said(source)}. Features of one say nothing of the other: train with the first, or begin anew."
            )


def save_library(library: SkillLibrary, folder: Path) -> None:
    """Write `skills.json` and `skills.safetensors` into a folder; of each skill O(features) and its sample."""
    tensors: dict[str, NDArray[np.float32]] = {}
    for index, skill in enumerate(library.skills.values()):
        tensors[f"{index}.mean"] = np.ascontiguousarray(skill.mean, np.float32)
        tensors[f"{index}.prompts"] = np.ascontiguousarray(skill.sample.prompts, np.float32)
        tensors[f"{index}.answers"] = np.ascontiguousarray(skill.sample.answers, np.float32)
    save_file(tensors, folder / TENSORS)
    records = [skill.record for skill in library.skills.values()]
    content = {
        "format": _FORMAT,
        "source": TypeAdapter(Source).dump_python(library.source),
        "skills": TypeAdapter(list[SkillRecord]).dump_python(records),
    }
    (folder / RECORD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_library(folder: Path) -> SkillLibrary:
    """Read what `save_library` wrote.

    Raises:
        RunError: A file is missing, damaged or of another version.
    """
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise RunError(
                f"{folder / RECORD} must have format {_FORMAT} to be read by this version, got {content['format']}. "
                "Begin the stream anew under another --run_name."
            )
        tensors = load_file(folder / TENSORS)
        source = TypeAdapter(Source).validate_python(content["source"])
        skills = {}
        for index, record in enumerate(TypeAdapter(list[SkillRecord]).validate_python(content["skills"])):
            sample = Sample(prompts=tensors[f"{index}.prompts"], answers=tensors[f"{index}.answers"])
            skills[record.name] = Skill(record=record, mean=tensors[f"{index}.mean"], sample=sample)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, ValidationError) as error:
        raise RunError(
            f"{folder} must hold a skill library ({RECORD} and {TENSORS}), and it cannot be read: {error}."
        ) from error
    return SkillLibrary(source=source, skills=skills)


def _said(source: Source) -> str:
    revision = f" at {source.revision}" if source.revision else ""
    return f"{source.base}{revision}, layer {source.tap_layer}"
