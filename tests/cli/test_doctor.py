"""`dylora doctor sandbox`: tables, JSON, and the exit code that says whether an attack got through."""

from collections.abc import Callable
from typing import Any

import pytest

from dylora_moe.sandbox import self_test, try_back_end
from dylora_moe.sandbox.attacks import ATTACKS

Run = Callable[..., Any]


@pytest.fixture
def few_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two, for their time; tests/sandbox has them all."""
    chosen = [attack for attack in ATTACKS if attack.name in ("read secret files", "write outside")]
    monkeypatch.setattr(self_test, "ATTACKS", chosen)


@pytest.fixture
def sandbox_name() -> str:
    for name in ("bubblewrap", "sandlock"):
        if try_back_end(name).sandbox is not None:
            return name
    pytest.skip("no sandbox works here: " + try_back_end("sandlock").reason)


@pytest.mark.usefixtures("few_attacks")
def test_people_read_tables(dylora: Run, sandbox_name: str) -> None:
    outcome = dylora("doctor", "sandbox")
    assert outcome.code == 0 and outcome.err == ""
    for shown in ("bubblewrap", "sandlock", "docker", "unprotected", "why not", "what must hold", "read secret files"):
        assert shown in outcome.out
    assert f"Programs run in {sandbox_name}" in outcome.out and "Attacks: 2 stopped." in outcome.out


@pytest.mark.usefixtures("few_attacks")
def test_programs_read_json(dylora: Run, sandbox_name: str) -> None:
    found = dylora("doctor", "sandbox", "--sandbox", sandbox_name, "--json").json()
    assert found["sandbox"] == sandbox_name and found["well"] is True
    assert [each["name"] for each in found["back_ends"]] == ["bubblewrap", "sandlock", "docker", "none"]
    assert all(each["works"] != bool(each["reason"]) for each in found["back_ends"])
    verdicts = {trial["name"]: trial["verdict"] for trial in found["trials"]}
    assert verdicts["a plain program"] == "passed" and verdicts["write outside"] == "stopped" and len(verdicts) == 7


@pytest.mark.usefixtures("few_attacks")
def test_an_attack_that_gets_through_is_an_error(dylora: Run) -> None:
    outcome = dylora("doctor", "sandbox", "--sandbox", "none")
    assert outcome.code == 1 and "Attacks: 2 not stopped." in outcome.out and "got the secret" in outcome.out


def test_a_sandbox_that_does_not_work_is_an_error(dylora: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = dylora("doctor", "sandbox", "--sandbox", "bubblewrap")
    assert outcome.code == 1 and "bubblewrap must be installed" in outcome.err and "Sandboxes" in outcome.out
