"""Entries of `skills` become skills with names, data and paths that hold anywhere; what cannot work is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.data.chat_templates import make_tokenizer

from dylora_moe.config import RunConfig, make_config, to_yaml
from dylora_moe.config.recipe import load_recipe
from dylora_moe.data.build import build_data
from dylora_moe.data.paths import with_full_paths
from dylora_moe.data.registry import extend_registry
from dylora_moe.data.settings import DataSettings
from dylora_moe.data.stream import Skill, all_at_once, parse_skills
from dylora_moe.errors import DataError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: sums.jsonl, and a folder with two files, a folder and a hidden file."""
    for name in ("sums.jsonl", "incoming/b.jsonl", "incoming/a.jsonl", "incoming/c/rows.jsonl", "incoming/.part"):
        write(tmp_path / name, range(3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, numbers: range) -> Path:
    path.parent.mkdir(exist_ok=True)
    rows = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stream(*skills: Any, **changes: Any) -> RunConfig:
    return with_full_paths(make_config({"mode": "continual", "skills": list(skills), **changes}))


def parse(*skills: Any) -> tuple[Skill, ...]:
    """As a run does."""
    return parse_skills(stream(*skills).skills)


def names(*skills: Any) -> list[str]:
    return [skill.name for skill in parse(*skills)]


def data_of(skill: Skill) -> list[tuple[str | None, str | None, str | None]]:
    return [(dataset.get("name"), dataset.get("path"), dataset.get("domain")) for dataset in skill.datasets]


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("flask", "flask"),
        ("sums.jsonl", "sums"),
        ("incoming", "incoming"),
        ({"name": "flask", "domain": "web"}, "web"),
        ({"path": "sums.jsonl"}, "sums"),
        ({"skill": "calling", "datasets": ["requests"]}, "calling"),
        ({"datasets": ["stripe", "flask"]}, "stripe"),
        ({"datasets": [{"path": "sums.jsonl", "domain": "maths"}]}, "maths"),
        ({"skill": None, "datasets": ["requests"]}, "requests"),
    ],
    ids=str,
)
def test_a_skill_has_its_own_name_or_that_of_its_first_data(here: Path, entry: Any, name: str) -> None:
    (skill,) = parse(entry)
    assert skill.name == name and {domain for _, _, domain in data_of(skill)} == {name}


def test_a_mixture_is_one_skill(here: Path) -> None:
    mixed = {"skill": "both", "datasets": ["flask", {"path": "sums.jsonl", "domain": "sums", "num_examples": 2}]}
    skills = parse("requests", mixed)
    assert [skill.name for skill in skills] == ["requests", "both"]
    assert data_of(skills[1]) == [("flask", None, "both"), (None, str(here / "sums.jsonl"), "both")]
    assert skills[1].datasets[1]["num_examples"] == 2
    # What they became is what a run takes.
    data = build_data(list(skills[1].datasets), make_tokenizer(), DataSettings(max_length=2000))
    assert data.domains == ("both",) and len(data.train) + len(data.validation["both"]) == 302


def test_what_an_entry_says_of_the_expert_is_kept() -> None:
    (skill,) = parse({"datasets": ["flask"], "decision": "extend", "lora_r": 8, "lora_alpha": 12.5})
    assert (skill.decision, skill.rank, skill.alpha) == ("extend", 8, 12.5)
    (plain,) = parse("flask")
    assert (plain.decision, plain.rank, plain.alpha) == (None, None, None)
    assert plain.datasets == ({"name": "flask", "domain": "flask", "on_bad_row": "stop"},)


def test_a_pattern_is_what_it_matches_in_order_of_names(here: Path) -> None:
    skills = parse("flask", "incoming/*", "requests")
    assert [skill.name for skill in skills] == ["flask", "a", "b", "c", "requests"]
    assert data_of(skills[3]) == [(None, str(here / "incoming" / "c"), "c")]
    assert names("incoming/[ab].jsonl") == ["a", "b"]
    write(here / "incoming" / "0.jsonl", range(3))
    assert names("incoming/*") == ["0", "a", "b", "c"]


def test_a_pattern_never_stands_for_a_name_of_the_registry(here: Path) -> None:
    write(here / "flask" / "rows.jsonl", range(3))
    (skill,) = parse_skills(["fla*"])
    assert data_of(skill) == [(None, "flask", "flask")]
    assert data_of(parse("flask")[0]) == [("flask", None, "flask")]


def test_a_file_may_have_brackets_in_its_name(here: Path) -> None:
    write(here / "rows[1].jsonl", range(3))
    write(here / "rows1.jsonl", range(3))
    (skill,) = parse("rows[1].jsonl")
    assert data_of(skill) == [(None, str(here / "rows[1].jsonl"), "rows[1]")]


