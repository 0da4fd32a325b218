"""Warning signs: the history of logged figures -> what is seen now, with its numbers, and advice. Pure.

Every check prefers silence: a run that learns, however noisily, has no sign.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, pstdev

from dylora_moe.evaluate.routing import DEAD_SHARE
from dylora_moe.train.trends import spread, stands_still

# Lines of metrics before the loss is judged: the trend test below needs about 20 values to tell 1 sigma from noise.
MIN_LINES = 20
# The loss must have stood still at this part of its lines already: a second look at less noise than one.
STOOD = 0.8
# Share of the run before the loss is judged: what 20 lines of a very long run show is no verdict on it.
MIN_PART = 0.2
# A fall by less than 1 % counts as none; real bases lost 24 % to 61 % in 24 to 40 steps (tests/train/test_signs.py).
FALL = 0.01

# Lines that a loss is compared with. It must be above all of them, since easy and hard domains take turns.
WINDOW = 20
# Lines before a jump can be told from the noise of a start, and before a climb can be.
MIN_WINDOW, MIN_CLIMB = 8, 20
# Lines in a row that are too high: a single one is a hard batch, an exploded loss stays.
STAYS = 3
# Factor over the highest of the window, and, for a slow climb, of a window's mean over the lowest mean before.
JUMP, CLIMB = 1.25, 1.5
# Nats per token that an explosion has at least: the loss of an overfitted run triples from 0.01 without harm.
MIN_RISE = 0.5
# Standard deviations that a rise has at least; normal noise is beyond 6 once in a billion lines.
OUTLIER = 6.0

# Evaluations in a row that rise; the seeds stop at 3 to 5 without improvement.
RISES = 3
# Total rise over the best evaluation, below which a rise is noise.
MIN_OVERFIT = 0.02
# Validation loss over training loss, and its growth since the first evaluation, that together show memorising:
# domains weigh differently in the two losses, so neither says it alone.
GAP, GAP_GROWTH = 2.0, 1.5

# Decisions that an expert with an even share, or with the smallest domain to itself, has had on average before loads
# are judged: it had none by chance once in e^20 times.
DECISIONS = 20
# Lines over which load is averaged at least, and lines of the start that are left out while the router settles.
MIN_LOAD_LINES, SETTLING_LINES = 5, 5
# Experts in use (exp of the load's entropy) above the fewest possible at which the router has collapsed: at 1.25
# one expert takes 95 % of two, 96 % of eight.
EXTRA_EXPERTS = 0.25
# Share of one expert at which all domains are as good as in it.
TOP_SHARE = 0.9

# Share of the limit in use: a batch of long rows easily takes the rest.
MEMORY = 0.92

# Part of the median speed below which steps are very slow, in so many lines in a row, after so many lines. Lines of
# healthy runs vary by a factor of 2, since short rows have fewer tokens a second.
SLOW, SLOW_LINES, MIN_SPEEDS = 1 / 3, 3, 8

# Lines without a sign after which it is gone; without so many it would be told again at each turn of the noise.
CALM = 10

Line = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """Something that looks wrong.

    Attributes:
        name: Of the check.
        step: Of the last line it looked at.
        seen: What, with its numbers.
        advice: What to do.
    """

    name: str
    step: int
    seen: str
    advice: str

    @property
    def text(self) -> str:
        """For a person, one line."""
        return f"{self.seen} {self.advice}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What of a run the figures do not say.

    Attributes:
        max_steps: Of the run.
        warmup_ratio: The setting.
        learning_rate: The setting.
        rows_per_step: Rows of one optimizer step; each is at least one decision of the router.
        top_k: The setting.
        domain_shares: Share of each domain in the training rows.
        base_loss: Mean validation loss before training, where it was measured.
    """

    max_steps: int
    warmup_ratio: float
    learning_rate: float
    rows_per_step: int
    top_k: int
    domain_shares: tuple[float, ...]
    base_loss: float | None = None


