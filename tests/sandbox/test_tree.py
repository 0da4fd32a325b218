"""The processes below one, beside what psutil says."""

import os
import subprocess
import sys
import time

import psutil

from dylora_moe.sandbox import tree


def test_it_finds_children_and_theirs_with_what_they_use() -> None:
    code = (
        "import os, time\nkept = b'x' * 30_000_000\nwhile time.process_time() < 0.3: pass\n"
        "os.fork()\nos.write(1, b'ready\\n')\ntime.sleep(60)"
    )
    others = {each.pid for each in psutil.Process().children(recursive=True)}  # of other tests in this process
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
            found = {each.pid: each for each in tree.below(os.getpid())}
            assert set(found) == {each.pid for each in psutil.Process().children(recursive=True)}
            found = {pid: each for pid, each in found.items() if pid not in others}
            assert {each.parent for each in found.values()} == {os.getpid(), process.pid}
            parent = found[process.pid]
            assert 0.25 < parent.cpu_seconds < 5 and parent.memory_bytes > 30_000_000 and not parent.is_dead
            for pid in found:
                os.kill(pid, 9)
            time.sleep(0.2)
            assert all(each.is_dead for each in tree.below(os.getpid()) if each.pid not in others)
        finally:
            process.kill()
