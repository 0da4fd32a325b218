"""A whole generation against a server that answers, fails and goes away: every row ends once, nothing is lost."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.generate.conftest import ROOT

from dylora_moe.config import GenerateConfig
from dylora_moe.data.sources import SplitExample, parse_dataset_spec, read_source
from dylora_moe.errors import ConfigError, GeneratorError, RunError
from dylora_moe.generate.packs import write_pack
from dylora_moe.generate.rows import Limits, RowState, advance
from dylora_moe.generate.run import LOG, Hooks, generate
from dylora_moe.run_dir import RunDir

Recipe = Callable[..., GenerateConfig]
Serve = Callable[..., str]
FAULTS = {"429": 0.1, "500": 0.08, "cut": 0.06, "malformed": 0.06, "empty": 0.03, "long": 0.08, "english": 0.08}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def made(config: GenerateConfig) -> list[dict[str, Any]]:
    return [row for file in sorted((config.run_dir / "data").glob("*.jsonl")) for row in lines(file)]


def ends(config: GenerateConfig) -> dict[str, RowState]:
    """Of every row that the log knows."""
    limits, states = Limits(regenerations=config.max_regenerations, tries=config.max_tries), dict[str, RowState]()
    for event in lines(config.run_dir / LOG):
        before = states.get(event["id"], RowState())
        assert before.end is None or event["kind"] in ("review", "reopened", "probe"), (
            "a row that has ended is not asked again"
        )
        states[event["id"]] = advance(before, event, limits)
    return states


def test_every_question_gets_its_answer(recipe: Recipe, serve: Serve) -> None:
    config = recipe(endpoints=[serve()], for_base="sapienzanlp/Minerva-3B-base-v1.0")
    result = generate(config, Hooks())
    assert result["rows"] | {"train": 0, "validation": 0} == {
        "planned": 20, "passed": 20, "set_aside": 0, "authentic": 0, "train": 0, "validation": 0,
    }  # fmt: skip
    level = {"asked": 10, "passed": 10, "words": 12.0}
    assert result["levels"] == {"A1": level, "B2": level} and len(result["samples"]) == 6
    page = (config.run_dir / "report.html").read_text(encoding="utf-8")
    assert result["samples"][0]["answer"] in page and "answered by stub with the prompts italian_teacher" in page
    card = (config.run_dir / "data" / "README.md").read_text(encoding="utf-8")
    assert "| generated | 20 | 100.0% |" in card and "| B2 | 10 | 10 | 50.0% | 12.0 |" in card
    assert "Answers by stub" in card and "questions.jsonl (licence unknown)" in card
    rows = made(config)
    assert len(rows) == 20 and len({row["id"] for row in rows}) == 20
    assert {row["messages"][1]["content"] for row in rows} == {
        f"Come si dice la parola numero {n} in italiano?" for n in range(20)
    }
    assert all(row["origin"] == "generated" and row["generator"] == "stub" for row in rows)
    assert {row["source"] for row in rows} == {"questions.jsonl"}
    found: list[SplitExample] = []
    read_source(parse_dataset_spec({"path": str(config.run_dir / "data")}), seed=0, add=found.append)
    assert Counter(item.split for item in found) == {
        "train": result["rows"]["train"],
        "validation": result["rows"]["validation"],
    }
    again = generate(recipe(endpoints=["http://127.0.0.1:1/v1"], for_base="sapienzanlp/Minerva-3B-base-v1.0"), Hooks())
    assert again == result, "nothing is asked again"


def test_faults_are_tried_again_and_told(recipe: Recipe, serve: Serve) -> None:
    config = recipe(endpoints=[serve(faults=FAULTS), serve(faults=FAULTS, seed=1)], max_tries=4, max_regenerations=1)
    result = generate(config, Hooks())
    states = ends(config)
    assert len(states) == 20 and all(state.end is not None for state in states.values())
    assert result["rows"]["passed"] + result["rows"]["set_aside"] == 20
    assert len(made(config)) == result["rows"]["passed"]
    assert sum(result["failures"].values()) + sum(result["refused_answers"].values()) > 3
    assert all(state.failure or state.reasons for state in states.values() if state.end == "set_aside")


def test_what_was_set_aside_is_kept_and_may_be_tried_again(recipe: Recipe, serve: Serve) -> None:
    config = recipe(endpoints=[serve(faults={"english": 1.0})], max_regenerations=1)
    result = generate(config, Hooks())
    assert result["rows"]["set_aside"] == 20 and result["set_aside"] == {"language": 20}
    assert result["requests"] == 40 and result["total"] == 0
    assert [path.name for path in (config.run_dir / "data").iterdir()] == ["README.md"]
    kept = generate(recipe(endpoints=[], max_regenerations=1, keep="all"), Hooks())
    assert kept["rows"]["train"] + kept["rows"]["validation"] == 20
    assert all(row["reasons"] == ["language"] for row in made(config))
    mended = generate(recipe(endpoints=[serve()], max_regenerations=1), Hooks(), retry=True)
    assert mended["rows"]["passed"] == 20 and not mended["set_aside"]


def test_answers_are_looked_at_beside_each_other(recipe: Recipe, serve: Serve) -> None:
    """Also after a stop between the last answer and the look."""
    same = serve(faults={"same": 1.0})
    config = recipe(endpoints=[same], max_regenerations=1)
    result = generate(config, Hooks())
    assert result["rows"]["passed"] == 0 and result["set_aside"] == {"near_copy": 19, "template": 20}
    assert result["requests"] == 40 and result["patterns"][0]["answers"] == 20
    log = config.run_dir / LOG
    answered = [line for line in log.read_text(encoding="utf-8").splitlines() if '"answer"' in line][:20]
    log.write_text("".join(f"{line}\n" for line in answered), encoding="utf-8")
    mended = generate(recipe(endpoints=[serve()], max_regenerations=1), Hooks())
    assert mended["rows"]["passed"] == 20 and mended["requests"] == 40
    assert mended["refused_answers"] == {"near_copy": 19, "template": 20}


def test_a_server_that_is_down_sets_no_row_aside(recipe: Recipe, serve: Serve) -> None:
    config = recipe(endpoints=["http://127.0.0.1:9/v1"], patience=3.0, in_flight=4, max_tries=2)
    with pytest.raises(GeneratorError, match=r"must answer now and then, .*Nothing is lost"):
        generate(config, Hooks())
    assert all(state.end is None for state in ends(config).values())
    assert generate(recipe(endpoints=[serve()]), Hooks())["rows"]["passed"] == 20


def test_a_request_that_fails_too_often_is_set_aside(recipe: Recipe, serve: Serve) -> None:
    config = recipe(endpoints=[serve(faults={"500": 0.75})], max_tries=2)
    result = generate(config, Hooks())
    assert result["rows"]["passed"] + result["rows"]["set_aside"] == 20 and result["set_aside"]["HTTP 500"] > 0
    aside = [state for state in ends(config).values() if state.end == "set_aside"]
    assert all(state.failures == 2 and state.failure == ("HTTP 500",) for state in aside)


@pytest.mark.parametrize("poison", ["numero 7 ", "numero 1"])  # one row, and eleven of twenty
def test_rows_that_always_fail_are_set_aside_while_others_are_answered(
    recipe: Recipe, serve: Serve, poison: str
) -> None:
    config = recipe(endpoints=[serve(poison=poison)], max_tries=2, patience=2.0, in_flight=8)
    bad = 1 if poison.endswith(" ") else 11
    result = generate(config, Hooks())
    assert result["rows"]["passed"] == 20 - bad and result["set_aside"] == {"HTTP 500": bad}
    again = generate(config, Hooks(), retry=True)
    assert again["rows"] == result["rows"] and again["requests"] > result["requests"]


def test_a_server_that_refuses_whatever_it_is_asked_stops_the_run(recipe: Recipe, serve: Serve) -> None:
    config = recipe(endpoints=[serve(faults={"400": 1.0})], in_flight=4)
    with pytest.raises(GeneratorError, match=r"refused the first \d+ requests, .* HTTP 400, .*no such parameter"):
        generate(config, Hooks())
    events = lines(config.run_dir / LOG)
    assert 8 <= len(events) <= 12 and {event["reasons"][0] for event in events} == {"HTTP 400"}
    assert events[0]["said"] == "[31mno such parameter"  # nothing that steers a terminal
    assert generate(recipe(endpoints=[serve()]), Hooks(), retry=True)["rows"]["passed"] == 20
    with pytest.raises(GeneratorError, match=r"sends requests on to 'http://elsewhere/' \(HTTP 307\)"):
        generate(recipe(endpoints=[serve(faults={"307": 1.0})], run_name="moved"), Hooks())


def test_a_wish_to_wait_beyond_patience_stops_the_run(recipe: Recipe, serve: Serve) -> None:
    config = recipe(endpoints=[serve(faults={"429": 1.0}, retry_after=86400)], patience=2.0)
    with pytest.raises(GeneratorError, match="asks to be left alone for 86400 s"):
        generate(config, Hooks())


def test_tried_again_a_row_keeps_its_answer_until_there_is_another(recipe: Recipe, serve: Serve) -> None:
    config = recipe(endpoints=[serve(faults={"english": 1.0})], max_regenerations=0, keep="all")
    before = generate(config, Hooks())
    card = (config.run_dir / "data" / "README.md").read_text(encoding="utf-8")
    assert "20 of 20 rows did not pass; those with an answer are here, with their `reasons`." in card
    poisoned = recipe(endpoints=[serve(poison="numero", faults={})], max_regenerations=0, keep="all", patience=0.0)
    with pytest.raises(GeneratorError):
        generate(poisoned, Hooks(), retry=True)
    after = generate(recipe(endpoints=[serve(faults={"400": 0.5})], max_regenerations=0, keep="all"), Hooks())
    assert after["rows"]["train"] + after["rows"]["validation"] == before["total"] == 20
    assert after["rows"]["set_aside"] > 0 and all(
        row.get("reasons", ["language"]) == ["language"] for row in made(config)
    )


def test_tried_again_a_row_is_asked_with_another_seed(recipe: Recipe, serve: Serve) -> None:
    """The stub's answers depend on messages and seed alone; the second and third request have the same reasons."""
    config = recipe(endpoints=[serve(faults={"long": 1.0})], max_regenerations=0)
    for retry in (False, True, True):
        generate(config, Hooks(), retry=retry)
    texts: dict[str, list[str]] = {}
    for event in lines(config.run_dir / LOG):
        if event["kind"] == "answer":
            texts.setdefault(event["id"], []).append(event["text"])
    assert len(texts) == 20 and all(len(set(found)) == 3 for found in texts.values())


