"""Warning signs: none in runs that learn, recorded and made up, and each in a run that is sick in its way."""

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dylora_moe.config import RunConfig
from dylora_moe.run_dir import METRICS, RunDir
from dylora_moe.train.run import train
from dylora_moe.train.signs import Setup, Sign, find_signs, new_signs, not_finite
from dylora_moe.train.trends import stands_still, trend

EVEN = Setup(
    max_steps=200,
    warmup_ratio=0.05,
    learning_rate=2e-4,
    rows_per_step=8,
    top_k=1,
    domain_shares=(0.4, 0.3, 0.3),
)
LOADS = tuple(f"load_expert_{index}" for index in range(4))
History = list[dict[str, float]]


def routed(loads: tuple[float, ...]) -> dict[str, float]:
    entropy = -sum(load * math.log(load) for load in loads if load) / math.log(len(loads))
    return {"load_entropy": entropy} | dict(zip(LOADS, loads, strict=False))


def recorded(losses: list[float], loads: list[tuple[float, ...]], speeds: list[float], every: int) -> History:
    return [
        {"step": every * (index + 1), "loss": loss, "tokens_per_second": speed, **routed(load)}
        for index, (loss, load, speed) in enumerate(zip(losses, loads, speeds, strict=True))
    ]


# Three runs of 2026-11-21: SmolLM2-135M on three registered sets (40 steps of 8 rows), and Gemma-3-270M on the three
# built-in skills twice (24 steps of 4 rows), one of them beside other work on the same two cores.
SMOLLM2 = recorded(
    [1.1026, 0.8681, 0.9082, 0.8633],
    [
        (0.2692, 0.0769, 0.3462, 0.3077),
        (0.225, 0.0625, 0.1625, 0.55),
        (0.35, 0.1625, 0.2375, 0.25),
        (0.1625, 0.15, 0.225, 0.4625),
    ],
    [56.2, 117.0, 136.1, 101.7],
    10,
)
QUICKSTART = recorded(
    [1.2548, 0.9804, 0.6907, 0.7687, 0.8283, 0.5847],
    [
        (0.25, 0.3125, 0.1875, 0.25),
        (0.3125, 0.25, 0.3125, 0.125),
        (0.25, 0.25, 0.375, 0.125),
        (0.1875, 0.3125, 0.0625, 0.4375),
        (0.1875, 0.1875, 0.3125, 0.3125),
        (0.0625, 0.3125, 0.25, 0.375),
    ],
    [90.6, 87.8, 95.6, 90.8, 98.7, 107.4],
    4,
)
BUSY = recorded(
    [1.08, 1.0379, 0.7306, 0.7262, 0.7348, 0.5747],
    [
        (0.3125, 0.375, 0.0, 0.3125),
        (0.25, 0.25, 0.3125, 0.1875),
        (0.1875, 0.25, 0.0625, 0.5),
        (0.4375, 0.125, 0.1875, 0.25),
        (0.375, 0.25, 0.125, 0.25),
        (0.375, 0.125, 0.3125, 0.1875),
    ],
    [23.3, 26.6, 37.9, 29.1, 16.6, 17.1],
    4,
)
BUSY.insert(3, {"step": 12, "eval_loss": 0.9973, "eval_stripe_loss": 1.549, "eval_flask_loss": 1.0928})


@pytest.mark.parametrize(
    ("history", "setup"),
    [
        (SMOLLM2, replace(EVEN, max_steps=40, base_loss=1.1281)),
        (QUICKSTART, replace(EVEN, max_steps=24, rows_per_step=4, base_loss=1.4152)),
        (BUSY, replace(EVEN, max_steps=24, rows_per_step=4, base_loss=1.4152)),
    ],
)
def test_recorded_runs_have_no_sign_at_any_time(history: History, setup: Setup) -> None:
    for end in range(1, len(history) + 1):
        assert find_signs(history[:end], setup) == []


