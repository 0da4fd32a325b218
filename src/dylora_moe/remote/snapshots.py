"""A run folder at some moments, in a remote folder: each snapshot is complete or not there.

    objects/<sha256>                  the content of a file, once, whatever its names
    snapshots/00000012-<sha256>.json  name -> size and hash of each file of the run at one moment; written last

Nothing is written over, so that what was good stays good until it is deleted: snapshots first, then the objects that
none of those left names. Every file is checked by its hash before it is used; a snapshot's own hash is in its name.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import TypeAdapter

from dylora_moe.cache.disk import hash_file, sync
from dylora_moe.remote.place import Place
from dylora_moe.remote.staging import copy_shared, is_unchanging, visible_files
from dylora_moe.run_dir import CHECKPOINTS

_SNAPSHOTS, _OBJECTS = "snapshots", "objects"
_NAME = re.compile(r"(\d{8})-([0-9a-f]{16})\.json")
_FORMAT = 1
_HEX = re.compile(r"[0-9a-f]{64}")
# What a name may hold on other systems only: there these lead elsewhere.
_SEPARATORS = set("\\:") if os.name == "nt" else set[str]()


class Damaged(Exception):
    """A snapshot that cannot be used; says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a file must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A run folder at one moment.

    Attributes:
        progress: How far the run was; of two the greater one is further.
        files: Path in the run folder -> what it must be.
        format: Of this record.
    """

    progress: tuple[int, ...]
    files: dict[str, Entry]
    format: int = _FORMAT


_RECORD = TypeAdapter(Snapshot)


def describe_files(folder: Path) -> dict[str, Entry]:
    """What the files of an image of a run are; names of one file share its hash."""
    found, hashes = dict[str, Entry](), dict[tuple[int, int], str]()
    for name in visible_files(folder):
        status = (folder / name).stat()
        file = (status.st_dev, status.st_ino)
        if file not in hashes:
            hashes[file] = hash_file(folder / name)
        found[name] = Entry(bytes=status.st_size, sha256=hashes[file])
    return found


class Snapshots:
    """Those of one run.

    Args:
        place: Its remote folder.
    """

    def __init__(self, place: Place) -> None:
        self.place = place

    def names(self) -> list[str]:
        """Of all snapshots, the newest first."""
        return sorted((name for name in self.place.list(_SNAPSHOTS) if _NAME.fullmatch(name)), reverse=True)

    def read(self, name: str) -> Snapshot:
        """One of them; whether its files are sound is seen when they are fetched.

        Raises:
            Damaged: It is not what was written, or of another version.
        """
        found = _NAME.fullmatch(name)
        assert found is not None
        try:
            content = self.place.read(f"{_SNAPSHOTS}/{name}")
        except FileNotFoundError as error:
            raise Damaged("it is gone") from error
        if hashlib.sha256(content).hexdigest()[: len(found[2])] != found[2]:
            raise Damaged("it is not what was written: its hash differs")
        try:
            if (format_there := json.loads(content)["format"]) != _FORMAT:
                raise Damaged(f"it has format {format_there}, and this version reads {_FORMAT}")
            snapshot = _RECORD.validate_json(content)
        except (ValueError, TypeError, LookupError) as error:
            raise Damaged(f"it cannot be read ({type(error).__name__})") from error
        for path, entry in snapshot.files.items():  # written by whoever can write there
            if not _is_inside(path) or not _HEX.fullmatch(entry.sha256):
                raise Damaged(f"it names a file that no run has, {path}")
        return snapshot

    def readable(self, tell: Callable[[str], None]) -> Iterator[tuple[str, Snapshot]]:
        """(name, snapshot) of those that can be read, the newest first; what is wrong with others is told."""
        for name in self.names():
            try:
                yield name, self.read(name)
            except Damaged as error:
                tell(f"The snapshot {name} in {self.place.url} is not used: {error}.")

    def write(
        self,
        snapshot: Snapshot,
        folder: Path,
        *,
        sent: Callable[[int], None] = lambda num_bytes: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Send what is not there yet, and the record last.

        Args:
            snapshot: Of the folder.
            folder: With its files.
            sent: Called with the bytes of each file that is there; may raise, to end this.
            check: Called before the record is written; may raise, too.
        """
        there = self.place.list(_OBJECTS)
        for path, entry in snapshot.files.items():
            if not _is_inside(path):  # nobody would read it back
                raise OSError(f"a file of a run cannot be called {path!r}")
            # One that was cut off, where a file system shows files before they are whole, has another size.
            if there.get(entry.sha256) != entry.bytes:
                self.place.send(folder / path, f"{_OBJECTS}/{entry.sha256}")
                there[entry.sha256] = entry.bytes
            sent(entry.bytes)
        check()
        content = _RECORD.dump_json(snapshot, indent=1)
        names = self.names()
        number = 1 + (int(names[0].partition("-")[0]) if names else 0)
        name = f"{number:08d}-{hashlib.sha256(content).hexdigest()[:16]}.json"
        self.place.write(f"{_SNAPSHOTS}/{name}", content)
        if self.place.read(f"{_SNAPSHOTS}/{name}") != content:
            raise OSError(f"{name} is not there as it was sent")

    def prune(self, keep: int, *, check: Callable[[], None] = lambda: None) -> None:
        """Delete all snapshots but the newest that can be read, so many of them, and what none of those left needs.

        Args:
            keep: Snapshots to keep.
            check: Called before objects are deleted; may raise, to end this.
        """
        kept: list[Snapshot] = []
        for name in self.names():
            try:
                snapshot = self.read(name) if len(kept) < keep else None
            except Damaged:
                snapshot = None
            if snapshot is None:
                self.place.delete(f"{_SNAPSHOTS}/{name}")
            else:
                kept.append(snapshot)
        needed = {entry.sha256 for snapshot in kept for entry in snapshot.files.values()}
        there = self.place.list(_OBJECTS)
        check()  # objects that came since, of another writer, are in no snapshot that was read here
        for name in there:
            if name not in needed:
                self.place.delete(f"{_OBJECTS}/{name}")

    def fetch_file(self, snapshot: Snapshot, path: str, target: Path) -> None:
        """One file of a snapshot, checked; not again where the target is that file.

        Raises:
            Damaged: It is not there, or not what was sent.
        """
        if (entry := snapshot.files.get(path)) is None:
            raise Damaged(f"it has no {path}")
        if target.is_file() and target.stat().st_size == entry.bytes and hash_file(target) == entry.sha256:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.place.fetch(f"{_OBJECTS}/{entry.sha256}", target)
        except FileNotFoundError as error:
            raise Damaged(f"{path} is missing there") from error
        if (size := target.stat().st_size) != entry.bytes:
            raise Damaged(f"{path} has {size} bytes there instead of {entry.bytes}")
        if hash_file(target) != entry.sha256:
            raise Damaged(f"{path} is not what was sent: its hash differs")
        sync(target)

    def fetch(self, snapshot: Snapshot, folder: Path, tell: Callable[[str], None]) -> None:
        """All files of a snapshot, into a folder of its own; checkpoints that are damaged are left out, and told.

        First comes what a run that goes on elsewhere soon replaces, then its checkpoints, the newest first.

        Raises:
            Damaged: Another file is, or no checkpoint of a folder of them is sound.
        """
        checkpoints, whole = _by_checkpoint(snapshot.files), set[str]()
        fetched: dict[str, Path] = {}
        for checkpoint in sorted(checkpoints, key=lambda name: (not name, name), reverse=True):
            try:
                for path in checkpoints[checkpoint]:
                    digest, target = snapshot.files[path].sha256, folder / path
                    if digest in fetched and not target.exists():
                        copy_shared(fetched[digest], target, path)
                    else:
                        self.fetch_file(snapshot, path, target)
                        if is_unchanging(path):  # others are no names to link to
                            fetched[digest] = target
            except Damaged as error:
                if not checkpoint:
                    raise
                tell(f"The checkpoint {checkpoint} in {self.place.url} is not used: {error}.")
                shutil.rmtree(folder / checkpoint, ignore_errors=True)
                fetched = {digest: path for digest, path in fetched.items() if path.is_file()}
            else:
                whole.add(checkpoint.rpartition("/")[0])
        for checkpoint in checkpoints:
            if checkpoint and checkpoint.rpartition("/")[0] not in whole:
                raise Damaged(f"none of its {CHECKPOINTS} is sound")


def _by_checkpoint(files: Mapping[str, Entry]) -> dict[str, list[str]]:
    """Folder of a checkpoint -> its files; under no name all others."""
    found: dict[str, list[str]] = {}
    for path in files:
        parts = path.split("/")
        depth = parts.index(CHECKPOINTS) + 2 if CHECKPOINTS in parts[:-2] else 0
        found.setdefault("/".join(parts[:depth]), []).append(path)
    return found


def _is_inside(path: str) -> bool:
    """Whether a path names a file in a folder, and none that is hidden."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not _SEPARATORS & set(path) and not any(part.startswith((".", "/")) for part in parts)
