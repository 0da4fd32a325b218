"""A command line and a number -> so many processes of this machine that train together, and their exit code.

They are started and looked after by what torchrun itself uses, torch's elastic multiprocessing.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import click
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes

from dylora_moe.train.stopping import EXIT_CODE

_LOOK_S = 0.2
_LAST_LINES = 30
# All that torch's own handlers would end this process by, and leave the others running.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def launch(arguments: Sequence[str], count: int) -> int:
    """Run `dylora` with these arguments in so many processes; returns the exit code for all of them.

    Only the first one has this terminal. When another one fails, its last lines are shown. Signals are handed on.
    """
    logging.disable(logging.CRITICAL)  # torch tells each exit code as an error; that of a stop is none
    # They meet here, as torchrun has it: a port that is only looked up can be taken by the time they begin.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    own |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    if "OMP_NUM_THREADS" not in os.environ:
        own["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    with TemporaryDirectory(prefix="dylora-") as folder:
        processes = start_processes(
            name="dylora",
            entrypoint=sys.executable,
            args={rank: ("-m", "dylora_moe", *arguments) for rank in range(count)},
            envs={rank: {**own, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)},
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=dict.fromkeys(range(1, count), Std.ALL)),
        )
        stopped: list[int] = []

        def hand_on(number: int, frame: FrameType | None) -> None:
            stopped.append(number)
            for process in processes.pids().values():
                with suppress(ProcessLookupError):
                    os.kill(process, number)

        for number in _SIGNALS:
            signal.signal(number, hand_on)
        result = processes.wait(period=_LOOK_S)
        assert result is not None  # without a limit in time
        if not result.is_failed():
            return 0
        first = min(result.failures.values(), key=lambda failure: failure.timestamp)
        if stopped and any(failure.exitcode == EXIT_CODE for failure in result.failures.values()):
            return EXIT_CODE
        if first.exitcode < 0:
            click.echo(f"Process {first.local_rank} was ended by {signal.Signals(-first.exitcode).name}.", err=True)
            return 128 - first.exitcode
        if first.local_rank and first.exitcode != EXIT_CODE:
            _show(first.local_rank, first.exitcode, Path(result.stderrs[first.local_rank]))
        return first.exitcode


def _show(rank: int, code: int, errors: Path) -> None:
    lines = errors.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
    if lines:  # there are none where it ended since another one did
        click.echo("\n".join([f"Process {rank} ended with exit code {code}. The last that it said:", *lines]), err=True)
