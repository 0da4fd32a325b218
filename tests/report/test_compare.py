"""Runs side by side: what differs, who is best, and nothing breaks where they have nothing in common."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.report.pages import Page

from dylora_moe.errors import RunError
from dylora_moe.evaluate.stream import read_stream
from dylora_moe.report.compare import render_comparison
from dylora_moe.report.records import read_run
from dylora_moe.run_dir import RunDir


def compared(*folders: Path) -> Page:
    runs = [read_run(folder) for folder in folders]
    streams = [read_stream(RunDir(run.path)) if run.is_stream and not run.result else None for run in runs]
    return Page(render_comparison(runs, streams))


def set_losses(run: Path, losses: dict[str, float]) -> None:
    result = json.loads((run / "result.json").read_text())
    for each in result["after"]["domains"]:
        each["loss"] = losses[each["domain"]]
    (run / "result.json").write_text(json.dumps(result))


def test_the_best_of_a_row_is_marked_and_the_mean_is_of_what_all_have(run_of: Callable[..., Path]) -> None:
    one, other = run_of("joint"), run_of("single")
    set_losses(one, {"capitals": 1.0, "functions": 2.0, "sums": 0.75})
    set_losses(other, {"capitals": 1.5, "functions": 1.25, "sums": 0.7500001})
    page = compared(one, other)
    assert page.headings[0] == "joint and single" and page.row("domain") == ["domain", "joint", "single"]
    told = {row[0]: (row, style) for row, style in zip(page.rows, page.styles, strict=True) if row}
    best = {
        name: [place for place, style in enumerate(told[name][1]) if "best" in style]
        for name in ("capitals", "functions", "sums", "mean")
    }
    assert best == {"capitals": [1], "functions": [2], "sums": [], "mean": [2]}
    assert told["mean"][0] == ["mean", "1.250", "1.167"] and told["capitals"][0][1].startswith("1.000 from ")
    assert page.row("num_experts") == ["num_experts", "3", "1"] and "lora_r" not in [row[0] for row in page.rows]
    assert "The mean is that of the 3 domains" in page.text and "Not shown" not in page.text
    for run in (one, other):
        line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        assert f"{run.name}, step 0: {line['eval_sums_loss']:.4g}" in page.tips
    assert "Folder " + str(other) in page.text and "One LoRA of rank 8" in page.text


def test_intervals_stand_below_their_losses(run_of: Callable[..., Path]) -> None:
    page = compared(run_of("joint", measured=True), run_of("single"))
    assert " to " in page.row("capitals")[1] and " to " not in page.row("capitals")[2]
    assert "bootstrap interval" in page.text


def test_runs_with_other_domains_stand_beside_each_other(run_of: Callable[..., Path]) -> None:
    joint, stream = run_of("joint"), run_of("stream")
    for path in (joint / "result.json", joint / "metrics.jsonl", joint / "start.json"):
        path.write_text(path.read_text().replace("sums", "other"))
    page = compared(joint, stream)
    assert page.row("other")[2] == "" and page.row("sums")[1] == "" and page.row("sums")[2]
    last = json.loads((stream / "result.json").read_text())["summary"]["loss"]["by_skill"][2]["last"]
    assert page.row("sums")[2].startswith(f"{last:.3f} from ")
    assert f"stream, step 9: {last:.4g}" in page.tips and "Not shown" not in page.text


def test_losses_of_other_bases_are_not_ranked(run_of: Callable[..., Path]) -> None:
    one, other = run_of("joint"), run_of("joint", "other")
    settings = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump(settings | {"base_model": "pypi:smollm2"}))
    set_losses(other, {"capitals": 0.5, "functions": 0.5, "sums": 0.5})
    page = compared(one, other)
    assert "the bases differ, so none is marked" in page.text
    assert not any("best" in style for styles in page.styles for style in styles)


def test_unfinished_runs_are_said_to_be(run_of: Callable[..., Path]) -> None:
    one, other, begun = run_of("joint"), run_of("stream"), run_of("joint", "begun")
    (other / "result.json").unlink()
    for name in ("result.json", "metrics.jsonl", "routing.jsonl", "start.json"):
        (begun / name).unlink()
    page = compared(one, other, begun)
    assert "stream is not finished." in page.text and "begun is not finished." in page.text
    assert "joint is not finished" not in page.text and "There is no line of figures yet." in page.text
    assert "Not shown" not in page.text
    shutil.rmtree(other / "stages")
    assert "Not shown" not in compared(one, other).text


def test_runs_of_one_name_are_told_apart(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run_of("joint", "a/same")
    run_of("joint", "b/same")
    assert compared(tmp_path / "a" / "same", tmp_path / "b" / "same").headings[0] == "a/same and b/same"
    assert compared(tmp_path / "a" / "same", tmp_path / "a" / "same").headings[0] == "1. a/same and 2. a/same"


def test_hostile_names_are_text(run_of: Callable[..., Path]) -> None:
    bad = "<script>alert(1)</script>"
    one, other = run_of("joint"), run_of("joint", "other")
    for path in (one / "result.json", one / "metrics.jsonl", one / "config.yaml"):
        path.write_text(
            path.read_text().replace("sums", bad.replace("/", "\\u002f") if path.suffix != ".yaml" else bad)
        )
    page = compared(one, other)
    assert "script" not in page.tags and bad in page.text


def test_a_generation_is_not_compared(run_of: Callable[..., Path], tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "config.yaml").write_text("generator: x\n")
    with pytest.raises(RunError, match=r"must be of `dylora train`, and .*made made data"):
        compared(run_of("joint"), made)
