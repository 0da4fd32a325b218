"""Snapshots: whatever happens on the way, what is fetched is one whole state of a run, and no older than was told."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.damages import DAMAGES
from tests.remote.faults import Failing, Killed

from dylora_moe.remote import snapshots as module
from dylora_moe.remote.fetching import fetch_newest, fetch_run, read_remote
from dylora_moe.remote.place import Place
from dylora_moe.remote.snapshots import Damaged, Snapshot, Snapshots, describe_files


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state(number: int) -> dict[str, bytes]:
    """A run as it goes on: lines that grow, the two newest checkpoints, an expert under two names."""
    files = {"config.yaml": b"seed: 0\n", "metrics.jsonl": b"{}\n" * number}
    for step in range(max(1, number - 1), number + 1):
        files[f"checkpoints/step-{step:06d}/weights"] = f"weights {step} ".encode() * 50
        files[f"checkpoints/step-{step:06d}/manifest.json"] = f"manifest {step}".encode()
    return files | {"stages/1/final/expert": b"expert", "stages/2/final/expert": b"expert"}


def send(snapshots: Snapshots, folder: Path, number: int) -> None:
    snapshots.write(Snapshot(progress=(number,), files=describe_files(folder)), folder)
    snapshots.prune(2)


def test_what_was_sent_comes_back(address: str, write: Callable[..., Path], tmp_path: Path, told: list[str]) -> None:
    snapshots = Snapshots(Place(address))
    assert snapshots.names() == [] and fetch_newest(snapshots, tmp_path / "none", told.append) is None
    for number in (1, 2, 3, 4):
        send(snapshots, write("run", state(number)), number)
    found = fetch_newest(snapshots, tmp_path / "fetched", told.append)
    assert found is not None and found.progress == (4,) and files_of(tmp_path / "fetched") == state(4)
    assert [int(name[:8]) for name in snapshots.names()] == [4, 3] and told == []
    kept = {content for number in (3, 4) for content in state(number).values()}
    assert len(snapshots.place.list("objects")) == len(kept)  # each content once, and none of what is gone
    assert read_remote(address, "config.yaml") == "seed: 0\n" and read_remote(address, "other") is None


def test_nothing_is_sent_twice(write: Callable[..., Path], tmp_path: Path, failing: type[Failing]) -> None:
    snapshots = Snapshots(Place(f"failing://{tmp_path / 'remote'}"))
    send(snapshots, write("run", state(3)), 3)
    sent = list[str]()
    put = Failing.put_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Failing, "put_file", lambda self, a, b, **more: (sent.append(a), put(self, a, b))[1])
        send(snapshots, write("run", state(4)), 4)
    names = {Path(path).relative_to(tmp_path / "run").as_posix() for path in sent}
    assert names == {"metrics.jsonl", "checkpoints/step-000004/weights", "checkpoints/step-000004/manifest.json"}


def test_a_fetch_that_was_cut_off_goes_on(
    write: Callable[..., Path], tmp_path: Path, failing: type[Failing], told: list[str]
) -> None:
    snapshots = Snapshots(Place(f"failing://{tmp_path / 'remote'}"))
    send(snapshots, write("run", state(4)), 4)
    snapshot = snapshots.read(snapshots.names()[0])
    Failing.plan(4)
    with pytest.raises(ConnectionError):
        snapshots.fetch(snapshot, tmp_path / "fetched", told.append)
    Failing.plan(0)
    snapshots.fetch(snapshot, tmp_path / "fetched", told.append)
    assert files_of(tmp_path / "fetched") == state(4)
    assert Failing.count == len(set(state(4).values())) - 3


FAULTS = st.lists(st.tuples(st.integers(1, 40), st.sampled_from(["error", "lost", "cut", "killed"])), max_size=4)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=FAULTS)
def test_every_fault_leaves_a_whole_state(
    faults: list[tuple[int, str]], write: Callable[..., Path], tmp_path: Path, failing: type[Failing]
) -> None:
    """A writer that fails, or is killed, at any operation; then a new one, on an empty disk, goes on."""
    shutil.rmtree(tmp_path / "remote", ignore_errors=True)
    address, acknowledged, number = f"failing://{tmp_path / 'remote'}", 0, 0
    for at, kind in [*faults, (0, "error")]:
        snapshots = Snapshots(Place(address))
        Failing.plan(at, kind)
        try:
            for number in range(acknowledged + 1, acknowledged + 4):
                folder = write("run", state(number))
                snapshots.write(Snapshot(progress=(number,), files=describe_files(folder)), folder)
                acknowledged = number
                snapshots.prune(2)
        except (ConnectionError, OSError, Killed):
            pass
        Failing.plan(0)
        told = list[str]()
        found = fetch_newest(Snapshots(Place(address)), tmp_path / "fetched", told.append)
        reached = 0 if found is None else found.progress[0]
        assert acknowledged <= reached <= number, (acknowledged, reached, number, told)
        assert reached == 0 or files_of(tmp_path / "fetched") == state(reached)
        acknowledged = reached


def remote_files(remote: Path) -> list[Path]:
    return sorted(path for path in remote.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", DAMAGES)
def test_each_file_there_is_guarded(kind: str, write: Callable[..., Path], tmp_path: Path) -> None:
    """Of what only the newest snapshot has: the one before is taken, or the newest without that checkpoint."""
    remote = tmp_path / "remote"
    snapshots = Snapshots(Place(f"file://{remote}"))
    for number in (3, 4):
        send(snapshots, write("run", state(number)), number)
    without = {path: content for path, content in state(4).items() if "step-000004" not in path}
    shared = {content for content in state(3).values()}
    tried = 0
    for path in remote_files(remote):
        if path.read_bytes() in shared or path.name.startswith("00000001"):
            continue
        shutil.copytree(remote, tmp_path / "kept")
        DAMAGES[kind](path)
        told = list[str]()
        assert fetch_newest(snapshots, tmp_path / "fetched", told.append) is not None
        assert files_of(tmp_path / "fetched") in (state(3), without), path
        # A snapshot that is gone is not missed; all else is told.
        assert (len(told) == 1 and "not used" in told[0]) or (kind == "deleted" and path.suffix == ".json"), told
        shutil.rmtree(remote)
        shutil.move(tmp_path / "kept", remote)
        tried += 1
    assert tried == 4  # the record, the lines, and two files of the checkpoint


@pytest.mark.parametrize("change", [(b"metrics.jsonl", b"metrics.jsonk"), (b'"progress"', b'"progresz"')])
def test_a_record_is_guarded_by_its_name(
    change: tuple[bytes, bytes], write: Callable[..., Path], tmp_path: Path
) -> None:
    """Also where it still reads well and its objects are sound."""
    snapshots = Snapshots(Place(f"file://{tmp_path / 'remote'}"))
    send(snapshots, write("run", state(1)), 1)
    (record,) = (tmp_path / "remote" / "snapshots").iterdir()
    assert change[0] in record.read_bytes()
    record.write_bytes(record.read_bytes().replace(*change))
    with pytest.raises(Damaged, match="its hash differs"):
        snapshots.read(record.name)


def test_without_any_sound_checkpoint_the_one_before_is_taken(
    write: Callable[..., Path], tmp_path: Path, told: list[str]
) -> None:
    """As where a run keeps one."""
    snapshots = Snapshots(Place(f"file://{tmp_path / 'remote'}"))
    for number in (1, 2):
        send(
            snapshots, write("run", {"config.yaml": b"", f"checkpoints/step-{number}/weights": b"w%d" % number}), number
        )
    (bad,) = (path for path in remote_files(tmp_path / "remote") if path.read_bytes() == b"w2")
    bad.write_bytes(b"w3")
    found = fetch_newest(snapshots, tmp_path / "fetched", told.append)
    assert found is not None and found.progress == (1,)
    assert len(told) == 2 and "step-2" in told[0] and "hash differs" in told[0] and "none of its" in told[1]


@pytest.mark.parametrize("name", ["a b.txt", "2026-11-23T08:41.json", "a\\b", "größe.txt", "two\nlines", "%20"])
def test_any_name_of_a_file_comes_back(name: str, write: Callable[..., Path], tmp_path: Path) -> None:
    snapshots = Snapshots(Place(f"file://{tmp_path / 'remote'}"))
    files = state(1) | {f"eval/{name}": b"one", f"checkpoints/step-000001/{name}": b"two"}
    send(snapshots, write("run", files), 1)
    assert fetch_newest(snapshots, tmp_path / "fetched", print) is not None
    assert files_of(tmp_path / "fetched") == files


def test_what_could_not_be_read_back_is_not_sent(write: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    """On Windows; else the snapshot would be deleted as damaged, and nobody told."""
    snapshots = Snapshots(Place(f"file://{tmp_path / 'remote'}"))
    folder = write("run", state(1) | {"eval/08:41.json": b"one"})
    monkeypatch.setattr(module, "_SEPARATORS", {":"})
    with pytest.raises(OSError, match=r"cannot be called 'eval/08:41\.json'"):
        send(snapshots, folder, 1)


@pytest.mark.parametrize("path", ["../escaped", "/etc/passwd", "a/../../b", ".lock", "c:/x", "a\\..\\b", ""])
def test_a_snapshot_names_no_file_elsewhere(
    path: str, write: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "_SEPARATORS", {":", "\\"})  # as on Windows
    folder = write("run", {"config.yaml": b""})
    snapshots, entry = Snapshots(Place(f"file://{tmp_path / 'remote'}")), describe_files(folder)["config.yaml"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_is_inside", lambda path: True)
        (tmp_path / "run" / "x").write_bytes(b"")
        record = Snapshot(progress=(1,), files={"config.yaml": entry, path: entry})
        (tmp_path / "remote" / "objects").mkdir(parents=True)
        shutil.copyfile(folder / "config.yaml", tmp_path / "remote" / "objects" / entry.sha256)
        snapshots.write(record, folder)
    with pytest.raises(Damaged, match="names a file that no run has"):
        snapshots.read(snapshots.names()[0])


def test_a_run_that_goes_on_meanwhile_can_be_fetched(
    write: Callable[..., Path], tmp_path: Path, told: list[str], monkeypatch: Any
) -> None:
    """A checkpoint is made while two files are fetched: what is replaced soonest is fetched first."""
    snapshots, fetched = Snapshots(Place(f"file://{tmp_path / 'remote'}")), list[str]()
    send(snapshots, write("run", state(4)), 4)
    fetch = Place.fetch

    def slow(self: Place, name: str, target: Path) -> None:
        fetched.append(name)
        if len(fetched) % 2 == 1 and len(fetched) > 1:
            number = 4 + len(fetched) // 2
            send(snapshots, write("run", state(number)), number)
        fetch(self, name, target)

    monkeypatch.setattr(Place, "fetch", slow)
    fetch_run(snapshots.place.url, tmp_path / "got", told.append)
    got = files_of(tmp_path / "got")
    assert got == {path: content for path, content in state(4).items() if "step-000003" not in path}


@pytest.mark.parametrize("output", [".", "volume"])
def test_a_run_is_fetched_into_an_empty_folder(
    output: str, write: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """That cannot be deleted, as where one is, or where a disk of its own is mounted."""
    address = f"file://{tmp_path / 'remote'}"
    send(Snapshots(Place(address)), write("run", state(2)), 2)
    (tmp_path / "here" / "volume").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / ("volume" if output == "." else "."))
    target = Path(output)
    before = target.stat().st_ino
    fetch_run(address, target, print)
    assert files_of(target) == state(2) and target.stat().st_ino == before


def test_a_run_is_fetched_into_a_new_folder(write: Callable[..., Path], tmp_path: Path, told: list[str]) -> None:
    from dylora_moe.errors import RunError

    address = f"file://{tmp_path / 'remote'}"
    with pytest.raises(RunError, match="holds none"):
        fetch_run(address, tmp_path / "got", told.append)
    send(Snapshots(Place(address)), write("run", state(1)), 1)
    fetch_run(address, tmp_path / "deep" / "got", told.append)
    assert files_of(tmp_path / "deep") == {f"got/{name}": content for name, content in state(1).items()}
    with pytest.raises(RunError, match="is there"):
        fetch_run(address, tmp_path / "deep" / "got", told.append)