def find_signs(history: Sequence[Line], setup: Setup) -> list[Sign]:
    """All signs that are there at the end of a history.

    Args:
        history: Lines as the Trainer logs them, each with `step`; training lines have `loss`, evaluations `eval_loss`.
        setup: Of the run.
    """
    train = [line for line in history if "loss" in line]
    evals = [line for line in history if "eval_loss" in line]
    signs = [sign for check in CHECKS if (sign := check(train, evals, setup)) is not None]
    names = {sign.name for sign in signs}
    # A loss that explodes does not fall either; one piece of advice is enough.
    return [sign for sign in signs if sign.name != "loss_not_falling" or "loss_exploding" not in names]


def new_signs(history: Sequence[Line], setup: Setup, *, calm: int = CALM) -> list[Sign]:
    """The signs that the last line of a history brought: they were in none of the `calm` histories before it.

    It depends on the history alone, so a run that goes on says what one without a stop says.
    """
    signs = {sign.name: sign for sign in find_signs(history, setup)}
    for end in range(len(history) - 1, max(0, len(history) - 1 - calm), -1):
        if not signs:
            break
        for sign in find_signs(history[:end], setup):
            signs.pop(sign.name, None)
    return list(signs.values())


def not_finite(name: str, value: float, *, step: int, rows: Sequence[str] = ()) -> Sign:
    """A figure that is no number any more; rows are those of the step, as a person can find them."""
    which = f" The step had these {len(rows)} rows: {'; '.join(rows)}." if rows else ""
    return Sign(
        name="not_finite",
        step=step,
        seen=f"{name} must be a finite number, got {value} at step {step}.{which}",
        advice="Lower learning_rate or raise warmup_ratio, compute in float32 (--no-bf16), or look at the rows.",
    )


def loss_not_falling(train: Sequence[Line], evals: Sequence[Line], setup: Setup) -> Sign | None:
    """Nothing says that the run learns: neither trend, nor start against now, nor validation."""
    warmup = setup.warmup_ratio * setup.max_steps
    if len([line for line in train if line["step"] > warmup]) < MIN_LINES // 2:
        return None
    step = int(train[-1]["step"])
    if step < MIN_PART * setup.max_steps or _validation_fell(evals, setup.base_loss):
        return None
    losses = [line["loss"] for line in train]
    before = losses[: round(len(losses) * STOOD)]
    if len(before) < MIN_LINES or not all(stands_still(values, fall=FALL) for values in (losses, before)):
        return None
    third = len(losses) // 3
    how = "Lower it" if setup.learning_rate > 2e-4 else "Raise it" if setup.learning_rate < 1e-4 else "Try another"
    return Sign(
        name="loss_not_falling",
        step=step,
        seen=f"The training loss has not fallen in {step} steps: {median(losses[:third]):.3f} at first, "
        f"{median(losses[-third:]):.3f} now.",
        advice=f"{how}, if learning_rate ({setup.learning_rate:g}) is the cause; look whether the rows and their masks "
        "are right (dylora data inspect); a higher lora_r can learn more.",
    )


def loss_exploding(train: Sequence[Line], evals: Sequence[Line], setup: Setup) -> Sign | None:
    """The loss stays far above everything lately, or has climbed for long."""
    losses = [line["loss"] for line in train]
    seen = _jump(losses) or _climb(losses)
    if not seen:
        return None
    return Sign(
        name="loss_exploding",
        step=int(train[-1]["step"]),
        seen=seen,
        advice=f"Lower learning_rate ({setup.learning_rate:g}) or raise warmup_ratio ({setup.warmup_ratio:g}); "
        "a lower max_grad_norm bounds each step.",
    )


