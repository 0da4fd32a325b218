"""Does a stream grow an expert for each new skill and for nothing else, and forget nothing?

    python benchmarks/stream.py --data DATA --order 0 --out benchmarks/results/stream-0.json

DATA holds gsm8k, mbpp, code_alpaca, wikisql, cima and continual/{agnews,amazon,dbpedia,yahoo}. With the three built-in
sets these are twelve skills; three of them come again with other rows, and one in other words. The orders are
drawn; what comes again comes after its first time.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from _measure import environment
from _rows import divide
from rich.console import Console

from dylora_moe.cli.show_stream import show_stream
from dylora_moe.config import make_config
from dylora_moe.train.run import train
from dylora_moe.train.session import Stages

_ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "gsm8k": "gsm8k",
    "mbpp": "mbpp",
    "code_alpaca": "code_alpaca/code_alpaca_2k.json",
    "cima": "cima",
    "agnews": "continual/agnews",
    "amazon": "continual/amazon",
    "dbpedia": "continual/dbpedia",
    "yahoo": "continual/yahoo",
}
BUILT_IN = ("requests", "stripe", "flask")
REPEATED = ("gsm8k", "agnews", "stripe")
REWORDED = "gsm8k"
WORDS = (
    ("Here is a riddle my teacher gave me: ", " Could you work it out step by step?"),
    ("Hi! I am stuck with my homework. ", " Thanks in advance for your help."),
    ("Please look at this with me. ", " How would you go about it?"),
)


def reword(source: Path, target: Path) -> None:
    """The rows of a JSON-lines file, their questions in other words."""
    lines = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        before, after = WORDS[number % len(WORDS)]
        lines.append(json.dumps({"question": before + row["question"] + after, "answer": row["answer"]}))
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def skills(data: Path, folder: Path, order: int, rows: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The stream, and for each name in it the skill that it really is."""
    reword(next((data / REWORDED).glob("*train*.jsonl")), folder / "reworded.jsonl")
    divide(data / "wikisql" / "train.jsonl", folder / "wikisql.jsonl")
    files = {name: data / file for name, file in FILES.items()} | {"wikisql": folder / "wikisql.jsonl"}
    first, again = "1/2", "2/2"

    def entry(name: str, skill: str, part: str) -> dict[str, Any]:
        source = {"name": skill} if skill in BUILT_IN else {"path": str(files[skill]), "on_bad_row": "skip"}
        return {
            "skill": name,
            "datasets": [source | {"part": part} | ({} if skill in BUILT_IN else {"num_examples": rows})],
        }

    draw = random.Random(order)
    names = draw.sample([*files, *BUILT_IN], len(files) + len(BUILT_IN))
    stream = [entry(name, name, first) for name in names]
    reworded = {"path": str(folder / "reworded.jsonl"), "part": again, "num_examples": rows}
    late = [(entry(f"{skill}_again", skill, again), skill) for skill in REPEATED]
    late.append(({"skill": f"{REWORDED}_reworded", "datasets": [reworded]}, REWORDED))
    for value, skill in late:
        place = next(index for index, other in enumerate(stream) if other["skill"] == skill)
        stream.insert(draw.randint(place + 1, len(stream)), value)
    meant = {name: name for name in names} | {value["skill"]: skill for value, skill in late}
    return stream, meant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--order", type=int, default=0)
    parser.add_argument("--rows", type=int, default=150, help="training rows of a skill")
    parser.add_argument("--steps", type=int, default=30, help="steps of a skill")
    parser.add_argument("--base", default="pypi:smollm2")
    parser.add_argument("--runs", type=Path, help="folder of the run, to go on with; a temporary one by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs = arguments.runs or Path(tempfile.mkdtemp(prefix="stream-"))
    runs.mkdir(parents=True, exist_ok=True)
    stream, meant = skills(arguments.data.absolute(), runs.absolute(), arguments.order, arguments.rows)
    config = make_config(
        {
            "mode": "continual",
            "skills": stream,
            "base_model": arguments.base,
            "output_dir": str(runs),
            "run_name": f"order-{arguments.order}",
            "max_length": 256,
            "overlong": "truncate",
            "validation_split": 0.1,
            "lora_dropout": 0.0,
            "target_modules": "attention",
            "batch_size": 4,
            "learning_rate": 1e-3,
            "max_steps": arguments.steps,
            "warmup_ratio": 0.1,
            "logging_steps": 10,
            "sample_tokens": 0,
            "bf16": True,
        }
    )
    result = train(config, Stages(console=Console()))
    show_stream(Console(width=220), result)
    decisions = judge(result, meant)
    wrong = [decision for decision in decisions if not decision["right"]]
    print(f"{len(decisions)} decisions, {len(wrong)} wrong: {wrong}")
    record = {"order": arguments.order, "steps": arguments.steps, "rows": arguments.rows, "threads": arguments.threads}
    record |= {"decisions": decisions, "summary": result["summary"], "stages": result["stages"]}
    arguments.out.write_text(
        json.dumps(record | {"environment": environment(_ROOT)}, indent=2) + "\n", encoding="utf-8"
    )


def judge(result: dict[str, Any], meant: dict[str, str]) -> list[dict[str, Any]]:
    """Each decision beside what the skill really is."""
    served: dict[str, str] = {}
    judged = []
    for stage in result["stages"]:
        skill, decision = meant[stage["skill"]], stage["decision"]
        expected = served.get(skill)
        right = decision["kind"] == "grow" if expected is None else decision["expert"] == expected
        served.setdefault(skill, decision["expert"])
        judged.append({"skill": stage["skill"], "is": skill, "kind": decision["kind"], "right": right})
    return judged


if __name__ == "__main__":
    main()