def test_a_run_on_the_tiny_base_has_no_sign_at_any_time(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config(max_steps=60, logging_steps=1, eval_steps=10, sample_tokens=0)
    train(config)
    history = RunDir(config.run_dir).read_lines(METRICS)
    setup = replace(EVEN, max_steps=60, rows_per_step=6, domain_shares=(1 / 3,) * 3, learning_rate=1e-2)
    setup = replace(setup, base_loss=history[0]["eval_loss"])
    history = history[1:]
    assert len(history) > 60
    found = [sign for end in range(1, len(history) + 1) for sign in find_signs(history[:end], setup)]
    of_this_machine = ("memory_short", "slow_steps")  # what else it does may well leave it short of both
    assert [sign for sign in found if sign.name not in of_this_machine] == []


def healthy(rng: random.Random, lines: int, noise: float = 0.08) -> History:
    """Falls by a third to two thirds; every tenth line is of a hard domain."""
    start, fall, time = rng.uniform(1, 3), rng.uniform(0.3, 0.65), lines * rng.uniform(0.05, 0.4)
    loads = [rng.uniform(0.3, 1) for _ in LOADS]
    history: History = []
    for index in range(lines):
        level = start * (1 - fall + fall * math.exp(-index / time))
        loss = level * (1 + rng.gauss(0, noise)) + (0.4 if rng.random() < 0.1 else 0)
        counts = [rng.choices(range(4), loads).pop() for _ in range(16)]
        line = {"step": 2 * (index + 1), "loss": loss, "tokens_per_second": 1000 * rng.uniform(0.6, 1.5)}
        history.append(line | {"memory_share": 0.6} | routed(tuple(counts.count(which) / 16 for which in range(4))))
        if (index + 1) % 10 == 0:
            history.append({"step": line["step"], "eval_loss": level * 1.1 + rng.gauss(0, 0.002), "eval_a_loss": 1.0})
    return history


@pytest.mark.parametrize("seed", range(12))
def test_noisy_runs_that_learn_have_no_sign(seed: int) -> None:
    rng = random.Random(seed)
    lines = rng.choice([25, 60, 120])
    history, setup = healthy(rng, lines), replace(EVEN, max_steps=2 * lines)
    found = {sign.name for end in range(1, len(history) + 1, 3) for sign in find_signs(history[:end], setup)}
    assert not found


def train_lines(losses: list[float], **more: float) -> History:
    return [{"step": 2 * (index + 1), "loss": loss, **more} for index, loss in enumerate(losses)]


def only(history: History, setup: Setup = EVEN) -> Sign:
    (sign,) = find_signs(history, setup)
    assert re.fullmatch(r"[A-Z0-9a-z].*\. [A-Z].*\.", sign.text)
    return sign


def noisy(levels: list[float], noise: float = 0.05, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [level * (1 + rng.gauss(0, noise)) for level in levels]


def test_a_loss_that_does_not_fall() -> None:
    history = train_lines(noisy([2.0] * 60))
    sign = only(history)
    assert sign.name == "loss_not_falling" and sign.step == 120
    assert re.search(r"not fallen in 120 steps: (1\.9|2\.0)\d+ at first, (1\.9|2\.0)\d+ now", sign.seen)
    assert "learning_rate (0.0002)" in sign.advice
    assert "Raise it" in only(history, replace(EVEN, learning_rate=1e-6)).advice
    assert "Lower it" in only(history, replace(EVEN, learning_rate=1e-2)).advice


def test_most_losses_that_do_not_fall_are_found() -> None:
    """Not all: one that seems to fall by chance is taken to fall, so that a wrong alarm stays rare."""
    histories = [train_lines(noisy([2.0] * 60, seed=seed)) for seed in range(20)]
    assert sum(any(find_signs(history[:end], EVEN) for end in range(25, 61)) for history in histories) >= 14


def test_a_loss_that_fell_early_is_no_standstill() -> None:
    """What is learned in the first steps and then kept, as fine-tuning often goes."""
    assert find_signs(train_lines(noisy([2.2] * 4 + [2.0] * 80, noise=0.03)), EVEN) == []


def test_validation_that_fell_is_no_standstill() -> None:
    history = train_lines(noisy([2.0] * 60))
    assert find_signs([*history, {"step": 120, "eval_loss": 1.9}], replace(EVEN, base_loss=2.0)) == []
    assert find_signs([*history, {"step": 120, "eval_loss": 2.0}], replace(EVEN, base_loss=2.0))


def test_a_standstill_is_not_judged_early() -> None:
    assert find_signs(train_lines(noisy([2.0] * 60)), replace(EVEN, max_steps=2000)) == []


def test_a_loss_that_jumps_and_stays() -> None:
    calm = noisy([2.0 - 0.02 * index for index in range(30)])
    sign = only(train_lines([*calm, 3.5, 4.0, 4.5]))
    assert sign.name == "loss_exploding" and sign.step == 66
    assert re.search(r"jumped to 4\.500; it was 1\.\d+ \(median of 20 lines\)", sign.seen)
    assert "learning_rate (0.0002)" in sign.advice and "warmup_ratio (0.05)" in sign.advice
    assert find_signs(train_lines([*calm, 4.5, 1.5, 4.5, 1.5]), EVEN) == []  # hard batches


def test_a_loss_that_climbs_slowly() -> None:
    climb = noisy([2.0 - 0.05 * index for index in range(20)] + [1.0 + 0.04 * index for index in range(60)])
    sign = only(train_lines(climb))
    assert sign.name == "loss_exploding" and "climbed to 2.9" in sign.seen
    assert [found.name for found in find_signs(train_lines(climb[:26]), EVEN)] == []


def test_an_overfitted_loss_does_not_explode() -> None:
    assert find_signs(train_lines([*noisy([1.5 * 0.9**index for index in range(60)]), 0.02, 0.03, 0.03]), EVEN) == []


def with_evaluations(losses: list[float], evaluations: dict[int, float], **more: float) -> History:
    history: History = []
    for line in train_lines(losses):
        history.append(line)
        if line["step"] in evaluations:
            loss = evaluations[int(line["step"])]
            history.append({"step": line["step"], "eval_loss": loss, "eval_a_loss": 1.0, "eval_b_loss": 2 * loss - 1})
    return history


def test_overfitting() -> None:
    falls = [2.0 * 0.99**index for index in range(60)]
    history = with_evaluations(falls, {20: 1.9, 40: 1.6, 60: 1.62, 80: 1.7, 100: 1.8})
    sign = only(history)
    assert sign.name == "overfitting" and sign.step == 100
    assert "rose from 1.600 (step 40) to 1.800, while training loss fell from 1." in sign.seen
    assert sign.seen.endswith("b lost most: 2.200 to 2.600.")
    assert find_signs(history[: history.index({"step": 82, "loss": falls[40]})], EVEN) == []  # two rises only


def test_validation_far_above_training() -> None:
    falls = [2.0 * 0.95**index for index in range(60)]
    level = {20: 2.0, 40: 1.9, 60: 1.85, 80: 1.86, 100: 1.84, 118: 1.85}
    sign = only(with_evaluations(falls, level | {120: 1.85}))
    assert sign.name == "overfitting" and "times the training loss" in sign.seen
    learning = {step: 2.0 - step / 120 for step in range(20, 121, 20)}
    assert find_signs(with_evaluations(falls, learning), EVEN) == []


def falling(loads: tuple[float, ...], lines: int = 30) -> History:
    return train_lines([2 - index / 30 for index in range(lines)], **routed(loads))


def test_a_router_that_collapsed() -> None:
    sign = only(falling((0.97, 0.01, 0.01, 0.01)))
    assert sign.name == "router_collapse"
    assert "expert_0 takes 97% of the load of 3 domains: 1.18 of 4 experts are in use" in sign.seen
    assert "balance_coefficient" in sign.advice
    assert find_signs(falling((0.97, 0.01, 0.01, 0.01)), replace(EVEN, domain_shares=(1.0,))) == []


def test_one_expert_for_a_domain_that_is_nearly_all_is_no_collapse() -> None:
    loads = (0.92, 0.04, 0.02, 0.02)
    assert find_signs(falling(loads), replace(EVEN, domain_shares=(0.9, 0.05, 0.05))) == []
    assert only(falling(loads)).name == "router_collapse"


def test_a_router_that_starts_is_not_judged() -> None:
    assert find_signs(falling((1.0, 0.0, 0.0, 0.0), lines=9), EVEN) == []


def test_dead_experts() -> None:
    sign = only(falling((0.4, 0.3, 0.3, 0.0)))
    assert sign.name == "dead_experts" and sign.seen == "1 of 4 experts get no load: expert_3."
    assert "num_experts" in sign.advice


def test_an_expert_is_not_dead_by_chance() -> None:
    """Sixteen decisions are too few, and so are 80 where one domain of 1 % has an expert to itself."""
    once = (0.4, 0.3, 0.3, 0.0)
    assert find_signs(falling(once, lines=12), replace(EVEN, rows_per_step=1)) == []
    assert find_signs(falling(once), replace(EVEN, domain_shares=(0.5, 0.49, 0.01))) == []


def test_memory_close_to_its_limit() -> None:
    history = train_lines([2 - index / 30 for index in range(5)], memory_share=0.6)
    assert find_signs(history, EVEN) == []
    history[-1]["memory_share"] = 0.95
    sign = only(history)
    assert sign.name == "memory_short" and sign.seen == "95% of the memory is in use."
    assert "gradient_accumulation_steps" in sign.advice


def test_steps_that_became_very_slow() -> None:
    history = train_lines([2 - index / 30 for index in range(20)], tokens_per_second=900.0)
    for line in history[-2:]:
        line["tokens_per_second"] = 250.0
    assert find_signs(history, EVEN) == []
    history[-3]["tokens_per_second"] = 200.0
    sign = only(history)
    assert sign.name == "slow_steps" and "250 tokens/s at most since 3 lines; 900 were usual" in sign.seen


def test_no_number_any_more() -> None:
    sign = not_finite("loss", math.nan, step=7, rows=["'Name it'", "'2 + 2'"])
    assert sign.seen == (
        "loss must be a finite number, got nan at step 7. The step had these 2 rows: 'Name it'; '2 + 2'."
    )


def sick_histories() -> list[tuple[History, Setup]]:
    calm = noisy([2.0 - 0.02 * index for index in range(30)])
    falls = [2.0 * 0.99**index for index in range(60)]
    return [
        (train_lines(noisy([2.0] * 60)), EVEN),
        (train_lines([*calm, 3.5, 4.0, 4.5]), EVEN),
        (with_evaluations(falls, {20: 1.9, 40: 1.6, 60: 1.62, 80: 1.7, 100: 1.8}), EVEN),
        (falling((0.97, 0.01, 0.01, 0.01)), EVEN),
        (falling((0.4, 0.3, 0.3, 0.0)), EVEN),
        (train_lines([2.0, 1.9], memory_share=0.97), EVEN),
        (train_lines([2 - i / 30 for i in range(20)], tokens_per_second=900.0), EVEN),
    ]


def test_advice_names_settings_that_exist() -> None:
    histories = sick_histories()
    for line in histories[-1][0][-3:]:
        line["tokens_per_second"] = 1.0
    signs = [only(history, setup) for history, setup in histories] + [not_finite("loss", math.inf, step=1)]
    assert len({sign.name for sign in signs}) == 8
    names = {name for sign in signs for name in re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", sign.advice)}
    assert len(names) > 12
    assert names <= set(RunConfig.model_fields)


def told(history: History, start: int = 1) -> list[tuple[int, str]]:
    ends = range(start, len(history) + 1)
    return [(end, sign.name) for end in ends for sign in new_signs(history[:end], EVEN)]


def test_a_sign_is_told_once_and_again_when_it_came_back() -> None:
    line: dict[str, Any] = {"loss": 1.0}
    shares = [0.5, 0.95, 0.96, 0.5, 0.95, 0.95, *[0.5] * 10, 0.95, 0.95]
    history = [line | {"step": 2 * i, "memory_share": share, "loss": 1 - i / 50} for i, share in enumerate(shares)]
    assert told(history) == [(2, "memory_short"), (17, "memory_short")]


def test_a_history_that_went_through_a_checkpoint_tells_the_same() -> None:
    history = train_lines([*noisy([2.0] * 60), 4.0, 4.5, 5.0, 5.5, 5.0])
    again = json.loads(json.dumps(history))
    whole = told(history)
    assert len(whole) == 2
    for stop in (24, 25, 30, 62, 63):
        assert told(history[:stop]) + told(again, start=stop + 1) == whole


def test_the_trend_of_noise_is_near_nothing_and_that_of_a_fall_is_not() -> None:
    assert abs(trend(noisy([1.0] * 50))) < 2
    assert trend(noisy([1 - index / 100 for index in range(50)])) < -4
    assert trend([1.0] * 10) == 0


def test_what_falls_little_but_surely_does_not_stand_still() -> None:
    """By less than 1 % between the thirds: once all the time, once only at the start."""
    steady = noisy([2 - index / 4000 for index in range(60)], noise=0.001)
    assert not stands_still([*[1.98] * 6, *steady], fall=0.01)
    assert not stands_still(noisy([2.08] * 4 + [2.0] * 56, noise=0.01), fall=0.01)
    assert stands_still(noisy([2.0] * 60, noise=0.01), fall=0.01)