def overfitting(train: Sequence[Line], evals: Sequence[Line], setup: Setup) -> Sign | None:
    """Validation gets worse while training gets better, or is left far behind."""
    losses = [line["eval_loss"] for line in evals]
    if len(losses) < RISES + 1 or not train:
        return None
    best = min(range(len(losses)), key=losses.__getitem__)
    then, now = _train_loss_at(train, evals[best]["step"]), _train_loss_at(train, evals[-1]["step"])
    recent = losses[-RISES - 1 :]
    rising = all(new > old for old, new in pairwise(recent))
    worse = losses[-1] > losses[best] * (1 + MIN_OVERFIT)
    seen = ""
    if then is not None and now is not None and rising and worse and now < then:
        seen = (
            f"Validation loss rose from {losses[best]:.3f} (step {int(evals[best]['step'])}) to {losses[-1]:.3f}, "
            f"while training loss fell from {then:.3f} to {now:.3f}."
        )
    elif now is not None and _gap_grew(train, evals) and best <= len(losses) - 3:
        seen = (
            f"Validation loss ({losses[-1]:.3f}) is {losses[-1] / max(now, 1e-9):.1f} times the training loss "
            f"({now:.3f}), and no better than {losses[best]:.3f} since step {int(evals[best]['step'])}."
        )
    if not seen:
        return None
    return Sign(
        name="overfitting",
        step=int(evals[-1]["step"]),
        seen=f"{seen}{_worst_domain(evals[best], evals[-1])}",
        advice="Lower num_epochs, or stop by early_stopping_patience; more rows, a higher lora_dropout, a lower lora_r "
        "or learning_rate help, too. load_best_model_at_end keeps the best weights.",
    )


def router_collapse(train: Sequence[Line], evals: Sequence[Line], setup: Setup) -> Sign | None:
    """As good as all of several domains go to one expert."""
    load = _load(train, setup)
    domains = len(setup.domain_shares)
    if domains < 2 or load is None or len(load) <= setup.top_k:
        return None
    used = math.exp(-sum(share * math.log(share) for share in load.values() if share > 0))
    name, top = max(load.items(), key=lambda item: item[1])
    # A mixture of mostly one domain may well be in mostly one expert.
    crowded = setup.top_k == 1 and top >= max(TOP_SHARE, (1 + max(setup.domain_shares)) / 2)
    if used >= 1 + EXTRA_EXPERTS and not crowded:
        return None
    return Sign(
        name="router_collapse",
        step=int(train[-1]["step"]),
        seen=f"{name} takes {top:.0%} of the load of {domains} domains: {used:.2f} of {len(load)} experts are in "
        f"use, max_violation is {top * len(load) - 1:.2f}.",
        advice="Raise balance_coefficient, or lower router_learning_rate; a higher z_coefficient keeps the router "
        "from being too sure.",
    )


def dead_experts(train: Sequence[Line], evals: Sequence[Line], setup: Setup) -> Sign | None:
    """Some experts get nothing, over enough decisions to be no chance."""
    load = _load(train, setup)
    if load is None:
        return None
    dead = [name for name, share in load.items() if share < DEAD_SHARE / len(load)]
    if not dead:
        return None
    return Sign(
        name="dead_experts",
        step=int(train[-1]["step"]),
        seen=f"{len(dead)} of {len(load)} experts get no load: {', '.join(dead)}.",
        advice="Raise balance_coefficient, or lower num_experts if there are more experts than kinds of rows.",
    )


def memory_short(train: Sequence[Line], evals: Sequence[Line], setup: Setup) -> Sign | None:
    """Memory is close to its limit."""
    if not train or train[-1].get("memory_share", 0.0) < MEMORY:
        return None
    return Sign(
        name="memory_short",
        step=int(train[-1]["step"]),
        seen=f"{train[-1]['memory_share']:.0%} of the memory is in use.",
        advice="Halve batch_size and double gradient_accumulation_steps, set gradient_checkpointing, or lower "
        "max_length; a smaller eval_batch_size if it is short in evaluations.",
    )


def slow_steps(train: Sequence[Line], evals: Sequence[Line], setup: Setup) -> Sign | None:
    """Speed fell to a part of what it was."""
    speeds = [line["tokens_per_second"] for line in train if "tokens_per_second" in line]
    if len(speeds) < MIN_SPEEDS + SLOW_LINES:
        return None
    usual, now = median(speeds[:-SLOW_LINES]), max(speeds[-SLOW_LINES:])
    if now >= SLOW * usual:
        return None
    return Sign(
        name="slow_steps",
        step=int(train[-1]["step"]),
        seen=f"Training makes {now:.0f} tokens/s at most since {SLOW_LINES} lines; {usual:.0f} were usual.",
        advice="Look for other processes, a hot device or memory on disk (swap). If it stays, raise batch_size with "
        "fewer gradient_accumulation_steps where memory allows, or set torch_compile.",
    )


