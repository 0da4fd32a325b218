"""`dylora serve` as a process: it listens, answers, and ends when told."""

import json
import os
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from tests.cli.conftest import finish, start_python

Run = Callable[..., Any]
START = "from dylora_moe.cli.main import main; main()"


def test_a_run_is_served_until_sigterm(finished: Any, dylora: Run) -> None:
    process = start_python(START, "serve", finished.folder, "--port", 0, "--json", "--max-tokens", 150)
    try:
        assert process.stdout is not None
        shown = json.loads(process.stdout.readline())
        assert shown["models"] == ["three-domains", "base", "expert_0", "expert_1", "expert_2"]
        client = openai.OpenAI(base_url=f"{shown['url']}/v1", api_key="x", max_retries=0, timeout=60)
        ask: Any = {"messages": [{"role": "user", "content": "Say blue river in capitals."}], "temperature": 0}
        found = client.chat.completions.create(model="expert_1", **ask, max_tokens=6).choices[0].message.content
        wanted = ("--prompt", "Say blue river in capitals.", "--max-new-tokens", 6, "--expert", "expert_1", "--json")
        assert found == dylora("chat", finished.folder, *wanted).json()["text"]

        streams = [client.chat.completions.create(model="base", **ask, max_tokens=150, stream=True) for _ in range(6)]
        os.kill(process.pid, signal.SIGTERM)  # all were taken, as their heads have come
        with ThreadPoolExecutor(6) as pool:
            ends = pool.map(lambda stream: list(stream)[-1].choices[0].finish_reason, streams)
            assert set(ends) <= {"length", "stop"}
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        _, err = finish(process, 60)
    assert process.returncode == 0, err
    assert "Traceback" not in err


def test_a_key_is_needed_where_others_can_reach(finished: Any, dylora: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYLORA_API_KEY", raising=False)
    outcome = dylora("serve", finished.folder, "--host", "0.0.0.0", "--port", 0)
    assert outcome.code == 1 and "no DYLORA_API_KEY" in outcome.err
    monkeypatch.setenv("DYLORA_API_KEY", "wörd")
    outcome = dylora("serve", finished.folder, "--port", 0)
    assert outcome.code == 1 and "printable ASCII" in outcome.err and "wörd" not in outcome.err


def test_what_cannot_be_served_is_told(finished: Any, dylora: Run) -> None:
    outcome = dylora("serve", finished.folder, "--port", 0, "--upstream", "http://127.0.0.1:1")
    assert outcome.code == 1 and "must be a server with OpenAI's interface" in outcome.err
    outcome = dylora("serve", finished.folder.parent, "--port", 0)
    assert outcome.code == 1 and "Give a run or a model folder" in outcome.err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        outcome = dylora("serve", finished.folder, "--port", taken.getsockname()[1])
    assert outcome.code == 1 and "must be free" in outcome.err
