"""A stream of skills on disk: its stages, which of them count, and the model and library that the next one begins with.

Each stage is a run folder of its own in `stages/`. It counts from the moment its `stage.json` is there, written last.
"""

import filecmp
import os
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from transformers import set_seed

from dylora_moe import ranks
from dylora_moe.bases import LoadedBase
from dylora_moe.config import RunConfig, to_yaml
from dylora_moe.data.bundle import DataBundle
from dylora_moe.data.stream import Skill, check_names, in_order
from dylora_moe.errors import RunError, TunerError
from dylora_moe.evaluate.forgetting import StageFigures
from dylora_moe.evaluate.load import read_config
from dylora_moe.run_dir import CONFIG, FINAL, SEGMENTS, STAGE, STAGES, START, RunDir, stage_folders
from dylora_moe.skills.growth import Decision
from dylora_moe.skills.library import SkillLibrary, Source, load_library, save_library
from dylora_moe.train.arrival import data_hash
from dylora_moe.train.folder import differences
from dylora_moe.train.session import Stages, build_model, load_run_base
from dylora_moe.tuner import DyLoraModel, load_model, save_model
from dylora_moe.tuner.folder import EXPERTS_FOLDER, read_description
from dylora_moe.tuner.inspect import check_name

# Of a stream these say what comes, not what was learned.
MAY_CHANGE = {"skills", "allow_expert_growth", "max_experts"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """What a stage did, as `stage.json` has it.

    Attributes:
        decision: What was decided, and why.
        expert: That serves the skill, or that was changed.
        base_loss: The base's loss on the skill, nats a token; None where no skill was learned.
        figures: What was measured after it.
        by_hand: True for a change that the recipe knows nothing of.
    """

    decision: Decision
    expert: str
    base_loss: float | None
    figures: StageFigures
    by_hand: bool = False


@dataclass(slots=True, kw_only=True)
class Stream:
    """A stream under way.

    Attributes:
        config: Of the whole stream.
        run: Its folder.
        learned: Skills of the stages that count, those given by hand included.
        waiting: Skills of the recipe that are still to be learned.
        base: Loaded once.
        model: As the last stage left it.
        library: Of the skills learned so far.
        records: Of the stages that count.
        data: Skill -> its rows, as far as they were needed.
    """

    config: RunConfig
    run: RunDir
    learned: list[Skill]
    waiting: list[Skill]
    base: LoadedBase
    model: DyLoraModel
    library: SkillLibrary
    records: list[StageRecord] = field(default_factory=list)
    data: dict[str, DataBundle] = field(default_factory=dict)

    def next_stage(self, name: str) -> RunDir:
        """The folder of the stage after those that count, of a skill or a change of that name."""
        return stage_folder(self.run, len(self.records), name)

    def stage_config(self, skill: Skill, *, again: Collection[str] = ()) -> RunConfig:
        """The next stage as the run that it is: the skill's data, and those of skills to be learned again beside it."""
        config = stage_config(self.config, skill, self.next_stage(skill.name))
        datasets = {known.name: known.datasets for known in self.learned}
        return config.model_copy(update={"datasets": sum((datasets[name] for name in again), config.datasets)})

    def commit(self, stage: RunDir, record: StageRecord) -> None:
        """Make a stage count, whose model is written."""
        ranks.by_first(lambda: self._write(stage, record))
        self.records.append(record)

    def _write(self, stage: RunDir, record: StageRecord) -> None:
        if done := read_stages(self.run):
            share_files(stage / FINAL, done[-1][0] / FINAL)
        save_library(self.library, stage.path)
        stage.write(STAGE, asdict(record))

    def check_data(self, name: str, data: DataBundle) -> None:
        """See that a skill learned before has the rows that it was learned from.

        Raises:
            RunError: It has others.
        """
        then, now = self.library.skills[name].record.data, data_hash(data)
        if then != now:
            raise RunError(
                f"the data of skill {name} must be what it was learned from, so that it can be measured, and they are "
                "others. Bring them back, or choose another --run_name."
            )

    def save(self, folder: Path) -> None:
        """Write the model as it is; a folder that is there is of a stage that never counted."""
        shutil.rmtree(folder, ignore_errors=True)
        save_model(
            self.model,
            folder,
            base_name=self.config.base_model,
            base_revision=self.base.resolved.revision,
            tokenizer=self.base.tokenizer,
        )


def stage_folder(run: RunDir, place: int, skill: str) -> RunDir:
    """The folder of a stage: `stages/03-flask`."""
    return RunDir(run / STAGES / f"{place + 1:02d}-{_slug(skill)}", writes=run.writes)


def stage_config(config: RunConfig, skill: Skill, stage: RunDir) -> RunConfig:
    """A stage as a run of its own."""
    rank = skill.rank or config.lora_r
    alpha = skill.alpha or config.lora_alpha * rank / config.lora_r
    changed = {
        "mode": "joint",
        "skills": (),
        "datasets": skill.datasets,
        "allow_expert_growth": None,
        "max_experts": None,
        "output_dir": stage.path.parent,
        "run_name": stage.path.name,
        "remote_dir": None,  # the stream's is enough
        "num_experts": 1,
        "lora_r": rank,
        "lora_alpha": alpha,
        "balance_coefficient": 0.0,  # all rows are of one skill
        "resume": "auto",
    }
    return config.model_copy(update=changed)


def read_stages(run: RunDir) -> list[tuple[Path, StageRecord]]:
    """(folder, record) of each stage that counts, in their order."""
    adapter = TypeAdapter(StageRecord)
    return [
        (path, adapter.validate_python(RunDir(path).read(STAGE)))
        for path in stage_folders(run)
        if (path / STAGE).is_file()
    ]


def claim_folder(run: RunDir, config: RunConfig) -> None:
    """Make a new folder that of this stream, or see that it is; then its settings are still those it had.

    Raises:
        RunError: The folder holds something else, or a stream with other settings.
    """
    if run.is_empty or ((run / CONFIG).is_file() and not (run / START).is_file()):  # of a start that came to nothing
        shutil.rmtree(run / SEGMENTS, ignore_errors=True)
        run.write(CONFIG, to_yaml(config))
        return
    if not (run / CONFIG).is_file():
        raise RunError(
            f"a run folder must be new or empty, and {run.path} holds something else. Move or delete it, or choose "
            "another --run_name; nothing was changed."
        )
    if config.resume == "never":
        raise RunError(
            f"{run.path} holds a stream, and resume is never. Go on with auto, or choose another --run_name."
        )
    if changed := differences(read_config(run), config, also_harmless=MAY_CHANGE):
        raise RunError(f"{run.path} holds a stream with other settings: {changed}. Go on with its own.")


def divide_skills(run: RunDir, skills: Sequence[Skill]) -> tuple[list[Skill], list[Skill]]:
    """Skills of the stages that count, in their order, and those of the recipe that are still to be learned.

    Raises:
        RunError: The recipe has other skills in the places of those that were learned from it.
    """
    learned: list[Skill] = []
    stages = read_stages(run)
    names = [record.figures.skill for _, record in stages if record.figures.skill is not None and not record.by_hand]
    waiting = list(in_order(skills, names))
    for folder, record in stages:
        name = record.figures.skill
        if name is None:
            continue
        if record.by_hand:
            datasets = tuple(dataset for dataset in read_config(RunDir(folder)).datasets if isinstance(dataset, dict))
            learned.append(Skill(name=name, datasets=datasets))
            continue
        place, wanted = len(skills) - len(waiting), waiting[0].name if waiting else None
        if wanted != name:
            raise RunError(
                f"skill {place + 1} of the stream in {run.path} was {name!r}, and is {wanted!r} now. "
                f"Skills are added at the end; take stages back with `dylora experts rollback` ({folder.name})."
            )
        learned.append(waiting.pop(0))
    check_names([*learned, *waiting])
    return learned, waiting


def open_stream(config: RunConfig, run: RunDir, learned: list[Skill], waiting: list[Skill], stages: Stages) -> Stream:
    """Base, model and library as the last stage left them.

    A stage that was trained and not committed yet gives its model, and is not trained again.

    Raises:
        RunError: The library in the folder is of another base or tap.
    """
    base = load_run_base(config, stages)
    source = Source(base=config.base_model, revision=base.resolved.revision, tap_layer=config.tap_layer)
    done, library = read_stages(run), SkillLibrary(source=source, skills={})
    if done:
        library = load_library(done[-1][0])
        library.check_source(source)
    if (folder := _model_folder(run, [path for path, _ in done], waiting)) is not None:
        model = load_model(base.model, folder)
    else:
        set_seed(config.seed)
        first = stage_config(config, waiting[0], stage_folder(run, 0, waiting[0].name))
        shape = {"lora_r": first.lora_r, "lora_alpha": first.lora_alpha}
        model = build_model(config.model_copy(update=shape), base, [expert_name(base, waiting[0].name, ())])
    if torch.cuda.is_available() and not config.load_in_4bit:
        model.to("cuda")
    return Stream(
        config=config,
        run=run,
        learned=learned,
        waiting=waiting,
        base=base,
        model=model,
        library=library,
        records=[record for _, record in done],
    )


def expert_name(base: LoadedBase, skill: str, taken: Collection[str]) -> str:
    """A name for the expert of a skill: the skill's, or one like it where that cannot be one.

    Raises:
        TunerError: No name like it can be.
    """
    name = re.sub(r"[^A-Za-z0-9_-]", "_", skill)
    try:
        check_name(base.model, name, ())
    except TunerError:
        name = f"skill_{name}"
    while name in taken:
        name += "_"
    check_name(base.model, name, taken)
    return name


def share_files(folder: Path, earlier: Path) -> None:
    """Keep experts that two models have in common once on the disk, where its file system can."""
    for path in folder.glob(f"{EXPERTS_FOLDER}/*/*"):
        other = earlier / path.relative_to(folder)
        # Renaming one name of a file to another one of it does nothing.
        if other.is_file() and not path.samefile(other) and filecmp.cmp(path, other, shallow=False):
            linked = path.with_name(f".{path.name}.link")
            linked.unlink(missing_ok=True)
            try:
                os.link(other, linked)
            except OSError:  # a file system without links keeps both
                return
            os.replace(linked, path)


def copy_model(source: Path, target: Path) -> None:
    """Make a model folder the copy of another one, sharing its files where the file system can."""

    def link(one: str, other: str) -> Any:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    temporary = target.with_name(f".{target.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=link)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def _model_folder(run: RunDir, done: Sequence[Path], waiting: Sequence[Skill]) -> Path | None:
    if waiting:
        current = stage_folder(run, len(done), waiting[0].name)
        if current.is_finished and (current / FINAL).is_dir():
            read_description(current / FINAL)
            return current / FINAL
    return done[-1] / FINAL if done else None


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)
