"""A run, a model folder or a hub id -> the model, its tokenizer, and what it was trained with.

The one place that opens what was trained, for the library, the verbs and whoever serves. It is no `dylora_moe/load.py`:
once that was imported, `dylora_moe.load` would be the module and no longer the function.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase
from transformers.pipelines.base import SUPPORTED_PEFT_TASKS

from dylora_moe.bases import load_base
from dylora_moe.bases.hub import fetch_mixture
from dylora_moe.bases.resolve import log_progress
from dylora_moe.config import RunConfig, load_recipe, make_config
from dylora_moe.errors import RunError, TunerError
from dylora_moe.evaluate.machine import base_dtype
from dylora_moe.run_dir import CONFIG, EVAL, FINAL, RunDir, digest_folder
from dylora_moe.tuner import DyLoraModel, load_model
from dylora_moe.tuner.folder import MODEL_FILE, read_description

TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """Who answers: the routed mixture, the base alone, all experts together by the router's weights, or one expert."""

    kind: Literal["routed", "base", "dense", "expert"] = "routed"
    expert: str | None = None
    """Name of the one expert; None of every other kind."""

    @property
    def name(self) -> str:
        """As files are named: routed, base, dense or expert-NAME."""
        return self.kind if self.expert is None else f"expert-{self.expert}"

    @classmethod
    def chosen(cls, *, expert: str | None, base_alone: bool) -> "Speaker":
        """Of the options `--expert NAME` and `--base`; with neither the mixture."""
        if expert is not None:
            return cls(kind="expert", expert=expert)
        return cls(kind="base" if base_alone else "routed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A trained mixture, ready to be used."""

    name: str
    """Of the run, of the model's folder, or of the hub's repository."""
    model: DyLoraModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    """By which the model is known: `run_dir.digest_folder` of its folder."""

    def speaking(self, speaker: Speaker) -> AbstractContextManager[None]:
        """Inside, this one answers.

        Raises:
            TunerError: There is no such expert.
        """
        if speaker.expert is not None:
            return self.model.forced(speaker.expert)
        modes = {"routed": nullcontext, "base": self.model.disabled, "dense": self.model.dense}
        return modes[speaker.kind]()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRun(Trained):
    """One that has the folder of its run."""

    run: RunDir
    config: RunConfig

    def keep(self, name: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write what was measured to `eval/NAME.json`; with the model's digest, so that it is known when it is old.

        Returns:
            What was written.
        """
        whole = {"model": self.digest, **record}
        self.run.write(f"{EVAL}/{name}.json", whole)
        return whole


def read_config(run: RunDir) -> RunConfig:
    """The settings a run was made with.

    Raises:
        RunError: the folder is no run folder.
    """
    path = run / CONFIG
    if not path.is_file():
        raise RunError(
            f"{run.path} holds no {CONFIG}, so it is no run folder. Give the folder that `dylora train` made."
        )
    return make_config(load_recipe(path), where=str(path))


def load_run(folder: Path, *, progress: Callable[[str], None]) -> TrainedRun:
    """Load the model of a finished run on its base, in evaluation mode.

    Raises:
        RunError: no run folder, or a run that is not finished.
        TunerError: its model is not there.
        BaseModelError: its base cannot be had.
    """
    run = RunDir(folder)
    config = read_config(run)
    _check_finished(run)
    model, tokenizer = _open(
        run / FINAL,
        dtype=base_dtype(bf16=config.bf16, fp16=config.fp16),
        load_in_4bit=config.load_in_4bit,
        progress=progress,
    )
    name = run.path.resolve().name
    return TrainedRun(name=name, run=run, config=config, model=model, tokenizer=tokenizer, digest=run.model_digest())


def load(
    place: str | Path, *, dtype: torch.dtype | None = None, progress: Callable[[str], None] = log_progress
) -> tuple[DyLoraModel, PreTrainedTokenizerBase]:
    """Load a trained mixture on its base, in evaluation mode, with the tokenizer and the chat template of its training.

    Args:
        place: A run folder, a model folder, or a hub id of one.
        dtype: Of the base. None is that of the run; of a model by itself, what this machine computes in.
        progress: Called with a line of text at each long step.

    Raises:
        RunError: No such folder, or a run that is not finished.
        TunerError: No model is there, or one that does not fit its base.
        BaseModelError: The model or its base cannot be had.
    """
    trained = load_trained(place, dtype=dtype, progress=progress)
    return trained.model, trained.tokenizer


def load_trained(
    place: str | Path, *, dtype: torch.dtype | None = None, progress: Callable[[str], None] = log_progress
) -> Trained:
    """`load`, with the model's name and digest. Arguments and errors as there."""
    # Or a text-generation pipeline logs an error that lists every model it knows, and works all the same.
    if DyLoraModel.__name__ not in (known := SUPPORTED_PEFT_TASKS["text-generation"]):
        known.append(DyLoraModel.__name__)
    folder = Path(place).expanduser()
    if dtype is None and (folder / CONFIG).is_file():
        return load_run(folder, progress=progress)
    chosen = base_dtype(bf16=None, fp16=False) if dtype is None else dtype
    found = find_model(place)
    model, tokenizer = _open(found, dtype=chosen, load_in_4bit=False, progress=progress)
    named = folder.resolve()
    name = named.parent.name if named.name == FINAL else named.name
    return Trained(name=name, model=model, tokenizer=tokenizer, digest=digest_folder(found))


def find_model(place: str | Path) -> Path:
    """The model folder of a run, of a hub id, or the folder itself.

    Raises:
        RunError: No such folder, or a run that is not finished.
        TunerError: The folder holds no model.
        BaseModelError: The model cannot be had from the hub.
    """
    folder = RunDir(Path(place).expanduser()).path
    if (folder / CONFIG).is_file():
        _check_finished(RunDir(folder))
        return folder / FINAL
    if not folder.is_dir():
        if not _is_hub_id(str(place)):
            raise RunError(
                f"there must be a run or a model folder {place}, and there is no such folder (looked from "
                f"{Path.cwd()}). Correct the path, or give a hub id such as owner/name."
            )
        folder = fetch_mixture(str(place), MODEL_FILE)
    read_description(folder)
    return folder


def _is_hub_id(place: str) -> bool:
    """OWNER/NAME, unless OWNER is a folder here or that of runs: then it is a path with a mistake in it."""
    owner = place.partition("/")[0]
    is_path = Path(owner) == RunConfig.model_fields["output_dir"].default or Path(owner).is_dir()
    return not is_path and bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", place))


def _check_finished(run: RunDir) -> None:
    if not run.is_finished:
        raise RunError(f"the run in {run.path} is not finished. Wait for it, or train it first.")


def _open(
    folder: Path, *, dtype: torch.dtype, load_in_4bit: bool, progress: Callable[[str], None]
) -> tuple[DyLoraModel, PreTrainedTokenizerBase]:
    description: dict[str, Any] = read_description(folder)
    base = load_base(
        description["base"],
        dtype=dtype,
        expected_revision=description.get("base_revision"),
        load_in_4bit=load_in_4bit,
        progress=progress,
    )
    model = load_model(base.model, folder)
    if torch.cuda.is_available() and not load_in_4bit:  # a base in 4 bit is loaded where it stays
        model.to("cuda")
    set_saved_template(base.tokenizer, folder)
    return model, base.tokenizer


def set_saved_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Give the base's tokenizer the chat template that a model folder has, if it has one.

    Raises:
        TunerError: It is no text.
    """
    if (path := folder / TEMPLATE).is_file():
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TunerError(f"{path} must be UTF-8 text, and is not: {error}. Copy the model again.") from error
