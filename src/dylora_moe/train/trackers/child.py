"""The process of one tracker: `python -m dylora_moe.train.trackers.child NAME`, messages in, answers out."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dylora_moe.train.trackers.clients import CLIENTS, Client
from dylora_moe.train.trackers.messages import (
    Answer,
    Artifact,
    Figures,
    Finish,
    Message,
    Samples,
    Start,
    decode,
    encode,
)
from dylora_moe.train.trackers.sent import Sent

# Seconds for the tracker to end when training was killed and nobody waits.
_LAST_SECONDS = 60


def main() -> None:
    """Do what the messages on the standard input ask, one answer each on the standard output."""
    name = sys.argv[1]
    messages, answers = _take_streams()
    server = _Server(name, CLIENTS[name]())
    for line in messages:
        message = decode(line)
        answers.write(encode(server.answer(message)))
        answers.flush()
        if isinstance(message, Finish):
            return
    timer = threading.Timer(_LAST_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()
    server.answer(Finish(ok=False))


def _take_streams() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output, out of the reach of a library that prints (into the log) or asks (in vain)."""
    messages, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return messages, answers


class _Server:
    def __init__(self, name: str, client: Client) -> None:
        self._name, self._client = name, client
        self._sent: Sent | None = None

    def answer(self, message: Message) -> Answer:
        """Do what is asked; whatever is raised becomes the answer."""
        try:
            said = tuple(self._do(message))
            return Answer(say=said + self._client.warnings())
        except Exception as error:
            text = " ".join(str(error).split())
            return Answer(error=f"{type(error).__name__}: {text}" if text else type(error).__name__)

    def _do(self, message: Message) -> Iterator[str]:
        match message:
            case Start():
                Path(message.folder).mkdir(parents=True, exist_ok=True)
                if not self._client.takes_back:
                    self._sent = Sent(Path(message.folder) / f"{self._name}.sent.json", message.run_id)
                if where := self._client.start(message):
                    yield where
            case Figures():
                new = self._new("figures", message.step, message.figures)
                if new:
                    self._client.log(message.step, new)
                    self._add("figures", message.step, new)
            case Samples():
                new = self._new("samples", message.step, {sample.domain: sample for sample in message.samples})
                if new:
                    self._client.samples(message.step, list(new.values()))
                    self._add("samples", message.step, new)
            case Artifact():
                self._client.keep(message)
            case Finish():
                self._client.finish(ok=message.ok)

    def _new(self, kind: str, step: int, values: dict) -> dict:
        return values if self._sent is None else self._sent.new(kind, step, values)

    def _add(self, kind: str, step: int, values: dict) -> None:
        if self._sent is not None:
            self._sent.add(kind, step, values)


if __name__ == "__main__":
    main()
