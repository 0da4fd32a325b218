"""Many clients at once against one at a time: answers that differ, errors, memory, and tokens a second.

Starts the server in a process of its own, over a base with random experts: what they say means nothing, but each says
something else. First and last each request is asked alone, which is what its answer is compared with; between them
all clients ask in a loop, greedy, of mixture, base and experts in turn. Run with --help for the settings.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import click
import psutil
import torch
from _measure import environment
from rich.console import Console

from dylora_moe.bases import load_base
from dylora_moe.data.templates import end_token_id, ensure_template
from dylora_moe.serve.app import Answers, make_app
from dylora_moe.serve.engine import Engine, Limits
from dylora_moe.serve.local import Local
from dylora_moe.serve.metrics import Metrics
from dylora_moe.serve.names import name_speakers
from dylora_moe.serve.server import listen, make_server
from dylora_moe.tuner import DyLoraModel, ExpertConfig, RoutingConfig

EXPERTS = 4
MODELS = ("mixture", "base", "expert_0", "expert_3")
SUBJECTS = ("the sea", "a clock", "bread and butter", "snow", "a long walk home at night", "seven", "glass", "my cat")


def run_server(base_name: str, rows: int) -> None:
    """Answer on a free port, which is printed, until told to end."""
    base = load_base(base_name, dtype=torch.float32)
    ensure_template(base.tokenizer)
    names = [f"expert_{number}" for number in range(EXPERTS)]
    torch.manual_seed(0)
    tap = len(base.model.get_decoder().layers) // 3  # type: ignore[arg-type]
    config = ExpertConfig(rank=16, alpha=32, target_modules="all-linear")
    model = DyLoraModel(base.model, names, expert_config=config, routing=RoutingConfig(tap_layer=tap))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.01)
    engine = Engine(model, base.tokenizer, Limits(rows=rows))
    metrics = Metrics(engine.snapshot)
    local = Local(
        engine=engine,
        end_token_ids=(end_token_id(base.tokenizer),),
        fingerprint="benchmark",
        most_tokens=256,
        timeout_s=600.0,
        metrics=metrics,
    )
    answers = Answers(local, name_speakers("mixture", names), metrics)
    listening = listen("127.0.0.1", 0)
    app = make_app(answers, key=None, only_local=True)
    port = listening.getsockname()[1]
    make_server(app, answers, grace_s=5.0, ready=lambda: print(port, flush=True)).run(sockets=[listening])


@contextmanager
def server(base: str, rows: int) -> Iterator[tuple[str, psutil.Process]]:
    """Its address and process."""
    command = [sys.executable, __file__, "--base", base, "--rows", str(rows), "--as-server"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def bodies(number: int, max_tokens: int) -> list[dict[str, Any]]:
    """Requests that all differ, in length too."""
    return [
        {
            "model": MODELS[index % len(MODELS)],
            "messages": [{"role": "user", "content": f"Write {3 + index} words about {SUBJECTS[index % 8]}."}],
            "max_tokens": max_tokens - index % 5,
            "temperature": 0,
        }
        for index in range(number)
    ]


async def ask(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[str, int]:
    async with http.post(f"{url}/chat/completions", json=body) as response:
        found = await response.json()
        if response.status != 200:
            raise RuntimeError(found["error"]["message"])
        return found["choices"][0]["message"]["content"], found["usage"]["completion_tokens"]


async def one_at_a_time(http: aiohttp.ClientSession, url: str, asked: list[dict[str, Any]]) -> dict[str, Any]:
    began = time.monotonic()
    found = [await ask(http, url, body) for body in asked]
    seconds = time.monotonic() - began
    tokens = sum(number for _, number in found)
    return {"answers": [text for text, _ in found], "tokens": tokens, "seconds": seconds}


async def crowd(
    http: aiohttp.ClientSession,
    url: str,
    process: psutil.Process,
    asked: list[dict[str, Any]],
    expected: list[str],
    *,
    clients: int,
    seconds: float,
) -> dict[str, Any]:
    began = time.monotonic()
    counts = {"answers": 0, "tokens": 0, "errors": 0, "other_than_alone": 0}
    memory: list[int] = []

    async def client(number: int) -> None:
        turn = number
        while time.monotonic() < began + seconds:
            index = turn % len(asked)
            turn += 7  # no two clients ask in the same order for long
            try:
                text, tokens = await ask(http, url, asked[index])
            except (RuntimeError, aiohttp.ClientError, asyncio.TimeoutError):
                counts["errors"] += 1
                continue
            counts["answers"] += 1
            counts["tokens"] += tokens
            counts["other_than_alone"] += text != expected[index]

    async def watch() -> None:
        while True:
            memory.append(process.memory_info().rss)
            await asyncio.sleep(1)

    watching = asyncio.ensure_future(watch())
    await asyncio.gather(*map(client, range(clients)))
    watching.cancel()
    third = max(1, len(memory) // 3)
    return counts | {
        "clients": clients,
        "seconds": time.monotonic() - began,
        "memory_mb": {
            "start": memory[0] / 1e6,
            "highest_of_first_third": max(memory[:third]) / 1e6,
            "highest_of_last_third": max(memory[-third:]) / 1e6,
            "end": memory[-1] / 1e6,
        },
    }


async def measure(
    url: str, process: psutil.Process, *, clients: int, seconds: float, different: int, max_tokens: int
) -> dict[str, Any]:
    asked = bodies(different, max_tokens)
    timeout = aiohttp.ClientTimeout(total=900)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        await ask(http, url, asked[0])  # what is made at the first pass is of neither
        first = await one_at_a_time(http, url, asked)
        together = await crowd(http, url, process, asked, first["answers"], clients=clients, seconds=seconds)
        last = await one_at_a_time(http, url, asked)
    alone = (first["tokens"] + last["tokens"]) / (first["seconds"] + last["seconds"])
    speed = together["tokens"] / together["seconds"]
    return {
        "different_answers": len(set(first["answers"])),
        "alone_changed": sum(a != b for a, b in zip(first["answers"], last["answers"], strict=True)),
        "tokens_per_s_alone": alone,
        "tokens_per_s_together": speed,
        "times_faster": speed / alone,
        "together": together,
    }


@click.command()
@click.option("--base", default="pypi:smollm2", show_default=True, help="A base, as --base-model takes it.")
@click.option("--clients", default=64, show_default=True, type=click.IntRange(1), help="That ask at the same time.")
@click.option("--seconds", default=120.0, show_default=True, type=float, help="How long they do.")
@click.option("--different", default=32, show_default=True, type=click.IntRange(1), help="Requests that differ.")
@click.option("--max-tokens", default=24, show_default=True, type=click.IntRange(6), help="Longest answer.")
@click.option("--rows", default=64, show_default=True, type=click.IntRange(1), help="Answers in one pass.")
@click.option("--as-server", is_flag=True, hidden=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the figures here, as JSON.")
def main(
    base: str,
    clients: int,
    seconds: float,
    different: int,
    max_tokens: int,
    rows: int,
    as_server: bool,
    out: Path | None,
) -> None:
    """Ask a server by many clients at once, and one at a time."""
    if as_server:
        run_server(base, rows)
        return
    with server(base, rows) as (url, process):
        figures = asyncio.run(
            measure(url, process, clients=clients, seconds=seconds, different=different, max_tokens=max_tokens)
        )
    settings = {"base": base, "experts": EXPERTS, "rows": rows, "different": different, "max_tokens": max_tokens}
    record = {"environment": environment(Path(__file__).parents[1]), "settings": settings, **figures}
    together = figures["together"]
    memory = together["memory_mb"]
    Console().print(
        f"{together['answers']} answers to {clients} clients in {together['seconds']:.0f} s: "
        f"{together['errors']} errors, {together['other_than_alone']} other than alone; "
        f"{figures['tokens_per_s_together']:.1f} tokens/s together, {figures['tokens_per_s_alone']:.1f} one at a time "
        f"({figures['times_faster']:.1f} times); memory {memory['highest_of_first_third']:.0f} MB, then "
        f"{memory['end']:.0f} MB",
        highlight=False,
    )
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
