"""The three trackers behind one face. Runs in the tracker's own process, and imports its library only there."""

import json
import os
import shutil
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from dylora_moe.train.trackers.messages import Artifact, Sample, Start

PROJECT = "dylora-moe"


class Client(ABC):
    """One tracker. Every method may raise anything."""

    takes_back = False
    """True for one that drops the steps after those that a resumed run has behind it; others are given none twice."""

    @abstractmethod
    def start(self, start: Start) -> str | None:
        """Begin or go on, and return where to look."""

    @abstractmethod
    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take figures of a step."""

    @abstractmethod
    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Take answers of the model at a step."""

    def keep(self, artifact: Artifact) -> None:
        """Keep a folder."""
        raise NotImplementedError(f"{type(self).__name__} has no place for folders")

    @abstractmethod
    def finish(self, *, ok: bool) -> None:
        """The run ends."""

    def warnings(self) -> tuple[str, ...]:
        """What the tracker complained about since the last call."""
        return ()


class _TensorBoard(Client):
    """Event files in the run's folder, by TensorBoard's own writer, as torch's SummaryWriter but without torch."""

    takes_back = True

    def start(self, start: Start) -> str | None:
        self._proto = {name: _load(f"tensorboard.compat.proto.{name}_pb2") for name in ("event", "summary", "tensor")}
        self._writer = _load("tensorboard.summary.writer.event_file_writer").EventFileWriter(start.folder)
        first = 0 if start.resumed_at is None else start.resumed_at + 1
        # Readers drop whatever an earlier file of the folder has from this step on.
        session = self._proto["event"].SessionLog
        self._add(first, session_log=session(status=session.START))
        if start.resumed_at is None:
            for name, record in (("config", start.config), ("environment", start.environment)):
                self._add_text(0, name, _as_code(record))
        self._writer.flush()
        return f"tensorboard --logdir {start.folder}"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        summary = self._proto["summary"].Summary
        values = [summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._add(step, summary=summary(value=values))
        self._writer.flush()

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        for sample in samples:
            self._add_text(step, f"samples/{sample.domain}", _as_markdown(sample))
        self._writer.flush()

    def finish(self, *, ok: bool) -> None:
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._proto["event"].Event(wall_time=time.time(), step=step, **content))

    def _add_text(self, step: int, name: str, text: str) -> None:
        summary = self._proto["summary"].Summary
        tensor = self._proto["tensor"].TensorProto(dtype="DT_STRING", string_val=[text.encode()])
        metadata = _load("tensorboard.plugins.text.metadata").create_summary_metadata(display_name=name, description="")
        self._add(step, summary=summary(value=[summary.Value(tag=name, tensor=tensor, metadata=metadata)]))


class _Trackio(Client):
    """A local database, or the server that TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names."""

    def start(self, start: Start) -> str | None:
        self._complaints: list[str] = []
        # trackio never raises: what it cannot write it warns about, from a thread.
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = self._take_warning
        self._library = trackio = _load("trackio")
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run = trackio.init(
            project=project,
            name=f"{start.run_name}-{start.run_id}",  # what it finds a run by
            config={**start.config, "environment": start.environment},
            resume="never" if start.resumed_at is None else "allow",
            private=True,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return f"trackio show --project {project}"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        texts = {f"samples/{sample.domain}": self._library.Markdown(_as_markdown(sample)) for sample in samples}
        self._run.log(texts, step=step)

    def finish(self, *, ok: bool) -> None:
        self._run.finish()

    def warnings(self) -> tuple[str, ...]:
        taken, self._complaints = tuple(self._complaints), []
        return taken

    def _take_warning(self, message: Any, category: Any, filename: str, *args: Any, **kwargs: Any) -> None:
        if category is UserWarning and "trackio" in filename:
            self._complaints.append(str(message))


class _Wandb(Client):
    """Weights & Biases; nothing is sent but what is given here: no code, no console, no machine statistics."""

    def start(self, start: Start) -> str | None:
        self._library = wandb = _load("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=start.folder,
            name=start.run_name,
            id=start.run_id,
            resume="never" if start.resumed_at is None else "allow",
            config={**start.config, "environment": start.environment},
            allow_val_change=True,
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                save_code=False,
                silent=True,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        # W&B's own step may not fall, and counts calls; figures are drawn over ours.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        return self._run.url or f"wandb sync {self._run.dir.removesuffix('/files')}"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({**figures, "step": step})

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        rows = [[sample.domain, sample.prompt, sample.text] for sample in samples]
        table = self._library.Table(columns=["domain", "prompt", "text"], data=rows)
        self._run.log({"samples": table, "step": step})

    def keep(self, artifact: Artifact) -> None:
        kept = self._library.Artifact(name=artifact.name, type=artifact.type)
        # Of what is mutable W&B takes a copy, and needs the folder no more.
        kept.add_dir(artifact.folder, policy="mutable" if artifact.is_copy else "immutable")
        self._run.log_artifact(kept, aliases=list(artifact.aliases))
        if artifact.is_copy:
            shutil.rmtree(artifact.folder)

    def finish(self, *, ok: bool) -> None:
        self._run.finish(exit_code=0 if ok else 1)


CLIENTS: dict[str, type[Client]] = {"tensorboard": _TensorBoard, "trackio": _Trackio, "wandb": _Wandb}


def _load(module: str) -> Any:
    """A module of a library that is there only where its tracker was asked for."""
    return import_module(module)


def _as_code(record: Mapping[str, Any]) -> str:
    """JSON as Markdown shows it."""
    return "".join(f"    {line}\n" for line in json.dumps(record, indent=2).splitlines())


def _as_markdown(sample: Sample) -> str:
    parts = (("Prompt", sample.prompt), ("Answer", sample.text))
    blocks = ["\n".join(f"    {line}" for line in text.splitlines()) for _, text in parts]
    return "\n\n".join(f"**{title}**\n\n{block}" for (title, _), block in zip(parts, blocks, strict=True))
