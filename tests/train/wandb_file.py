"""What W&B was given, read from the file that `wandb sync` sends to its server, which is the one thing not here."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


def read_wandb(path: Path) -> list[Any]:
    """The records of a .wandb file: protobuf in the blocks of a LevelDB log after a header of 7 bytes."""
    wandb_proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, place, part, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        _, size, kind = struct.unpack_from("<IHB", data, place)
        if left < 7 or kind == 0:
            place += left
            continue
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            records.append(wandb_proto.Record.FromString(part))
            part = b""
    return records


def artifacts(records: Sequence[Any], kind: str) -> list[Any]:
    """Those of a type, in the order in which they were given."""
    found = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    return [artifact for artifact in found if artifact.type == kind]
