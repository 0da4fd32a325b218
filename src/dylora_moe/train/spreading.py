"""A folder of the first process -> the same folder on the machines of others, where they share no disk with it."""

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch

from dylora_moe import ranks

T = TypeVar("T")

_PIECE = 2**24  # bytes that are told at a time


def spread(folder: Path) -> None:
    """Let every process find in a folder what the first one has there, at the same path; all of them call it.

    Nothing is sent where all see the same files, as on one machine or a shared disk. Hidden files are left out.
    """
    if ranks.count() == 1:
        return
    own = _files(folder)
    wanted = [(name, size, changed) for name, size, changed in ranks.agree(own)]
    sees_all = own == wanted
    if all(ranks.gather(sees_all)):
        return
    writes = not sees_all and os.environ.get("LOCAL_RANK", "0") == "0"
    for name, size, _ in wanted:
        _tell(folder / name, size, writes=writes)
    for name in {name for name, *_ in own} - {name for name, *_ in wanted} if writes else ():
        (folder / name).unlink()
    ranks.gather(None)  # so that nobody reads before it is whole


def in_turn(act: Callable[[], T], folder: Path) -> T:
    """Let the first process act, then each of the others for itself, with what is in a folder by then."""
    made: list[T] = []
    ranks.by_first(lambda: made.append(act()))
    spread(folder)
    return made[0] if made else act()


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, time of the last change) of each file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder) for path in paths}
    return [
        (name.as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
        for path, name in names.items()
        if not any(part.startswith(".") for part in name.parts)
    ]


def _tell(path: Path, size: int, *, writes: bool) -> None:
    """One file, in pieces, which all processes get; those that write it put it in its place once it is whole."""
    with ExitStack() as files:
        source = files.enter_context(path.open("rb")) if ranks.is_first() else None
        target = None
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            target = files.enter_context(tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False))
        for start in range(0, size, _PIECE):
            piece = torch.empty(min(_PIECE, size - start), dtype=torch.uint8)
            if source is not None:
                piece = torch.frombuffer(bytearray(source.read(len(piece))), dtype=torch.uint8)
            told = ranks.of_first(piece)
            if target is not None:
                target.write(told.numpy().data)
    if target is not None:
        os.replace(target.name, path)
