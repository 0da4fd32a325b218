"""All trackers of a run at once, as training uses them."""

import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dylora_moe.config.running import Artifacts
from dylora_moe.train.trackers.artifacts import copy_by_links
from dylora_moe.train.trackers.channel import Channel, Limits, child_command
from dylora_moe.train.trackers.messages import Artifact, Figures, Message, Sample, Samples, Start

_ROUTER = ("router_entropy", "load_entropy", "dead_experts", "max_violation", "balance_loss", "z_loss")


class Trackers:
    """Gives each tracker the same, and never raises or waits, until `finish`, which has a limit.

    A tracker that fails or does not answer is told about once, in one line, and is off from then on.

    Args:
        report_to: Names of trackers, of which `check_trackers` found the packages.
        folder: For what they write.
        run_name: For people.
        config: All settings of the run.
        environment: Versions and hardware.
        tell: Takes one line for a person, from another thread.
        artifacts: What W&B keeps besides figures.
        limits: Seconds that a tracker has.
    """

    def __init__(
        self,
        report_to: Sequence[str],
        *,
        folder: Path,
        run_name: str,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        tell: Callable[[str], None],
        artifacts: Artifacts = "model",
        limits: Limits = Limits(),  # noqa: B008
    ) -> None:
        self._folder, self._run_name = folder.absolute(), run_name
        self._config, self._environment, self._tell = dict(config), dict(environment), tell
        self._artifacts: Artifacts = artifacts
        self._copies = self._folder / "wandb-checkpoints"
        # Not from the random numbers that training draws from.
        self._ids = {name: secrets.token_hex(4) for name in dict.fromkeys(report_to)}
        self._known: set[str] = set()
        self._channels = [
            Channel(
                name,
                command=child_command(name),
                log=self._folder / f"{name}.log",
                advice=_advice(name, self._folder),
                tell=tell,
                limits=limits,
            )
            for name in self._ids
        ]

    def state(self) -> dict[str, Any]:
        """What a checkpoint is to keep: the run's id at each tracker, as JSON has it."""
        return dict(self._ids)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with the runs that `state` gave; called before `start`. Trackers that are new begin a run."""
        self._known = {name for name in self._ids if name in state}
        self._ids |= {name: str(state[name]) for name in self._known}

    def start(self, resumed_at: int | None = None) -> None:
        """Begin, without waiting; copies that a process left which was killed go.

        Args:
            resumed_at: Step of the checkpoint that the run goes on from; None for a new run.
        """
        shutil.rmtree(self._copies, ignore_errors=True)
        for channel in self._channels:
            channel.send(
                Start(
                    run_name=self._run_name,
                    run_id=self._ids[channel.name],
                    resumed_at=resumed_at if channel.name in self._known else None,
                    folder=str(self._folder / "tensorboard" if channel.name == "tensorboard" else self._folder),
                    config=self._config,
                    environment=self._environment,
                )
            )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Give the figures of a step."""
        self._send(Figures(step=step, figures={grouped_name(name): float(value) for name, value in figures.items()}))

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Give answers of the model at a step, one a domain."""
        self._send(Samples(step=step, samples=tuple(samples)))

    def log_best_model(self, folder: Path) -> None:
        """Have W&B keep a model folder as an artifact of type model with the aliases latest and best.

        The folder must stay as it is until `finish`.
        """
        if self._artifacts == "none":
            return
        model = Artifact(folder=str(folder), name=f"{self._run_name}-model", type="model", aliases=("latest", "best"))
        self._send_to_wandb("the model", lambda: model)

    def log_checkpoint(self, folder: Path, *, step: int, is_best: bool) -> None:
        """Have W&B keep a checkpoint as an artifact, where checkpoints are asked for.

        Args:
            folder: Of the checkpoint, which may go at any time after this.
            step: Optimizer steps done.
            is_best: Of all evaluations so far, its was the best.
        """
        if self._artifacts != "checkpoints":
            return
        best = ("best",) if is_best else ()
        self._send_to_wandb(
            f"the checkpoint of step {step}",
            lambda: Artifact(
                folder=str(copy_by_links(folder, self._copies / folder.name)),
                name=f"{self._run_name}-checkpoint",
                type="checkpoint",
                aliases=("latest", f"step-{step:06d}", *best),
                is_copy=True,
            ),
        )

    def _send_to_wandb(self, what: str, make: Callable[[], Artifact]) -> None:
        for channel in self._channels:
            if channel.name == "wandb" and channel.is_on:
                try:
                    channel.send(make())
                except OSError as error:
                    self._tell(f"wandb does not get {what}: {error}. The run goes on.")

    def finish(self, *, ok: bool = True, seconds: float | None = None) -> None:
        """End all trackers; what does not end in time is killed. Later calls do nothing.

        Args:
            ok: The run is finished, in contrast to one that failed or goes on later.
            seconds: To wait at most for all of them together, instead of the limits for each.
        """
        left = len(self._channels)
        for channel in self._channels:
            channel.finish(ok=ok, seconds=None if seconds is None else seconds / left)

    def _send(self, message: Message) -> None:
        for channel in self._channels:
            channel.send(message)


def grouped_name(name: str) -> str:
    """A figure's name in the groups that trackers show: train, eval, router; `eval_loss` -> `eval/loss`."""
    if name.startswith("eval_"):
        return f"eval/{name.removeprefix('eval_')}"
    return f"router/{name}" if name in _ROUTER or name.startswith("load_") else f"train/{name}"


def _advice(name: str, folder: Path) -> str:
    log = f"{folder / name}.log has what it printed."
    if name == "wandb":
        return f"Look at the network and WANDB_API_KEY, or set WANDB_MODE=offline; {log}"
    if name == "trackio":
        return f"Look at TRACKIO_DIR (its disk) or TRACKIO_SERVER_URL (its server); {log}"
    return f"Look whether {folder} can be written and its disk has room; {log}"
