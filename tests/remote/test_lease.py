"""One writer at a time: refused while another shows signs of life, taken over where it shows none."""

import json
import multiprocessing
import os
import platform
import time
from pathlib import Path

import pytest
from tests.remote.faults import Failing

from dylora_moe.errors import RunError
from dylora_moe.remote.lease import Lease, Taken, _began, _machine
from dylora_moe.remote.place import Place, patiently

HERE = {"host": platform.node(), "machine": _machine()}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(f"file://{tmp_path / 'remote'}")


def make(place: Place, told: list[str], *, patience_s: float = 0.6) -> Lease:
    return Lease(place, told.append, beat_s=0.05, patience_s=patience_s)


def leave(place: Place, **changes: object) -> None:
    """The file of a writer that is no more."""
    record = {"token": "other", "beat": 7, "host": "far-away", "process": 1, "began": 0.0, "since": "then"}
    place.write("writer.json", json.dumps(record | changes).encode())


def test_a_second_writer_is_refused_until_the_first_is_done(place: Place, told: list[str]) -> None:
    first, second = make(place, told), make(place, told, patience_s=8)  # it takes a quarter of that to see
    first.acquire()
    with pytest.raises(RunError, match=rf"one writer at a time, and process {os.getpid()} on {platform.node()} writes"):
        second.acquire()
    assert len(told) == 1 and "Waiting up to" in told[0]
    second.release()  # has nothing to give back
    first.check()
    first.release()
    third = make(place, told)
    third.acquire()
    assert len(told) == 1  # nothing was waited for
    third.release()
    assert place.list("") == {}


def test_who_shows_no_sign_of_life_is_followed(place: Place, told: list[str]) -> None:
    leave(place)
    began = time.monotonic()
    lease = make(place, told)
    lease.acquire()
    assert time.monotonic() - began > 0.5
    assert "process 1 on far-away" in told[0]
    lease.release()


@pytest.mark.parametrize("gone", ["dead", "another's number"])
def test_a_dead_process_of_this_machine_is_not_waited_for(place: Place, told: list[str], gone: str) -> None:
    """Also where its number is in use again, as in containers, whose first process always has number 1."""
    if gone == "dead":
        process = multiprocessing.get_context("spawn").Process()
        process.start()
        process.join()
        leave(place, **HERE, process=process.pid, began=1.0)
    else:
        leave(place, **HERE, process=os.getpid(), began=_began(os.getpid()) - 100)
    lease = make(place, told)
    lease.acquire()
    assert told == []
    lease.release()


def test_a_living_process_of_this_machine_is_no_dead_one(place: Place, told: list[str]) -> None:
    leave(place, **HERE, process=os.getpid(), began=_began(os.getpid()))
    lease = make(place, told)
    lease.acquire()
    assert "Waiting" in told[0]
    lease.release()


@pytest.mark.parametrize("change", [{"machine": "another"}, {"machine": None}, {"host": "far-away"}])
def test_a_number_means_nothing_on_another_machine(place: Place, told: list[str], change: dict[str, str]) -> None:
    """Also where it has the same name, as containers on a host's network have, and machines called localhost."""
    leave(place, **HERE | change, process=2**22, began=1.0)
    lease = make(place, told)
    lease.acquire()
    assert "Waiting" in told[0]
    lease.release()


def test_nobody_waits_for_oneself(
    place: Place, told: list[str], failing: type[Failing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the name was written and only the answer was lost."""
    there = Place(place.url.replace("file://", "failing://"))
    lease = make(there, told, patience_s=60)
    failing.plan(2, "lost")  # after the look at who is there
    patiently(lease.acquire, there.url, told.append, pause=lambda seconds: None)
    assert len(told) == 1 and "cannot be reached" in told[0]
    lease.check()
    lease.release()


def test_who_was_taken_for_gone_writes_no_more(place: Place, told: list[str]) -> None:
    slept = make(place, told)
    slept.acquire()
    leave(place)
    with pytest.raises(Taken, match="process 1 on far-away has taken it over"):
        slept.check()
    with pytest.raises(Taken):
        slept.check_known()
    slept.release()
    assert json.loads(place.read("writer.json"))["token"] == "other"


def test_it_notices_by_itself(place: Place, told: list[str]) -> None:
    slept = make(place, told)
    slept.acquire()
    leave(place)
    end = time.monotonic() + 5
    with pytest.raises(Taken):
        while time.monotonic() < end:
            slept.check_known()
            leave(place)  # in case that it was just writing
            time.sleep(0.02)
    slept.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_file_that_cannot_be_read_is_somebody(place: Place, told: list[str], content: bytes) -> None:
    place.write("writer.json", content)
    lease = make(place, told)
    lease.acquire()
    assert "Waiting" in told[0]
    lease.release()
