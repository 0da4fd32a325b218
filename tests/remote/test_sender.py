"""Sending in the background: errors of the network are told once and outlived, and the newest image wins."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.remote.faults import Failing
from tests.remote.test_snapshots import files_of, state

from dylora_moe.remote.fetching import fetch_newest
from dylora_moe.remote.lease import Lease, Taken
from dylora_moe.remote.place import Place
from dylora_moe.remote.sender import Sender
from dylora_moe.remote.snapshots import Snapshots
from dylora_moe.remote.staging import stage, visible_files


@pytest.fixture
def snapshots(tmp_path: Path, failing: type[Failing]) -> Snapshots:
    return Snapshots(Place(f"failing://{tmp_path / 'remote'}"))


@pytest.fixture
def sender(snapshots: Snapshots, told: list[str]) -> Iterator[Sender]:
    lease = Lease(snapshots.place, told.append, beat_s=60)
    lease.acquire()
    made = Sender(snapshots, lease, lambda image: (len(list(visible_files(image))),), told.append, first_pause_s=0.02)
    yield made
    made.close()


def give(sender: Sender, write: Callable[..., Path], number: int) -> Path:
    image = write("run", state(number)).with_name(f"image-{number}")
    stage(write("run", state(number)), image)
    sender.send(image)
    return image


def test_the_network_may_be_away_for_a_while(
    sender: Sender, snapshots: Snapshots, write: Callable[..., Path], told: list[str], tmp_path: Path
) -> None:
    Failing.plan(1, until=4)
    image = give(sender, write, 2)
    end = time.monotonic() + 10
    while len(told) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert sender.wait(10, lambda work: None)
    assert len(told) == 2, told
    assert "cannot be written (ConnectionError: the network is away). The run goes on" in told[0]
    assert "can be written again" in told[1]
    assert fetch_newest(snapshots, tmp_path / "fetched", told.append) is not None
    assert files_of(tmp_path / "fetched") == state(2) and not image.exists()


def test_it_says_that_not_all_is_there(sender: Sender, write: Callable[..., Path], told: list[str]) -> None:
    Failing.plan(1, until=10**9)
    give(sender, write, 2)
    shown = list[object]()
    assert not sender.wait(0.5, shown.append) and shown
    assert sender.error == "ConnectionError: the network is away" and len(told) == 1


def test_the_newest_image_wins(
    sender: Sender, snapshots: Snapshots, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that waited while another was being sent are left out, and their disk is given back."""
    go, put = threading.Event(), Failing.put_file
    monkeypatch.setattr(Failing, "put_file", lambda self, a, b, **more: (go.wait(10), put(self, a, b))[1])
    images = [give(sender, write, 1)]
    time.sleep(0.1)
    images += [give(sender, write, number) for number in (2, 3, 4)]
    assert [image.exists() for image in images] == [True, False, False, True]
    go.set()
    assert sender.wait(10, lambda work: None)
    assert len(snapshots.names()) == 2 and not any(image.exists() for image in images)
    assert fetch_newest(snapshots, tmp_path / "fetched", print) is not None
    assert files_of(tmp_path / "fetched") == state(4)


def test_the_same_is_not_sent_again(sender: Sender, snapshots: Snapshots, write: Callable[..., Path]) -> None:
    for _ in range(3):
        give(sender, write, 1)
        assert sender.wait(10, lambda work: None)
    assert len(snapshots.names()) == 1


def test_nothing_is_written_once_another_has_the_folder(
    sender: Sender, snapshots: Snapshots, write: Callable[..., Path]
) -> None:
    snapshots.place.write("writer.json", b'{"token": "other", "host": "far-away", "process": 1}')
    give(sender, write, 1)
    assert not sender.wait(1, lambda work: None) and snapshots.names() == []
    with pytest.raises(Taken):
        sender._lease.check_known()


def test_an_image_is_one_moment(write: Callable[..., Path], tmp_path: Path) -> None:
    """What the run does afterwards is not in it, and nothing hidden; large files are not copied."""
    folder = write("run", state(2) | {".lock": b"", ".remote/image-1/x": b"", "metrics.jsonl": b"{}\n"})
    (folder / "link").symlink_to(folder / "config.yaml")
    stage(folder, image := tmp_path / "image")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"{}\n")
    weights = "checkpoints/step-000002/weights"
    assert (folder / weights).samefile(image / weights)
    (folder / weights).unlink()
    assert files_of(image) == state(2) | {"metrics.jsonl": b"{}\n"}
