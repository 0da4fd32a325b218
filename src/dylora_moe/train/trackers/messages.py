"""What training tells a tracker's process and what it answers, one JSON line each."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# A variable of the environment with one of these in its name is taken for a secret ...
_SECRET_NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD", "TRACKIO_SERVER_URL")
# ... unless it is too short to be one, so that a TOKEN=1 does not take every 1 out of a text.
_SECRET_LENGTH = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the model answers to one prompt of a domain."""

    domain: str
    prompt: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Begin a run, or go on with it.

    Attributes:
        run_name: For people.
        run_id: Of the run at the tracker.
        resumed_at: Steps that the run has behind it; None for a new run.
        folder: For what the tracker writes.
        config: All settings of the run.
        environment: Versions and hardware.
    """

    run_name: str
    run_id: str
    resumed_at: int | None
    folder: str
    config: dict[str, Any]
    environment: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Numbers of a step."""

    step: int
    figures: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Answers of the model at a step."""

    step: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A folder to keep at the tracker.

    Attributes:
        folder: Its path.
        name: Versions of one thing share it.
        type: model or checkpoint.
        aliases: That point to this version from now on.
        is_copy: The folder is there for this alone, and goes when the tracker has it.
    """

    folder: str
    name: str
    type: str
    aliases: tuple[str, ...]
    is_copy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The run ends here."""

    ok: bool


Message = Start | Figures | Samples | Artifact | Finish
_KINDS: dict[str, type] = {kind.__name__: kind for kind in (Start, Figures, Samples, Artifact, Finish)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """To one message: why it failed, and what a person should know."""

    error: str | None = None
    say: tuple[str, ...] = ()


def encode(message: Message | Answer) -> bytes:
    """One line, without the values of secrets in the environment."""
    line = json.dumps({"kind": type(message).__name__, **asdict(message)}, default=str)
    return hide_secrets(line).encode() + b"\n"


def decode(line: bytes) -> Message:
    """What `encode` wrote."""
    record = json.loads(line)
    kind = record.pop("kind")
    if kind == Samples.__name__:
        record["samples"] = tuple(Sample(**sample) for sample in record["samples"])
    if kind == Artifact.__name__:
        record["aliases"] = tuple(record["aliases"])
    return _KINDS[kind](**record)


def decode_answer(line: bytes) -> Answer:
    """What `encode` wrote."""
    record = json.loads(line)
    return Answer(error=record["error"], say=tuple(record["say"]))


def hide_secrets(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """A text without the values of variables whose names are those of secrets."""
    for name, value in environ.items():
        if len(value) >= _SECRET_LENGTH and any(part in name.upper() for part in _SECRET_NAMES):
            text = text.replace(value, "***")
    return text
