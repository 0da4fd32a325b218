"""A stream's folder: whose it is, what it goes on from, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import domain_rows, write_lines
from tests.train.streams import beside, outcome

from dylora_moe.config import RunConfig
from dylora_moe.errors import DataError, RunError
from dylora_moe.train.run import train


def test_other_skills_in_learned_places_are_refused(whole: Any) -> None:
    before, settings = outcome(whole[1]), (whole[1] / "config.yaml").read_text()
    swapped = (whole[0].skills[1], whole[0].skills[0])
    with pytest.raises(RunError, match=r"skill 1 of the stream in .* was 'capitals', and is 'functions' now"):
        train(whole[0].model_copy(update={"skills": swapped}))
    with pytest.raises(RunError, match="other settings: learning_rate"):
        train(whole[0].model_copy(update={"learning_rate": 0.5}))
    assert outcome(whole[1]) == before and (whole[1] / "config.yaml").read_text() == settings


def test_what_arrives_under_an_earlier_name_comes_last(stream: Callable[..., RunConfig], tmp_path: Path) -> None:
    folder = tmp_path / "incoming"
    folder.mkdir()
    for name, domain in (("b", "capitals"), ("d", "sums")):
        write_lines(folder / f"{name}.jsonl", domain_rows(domain))
    config = stream(skills=[f"{folder}/*"], max_steps=1)
    assert [stage["skill"] for stage in train(config)["stages"]] == ["b", "d"]
    write_lines(folder / "a.jsonl", domain_rows("functions"))
    assert [stage["skill"] for stage in train(config)["stages"]] == ["b", "d", "a"]
    assert train(config)["already_finished"]
    (folder / "b.jsonl").unlink()
    with pytest.raises(RunError, match=r"skill 1 of the stream in .* was 'b'"):
        train(config)


def test_other_rows_of_a_learned_skill_are_refused(stream: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Figures of a skill before and after are of the same rows."""
    rows = write_lines(tmp_path / "sums.jsonl", domain_rows("sums"))
    other = write_lines(tmp_path / "functions.jsonl", domain_rows("functions"))
    train(stream(skills=[str(rows)], max_steps=1))
    write_lines(rows, domain_rows("capitals"))
    with pytest.raises(RunError, match="the data of skill sums must be what it was learned from"):
        train(stream(skills=[str(rows), str(other)], max_steps=1))
    write_lines(rows, domain_rows("sums"))
    assert len(train(stream(skills=[str(rows), str(other)], max_steps=1))["stages"]) == 2


def test_a_library_of_another_base_is_refused(whole: Any, tmp_path: Path) -> None:
    config = beside(whole, "foreign", skills=whole[0].skills[:1])
    train(config)
    record = config.run_dir / "stages" / "01-capitals" / "skills.json"
    record.write_text(record.read_text().replace('"tap_layer": 0', '"tap_layer": 1'))
    with pytest.raises(RunError, match=r"layer 1, not of .*layer 0"):
        train(beside(whole, "foreign"))


def test_a_start_that_came_to_nothing_leaves_the_folder_free(stream: Callable[..., RunConfig], tmp_path: Path) -> None:
    few = write_lines(tmp_path / "few.jsonl", domain_rows("sums")[:12])
    with pytest.raises(DataError):
        train(stream(skills=[str(few)]))
    write_lines(few, domain_rows("sums"))
    assert len(train(stream(skills=[str(few)], max_steps=2))["stages"]) == 1


@pytest.mark.parametrize("name", ["train", "items", "default", "2024", "lm_head"])
def test_a_skill_may_have_a_name_that_no_expert_can_have(
    stream: Callable[..., RunConfig], tiny_rows: dict[str, Path], name: str
) -> None:
    skills = [str(tiny_rows["capitals"]), {"skill": name, "datasets": [str(tiny_rows["sums"])]}]
    assert train(stream(skills=skills, max_steps=1))["experts"] == ["capitals", f"skill_{name}"]


def test_a_finished_stream_is_left_alone(whole: Any) -> None:
    before = outcome(whole[1])
    result = train(whole[0])
    assert result["already_finished"] and outcome(whole[1]) == before
