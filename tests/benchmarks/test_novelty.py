"""benchmarks/novelty.py: its streams, its counts, and a quick run on made-up skills. No figure is judged here."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from dylora_moe.data.example import Example, Message

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
SIZES = {"a": 60, "b": 60, "c": 50, "d": 44, "e": 60}


@pytest.fixture(scope="module")
def novelty(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("novelty")


def make_pools(novelty: ModuleType) -> dict[str, Any]:
    """Skills far apart; words around a prompt move it far, too."""
    pools = {}
    for index, (name, size) in enumerate(SIZES.items()):
        draw = np.random.default_rng(index)
        plain = draw.normal(size=(size, 12)) + 8 * draw.normal(size=12)
        moved = tuple(plain + 8 * draw.normal(size=12) for _ in novelty.WORDINGS)
        answers = draw.normal(size=(size, 12)) + 8 * draw.normal(size=12)
        pools[name] = novelty.Pool(plain=plain, reworded=moved, answers=answers)
    return pools


@pytest.mark.parametrize("seed", range(6))
def test_a_stream_has_every_skill_and_others_after_their_first(novelty: ModuleType, seed: int) -> None:
    stream = novelty.make_stream(SIZES, seed % 3, 25, seed)
    assert stream == novelty.make_stream(SIZES, seed % 3, 25, seed) != novelty.make_stream(SIZES, seed % 3, 25, 99)
    new = [arrival for arrival in stream if arrival.kind == "new"]
    assert [arrival.skill for arrival in new] == novelty.order_skills(list(SIZES), seed % 3)
    first = {arrival.skill: arrival for arrival in new}
    salt = [arrival for arrival in stream if arrival.kind != "new"]
    assert sorted(arrival.kind for arrival in salt) == ["paraphrase", "repeat", "repeat", "repeat"]
    assert len({arrival.skill for arrival in salt}) == 4
    for arrival in salt:
        assert stream.index(arrival) > stream.index(first[arrival.skill])
        assert (arrival.wording is None) == (arrival.kind == "repeat")
        assert not set(arrival.places) & set(first[arrival.skill].places)
    for arrival in stream:
        assert len(set(arrival.places)) == min(25, SIZES[arrival.skill] // 2)
        assert max(arrival.places) < SIZES[arrival.skill]


def test_there_are_three_orders_of_the_same_skills(novelty: ModuleType) -> None:
    orders = [novelty.order_skills(list("abcdefgh"), order) for order in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list("abcdefgh") for order in orders)


def test_other_words_stand_around_the_last_prompt_alone(novelty: ModuleType) -> None:
    roles = [("system", "s"), ("user", "one"), ("assistant", "x"), ("user", "two"), ("assistant", "y")]
    messages = tuple(Message(role=role, content=text) for role, text in roles)  # type: ignore[arg-type]
    example = Example(messages=messages, domain="d", source="s")
    for wording, (before, after) in enumerate(novelty.WORDINGS):
        found = [message.content for message in novelty.reword(example, wording).messages]
        assert found == ["s", "one", "x", f"{before}two{after}", "y"]


def test_mistakes_are_counted_by_kind(novelty: ModuleType) -> None:
    rows = [
        ("a", "new", "grow", None),
        ("b", "new", "extend", "a"),
        ("a", "repeat", "grow", "a"),
        ("a", "repeat", "extend", "b"),
        ("b", "paraphrase", "grow", "b"),
    ]
    records = [dict(zip(("skill", "kind", "decision", "nearest"), row, strict=True)) for row in rows]
    records[1]["answers"] = {"new": False}
    records[4]["answers"] = {"new": True}
    assert novelty.count(records) == {
        "false growth on repeats": (1, 2),
        "missed new skills": (1, 1),
        "wrong nearest": (1, 3),
        "false growth on paraphrases": (1, 1),
        "new skills with known answers": (1, 1),
    }


def test_intervals_are_those_of_the_textbook(novelty: ModuleType) -> None:
    """Newcombe, Two-Sided Confidence Intervals for the Single Proportion, 1998, table I, method 3."""
    assert novelty.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert novelty.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert novelty.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert novelty.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_a_quick_run_writes_every_decision(
    novelty: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(novelty, "read_pools", lambda *args: make_pools(novelty))
    output = tmp_path / "figures" / "novelty.json"
    arguments = ["--data", str(tmp_path), "--seeds", "1", "--rows", "20", "--pairs", "1", "--output", str(output)]
    done = CliRunner().invoke(novelty.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "mahalanobis" in done.output, done.output
    report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    for name, records in report["decisions"].items():
        assert [record["place"] for record in records] == list(range(len(SIZES) + 4))
        counts = report["summary"][name]
        totals = [total for _, total in counts.values()]
        assert totals == [3, 4, 4, 1, 4]
    repeats = [record for record in report["decisions"]["two_sample"] if record["kind"] == "repeat"]
    assert all(record["nearest"] == record["skill"] for record in repeats)
    assert report["summary"]["two_sample"]["missed new skills"][0] == 0
    assert report["summary"]["two_sample"]["false growth on paraphrases"][0] == 0
    (told,) = [record for record in report["decisions"]["two_sample"] if record["kind"] == "paraphrase"]
    assert told["prompts"]["new"] and not told["answers"]["new"] and told["nearest"] == told["skill"]
    assert set(report["rates"]) == {"prompts", "answers"}
    for rate in report["rates"].values():
        assert rate["total"] == len(SIZES) and set(rate["new_by_skill"]) == set(SIZES)
    assert str(tmp_path) not in output.read_text(encoding="utf-8")


def test_copies_are_left_out_and_no_more_than_asked_are_drawn(novelty: ModuleType, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {number} times seven?", "answer": f"It is {7 * number}."} for number in range(1, 31)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows]), encoding="utf-8")
    found = [example.answer for example in novelty.read_examples({"path": str(path)}, 60)]
    assert len(found) == len(set(found)) > 0
    assert len(novelty.read_examples({"path": str(path)}, 5)) <= 5


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the folder shared/data beside the repository")
def test_real_skills_are_there_and_give_distinct_prompts(novelty: ModuleType, tmp_path: Path) -> None:
    novelty.divide(SHARED / "wikisql" / "train.jsonl", tmp_path / "wikisql.jsonl")
    found = novelty.entries(SHARED, 40, tmp_path / "wikisql.jsonl")
    assert len(found) >= 10
    assert all(Path(entry["path"]).exists() for entry in found.values() if "path" in entry)
    for name in ("requests", "mbpp", "wikisql"):
        examples = novelty.read_examples(found[name], 40)
        assert 30 <= len(examples) <= 40 and len(set(examples)) == len(examples)
