"""A run or model folder -> the model, its tokenizer, and what it was trained with."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from dylora_moe.bases import load_base
from dylora_moe.config import RunConfig, load_recipe, make_config
from dylora_moe.errors import RunError
from dylora_moe.evaluate.machine import base_dtype
from dylora_moe.run_dir import CONFIG, EVAL, FINAL, RunDir
from dylora_moe.tuner import DyLoraModel, load_model
from dylora_moe.tuner.exchange import read_description


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
class TrainedRun:
    """A finished run, ready to be used. `digest` is its `RunDir.model_digest`."""

    run: RunDir
    config: RunConfig
    model: DyLoraModel
    tokenizer: PreTrainedTokenizerBase
    digest: str

    def keep(self, name: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write what was measured to `eval/NAME.json`; with the model's digest, so that it is known when it is old.

        Returns:
            What was written.
        """
        whole = {"model": self.digest, **record}
        self.run.write(f"{EVAL}/{name}.json", whole)
        return whole

    def speaking(self, speaker: Speaker) -> AbstractContextManager[None]:
        """Inside, this one answers.

        Raises:
            TunerError: There is no such expert.
        """
        if speaker.expert is not None:
            return self.model.forced(speaker.expert)
        modes = {"routed": nullcontext, "base": self.model.disabled, "dense": self.model.dense}
        return modes[speaker.kind]()


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
        BaseModelError: its base cannot be had.
    """
    run = RunDir(folder)
    config = read_config(run)
    if not run.is_finished:
        raise RunError(f"the run in {folder} is not finished. Wait for it, or train it first.")
    description: dict[str, Any] = read_description(run / FINAL)
    base = load_base(
        description["base"],
        dtype=base_dtype(bf16=config.bf16, fp16=config.fp16),
        expected_revision=description.get("base_revision"),
        load_in_4bit=config.load_in_4bit,
        progress=progress,
    )
    model = load_model(base.model, run / FINAL)
    if torch.cuda.is_available() and not config.load_in_4bit:  # a base in 4 bit is loaded where it stays
        model.to("cuda")
    tokenizer = base.tokenizer
    tokenizer.chat_template = (run / FINAL / "chat_template.jinja").read_text(encoding="utf-8")
    return TrainedRun(run=run, config=config, model=model, tokenizer=tokenizer, digest=run.model_digest())
