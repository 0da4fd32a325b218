"""Lines of metrics -> what the live view shows at one moment."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dylora_moe.evaluate.routing import DEAD_SHARE
from dylora_moe.train.live.sparkline import resampled

# More than a curve is ever wide.
_MAX_POINTS = 200
# Lines of metrics over which load is averaged, so that small batches do not make its bars jump.
_LOAD_LINES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A loss over time.

    Attributes:
        name: Of what it is the loss.
        points: In order of time, few enough to be drawn.
        first: The first value of all.
        last: The newest.
    """

    name: str
    points: tuple[float, ...]
    first: float
    last: float

    @property
    def change(self) -> float | None:
        """Since the first value, as a part of it; None where that says nothing."""
        if len(self.points) < 2 or not self.first or not math.isfinite(self.first) or not math.isfinite(self.last):
            return None
        return self.last / self.first - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """An expert's share of the load.

    Attributes:
        name: Of the expert.
        share: 0 to 1.
        dead: True where that is next to nothing, and should not be.
    """

    name: str
    share: float
    dead: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What was decided on a skill: `kind` says what, and `expert` which expert it has."""

    skill: str
    kind: str
    expert: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in a stream of skills a training is.

    Attributes:
        run: Name of the stream.
        number: Of the skill, from 1.
        total: Skills of the stream as far as it is known.
        decided: The skills up to this one, this one last.
    """

    run: str
    number: int
    total: int
    decided: tuple[Learned, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A moment of a run; None for what is not known yet, or never.

    Attributes:
        name: Of the run.
        step: Optimizer steps made.
        max_steps: Of the run.
        elapsed_s: Seconds since this process began to train.
        left_s: Seconds to the last step.
        tokens_per_second: In the steps since the last line of metrics.
        memory_gb: In use.
        memory_share: Of what can be had.
        learning_rate: Of the experts.
        training: Loss in training.
        validation: Mean over domains.
        domains: Validation loss of each.
        loads: Of the experts, in the router's order.
        router_entropy: 0 when the router is sure, 1 when it knows nothing.
        warnings: Newest last.
        place: In a stream of skills.
    """

    name: str
    step: int
    max_steps: int
    elapsed_s: float
    left_s: float | None = None
    tokens_per_second: float | None = None
    memory_gb: float | None = None
    memory_share: float | None = None
    learning_rate: float | None = None
    training: Curve | None = None
    validation: Curve | None = None
    domains: tuple[Curve, ...] = ()
    loads: tuple[Load, ...] = ()
    router_entropy: float | None = None
    warnings: tuple[str, ...] = ()
    place: Place | None = None


class History:
    """Takes lines of metrics one by one, and has the figures that they come to; of the lines it keeps losses only."""

    def __init__(self) -> None:
        self._losses: dict[str, list[float]] = {}
        self._loads: deque[dict[str, float]] = deque(maxlen=_LOAD_LINES)
        self._newest: dict[str, float] = {}

    def add(self, line: Mapping[str, Any]) -> None:
        """Take a line as `metrics.jsonl` has it."""
        for key, value in line.items():
            if key == "loss" or (key.startswith("eval_") and key.endswith("_loss")):
                self._losses.setdefault(key, []).append(value)
        if "loss" in line:
            self._newest = dict(line)
            load = {key: value for key, value in line.items() if key.startswith("load_") and key != "load_entropy"}
            if self._loads and load.keys() != self._loads[-1].keys():
                self._loads.clear()
            self._loads.append(load)

    def figures(
        self, *, name: str, step: int, max_steps: int, elapsed_s: float, warnings: Sequence[str], place: Place | None
    ) -> Figures:
        """What the lines come to, and what they do not say."""
        newest = self._newest
        domains = [key for key in self._losses if key not in ("loss", "eval_loss")]
        return Figures(
            name=name,
            step=step,
            max_steps=max_steps,
            elapsed_s=elapsed_s,
            tokens_per_second=newest.get("tokens_per_second"),
            memory_gb=newest.get("memory_gb"),
            memory_share=newest.get("memory_share"),
            learning_rate=newest.get("learning_rate"),
            training=self._curve("loss", "training loss"),
            validation=self._curve("eval_loss", "validation loss"),
            domains=tuple(
                curve
                for key in domains
                if (curve := self._curve(key, key.removeprefix("eval_").removesuffix("_loss"))) is not None
            ),
            loads=self._mean_loads(may_rest=place is not None),
            router_entropy=newest.get("router_entropy"),
            warnings=tuple(warnings),
            place=place,
        )

    def _curve(self, key: str, name: str) -> Curve | None:
        values = self._losses.get(key)
        if not values:
            return None
        return Curve(name=name, points=tuple(resampled(values, _MAX_POINTS)), first=values[0], last=values[-1])

    def _mean_loads(self, *, may_rest: bool) -> tuple[Load, ...]:
        """Of the last lines; in a stream the experts of other skills may rest."""
        names = self._loads[-1] if self._loads else {}
        shares = {key: fmean(line[key] for line in self._loads) for key in names}
        least = 0.0 if may_rest else DEAD_SHARE / max(len(shares), 1)
        return tuple(
            Load(name=key.removeprefix("load_"), share=share, dead=share < least) for key, share in shares.items()
        )
