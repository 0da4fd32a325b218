"""A Dockerfile -> its stages, each a list of instructions; enough of the format for the one of this project."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One instruction: its word in capitals, and all that follows on one line."""

    word: str
    text: str


def instructions(text: str) -> list[Instruction]:
    """All instructions of a Dockerfile, with its lines that go on joined and its comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = []
    for line in joined.splitlines():
        word, _, rest = line.strip().partition(" ")
        assert re.fullmatch(r"[A-Z]+", word), line
        found.append(Instruction(word=word, text=rest.strip()))
    return found


def stages() -> tuple[list[Instruction], list[list[Instruction]]]:
    """What stands before the first stage, and the stages."""
    before: list[Instruction] = []
    found: list[list[Instruction]] = []
    for each in instructions(DOCKERFILE.read_text(encoding="utf-8")):
        if each.word == "FROM":
            found.append([])
        (found[-1] if found else before).append(each)
    return before, found


def texts(stage: list[Instruction], word: str) -> list[str]:
    """What follows a word, wherever it stands in a stage."""
    return [each.text for each in stage if each.word == word]
