"""Does a stream of skills that is killed again and again come out as one that is not? Decisions and bytes.

Starts `dylora train` with a recipe as a process of its own and leaves it alone, noting when it says what. Then does the
same under another name, and kills it (SIGKILL) at moments drawn over all of that time: as long after the same words,
about the same skill. It is started again each time; in the end every file that is left is compared. Run with --help for
the settings.
"""

import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from _measure import environment
from rich.console import Console
from tests.train.streams import outcome

from dylora_moe.run_dir import RunDir

_ROOT = Path(__file__).resolve().parents[1]
_HEADER = re.compile(r"Skill \d+ of \d+: ")
_CLOCKS = re.compile(r"\s+lr .*|\d+ (?:tokens|it|rows)/s.*|\r.*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """A line that a stream printed.

    Attributes:
        second: When, since its start.
        skill: The header of the skill that it was about; empty before the first.
        text: Without what differs from run to run.
    """

    second: float
    skill: str
    text: str


def follow(command: Sequence[str], until: Sequence[Word] = (), seconds: float = 0.0) -> tuple[int, list[Word]]:
    """Run a process to its end, or kill it; gives its exit code and its words.

    Args:
        command: Of the process.
        until: The word to wait for, and those that come after it, at which it is killed at once: what was done before
            an earlier kill is not said again.
        seconds: From the word to the kill.
    """
    awaited = {(word.skill, word.text): word is until[0] for word in reversed(until)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
    assert process.stdout is not None
    began, words, skill = time.monotonic(), list[Word](), ""
    for line in process.stdout:
        text = _CLOCKS.sub("", line).strip()
        skill = text if _HEADER.match(text) else skill
        if text:
            words.append(Word(second=time.monotonic() - began, skill=skill, text=text))
        if (is_first := awaited.get((skill, text))) is not None:
            try:
                process.wait(seconds if is_first else 0)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
            break
    return process.wait(), words


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
    folder.mkdir(parents=True, exist_ok=True)

    def command(name: str) -> list[str]:
        program = [sys.executable, "-u", "-c", "from dylora_moe.cli.main import main; main()", "train", str(recipe)]
        return [*program, "--output_dir", str(folder), "--run_name", name]

    note = folder / "alone.json"
    if not note.is_file():
        code, words = follow(command("whole"))
        assert code == 0, words
        note.write_text(json.dumps([asdict(word) for word in words]), encoding="utf-8")
    words = [Word(**word) for word in json.loads(note.read_text(encoding="utf-8"))]
    alone = words[-1].second
    console.print(f"left alone: {alone:.0f} s", highlight=False)
    run, kills = RunDir(folder / "killed"), list[dict[str, Any]]()
    for moment in sorted(draw.uniform(words[0].second, alone) for _ in range(times)):
        place = max(place for place, word in enumerate(words) if word.second <= moment)
        last = words[place]
        code, _ = follow(command("killed"), words[place:], moment - last.second)
        stages = sorted(path.parent.name for path in run.path.glob("stages/*/stage.json"))
        kills.append({"second": round(moment, 1), "skill": last.skill, "after": last.text, "committed": stages})
        kills[-1]["ended_by_itself"] = code == 0
        assert code in (0, -signal.SIGKILL), code
        console.print(kills[-1], highlight=False)
    code, said = follow(command("killed"))
    assert code == 0, said
    one, other = outcome(RunDir(folder / "whole")), outcome(run)
    kinds = [
        [stage["decision"] for stage in found.read("result.json")["stages"]]
        for found in (RunDir(folder / "whole"), run)
    ]
    different = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    record = {
        "recipe": recipe.name,
        "kills": kills,
        "seconds_alone": round(alone, 1),
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
