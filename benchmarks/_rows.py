"""Rows of others made into rows that can be learned."""

import json
from pathlib import Path


def divide(source: Path, target: Path) -> None:
    """Rows of text as questions and answers."""
    lines = []
    for line in source.read_text(encoding="utf-8").splitlines():
        prompt, answer = json.loads(line)["text"].split("\nA: ", maxsplit=1)
        lines.append(json.dumps({"prompt": prompt, "completion": answer}))
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
