"""benchmarks/decode.py: what it writes is what transformers' own generate writes, and its bars can fail."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner


@pytest.fixture(scope="module")
def decode(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("decode")


def test_all_writers_are_timed_beside_the_base(decode: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "decode.json"
    arguments = ["--quick", "--shapes", "tiny", "--experts", "2", "--out", str(out)]
    done = CliRunner().invoke(decode.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [result["rows"] for result in report["results"]] == [1, 8] and not report["bars"]
    for result in report["results"]:
        assert list(result["writers"]) == [
            "base",
            "PEFT LoRA, not merged",
            "ours, N=1",
            "ours, N=2, token",
            "ours, N=2, sequence",
            "ours, N=2, sequence, one expert merged",
        ]
        assert all(line["ms_per_token"] > 0 and line["of"].keys() for line in result["writers"].values())


def test_a_writer_writes_what_generate_writes(decode: ModuleType) -> None:
    workshop = decode.Workshop("tiny", rows=2, tokens=5, seed=3, layers=1)
    for writer in decode.writers(workshop, (1, 3), 2):
        ids = workshop.batch.input_ids
        _, written = writer.write(ids, 6)
        with writer.model.forced(writer.merged) if writer.merged else nullcontext():
            expected = writer.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=[10**6],
                pad_token_id=0,
                use_cache=True,
            )
        assert written.tolist() == expected[:, ids.shape[1] :].tolist(), writer.name


def figures(**ratios: float) -> list[dict[str, Any]]:
    r = {"base": 1.1, "lora": 0.95, "growth": 1.2} | ratios
    of = {"base": r["base"], "PEFT LoRA, not merged": r["lora"], "ours, N=1": r["growth"]}
    writers = {f"ours, N=32, {kind}": {"of": of} for kind in ("token", "sequence")}
    return [{"shape": "tiny", "rows": rows, "writers": writers} for rows in (1, 8)]


@pytest.mark.parametrize(
    ("ratios", "failing"), [({}, 0), ({"base": 1.16}, 2), ({"lora": 1.01}, 2), ({"growth": 1.26}, 2)]
)
def test_bars(decode: ModuleType, ratios: dict[str, float], failing: int) -> None:
    bars = decode.judge(figures(**ratios))
    assert len(bars) == 6 and sum(not bar["passed"] for bar in bars) == failing