CHECKS: tuple[Callable[[Sequence[Line], Sequence[Line], Setup], Sign | None], ...] = (
    loss_not_falling,
    loss_exploding,
    overfitting,
    router_collapse,
    dead_experts,
    memory_short,
    slow_steps,
)


def _validation_fell(evals: Sequence[Line], base_loss: float | None) -> bool:
    losses = [*([] if base_loss is None else [base_loss]), *(line["eval_loss"] for line in evals)]
    return len(losses) > 1 and min(losses[1:]) < losses[0] * (1 - FALL)


def _jump(losses: Sequence[float]) -> str:
    window, now = losses[-WINDOW - STAYS : -STAYS], losses[-STAYS:]
    if len(window) < MIN_WINDOW:
        return ""
    usual = median(window)
    if min(now) <= max(JUMP * max(window), usual + max(MIN_RISE, OUTLIER * spread(window))):
        return ""
    return f"The training loss jumped to {now[-1]:.3f}; it was {usual:.3f} (median of {len(window)} lines)."


def _climb(losses: Sequence[float]) -> str:
    if len(losses) < MIN_CLIMB:
        return ""
    size = min(WINDOW, max(MIN_CLIMB // 2, len(losses) // 4))
    means = [fmean(losses[end - size : end]) for end in range(size, len(losses) + 1)]
    lowest, now, error = min(means), means[-1], pstdev(losses[-size:]) / math.sqrt(size)
    if now <= max(CLIMB * lowest, lowest + max(MIN_RISE, OUTLIER * error)):
        return ""
    return f"The training loss climbed to {now:.3f} from {lowest:.3f} (means of {size} lines)."


def _train_loss_at(train: Sequence[Line], step: float) -> float | None:
    """Median of the last lines up to a step."""
    lines = [line["loss"] for line in train if line["step"] <= step][-MIN_WINDOW:]
    return median(lines) if lines else None


def _gap_grew(train: Sequence[Line], evals: Sequence[Line]) -> bool:
    gaps = [
        line["eval_loss"] / max(loss, 1e-9)
        for line in evals
        if (loss := _train_loss_at(train, line["step"])) is not None
    ]
    return len(gaps) > 1 and gaps[-1] > GAP and gaps[-1] > GAP_GROWTH * gaps[0]


def _worst_domain(best: Line, now: Line) -> str:
    """The domain that lost most since the best evaluation, where there are several."""
    names = [name for name in now if name.startswith("eval_") and name.endswith("_loss") and name in best]
    if len(names) < 2:
        return ""
    worst = max(names, key=lambda name: now[name] - best[name])
    domain = worst.removeprefix("eval_").removesuffix("_loss")
    return f" {domain} lost most: {best[worst]:.3f} to {now[worst]:.3f}."


def _load(train: Sequence[Line], setup: Setup) -> dict[str, float] | None:
    """Mean share of each expert over the fewest last lines that have enough decisions; None before there are."""
    lines = [line for line in train if "load_entropy" in line]
    names = [name for name in (lines[-1] if lines else ()) if name.startswith("load_") and name != "load_entropy"]
    needed = DECISIONS * max(len(names), 1 / min(setup.domain_shares))
    for count in _counts(lines, needed=needed, rows_per_step=setup.rows_per_step):
        part = [line for line in lines[-count:] if all(name in line for name in names)]
        return {name.removeprefix("load_"): fmean(line[name] for line in part) for name in names}
    return None


def _counts(lines: Sequence[Line], *, needed: float, rows_per_step: int) -> Iterator[int]:
    """The fewest last lines, those of the start left out, whose steps had so many rows; nothing where there are not."""
    for count in range(MIN_LOAD_LINES, len(lines) - SETTLING_LINES + 1):
        begin = lines[-count - 1]["step"] if count < len(lines) else 0
        if (lines[-1]["step"] - begin) * rows_per_step >= needed:
            yield count
            return