def test_rows_of_one_question_and_prompt_at_two_levels_are_two(recipe: Recipe, serve: Serve, tmp_path: Path) -> None:
    write_pack("italian_teacher", tmp_path / "pack")
    (tmp_path / "pack" / "instructions.txt").write_text("Rispondi.", encoding="utf-8")
    level = {"rows": 20, "max_tokens": 50, "temperature": 0.7}
    levels = yaml.safe_dump({"levels": {"B1": level, "B2": level}})
    (tmp_path / "pack" / "pack.yaml").write_text(levels, encoding="utf-8")
    config = recipe(endpoints=[serve()], prompts=str(tmp_path / "pack"), levels={"B1": 20, "B2": 20})
    result = generate(config, Hooks())
    assert result["rows"]["planned"] == len({row["id"] for row in made(config)} | set(ends(config))) == 40
    (tmp_path / "pack" / "question.txt").write_text("{{ question[:3000] }}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"question.txt must hold the question"):
        generate(config, Hooks())


def test_a_side_without_rows_is_no_file(recipe: Recipe, serve: Serve) -> None:
    config = recipe(endpoints=[serve()], levels={"A1": 2}, validation_split=0.001)
    assert generate(config, Hooks())["rows"]["validation"] == 0
    assert sorted(path.name for path in (config.run_dir / "data").iterdir()) == ["README.md", "train.jsonl"]
    found: list[SplitExample] = []
    read_source(parse_dataset_spec({"path": str(config.run_dir / "data")}), seed=0, add=found.append)
    assert len(found) == 2


def test_an_answer_of_a_person_has_the_licence_of_its_own_data(recipe: Recipe, serve: Serve, tmp_path: Path) -> None:
    for name, answer in (("one", "Uno."), ("two", "Due.")):
        (tmp_path / name).mkdir()
        row = {"prompt": "Come si conta in italiano?", "answer": answer}
        (tmp_path / name / "q.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    questions = [
        {"path": str(tmp_path / "one" / "q.jsonl"), "licence": "MIT"},
        {"path": str(tmp_path / "two" / "q.jsonl"), "licence": "CC-BY-4.0", "keep_answers": True},
    ]
    config = recipe(endpoints=[serve()], questions=questions, levels={"A1": 1})
    result = generate(config, Hooks())
    told = {row["origin"]: (row["source"], row["licence"]) for row in made(config)}
    assert told == {"generated": ("one/q.jsonl", "MIT"), "authentic": ("two/q.jsonl", "CC-BY-4.0")}
    assert result["licences"] == {"one/q.jsonl": ["MIT"], "two/q.jsonl": ["CC-BY-4.0"]}
    questions[1]["keep_answers"] = "no"
    with pytest.raises(ConfigError, match="keep_answers of an entry of questions must be true or false, got 'no'"):
        generate(recipe(endpoints=[serve()], questions=questions, levels={"A1": 1}), Hooks())


def test_a_log_whose_lines_are_no_events_is_told(recipe: Recipe, serve: Serve) -> None:
    config = recipe(endpoints=[serve()])
    generate(config, Hooks())
    with (config.run_dir / LOG).open("a", encoding="utf-8") as log:
        log.write("5\n")
    with pytest.raises(RunError, match=r"line 21 of .* must be a JSON object, and it is broken: it has no id and kind"):
        generate(config, Hooks())


def test_a_new_answer_is_asked_for_with_the_reason(recipe: Recipe, serve: Serve) -> None:
    result = generate(recipe(endpoints=[serve(faults={"until_told": 1.0})]), Hooks())
    assert result["rows"]["passed"] == 20 and result["requests"] == 40 and result["refused_answers"] == {"language": 20}


@pytest.mark.parametrize(
    ("kills", "rows"), [(3, 20), pytest.param(20, 600, marks=pytest.mark.slow, id="20 kills, 600 rows")]
)
def test_a_killed_generation_goes_on(recipe: Recipe, serve: Serve, tmp_path: Path, kills: int, rows: int) -> None:
    """By SIGKILL at random moments, over servers with every fault: every row ends once, and says why if set aside."""
    questions = tmp_path / "many.jsonl"
    questions.write_text("".join(json.dumps({"text": f"Che vuol dire {n}?"}) + "\n" for n in range(rows)), "utf-8")
    faults = {**FAULTS, "slow": 0.01}
    urls = [serve(delay_s=0.05, faults=faults, seed=seed) for seed in (0, 1)]
    config = recipe(
        endpoints=urls, in_flight=8, timeout=0.5, questions=[str(questions)], levels={"A1": rows // 2, "C2": rows // 2}
    )
    (tmp_path / "recipe.yaml").write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    program = [sys.executable, "-c", "from dylora_moe.cli.main import main; main()"]
    command = [*program, "generate", str(tmp_path / "recipe.yaml")]
    log, draw = config.run_dir / LOG, random.Random(0)
    for _ in range(kills):
        size = log.stat().st_size if log.is_file() else 0
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        most = size + draw.uniform(0, 300 * rows / kills)
        while process.poll() is None and (not log.is_file() or log.stat().st_size <= most):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with log.open("ab") as file:
            file.write(b'{"id": "cut off by a ki')
    result = generate(config, Hooks())
    states = ends(config)
    assert len(states) == rows and all(state.end is not None for state in states.values())
    assert result["rows"]["passed"] + result["rows"]["set_aside"] == rows
    assert all(state.failure or state.reasons for state in states.values() if state.end == "set_aside")
    kept = made(config)
    assert len(kept) == result["rows"]["passed"] == len({row["id"] for row in kept})
    assert {row["id"] for row in kept} == {id for id, state in states.items() if state.end == "passed"}


def test_a_signal_ends_it_at_once_and_nothing_is_lost(recipe: Recipe, serve: Serve, tmp_path: Path) -> None:
    config = recipe(endpoints=[serve(faults={"slow": 0.5})], in_flight=2, timeout=60.0)
    (tmp_path / "recipe.yaml").write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    program = [sys.executable, "-c", "from dylora_moe.cli.main import main; main()"]
    command = [*program, "generate", str(tmp_path / "recipe.yaml"), "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (config.run_dir / LOG).is_file():
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, told = process.communicate(timeout=20)
    assert process.returncode == 75 and out == "" and "stopped, nothing is lost. The same command goes on" in told
    assert "SIGTERM: stopping. Ctrl-C ends at once." in told
    mended = subprocess.run(
        [*command, "--endpoints", serve()], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    result = json.loads(mended.stdout)
    assert result["rows"]["passed"] == 20 and "20 of 20 rows passed" in " ".join(mended.stderr.split())
    shown = subprocess.run(
        [*command, "--dry-run", "--total", "4"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    plan = json.loads(shown.stdout)
    assert plan["rows"] == 4 and list(plan["levels"]) == ["A1", "B2"] and plan["questions"]["kept"] == 20
    assert "Come si dice" in plan["sent"]["B2"][-1]["content"] and "skilled Italian teacher" in shown.stderr
    again = subprocess.run(
        [*command, "--write-prompts", str(tmp_path / "own")], cwd=ROOT, capture_output=True, text=True
    )
    assert json.loads(again.stdout)["pack"] == "italian_teacher" and (tmp_path / "own" / "pack.yaml").is_file()


def test_a_key_that_is_refused_ends_it_at_once(recipe: Recipe, serve: Serve) -> None:
    config = recipe(endpoints=[serve(faults={"401": 1.0})])
    with pytest.raises(GeneratorError, match=r"HTTP 401: 'no key'. Set the environment variable OPENAI_API_KEY"):
        generate(config, Hooks())
    assert all(state.end is None for state in ends(config).values())


def test_a_bad_recipe_is_refused_before_any_work(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="levels must be among A1, A2"):
        generate(recipe(levels={"A7": 3}), Hooks())
    with pytest.raises(ConfigError, match=r"at most a row for each of the 20 questions, got 21 of A1"):
        generate(recipe(levels={"A1": 21}), Hooks())
    with pytest.raises(ConfigError, match=r"of another family than the base it writes for, got Qwen/Qwen2\.5-3B and"):
        generate(recipe(generator="Qwen/Qwen2.5-3B", for_base="Qwen/Qwen3-0.6B"), Hooks())
    assert not (tmp_path / "runs").exists()


def test_other_settings_do_not_go_into_the_same_folder(recipe: Recipe, serve: Serve) -> None:
    config = recipe(endpoints=[serve()])
    generate(config, Hooks())
    before = (config.run_dir / LOG).read_bytes()
    with pytest.raises(RunError, match="holds a generation with other settings: levels"):
        generate(recipe(endpoints=config.endpoints, levels={"A1": 3}), Hooks())
    assert (RunDir(config.run_dir) / LOG).read_bytes() == before
