"""Does a stream of skills that is killed again and again come out as one that is not? Decisions and bytes.

Starts `dylora train` with a recipe as a process of its own and leaves it alone; then does the same under another name,
and kills it (SIGKILL) at moments drawn over the whole of the work, starting it again each time; and compares every file
that is left. Run with --help for the settings.
"""

import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import click
from _measure import environment
from interruptions import live
from rich.console import Console
from tests.train.streams import outcome

from dylora_moe.run_dir import RunDir

_ROOT = Path(__file__).resolve().parents[1]


@click.command(help=__doc__)
@click.option("--recipe", type=click.Path(path_type=Path, exists=True), default=_ROOT / "recipes/continual.yaml")
@click.option(
    "--runs", type=click.Path(path_type=Path), help="Folder of the runs; a whole one there is not made again."
)
@click.option("--times", default=10, show_default=True, help="Kills.")
@click.option("--seed", default=0, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to write.")
def main(recipe: Path, runs: Path | None, times: int, seed: int, output: Path | None) -> None:
    console, draw = Console(stderr=True), random.Random(seed)
    folder = runs or Path(tempfile.mkdtemp(prefix="streams-"))
    command = [sys.executable, "-c", "from dylora_moe.cli.main import main; main()", "train", str(recipe)]

    def start(name: str, number: signal.Signals | None, awaited: str, seconds: float) -> tuple[int, str, float]:
        began = time.monotonic()
        code, text = live([*command, "--output_dir", str(folder), "--run_name", name], number, awaited, seconds)
        return code, text, time.monotonic() - began

    note = folder / "alone.json"
    if not note.is_file():
        code, text, seconds = start("whole", None, "", 0)
        assert code == 0, text
        note.write_text(json.dumps({"seconds_alone": round(seconds, 1)}), encoding="utf-8")
    alone = json.loads(note.read_text(encoding="utf-8"))["seconds_alone"]
    console.print(f"left alone: {alone} s", highlight=False)
    moments, places, before = sorted(draw.uniform(0, alone) for _ in range(times)), [], 0.0
    run = RunDir(folder / "killed")
    for moment in moments:
        # From where its work goes on, so that every kill comes later in the stream than the one before.
        code, text, _ = start("killed", signal.SIGKILL, "Skill ", moment - before)
        assert code == -signal.SIGKILL, text
        before, said = moment, [line for line in text.splitlines() if line.strip()]
        stages = sorted(path.parent.name for path in run.path.glob("stages/*/stage.json"))
        places.append({"second": round(moment, 1), "committed": stages, "last_line": said[-1] if said else ""})
        console.print(places[-1], highlight=False)
    code, text, _ = start("killed", None, "", 0)
    assert code == 0, text
    one, other = outcome(RunDir(folder / "whole")), outcome(run)
    kinds = [
        [stage["decision"] for stage in found.read("result.json")["stages"]]
        for found in (RunDir(folder / "whole"), run)
    ]
    different = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    record = {
        "recipe": recipe.name,
        "kills": places,
        "seconds_alone": alone,
        "decisions": [decision["kind"] for decision in kinds[0]],
        "same_decisions": kinds[0] == kinds[1],
        "files_compared": len(one),
        "different": different,
    }
    console.print(record, highlight=False)
    if output:
        output.write_text(json.dumps({"environment": environment(_ROOT)} | record, indent=2) + "\n", encoding="utf-8")
    sys.exit(bool(different) or kinds[0] != kinds[1])


if __name__ == "__main__":
    main()
