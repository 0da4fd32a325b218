"""Experts of a stream changed by hand: merged, removed, taken in. Each change is a stage, which `rollback` undoes."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dylora_moe.data.paths import with_full_paths
from dylora_moe.data.registry import registry_of
from dylora_moe.data.stream import check_names, parse_skills
from dylora_moe.errors import RunError
from dylora_moe.evaluate.load import read_config
from dylora_moe.run_dir import FINAL, STAGE, RunDir, stage_folders
from dylora_moe.skills.growth import Decision
from dylora_moe.train.continual import learn, read_data, route
from dylora_moe.train.segments import cut_streams
from dylora_moe.train.session import Stages
from dylora_moe.train.stage_figures import measure_at_home, measure_stage
from dylora_moe.train.stopping import StopSignals
from dylora_moe.train.stream import StageRecord, Stream, divide_skills, open_stream
from dylora_moe.train.stream_result import finish_stream
from dylora_moe.tuner.merge import check_known, merge_experts


def merge(path: Path, into: str, gone: Sequence[str], stages: Stages, stop: StopSignals) -> dict[str, Any]:
    """Make one expert of several, which serves the skills of all of them, and return the result of the stream.

    Args:
        path: Of the stream.
        into: The expert that holds their mean, in its own rank.
        gone: The others.
        stages: Shows what is done.
        stop: May end it early; nothing is changed then.

    Raises:
        RunError: The folder holds no stream, or one that has not come to its end.
        TunerError: There are no such experts, or there is nothing to merge.
    """
    with _opened(path, stages) as stream:
        merged = merge_experts(stream.model, [into, *gone], into)
        for name in gone:
            stream.library = stream.library.with_expert(name, into)
        names = ", ".join([into, *gone])
        reason = f"By hand: {names} became {into}, which has room for {merged.kept:.0%} of their mean."
        decision = Decision(kind="merge", expert=into, nearest=None, reason=reason, numbers={})
        return _commit(stream, decision, stages, stop)


def remove(path: Path, expert: str, skills_to: str | None, stages: Stages, stop: StopSignals) -> dict[str, Any]:
    """Remove an expert, whose skills go to another one, and return the result of the stream.

    Args:
        path: Of the stream.
        expert: To be removed.
        skills_to: The expert that serves its skills from then on.
        stages: Shows what is done.
        stop: May end it early; nothing is changed then.

    Raises:
        RunError: Its skills, which need it, are given to no other; or as in `merge`.
        TunerError: There is no such expert, or no other.
    """
    with _opened(path, stages) as stream:
        check_known(stream.model, expert, *([skills_to] if skills_to else []))
        served = ", ".join(skill for skill, server in stream.library.experts.items() if server == expert)
        if skills_to is None or skills_to == expert:
            raise RunError(
                f"an expert must serve no skill to be removed, and {expert} serves {served}. Give them to another "
                "expert (--skills-to), merge it into one, or take the stream back to before them."
            )
        stream.model.remove_expert(expert)
        stream.library = stream.library.with_expert(expert, skills_to)
        reason = f"By hand: {expert} was removed. Expert {skills_to} serves {served} now."
        decision = Decision(kind="remove", expert=expert, nearest=None, reason=reason, numbers={})
        return _commit(stream, decision, stages, stop)


def take_in(
    path: Path, adapter: Path, skill: str, datasets: Sequence[str], stages: Stages, stop: StopSignals
) -> dict[str, Any]:
    """Take in a PEFT LoRA as the expert of a skill that some rows describe, and return the result of the stream.

    Args:
        path: Of the stream.
        adapter: Folder of the LoRA.
        skill: Its name.
        datasets: Rows of the skill, as in a recipe.
        stages: Shows what is done.
        stop: May end it early; nothing is changed then.

    Raises:
        DataError: The rows cannot be read, are too few, or have no prompts; or the name is taken.
        TunerError: It is no plain LoRA, or is of another base.
        RunError: As in `merge`.
    """
    with _opened(path, stages) as stream:
        entry = {"skill": skill, "datasets": list(datasets), "adapter": str(adapter)}
        config = with_full_paths(stream.config.model_copy(update={"skills": (entry,)}))
        (new,) = parse_skills(config.skills, registry_of(config.data_registry))
        check_names([*stream.learned, new])
        stream.waiting.append(new)
        read_data(stream, [new], stages)
        learn(stream, new, stages, stop, by_hand=True)
        return finish_stream(stream.run)


@contextmanager
def _opened(path: Path, stages: Stages) -> Iterator[Stream]:
    """A finished stream, locked, with its data."""
    run = RunDir(path)
    config = read_config(run)
    if config.mode != "continual":
        raise RunError(f"experts are changed by hand in streams of skills (mode: continual), and {path} is none.")
    with run.locked():
        skills = parse_skills(config.skills, registry_of(config.data_registry))
        learned, waiting = divide_skills(run, cut_streams(config, run, skills, stages))
        if not run.is_finished or waiting:
            missing = ", ".join(skill.name for skill in waiting) or "its result"
            raise RunError(
                f"a stream must have come to its end to be changed by hand, and {path} has not: {missing} is still to "
                "come. Train it first."
            )
        stream = open_stream(config, run, learned, waiting, stages)
        for folder in stage_folders(run):
            if not (folder / STAGE).is_file():  # of a change that was stopped
                shutil.rmtree(folder)
        read_data(stream, stream.learned, stages)
        yield stream


def _commit(stream: Stream, decision: Decision, stages: Stages, stop: StopSignals) -> dict[str, Any]:
    """Make a change a stage, after which the expert of the decision serves what it did not serve, or as it did not."""
    assert decision.expert is not None
    stage = stream.next_stage(decision.kind)
    route(stream, stream.library)
    stream.save(stage / FINAL)
    served = [name for name, expert in stream.library.experts.items() if expert == decision.expert]
    measure_at_home(stream, served, stages, stop)
    figures = measure_stage(stream, stages, stop)
    stream.commit(
        stage, StageRecord(decision=decision, expert=decision.expert, base_loss=None, figures=figures, by_hand=True)
    )
    return finish_stream(stream.run)
