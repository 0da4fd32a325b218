"""Each attack, really run in every sandbox of this machine; and unprotected, where it must be seen to get through."""

from dataclasses import replace

import pytest
from tests.sandbox.conftest import works

from dylora_moe.sandbox import Limits, Sandbox
from dylora_moe.sandbox.attacks import ATTACKS, Attack
from dylora_moe.sandbox.self_test import self_test, try_attack

# So high that nothing of an attack meets them, and so that the machine is safe all the same.
LAVISH = Limits(
    cpu_seconds=20, wall_seconds=30, memory_bytes=4 << 30, processes=600, file_bytes=512 << 20, output_bytes=1 << 28
)
ENDED_BY_LIMITS = {"endless output", "sleep", "busy loop", "busy processes"}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_it_is_stopped(sandbox: Sandbox, attack: Attack) -> None:
    trial = try_attack(sandbox, attack)
    if trial.verdict == "not run":
        pytest.skip(trial.detail)
    assert trial.verdict == "stopped", trial


@pytest.mark.parametrize(
    "attack", [attack for attack in ATTACKS if attack.name not in ENDED_BY_LIMITS], ids=lambda attack: attack.name
)
def test_unprotected_it_gets_through(attack: Attack) -> None:
    """So a sandbox that stops nothing cannot pass, nor an attack that does nothing."""
    trial = try_attack(works("none"), replace(attack, limits=LAVISH))
    if trial.verdict == "not run":
        pytest.skip(trial.detail)
    assert trial.verdict == "not stopped", trial


@pytest.mark.parametrize("name", sorted(ENDED_BY_LIMITS))
def test_what_no_limit_ends_is_not_stopped(name: str) -> None:
    """The same programs, made to end by themselves."""
    attack = next(attack for attack in ATTACKS if attack.name == name)
    program = attack.program.replace("while True:\n    pass", "").replace("200_000", "20").replace("(60)", "(0)")
    assert program != attack.program
    trial = try_attack(works("none"), replace(attack, program=program))
    assert trial.verdict == "not stopped" and trial.detail == "got it ended as: passed"


def test_good_programs_pass(sandbox: Sandbox) -> None:
    trials = []
    for trial in self_test(sandbox):
        if trial.kind == "attack":
            break
        trials.append(trial)
    assert len(trials) == 5 and all(trial.verdict == "passed" for trial in trials), trials
