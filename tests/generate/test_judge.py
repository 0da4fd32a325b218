"""A judge's levels: what it is asked and how often, what comes of its replies, a kill between answer and judgement."""

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from dylora_moe.config import GenerateConfig, make_generate_config
from dylora_moe.errors import ConfigError, GeneratorError
from dylora_moe.generate.asking import Hooks
from dylora_moe.generate.judge import named_level
from dylora_moe.generate.packs import load_pack, write_pack
from dylora_moe.generate.run import JUDGE_LOG, generate

Recipe = Callable[..., GenerateConfig]
Serve = Callable[..., str]


def requests_of(url: str) -> int:
    with urllib.request.urlopen(url.replace("/v1", "/requests")) as reply:
        return int(reply.read())


def rows_of(config: GenerateConfig) -> list[dict[str, object]]:
    files = sorted((config.run_dir / "data").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("B1", "B1"),
        ("It is b1.", "B1"),
        ("Level: B1 (intermediate)", "B1"),
        ("A1 or A2", None),
        ("AB1", None),
        ("", None),
    ],
)
def test_a_reply_names_one_level(text: str, level: str | None) -> None:
    assert named_level(text, ["A1", "A2", "B1"]) == level


def test_answers_that_the_judge_finds_far_off_are_asked_for_anew(recipe: Recipe, serve: Serve) -> None:
    generator, judge = serve(), serve(says="The level is A2.")
    config = recipe(endpoints=[generator], judge="judge", judge_endpoints=[judge], max_regenerations=1)
    result = generate(config, Hooks())
    assert {name: level["passed"] for name, level in result["levels"].items()} == {"A1": 10, "B2": 0}
    assert result["set_aside"] == {"level": 10} and result["refused_answers"] == {"level": 20}
    assert requests_of(generator) == 30 and requests_of(judge) == result["judge"]["requests"] == 30
    assert [row[1] for row in result["levels_judged"]["counts"]] == [10, 0, 0, 20, 0, 0]  # refused ones, too
    assert {row["level_judged"] for row in rows_of(config)} == {"A2"}
    assert "judged by judge" in (config.run_dir / "report.html").read_text(encoding="utf-8")
    again = generate(config, Hooks())
    assert again == result and requests_of(judge) == 30  # nothing is judged twice


def test_a_judge_that_names_no_level_stops_nothing(recipe: Recipe, serve: Serve) -> None:
    judge = serve(says="Hard to say.")
    result = generate(recipe(endpoints=[serve()], judge="judge", judge_endpoints=[judge]), Hooks())
    assert result["rows"]["passed"] == 20 and result["levels_judged"] is None
    assert requests_of(judge) == 60  # each three times
    assert [result["judge"][name] for name in ("judged", "unclear", "failed")] == [20, 20, 0]


def test_another_judge_is_asked_anew_and_one_that_failed_again_with_retry(recipe: Recipe, serve: Serve) -> None:
    generator, bad, other = serve(), serve(faults={"400": 0.4}, says="B1"), serve(says="A2")
    settings = {"endpoints": [generator], "level_tolerance": 5}
    first = generate(recipe(judge="one", judge_endpoints=[bad], **settings), Hooks())
    assert first["judge"]["failed"] > 0 and first["judge"]["judged"] == first["rows"]["passed"] == 20
    again = generate(recipe(judge="one", judge_endpoints=[serve(says="B1")], **settings), Hooks(), retry=True)
    assert again["judge"]["failed"] == 0 and again["levels_judged"]["rows"] == 20
    config = recipe(judge="other", judge_endpoints=[other], **settings)
    last = generate(config, Hooks())
    assert requests_of(other) == last["judge"]["requests"] == 20 and last["judge"]["model"] == "other"
    assert {row["level_judged"] for row in rows_of(config)} == {"A2"} and requests_of(generator) == 20


def test_levels_whose_names_are_parts_of_others_are_told_apart() -> None:
    names = ["A1", "A1+", "beginner", "absolute beginner", "A"]
    assert named_level("A1+", names) == "A1+" and named_level("It is A1.", names) == "A1"
    assert named_level("An absolute beginner.", names) == "absolute beginner"
    assert named_level("It is a beginner text.", names) == "beginner" and named_level("a", ["A", "B"]) == "A"
    assert named_level("It is a B.", ["A", "B"]) == "B"


def test_a_stop_while_judging_loses_no_judgement(recipe: Recipe, serve: Serve) -> None:
    generator, judge = serve(), serve(says="B1", faults={"500": 1.0})
    config = recipe(endpoints=[generator], judge="judge", judge_endpoints=[judge], patience=0.0, level_tolerance=3)
    with pytest.raises(GeneratorError, match="must answer now and then"):
        generate(config, Hooks())
    asked = requests_of(generator)
    with (config.run_dir / JUDGE_LOG).open("a", encoding="utf-8") as log:
        log.write('{"id": "cut')  # as a kill leaves it
    config = make_generate_config(config.model_dump() | {"judge_endpoints": [serve(says="B1")]})
    result = generate(config, Hooks())
    assert result["levels_judged"]["rows"] == result["rows"]["passed"] == 20
    assert requests_of(generator) == asked == 20


def test_a_judge_needs_a_text_and_a_name(recipe: Recipe, serve: Serve, tmp_path: Path) -> None:
    write_pack("italian_teacher", tmp_path / "pack")
    text = tmp_path / "pack" / "judge.txt"
    text.write_text("Which level?", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"judge.txt must hold the answer: \{\{ answer \}\}"):
        load_pack(str(tmp_path / "pack"))
    text.unlink()
    url = serve()
    config = recipe(prompts=str(tmp_path / "pack"), endpoints=[url], judge="judge", judge_endpoints=[url])
    with pytest.raises(ConfigError, match=r"judge needs a text that asks it: write judge.txt"):
        generate(config, Hooks())
    assert requests_of(url) == 0
    with pytest.raises(ConfigError, match="judge_endpoints needs judge"):
        recipe(judge_endpoints=[url])
