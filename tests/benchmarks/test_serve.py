"""benchmarks/serve.py: it runs and writes what it says. No figure of speed is judged here."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from click.testing import CliRunner
from tests.tiny import tiny_base

__all__ = ["tiny_base"]


def test_a_short_run_has_no_errors_and_no_other_answers(
    load: Callable[[str], ModuleType], tiny_base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "serve.json"
    options = ["--base", str(tiny_base), "--seconds", "2", "--clients", "6", "--different", "8", "--max-tokens", "8"]
    done = CliRunner().invoke(load("serve").main, [*options, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    figures = json.loads(out.read_text(encoding="utf-8"))
    together = figures["together"]
    assert together["answers"] >= 6 and together["errors"] == together["other_than_alone"] == 0
    assert figures["different_answers"] > 4 and figures["alone_changed"] == 0
    assert together["tokens"] > 4 * together["answers"] and together["memory_mb"]["start"] > 50
    assert "0 errors, 0 other than alone" in " ".join(done.output.split())
