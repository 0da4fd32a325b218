"""Does a run that is ended again and again come out as one that is not? Bit by bit.

Starts `dylora train` as a process of its own, ends it by a signal at a random moment, starts it again, so many times,
then lets it finish; and compares experts, router, metrics, routing, samples and result with those of a run that was
left alone. With --wipe the local disk, run folder and cache, is lost after some of them, and the run goes on from its
remote folder. Run with --help for the settings.
"""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import IO, Any

import click
from _measure import environment
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from tests.tiny import settings, write_base, write_rows

from dylora_moe.run_dir import METRICS, ROUTING, SAMPLES, RunDir

_ROOT = Path(__file__).resolve().parents[1]
KINDS: dict[str, dict[str, Any]] = {"joint": {"num_experts": 3}, "single": {"num_experts": 1}}
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}
HARD = {
    "packing": True,
    "max_length": 128,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.1,
    "num_epochs": 100_000,
    "logging_steps": 3,
    "eval_steps": 40,
    "save_steps": 10,
    "sample_tokens": 8,
}
CLOCKS = {"seconds", "tokens_per_second", "memory_gb", "memory_share", "run"}


def write_recipe(folder: Path, name: str, steps: int, kind: str, **more: str) -> list[str]:
    """The command that trains on a small random base, three domains, packing, accumulation and dropout on."""
    base, rows = folder / "base", folder / "rows"
    if not base.exists():
        rows.mkdir()
        write_base(base)
        write_rows(rows)
    paths = {path.stem: path for path in sorted(rows.iterdir())}
    values = settings(base, paths, folder) | HARD | KINDS[kind] | {"max_steps": steps, "run_name": name} | more
    recipe = folder / f"{name}.yaml"
    recipe.write_text(json.dumps(values), encoding="utf-8")
    return [sys.executable, "-c", "from dylora_moe.cli.main import main; main()", "train", str(recipe)]


def live(arguments: list[str], number: signal.Signals | None, awaited: str, seconds: float) -> tuple[int, str]:
    """Run a process, ended by a signal so many seconds after it said something; gives its exit code and output."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT)
        if number is not None:
            while awaited not in _read(output) and process.poll() is None:
                time.sleep(0.01)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
        return process.wait(), _read(output)


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def outcome(run: RunDir) -> dict[str, Any]:
    """All that a run leaves, but for clocks and paths."""
    kept: dict[str, Any] = {
        str(path.relative_to(run.path)): {name: value.numpy().tobytes() for name, value in load_file(path).items()}
        for path in sorted((run / "final").rglob("*.safetensors"))
    }
    for name in (METRICS, ROUTING, SAMPLES):
        kept[name] = [{key: value for key, value in line.items() if key not in CLOCKS} for line in run.read_lines(name)]
    kept["result"] = {key: value for key, value in run.read("result.json").items() if key not in CLOCKS}
    return kept


def start_s3() -> str:
    """The address of a folder on a server of this process that speaks S3, for the processes that it starts."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    boto3.client("s3").create_bucket(Bucket="bucket")
    return "s3://bucket/runs"


def torture(
    kind: str, number: str, times: int, steps: int, seed: int, console: Console, *, wipes: int = 0, remote: str = ""
) -> dict[str, Any]:
    """One run left alone and one that is ended so many times, compared; the disk is lost after some of them."""
    draw = random.Random(f"{kind}/{number}/{seed}")
    planned, wiped = draw.sample(range(times), wipes), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["DYLORA_CACHE"] = str(folder / "cache")
        began = time.monotonic()
        code, text = live(write_recipe(folder, "whole", steps, kind), None, "", 0)
        assert code == 0, text
        alone = time.monotonic() - began
        whole, run, codes, before, fetched = RunDir(folder / "whole"), RunDir(folder / "ended"), [], 0, 0
        lines = whole.read_lines(METRICS)
        training = lines[-1]["seconds"] - lines[0]["seconds"]
        mirror = {"remote_dir": f"{remote or f'file://{folder}/remote'}/{kind}/{number}"} if wipes or remote else {}
        arguments = write_recipe(folder, "ended", steps, kind, **mirror)
        while len(codes) < times:
            # One in five anywhere in the start, the others in a part of the training that lets the run get on.
            early = draw.random() < 0.2
            awaited, longest = ("", alone - training) if early else ("Training for", training / 12)
            code, text = live(arguments, SIGNALS[number], awaited, draw.uniform(0, longest))
            if code == 0:
                break
            codes.append(code)
            before += "Training for" not in text
            fetched += "Fetched, " in text
            newest = max((path.name for path in (run / "checkpoints").glob("step-*")), default="none")
            console.print(
                f"{kind} {number} {len(codes)}: exit code {code}, newest checkpoint {newest}", highlight=False
            )
            if len(codes) - 1 in planned:
                wiped += 1
                console.print("the disk is lost", highlight=False)
                for lost in (run.path, folder / "cache"):
                    shutil.rmtree(lost, ignore_errors=True)
        code, text = live(arguments, None, "", 0)  # to its end, or that it is at its end
        assert code == 0, text
        fetched += "Fetched, " in text
        one, other = outcome(whole), outcome(run)
        return {
            "kind": kind,
            "signal": number,
            "times": len(codes),
            "steps": steps,
            "before_training": before,
            **({"wiped": wiped, "fetched": fetched, "remote": (remote or "file").partition(":")[0]} if mirror else {}),
            "exit_codes": sorted(set(codes)),
            "seconds_alone": round(alone, 1),
            "compared": len(one),
            "different": [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)],
        }


@click.command(help=__doc__)
@click.option("--times", default=20, show_default=True, help="Signals sent to each run.")
@click.option("--steps", default=500, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--kinds", default=",".join(KINDS), show_default=True)
@click.option("--signals", default=",".join(SIGNALS), show_default=True)
@click.option("--wipe", default=0, show_default=True, help="After so many of the signals the disk is lost.")
@click.option(
    "--remote", default="", help="Address of the remote folder, or s3 for a server here; else another folder."
)
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    times: int, steps: int, seed: int, kinds: str, signals: str, wipe: int, remote: str, output: Path | None
) -> None:
    console = Console(stderr=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results, remote = [], start_s3() if remote == "s3" else remote
    for kind, number in product(kinds.split(","), signals.split(",")):
        results.append(torture(kind, number, times, steps, seed, console, wipes=wipe, remote=remote))
        console.print(results[-1], highlight=False)
    table = Table(
        "run", "signal", "times", "of them before training", "exit codes", "files and records compared", "different"
    )
    for row in results:
        codes, different = ", ".join(map(str, row["exit_codes"])), ", ".join(row["different"]) or "none"
        values = (row["kind"], row["signal"], row["times"], row["before_training"], codes, row["compared"], different)
        table.add_row(*map(str, values))
    console.print(table)
    if output:
        record = {"environment": environment(_ROOT), "results": results}
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(row["different"] or row["times"] < times for row in results))


if __name__ == "__main__":
    main()