def test_a_pattern_that_matches_nothing_is_told(here: Path) -> None:
    with pytest.raises(DataError, match=r"must match files or folders, got '.*/coming/\*', which matches none\."):
        parse("coming/*")


@pytest.mark.parametrize(
    "skills",
    [
        ["flask", "flask"],
        ["flask", {"skill": "flask", "datasets": ["requests"]}],
        ["incoming/a.jsonl", "incoming/*"],
        ["sums.jsonl", {"path": "incoming/b.jsonl", "domain": "sums"}],
    ],
)
def test_two_skills_of_one_name_are_refused(here: Path, skills: list[Any]) -> None:
    name = {"flask": "flask", "incoming/a.jsonl": "a", "sums.jsonl": "sums"}[skills[0]]
    with pytest.raises(DataError, match=rf"different names, got '{name}' twice\. Name one.*skill: {name}_2"):
        parse(*skills)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"skill": "a", "dataset": ["flask"]}, "got 'dataset'. Did you mean datasets?"),
        ({"skil": "a", "datasets": ["flask"]}, "got 'skil'. Did you mean skill?"),
        (
            {"datasets": ["flask"], "rank": 8},
            "must be one of skill, datasets, decision, lora_r, lora_alpha, adapter, find_changes, got",
        ),
        ({"name": "flask", "decision": "grow"}, "got 'name'. It says something of a data set: write datasets: [{name"),
        ({"nam": "flask"}, "a key of a datasets entry must be one of name"),
        ({"datasets": [{"name": "flask", "pat": "1/2"}]}, "Did you mean path or part?"),
        ({"skill": "a"}, "datasets of a skills entry must be a list of at least one data set, got {'skill': 'a'}"),
        ({"skill": "a", "datasets": []}, "must be a list of at least one data set"),
        ({"skill": "a", "datasets": "flask"}, "must be a list of at least one data set"),
        ({"skill": "a", "datasets": None}, "must be a list of at least one data set"),
        ({"skill": " ", "datasets": ["flask"]}, "skill of a skills entry must be a name, got ' '"),
        ({"skill": 3, "datasets": ["flask"]}, "skill of a skills entry must be a name, got 3"),
        (
            {"datasets": ["flask"], "decision": "shrink"},
            "decision of a skill must be one of reuse, extend, grow",
        ),
        ({"datasets": ["flask"], "decision": ["grow"]}, "decision of a skill must be one of"),
        ({"datasets": ["flask"], "lora_r": 12}, "lora_r of a skill must be a multiple of 8 above 0, got 12"),
        ({"datasets": ["flask"], "lora_r": 0}, "lora_r of a skill must be a multiple of 8 above 0, got 0"),
        ({"datasets": ["flask"], "lora_r": 8.0}, "lora_r of a skill must be a multiple of 8 above 0, got 8.0"),
        ({"datasets": ["flask"], "lora_r": True}, "lora_r of a skill must be a multiple of 8 above 0, got True"),
        ({"datasets": ["flask"], "lora_alpha": 0}, "lora_alpha of a skill must be a number above 0, got 0"),
        ({"datasets": ["flask"], "lora_alpha": "16"}, "lora_alpha of a skill must be a number above 0, got '16'"),
        (
            {"datasets": ["flask"], "lora_alpha": float("nan")},
            "lora_alpha of a skill must be a number above 0",
        ),
        (
            {"datasets": ["flask"], "lora_alpha": float("inf")},
            "lora_alpha of a skill must be a number above 0",
        ),
        (
            {"datasets": ["flask"], "adapter": " "},
            "adapter of a skill must be the folder of a PEFT LoRA, got ' '",
        ),
        ({"datasets": ["flask"], "adapter": 3}, "adapter of a skill must be the folder of a PEFT LoRA, got 3"),
        ({"datasets": ["flask"], "adapter": ".", "lora_r": 8}, "must have an adapter or lora_r, and has both"),
        ({"datasets": ["flask"], "adapter": ".", "decision": "grow"}, "must have an adapter or decision, and has both"),
        ({"datasets": ["flask"], "adapter": ".", "find_changes": True}, "an adapter or find_changes, and has both"),
        ({"datasets": ["flask", "nowhere.jsonl"]}, "existing file or folder, got 'nowhere.jsonl'"),
        ("flsk", "Did you mean 'flask'?"),
        ({"name": "flask", "part": "3/2"}, "such as 1/2 or 2/2, got '3/2'"),
        (3, "name, a path or a mapping"),
    ],
    ids=str,
)
def test_wrong_entries_are_named(here: Path, entry: Any, told: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_skills([entry])
    assert told in str(caught.value)
    if not isinstance(entry, int):  # which settings refuse
        with pytest.raises(DataError) as caught:
            parse(entry)
        assert told in str(caught.value)


def test_a_stream_means_the_same_in_another_folder(
    here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = {"skill": "mixed", "datasets": ["flask", "sums.jsonl", {"path": "incoming/a.jsonl"}], "decision": "grow"}
    given = {"skill": "given", "datasets": ["flask"], "adapter": "incoming"}
    config = stream("requests", "sums.jsonl", {"path": "incoming", "domain": "all"}, mixed, given, "incoming/*.jsonl")
    skills = parse_skills(config.skills)
    assert skills[4].adapter == str(here / "incoming")
    written = here / "config.yaml"
    written.write_text(to_yaml(config))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    again = make_config(load_recipe(written))
    assert with_full_paths(again) == again == with_full_paths(config)
    assert parse_skills(again.skills) == skills
    paths = {path for skill in skills for _, path, _ in data_of(skill) if path}
    assert paths == {str(here / name) for name in ("sums.jsonl", "incoming", "incoming/a.jsonl", "incoming/b.jsonl")}


def test_a_folder_with_brackets_in_its_name_has_patterns(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(here / "week[1]" / "a.jsonl", range(3))
    write(here / "week1" / "b.jsonl", range(3))
    monkeypatch.chdir(here / "week[1]")
    config = stream("*.jsonl")
    monkeypatch.chdir(here)
    assert [skill.name for skill in parse_skills(with_full_paths(config).skills)] == ["a"]


def test_own_names_are_known_in_a_stream(here: Path) -> None:
    registry = extend_registry({"mine": {"path": "sums.jsonl", "domain": "maths"}}, folder=here)
    (skill,) = parse_skills(["mine"], registry)
    assert skill.name == "maths" and data_of(skill) == [("mine", None, "maths")]


def rows_of(dataset: Any, **changes: Any) -> set[tuple[int, ...]]:
    """Tokens of the rows for training and validation of a skill that is learned from this."""
    (skill,) = parse_skills([{"skill": "s", "datasets": [dataset]}])
    data = build_data(list(skill.datasets), make_tokenizer(), DataSettings(max_length=2000, **changes))
    return {row.input_ids for rows in (data.train, data.validation["s"]) for row in rows}


@pytest.mark.parametrize("count", [2, 3])
def test_parts_of_a_file_share_no_row_and_are_all_of_it(here: Path, count: int) -> None:
    dataset = {"path": str(write(here / "many.jsonl", range(41)))}
    parts = [rows_of(dataset | {"part": f"{place}/{count}"}) for place in range(1, count + 1)]
    assert set.union(*parts) == rows_of(dataset) and sum(map(len, parts)) == 41
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert rows_of(dataset | {"part": "1/1"}) == rows_of(dataset)
    assert rows_of(dataset | {"part": f"1/{count}", "num_examples": 5}) < parts[0]
    assert rows_of(dataset | {"part": f"1/{count}"}, seed=1) != parts[0]
    with pytest.raises(DataError, match=r"at most the \d+ training rows of part 2/\d, got 30"):
        rows_of(dataset | {"part": f"2/{count}", "num_examples": 30})


@pytest.mark.parametrize("name", ["requests", "stripe", "flask"])
def test_parts_of_a_built_in_set_share_no_row_and_are_all_of_it(name: str) -> None:
    """Of `num_examples` that are made in all, whatever the skill is called."""
    dataset = {"name": name, "num_examples": 60}
    one, two = (rows_of(dataset | {"part": part}) for part in ("1/2", "2/2"))
    assert len(one) == len(two) == 30 and one | two == rows_of(dataset)


def test_more_parts_than_rows_are_refused(here: Path) -> None:
    with pytest.raises(DataError, match=r"must leave each part a training row, got 4/4 of 3 rows\. Take fewer parts"):
        rows_of({"path": "sums.jsonl", "part": "4/4"})


def test_a_stream_is_looked_at_as_all_of_its_data() -> None:
    config = make_config(
        {"mode": "continual", "skills": ["flask", {"skill": "web", "datasets": ["requests", "stripe"]}]}
    )
    joint = all_at_once(config)
    assert joint.mode == "joint" and joint.skills == ()
    assert joint.datasets == (
        {"name": "flask", "domain": "flask", "on_bad_row": "stop"},
        {"name": "requests", "domain": "web", "on_bad_row": "stop"},
        {"name": "stripe", "domain": "web", "on_bad_row": "stop"},
    )
    assert all_at_once(joint) is joint
