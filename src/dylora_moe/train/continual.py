"""THE PAGE of a stream: skill after skill -> features, decision, training, library, figures, one commit."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from transformers import set_seed

from dylora_moe import ranks
from dylora_moe.config import RunConfig, to_yaml
from dylora_moe.data.batching import pad_token_id
from dylora_moe.data.build import build_run_data
from dylora_moe.data.bundle import DataBundle
from dylora_moe.data.registry import registry_of
from dylora_moe.data.stream import Skill, parse_skills
from dylora_moe.errors import RunError, TunerError
from dylora_moe.run_dir import CONFIG, DECISION, FINAL, RESULT, START, RunDir
from dylora_moe.skills.growth import Kind
from dylora_moe.skills.library import Sample, SkillLibrary, SkillRecord
from dylora_moe.skills.library import Skill as KnownSkill
from dylora_moe.skills.prototypes import fit_prototypes
from dylora_moe.train.arrival import Arrival, check_rows, data_hash, examine
from dylora_moe.train.callbacks.mature import Mature
from dylora_moe.train.evaluator import Evaluator
from dylora_moe.train.features import answers_alone, draw_sample, read_features
from dylora_moe.train.fitting import fit, tracking
from dylora_moe.train.folder import find_start_together
from dylora_moe.train.live.figures import Learned, Place
from dylora_moe.train.mirror import mirrored
from dylora_moe.train.parameters import check_parameters, count_parameters
from dylora_moe.train.segments import cut_streams
from dylora_moe.train.session import Session, Stages, check_machine, expert_config
from dylora_moe.train.spreading import in_turn
from dylora_moe.train.stage_figures import make_evaluator, measure_at_home, measure_base, measure_stage
from dylora_moe.train.stopping import StopSignals
from dylora_moe.train.stream import (
    StageRecord,
    Stream,
    claim_folder,
    divide_skills,
    expert_name,
    open_stream,
    read_stages,
)
from dylora_moe.train.stream_result import finish_stream
from dylora_moe.train.trackers import check_trackers
from dylora_moe.tuner.exchange import check_adapter, import_expert
from dylora_moe.tuner.head import read_head
from dylora_moe.tuner.merge import copy_expert_weights, merge_experts


def train_stream(config: RunConfig, stages: Stages, stop: StopSignals) -> dict[str, Any]:
    """Learn the skills of a stream in their order, and return the result record.

    Skills that the folder has learned already are left as they are, so that skills can be added later.

    Raises:
        DyLoraError: any bad setting, data, base or folder, before the work on a skill.
        Stopped: A signal came; the same call goes on.
    """
    skills = parse_skills(config.skills, registry_of(config.data_registry))
    run = RunDir(config.run_dir, writes=ranks.is_first())
    with run.locked(), mirrored(config, run, stages, stop) as stages:
        ranks.by_first(lambda: claim_folder(run, config))
        learned, waiting = divide_skills(run, in_turn(lambda: cut_streams(config, run, skills, stages), run.path))
        _check_alike([*learned, *waiting])
        if ranks.by_first(lambda: run.is_finished and not waiting and _counts_all(run)):
            return {**run.read(RESULT), "already_finished": True}
        ranks.by_first(lambda: check_machine(config))
        ranks.by_first(lambda: check_trackers(config.report_to))
        stream = open_stream(config, run, learned, waiting, stages)
        read_data(stream, (*stream.learned, *stream.waiting), stages)
        run.write(CONFIG, to_yaml(config))  # with skills that came since, now that nothing is wrong with them
        if not ranks.by_first(lambda: (run / START).is_file()):
            run.write(START, {"base_general": measure_base(stream, stages, stop)})
        for skill in list(stream.waiting):
            stages.tell(f"Skill {len(stream.learned) + 1} of {len(stream.learned) + len(stream.waiting)}: {skill.name}")
            learn(stream, skill, stages, stop)
        return ranks.by_first(lambda: finish_stream(run))


def _counts_all(run: RunDir) -> bool:
    return len(run.read(RESULT)["stages"]) == len(read_stages(run))


def _check_alike(skills: Sequence[Skill]) -> None:
    """See that every process found the same skills: a file may come too late for one, and in time for another."""
    names = [skill.name for skill in skills]
    if any(other != names for other in ranks.gather(names)):
        raise RunError(
            "all processes must find the same skills, and files came meanwhile. Give the same command again."
        )


def read_data(stream: Stream, skills: Sequence[Skill], stages: Stages) -> None:
    """Rows of skills, and what they come with; before any work on the first, so that a mistake in the last is cheap."""
    for skill in skills:
        if skill.adapter is not None and skill not in stream.learned:
            _check_adapter(stream, Path(skill.adapter), stages)
        data = _build_data(stream, stream.stage_config(skill), stages)
        if skill in stream.learned:
            stream.check_data(skill.name, data)
        else:
            check_rows(skill, data)
            stages.data(data)
        stream.data[skill.name] = data


def _build_data(stream: Stream, config: RunConfig, stages: Stages) -> DataBundle:
    return ranks.in_turn(lambda: build_run_data(config, stream.base.tokenizer, tell=stages.tell))


def _check_adapter(stream: Stream, adapter: Path, stages: Stages) -> None:
    named, base = check_adapter(stream.model, adapter), stream.config.base_model
    if named and named != base:
        stages.tell(f"Note: {adapter} says that it is of {named}, and the base is {base}. Its shapes fit.")


def learn(stream: Stream, skill: Skill, stages: Stages, stop: StopSignals, *, by_hand: bool = False) -> None:
    """One waiting skill, from its features to its commit."""
    stage, config = stream.next_stage(skill.name), stream.stage_config(skill)
    if not (stage / CONFIG).is_file():
        stage.write(CONFIG, to_yaml(config))
    evaluator = make_evaluator(stream, skill.name, stages)
    sample = _read_sample(stream, skill.name, stages)
    arrival = _decide(stream, stage, skill, evaluator, sample, stages)
    decision = arrival.decision
    stages.saved()
    stages.tell(f"{skill.name}: {decision.kind}. {decision.reason}")
    if arrival.merge is not None:
        _make_room(stream, *arrival.merge, stages)
    expert = decision.expert or _add(stream, skill, config, decision.nearest, stages)
    for name in stream.model.expert_names:
        stream.model.freeze_expert(name, frozen=name != expert)
    library = stream.library.with_skill(_describe(skill.name, expert, arrival, sample))
    route(stream, library)
    is_trained = ranks.by_first(lambda: stage.is_finished)
    if decision.kind in ("grow", "extend") and not is_trained:
        _train(stream, stage, skill, expert, decision.kind, stages, stop)
    stream.model.eval().freeze_expert(expert)
    ranks.by_first(lambda: None if stage.is_finished else stream.save(stage / FINAL))  # where nothing was trained
    stream.library = library
    measure_at_home(stream, [skill.name, *_changed_beside(stream, skill.name, arrival)], stages, stop)
    figures = measure_stage(stream, stages, stop, skill=skill.name, before=arrival.before)
    record = StageRecord(
        decision=decision, expert=expert, base_loss=arrival.base_loss, figures=figures, by_hand=by_hand
    )
    stream.commit(stage, record)
    stages.saved()
    stream.waiting.remove(skill)
    stream.learned.append(skill)


def _changed_beside(stream: Stream, skill: str, arrival: Arrival) -> list[str]:
    """Other skills whose expert the arrival of one has changed: trained further, or made of two."""
    changed = {stream.library.experts[skill]} if arrival.decision.kind == "extend" else set[str]()
    if arrival.merge is not None:
        changed.add(arrival.merge[0])
    return [name for name, expert in stream.library.experts.items() if expert in changed and name != skill]


def _read_sample(stream: Stream, skill: str, stages: Stages) -> Sample:
    config = stream.config
    rows = draw_sample(stream.data[skill], config.feature_rows, config.seed)
    prompts, answers = (
        read_features(
            stream.model,
            part,
            stream.library.source,
            batch_size=config.eval_batch_size,
            pad_token_id=pad_token_id(stream.base.tokenizer),
            tell=stages.tell,
        )
        for part in (rows, answers_alone(rows))
    )
    return Sample(prompts=prompts, answers=answers)


def _decide(
    stream: Stream, stage: RunDir, skill: Skill, evaluator: Evaluator, sample: Sample, stages: Stages
) -> Arrival:
    """Decide once: what was decided before a stop is what is done after it."""
    if stored := ranks.by_first(lambda: stage.read(DECISION) if (stage / DECISION).is_file() else None):
        arrival = TypeAdapter(Arrival).validate_python(stored)
        if arrival.wanted != _wanted(skill):
            raise RunError(
                f"skill {skill.name} must be what its stage was begun as, decision {arrival.wanted}, and is "
                f"{_wanted(skill)} now. Change it back, or delete {stage.path}, which has not come to its end."
            )
        if arrival.data != data_hash(stream.data[skill.name]):
            raise RunError(
                f"the data of skill {skill.name} must be those that its stage was begun with, and they are others. "
                f"Bring them back, or delete {stage.path}, which has not come to its end."
            )
        return arrival
    stages.tell("Comparing it with known skills ...")
    arrival = examine(
        stream.model,
        evaluator,
        stream.library,
        stream.data[skill.name],
        sample,
        stream.config,
        wanted=_wanted(skill),
    )
    if ranks.count() > 1:  # other machines may round otherwise, and what is done must be the same
        arrival = TypeAdapter(Arrival).validate_python(ranks.agree(asdict(arrival)))
    stage.write(DECISION, asdict(arrival))
    return arrival


def _wanted(skill: Skill) -> Kind | None:
    return "import" if skill.adapter else skill.decision


def _make_room(stream: Stream, into: str, gone: str, stages: Stages) -> None:
    """Merge two experts; in the model of a trained stage they are one already."""
    if gone in stream.model.expert_names:
        merged = merge_experts(stream.model, [into, gone], into)
        stages.tell(
            f"Experts {into} and {gone} become one, {into}, which has room for {merged.kept:.0%} of their mean."
        )
    stream.library = stream.library.with_expert(gone, into)


def _add(stream: Stream, skill: Skill, config: RunConfig, nearest: str | None, stages: Stages) -> str:
    """The new expert of a stage, in the model from now on; the first one, or that of a trained stage, is there."""
    model, known = stream.model, set(stream.library.experts.values())
    new = [name for name in model.expert_names if name not in known]
    if skill.adapter is not None:
        return _import(stream, skill.name, Path(skill.adapter), replace=new)
    if new:
        return new[0]
    set_seed(stream.config.seed + len(stream.records))
    name = expert_name(stream.base, skill.name, model.expert_names)
    model.add_expert(name, expert_config(config), maturity=1.0)
    if config.warm_start and nearest is not None:
        try:
            copy_expert_weights(model, stream.library.experts[nearest], name)
        except TunerError as error:  # another shape; nothing was copied
            stages.tell(f"Expert {name} starts from nothing: {error}")
    return name


def _import(stream: Stream, skill: str, adapter: Path, *, replace: Sequence[str]) -> str:
    """An adapter as the expert of a skill, in the place of experts that have none: a model is never without one."""
    model = stream.model
    name = expert_name(stream.base, skill, model.expert_names)
    import_expert(model, adapter, name)
    for other in replace:
        model.remove_expert(other)
        model.rename_expert(name, other)
        name = other
    return name


def _describe(name: str, expert: str, arrival: Arrival, sample: Sample) -> KnownSkill:
    record = SkillRecord(
        name=name,
        expert=expert,
        num_rows=len(sample.prompts),
        data=arrival.data,
        base_loss=arrival.base_loss,
        loss=arrival.base_loss,  # until it is learned
    )
    return KnownSkill(record=record, mean=sample.prompts.mean(0), sample=sample)


def route(stream: Stream, library: SkillLibrary) -> None:
    """Send each prompt to the expert of the skill that it is most like."""
    if stream.config.stream_router == "learned":
        experts = [library.experts[name] for name, prompts in library.prompts.items() for _ in prompts]
        stream.model.teach_routers(np.concatenate(list(library.prompts.values())), experts)
        return
    prototypes = fit_prototypes(library.prompts, unsure_rate=stream.config.unsure_rate, seed=stream.config.seed)
    experts = [library.skills[name].record.expert for name in prototypes.skills]
    stream.model.set_prototypes(prototypes.projection, prototypes.centres, prototypes.radii, experts)


def _train(
    stream: Stream, stage: RunDir, skill: Skill, expert: str, kind: Kind, stages: Stages, stop: StopSignals
) -> None:
    """Teach the expert the skill; one that has skills already learns them again beside it, so as to forget none."""
    model = stream.model.train()
    again = [name for name, other in stream.library.experts.items() if other == expert]
    config = stream.stage_config(skill, again=again)
    data = stream.data[skill.name]
    if again:
        stages.tell(f"With it, expert {expert} learns again: {', '.join(again)}.")
        stage.write(CONFIG, to_yaml(config))
        data = _build_data(stream, config, stages)
    stages.parameters(count_parameters(model))
    check_parameters(model)
    session = Session(
        config=config,
        run=stage,
        base=stream.base,
        data=data,
        model=model,
        head=read_head(model.lm),
        expert=expert,
    )
    grows_up = [Mature(lambda maturity: model.set_maturity(expert, maturity), config.maturity_ratio)]
    with tracking(config, stage, stages) as trackers:
        fit(
            session,
            find_start_together(stage, config, stages.tell),
            trackers,
            stages,
            stop,
            callbacks=grows_up if config.maturity_ratio and not again else (),
            place=_place(stream, Learned(skill=skill.name, kind=kind, expert=expert)),
        )


def _place(stream: Stream, now: Learned) -> Place:
    """Where a stream is, for the person who watches."""
    before = [
        Learned(skill=record.figures.skill, kind=record.decision.kind, expert=record.expert)
        for record in stream.records
        if record.figures.skill is not None
    ]
    return Place(
        run=stream.run.path.name,
        number=len(stream.learned) + 1,
        total=len(stream.learned) + len(stream.waiting),
        decided=(*before, now),
    )
