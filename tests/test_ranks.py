"""What processes tell each other: three of them, and one by itself."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COUNT = 3
# Each prints what it got as JSON.
WORKER = """
import json, torch
from dylora_moe import ranks
from dylora_moe.errors import OtherFailed, RunError
ranks.join()
ranks.join()
me = ranks.rank()
got = {
    "me": [me, ranks.count(), ranks.is_first(), ranks.on_this_machine()],
    "total": ranks.total(torch.tensor([1.0, me])).tolist(),
    "most": ranks.most(-me),
    "of_each": [each.tolist() for each in ranks.of_each(torch.tensor([me, 7]))],
    "to_first": [each.tolist() for each in ranks.to_first(torch.tensor([me, 7]))],
    "gather": ranks.gather({"name": "x" * me, "none": None, "word": "ü"}),
    "agree": ranks.agree([me]),
    "by_first": ranks.by_first(lambda: {"rank": me}),
}
made = []
got["in_turn"] = ranks.in_turn(lambda: made.append(me) or me)
got["made"] = made
torch.manual_seed(me)
ranks.share_random()
got["random"] = float(torch.rand(()))


def fail():
    raise RunError("no such folder")


try:
    ranks.by_first(fail)
except RunError as error:
    got["error"] = [type(error) is OtherFailed, str(error), ranks.reaches_all(error)]
try:
    with ranks.explained():
        if me == 2:
            raise SystemExit
        ranks.agree(None)
except OtherFailed as error:
    got["gone"] = str(error)
finally:
    print(json.dumps(got))
"""


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    """What each of them got."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": COUNT, "LOCAL_WORLD_SIZE": COUNT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": 1}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env={**os.environ, **{name: str(value) for name, value in {**common, "RANK": r, "LOCAL_RANK": r}.items()}},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(COUNT)
    ]
    return [json.loads(process.communicate(timeout=120)[0]) for process in started]


def test_each_knows_its_place(told: list[dict[str, Any]]) -> None:
    assert [got["me"] for got in told] == [[0, 3, True, 3], [1, 3, False, 3], [2, 3, False, 3]]


def test_all_get_the_same_of_what_each_gives(told: list[dict[str, Any]]) -> None:
    for got in told:
        assert got["total"] == [3.0, 3.0] and got["most"] == 0
        assert got["of_each"] == [[0, 7], [1, 7], [2, 7]]
        assert got["to_first"] == (got["of_each"] if got["me"][0] == 0 else [])
        assert got["gather"] == [{"name": "x" * rank, "none": None, "word": "ü"} for rank in range(COUNT)]
        assert got["agree"] == [0] and got["by_first"] == {"rank": 0}
    assert len({got["random"] for got in told}) == 1


def test_in_turn_each_makes_its_own_once(told: list[dict[str, Any]]) -> None:
    assert [got["in_turn"] for got in told] == [0, 1, 2]
    assert [got["made"] for got in told] == [[0], [1], [2]]


def test_what_the_first_fails_by_reaches_the_others(told: list[dict[str, Any]]) -> None:
    assert told[0]["error"] == [False, "no such folder", False]  # the others know it already
    for got in told[1:]:
        assert got["error"] == [True, "The first process of this run failed: no such folder", False]


def test_one_that_is_gone_is_noticed(told: list[dict[str, Any]]) -> None:
    assert all("Another process of this run ended" in got["gone"] for got in told[:2])


def test_alone_everything_is_as_given() -> None:
    import torch

    from dylora_moe import ranks

    ranks.join()
    assert (ranks.rank(), ranks.count(), ranks.is_first(), ranks.on_this_machine()) == (0, 1, True, 1)
    value = torch.ones(2)
    assert ranks.total(value) is value and ranks.of_each(value) == ranks.to_first(value) == [value]
    assert ranks.gather("a") == ["a"] and ranks.agree("a") == "a" and ranks.most(3) == 3
    assert ranks.by_first(lambda: Path("a")) == ranks.in_turn(lambda: Path("a")) == Path("a")
