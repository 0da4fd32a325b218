"""What making data costs beside the server: rows a second against one that answers at once, and at a real latency.

Starts a stub server as a process of its own, and asks it so many questions twice, in turn: by the client alone, and by
the whole pipeline with prompts, checks, log and resume. Run with --help for the settings.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click
from _measure import environment
from rich.console import Console

from dylora_moe.config import GenerateConfig, make_generate_config
from dylora_moe.generate.asking import make_client
from dylora_moe.generate.clients import Client
from dylora_moe.generate.engine import Engine, Job
from dylora_moe.generate.journal import Journal
from dylora_moe.generate.prepare import prepare
from dylora_moe.generate.rows import Limits
from dylora_moe.generate.run import LOG, make_job

_ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def stub(delay_s: float) -> Iterator[str]:
    """Its address."""
    command = [sys.executable, "-m", "tests.generate.stub", json.dumps({"delay_s": delay_s})]
    process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    finally:
        process.kill()
        process.wait()


def recipe(folder: Path, url: str, rows: int, in_flight: int) -> GenerateConfig:
    questions = folder / "questions.jsonl"
    questions.write_text(
        "".join(json.dumps({"text": f"Che cosa vuol dire la parola {number}?"}) + "\n" for number in range(rows)),
        "utf-8",
    )
    return make_generate_config(
        {
            "questions": [str(questions)],
            "levels": {"B1": rows},
            "generator": "stub",
            "endpoints": [url],
            "in_flight": in_flight,
            "output_dir": str(folder),
        }
    )


def direct(client: Client, jobs: list[Job], in_flight: int) -> float:
    """Rows a second of the client alone."""

    async def run() -> None:
        queue = iter(jobs)

        async def work() -> None:
            for job in queue:
                await client.complete(job.ask((), 0))

        await asyncio.gather(*(work() for _ in range(in_flight)))
        await client.close()

    began = time.monotonic()
    asyncio.run(run())
    return len(jobs) / (time.monotonic() - began)


def pipeline(config: GenerateConfig, client: Client, jobs: list[Job]) -> float:
    """Rows a second with checks and log."""
    began = time.monotonic()
    with Journal(config.run_dir / LOG) as journal:
        engine = Engine(
            client=client,
            journal=journal,
            limits=Limits(regenerations=config.max_regenerations, tries=config.max_tries),
            in_flight=config.in_flight,
            patience_s=config.patience,
        )
        states = engine.run(jobs, {})
    seconds = time.monotonic() - began
    assert all(state.end == "passed" for state in states.values())
    return len(jobs) / seconds


def client_of(config: GenerateConfig) -> Client:
    return make_client(config, config.generator, config.endpoints, lambda line: None)


@click.command(help=__doc__)
@click.option("--rows", default=3000, show_default=True, help="Against the server that answers at once.")
@click.option("--rows-at-latency", default=1500, show_default=True)
@click.option("--latency", default=0.5, show_default=True, help="Seconds.")
@click.option("--in-flight", default=64, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(rows: int, rows_at_latency: int, latency: float, in_flight: int, repeats: int, out: Path | None) -> None:
    console = Console(width=120)
    record: dict[str, Any] = {"in_flight": in_flight}
    for name, delay, number in (("at_once", 0.0, rows), ("at_latency", latency, rows_at_latency)):
        rates: dict[str, list[float]] = {"direct": [], "pipeline": []}
        with stub(delay) as url, tempfile.TemporaryDirectory() as temporary:
            config = recipe(Path(temporary), url, number, in_flight)
            made = prepare(config, lambda line: None)
            jobs = [make_job(config, made, work) for work in made.work]
            config.run_dir.mkdir()
            for _ in range(repeats):
                rates["direct"].append(direct(client_of(config), jobs, in_flight))
                (config.run_dir / LOG).unlink(missing_ok=True)
                rates["pipeline"].append(pipeline(config, client_of(config), jobs))
        shares = [mine / theirs for mine, theirs in zip(rates["pipeline"], rates["direct"], strict=True)]
        record[name] = {"delay_s": delay, "rows": number, "rows_per_second": rates, "share_kept": median(shares)}
        console.print(
            f"{name}: client alone {median(rates['direct']):,.0f} rows/s, pipeline {median(rates['pipeline']):,.0f}, "
            f"{median(shares):.1%} of it",
            highlight=False,
        )
    if out:
        out.write_text(json.dumps(record | {"environment": environment(_ROOT)}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
