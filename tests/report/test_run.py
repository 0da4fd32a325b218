"""The page of a run says what its folder holds, as far as it came, and nothing that it does not hold."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.report.pages import page_of

from dylora_moe.errors import RunError
from dylora_moe.report.records import read_run


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_finished_run_is_told_from_its_data_to_its_command(run_of: Callable[..., Path]) -> None:
    run = run_of("joint")
    result, page = result_of(run), page_of(run)
    for wanted in (
        "3 experts of rank 8 on ",
        "trained together; a router sends each prompt to one expert.",
        "Data: 54 rows of capitals, functions and sums, ",
        f"It saw {sum(each['rows'] for each in result['trained']):,} rows in 8 steps.",
        f"Validation loss went from {result['before']['mean_loss']:.3f} to {result['after']['mean_loss']:.3f} nats",
        f"{result['tokens']:,}tokens trained on",
    ):
        assert wanted in page.text.replace("</strong><span>", ""), wanted
    for before, after in zip(result["before"]["domains"], result["after"]["domains"], strict=True):
        row = page.row(f"{before['domain']} {after['rows']} rows", f"{before['loss']:.3f}")
        assert row[2:4] == [f"{after['loss']:.3f}", f"{after['loss'] / before['loss'] - 1:+.0%}"]
    routing = result["after"]["routing"]
    for domain, shares in zip(routing["domains"], routing["table"], strict=True):
        assert [f"{share:.1%}" for share in shares] in [row[1:4] for row in page.rows if row[0] == domain]
    for sample in result["samples"]:
        told = page.section(sample["domain"])
        assert " ".join(sample["before"]["prompt"].split()) in told and "After training" in told
    assert page.headings[0] == "joint" and "Not finished" not in page.text and "Not shown" not in page.text
    assert "Warnings" not in page.headings and "Tasks" not in page.headings
    assert page.row("learning_rate") == ["learning_rate", "0.01", "0.0002"]
    assert "output_dir" not in page.text.replace("OUTPUT", "") and page.row("Time")[1].endswith(" s")


def test_every_line_of_figures_is_a_point_of_a_chart(run_of: Callable[..., Path]) -> None:
    run = run_of("joint")
    page = page_of(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "eval_loss" in line:
            assert f"sums, step {line['step']}: {line['eval_sums_loss']:.4g}" in page.tips
        else:
            for label, key in (
                ("training", "loss"),
                ("Learning rate", "learning_rate"),
                ("decisions", "router_entropy"),
            ):
                assert f"{label}, step {line['step']}: {line[key]:.4g}" in page.tips
    load = json.loads((run / "routing.jsonl").read_text().splitlines()[1])
    shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(load["experts"], load["load"], strict=True))
    assert f"step 2: {shares}" in page.tips


def test_what_was_measured_besides_is_shown(run_of: Callable[..., Path]) -> None:
    run = run_of("joint", measured=True)
    result, page = result_of(run), page_of(run)
    after = result["after"]["domains"][0]
    found = page.row(f"capitals {after['rows']} rows")
    assert found[2] == f"{after['loss']:.3f} {after['loss'] * 0.75:.3f} to {after['loss'] * 1.5:.3f}"
    assert "0.625" in found and "37.5% 25% to 50%" in found
    assert f"{after['loss'] * 1.25:.3f}" in page.section("Losses on test rows")
    assert "Step 4: Expert expert_2 has no load. Raise it." in page.text
    for title in ("Who does which domain best", "How alike the experts' updates are", "Layer by layer", "Code: mbpp"):
        assert title in page.headings
    assert page.row("expert expert_2") == ["expert expert_2", "7.500", "7.500", "7.500", "7.500"]
    oracle = [f"{each['loss']:.3f}" for each in result["after"]["domains"]]
    for name in ("oracle, an expert for each domain", "oracle, an expert for each row"):
        assert page.row(name)[1:4] == oracle
    best = [row for row, styles in zip(page.rows, page.styles, strict=True) if any("best" in style for style in styles)]
    assert [row[0] for row in best] == ["routed", "dense"], "of each of two tables"
    assert page.row("routed", "12.5%") == ["routed", "12.5%", "", "25.0%", ""]
    assert page.row("base", "2.5%")[2] == "0.0% to 5.0%"
    shares = ["25.0%", "20.0% to 30.0%", "87.5%", "70.0% to 90.0%"]
    assert page.row("capitals", "its label") == ["capitals", "its label", *shares, "+62.5 points, p 0.0005", "40"]
    assert "Trained less base: +10.0 points (-2.0 to +22.0), p 0.12 (the same problems, signs tossed)." in page.text
    assert page.row("capitals", "1.500", "1.625")[3:6] == ["-0.125", "-0.250 to -0.062", "0.002"]
    assert page.row("hellaswag") == ["hellaswag", "base", "acc_norm", "0.2812", "0.0125", "1,319", "5"]
    assert page.row("dense") == ["dense", "4.500", "4.500", "4.500", "4.500"]
    assert {"Who does which domain best, test rows", "Against runs/c, test rows"} <= set(page.headings)
    assert page.row("A1", "12", "10") == ["A1", "12", "10", "5.2", ""] and page.row("A2", "1", "2")
    assert "expert_1: \u2423return \u21b5" in page.text and "Not shown" not in page.text


def test_experts_measured_one_by_one_make_the_table_of_all(run_of: Callable[..., Path]) -> None:
    run = run_of("joint", measured=True)
    (run / "eval" / "matrix.json").unlink()
    record = json.loads((run / "eval" / "routed.json").read_text())
    for place in range(2):
        for each in record["domains"]:
            each["loss"] = place + 0.5
        (run / "eval" / f"expert-expert_{place}.json").write_text(json.dumps(record))
    page = page_of(run)
    assert page.row("expert expert_1") == ["expert expert_1", "1.500", "1.500", "1.500", "1.500"]


def test_a_stream_shows_its_skills_and_its_stages(run_of: Callable[..., Path]) -> None:
    run = run_of("stream")
    result, page = result_of(run), page_of(run)
    summary = result["summary"]
    assert f"3 skills learned with 3 experts; mean loss {summary['loss']['average']:.3f} nats a token" in page.text
    for title in ("Decisions", "Loss, stage by stage", "Who answered", "Curves", "Data"):
        assert title in page.headings
    last = [f"{loss:.2f}" for loss in summary["loss"]["matrix"][-1]]
    assert page.row("3", "sums")[2:] == last
    steps = [int(tip.split(", step ")[1].split(":")[0]) for tip in page.tips if tip.startswith("training, step ")]
    assert set(steps) == set(range(1, 10)), "three stages of three steps, one after the other"
    curve = re.search(r'aria-label="Loss by step".*?class="line" d="([^"]+)"', page.source)
    assert curve is not None and curve[1].count("M") == 3, "no line leads from one stage to the next"
    assert "Not finished" not in page.text and "Not shown" not in page.text


def test_a_single_lora_has_no_routing(run_of: Callable[..., Path]) -> None:
    page = page_of(run_of("single"))
    assert "One LoRA of rank 8 on " in page.text
    assert "Routing" not in page.headings and "Losses" in page.headings and "Not shown" not in page.text


def test_a_run_killed_in_a_line_is_told_as_far_as_it_came(run_of: Callable[..., Path]) -> None:
    run = run_of("joint", "killed")
    (run / "result.json").unlink()
    (run / "samples.jsonl").unlink()
    shutil.rmtree(run / "final")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    cut = steps.index(6)
    (run / "metrics.jsonl").write_text("\n".join([*lines[:cut], lines[cut][:40]]))
    os.utime(run / "metrics.jsonl", (1_700_000_000, 1_700_000_000))
    page = page_of(run, now=1_700_000_000 + 3 * 3600)
    assert "Not finished: 4 of 8 steps. The last line of figures is of 2023-11-14 22:13 UTC, 3 h 0 min" in page.text
    assert "The same command goes on with it." in page.text
    assert "It may still be going." in page_of(run, now=1_700_000_060).text
    latest = json.loads(lines[cut - 1])
    assert latest["step"] == 4 and "at step 4" in page.row("domain")
    assert page.row("sums")[2] == f"{latest['eval_sums_loss']:.3f}"
    assert "4 of 8" in page.text and page.text.count("not yet") == 3 and "Not shown" not in page.text


def test_a_run_that_has_only_begun_is_a_page(run_of: Callable[..., Path]) -> None:
    run = run_of("joint", "begun")
    for path in run.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "config.yaml":
            path.unlink()
    page = page_of(run)
    assert "Not finished: 0 of 8 steps. There is no line of figures yet." in page.text
    assert "svg" not in page.tags and "How it was made" in page.headings and "Not shown" not in page.text


def test_a_stream_under_way_is_told_by_its_stages(run_of: Callable[..., Path]) -> None:
    run = run_of("stream", "going")
    (run / "result.json").unlink()
    for name in ("stage.json", "result.json"):
        (run / "stages" / "03-sums" / name).unlink()
    lines = run / "stages" / "03-sums" / "metrics.jsonl"
    lines.write_text("".join(f"{line}\n" for line in lines.read_text().splitlines()[:2]))
    page = page_of(run)
    assert "Not finished: 2 of 3 skills." in page.text and "Under way: sums, 1 of 3 steps." in page.text
    assert "2 skills learned with 2 experts" in page.text and page.row("2", "functions")
    assert "Not shown" not in page.text
    shutil.rmtree(run / "stages")
    assert "Not finished: 0 of 3 skills." in page_of(run).text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("eval/matrix.json", '{"domains": ["a"], "rows": [{"speaker": "base"}]}'),
        ("eval/similarity.json", '{"experts": "many"}'),
        ("eval/code-x.json", '{"name": "x"}'),
        ("eval/levels-routed.json", '{"levels": [1]}'),
        ("data.json", '{"domains": [{"domain": "capitals"}], "samples": {}}'),
        ("result.json", '{"before": 1, "after": {"domains": [{"loss": "much"}]}, "samples": [3], "steps": "x"}'),
        ("eval/routed.json", "[1, 2]"),
        ("environment.json", '{"command": {"a": 1}, "packages": 3}'),
        ("start.json", '{"cut": '),
    ],
)
def test_a_record_of_another_shape_costs_its_section_at_most(
    run_of: Callable[..., Path], name: str, content: str
) -> None:
    run = run_of("joint")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(content)
    page = page_of(run)
    assert "Curves" in page.headings and "How it was made" in page.headings


def test_a_file_that_cannot_be_read_is_named(run_of: Callable[..., Path]) -> None:
    run = run_of("joint", measured=True)
    (run / "eval" / "matrix.json").write_text('{"cut": ')
    edit(run / "eval" / "similarity.json", similarity=[["alike"]])
    text = page_of(run).text
    assert "eval/matrix.json cannot be read." in text and "Experts by domain: a record is not as this version" in text


@pytest.mark.parametrize("bad", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}"])
def test_what_data_bring_cannot_write_into_the_page(run_of: Callable[..., Path], bad: str) -> None:
    run = run_of("joint", measured=True)
    for path in [*run.glob("*.json"), *run.glob("*.jsonl"), *run.glob("eval/*.json")]:
        text = path.read_text()
        for word in ("sums", "expert_1", "Say ", "Because.", "Raise it.", " return", "It is so."):
            text = text.replace(word, json.dumps(bad)[1:-1])
        path.write_text(text)
    page = page_of(run)
    assert not {"script", "img"} & page.tags and bad in page.headings and "49" not in page.headings
    assert all(link.startswith("#") for link in page.links), page.links
    assert any(bad in tip for tip in page.tips)


def test_a_page_asks_for_nothing_and_is_small(run_of: Callable[..., Path]) -> None:
    for name in ("joint", "stream"):
        page = page_of(run_of(name))
        head = page.source[: page.source.index("<body>")]
        assert "default-src 'none'" in head and "script" not in head and "url(" not in head and "@import" not in head
        assert len(page.source.encode()) < 2_000_000


def test_a_long_run_with_long_rows_stays_small(run_of: Callable[..., Path]) -> None:
    run = run_of("joint", "long")
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    route = json.loads((run / "routing.jsonl").read_text().splitlines()[1])
    with (run / "metrics.jsonl").open("w") as metrics, (run / "routing.jsonl").open("w") as routing:
        for step in range(20_000):
            figures = {f"eval_{name}_loss": 1.0 for name in ("capitals", "functions", "sums")}
            loss = 99.0 if step == 10_000 else 1 + step % 2
            metrics.write(json.dumps(line | {"step": step, "loss": loss} | figures) + "\n")
            routing.write(json.dumps(route | {"step": step}) + "\n")
    data = json.loads((run / "data.json").read_text())
    for rows in data["samples"].values():
        rows[:] = [(row * 9000)[:9000] for row in rows]
    (run / "data.json").write_text(json.dumps(data))
    page = page_of(run)
    assert len(page.source.encode()) < 2_000_000 and "more tokens of these rows are in data.json" in page.text
    assert 'class="band"' in page.source, "what a mean hides is shaded"


def test_the_samples_of_a_row_are_those_of_the_data(run_of: Callable[..., Path]) -> None:
    run = run_of("joint")
    page = page_of(run)
    tokens = json.loads((run / "data.json").read_text())["samples"]["sums"][0]
    learned = [token for token in tokens if token["is_learned"]]
    assert f"Sample 1: {len(tokens)} tokens, {len(learned)} learned" in page.text
    assert "sums: where its rows come from, what was left out, and 3 of them token by token" in page.text


def test_a_generation_gives_its_own_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"generator": "x", "questions": ["a"]}))
    with pytest.raises(RunError, match=r"must hold the result of `dylora generate`"):
        page_of(tmp_path)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has a config\.yaml, and .* has none"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "config.yaml").write_text("[1, 2")
    with pytest.raises(RunError, match=r"must hold settings as `name: value` lines"):
        read_run(tmp_path)


def test_pages_are_made_without_torch(run_of: Callable[..., Path]) -> None:
    code = (
        "import sys\n"
        "from dylora_moe.cli.main import main\n"
        "try:\n    main(['report', *sys.argv[1:]])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "found = {'torch', 'transformers', 'peft', 'numpy', 'datasets'} & sys.modules.keys()\n"
        "assert not found, found"
    )
    folders = [run_of("joint", measured=True), run_of("stream")]
    (folders[1] / "result.json").unlink()
    for arguments in ([folders[0]], [folders[1]], folders):
        subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
