"""A library comes back as it was written, refuses what is of another source, and grows by little."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dylora_moe.errors import RunError
from dylora_moe.skills.library import (
    RECORD,
    TENSORS,
    Sample,
    Skill,
    SkillLibrary,
    SkillRecord,
    Source,
    load_library,
    save_library,
)

SOURCE = Source(base="a-base", revision="abc", tap_layer=2)


def make(name: str, features: int = 8, rows: int = 5) -> Skill:
    numbers = np.random.default_rng(len(name)).normal(size=(rows, features)).astype(np.float32)
    record = SkillRecord(name=name, expert=f"{name}_expert", num_rows=rows, data="0" * 64, base_loss=2.5, loss=0.75)
    return Skill(record=record, mean=numbers.mean(0), sample=Sample(prompts=numbers, answers=numbers[:3] + 1))


def build(*names: str) -> SkillLibrary:
    library = SkillLibrary(source=SOURCE, skills={})
    for name in names:
        library = library.with_skill(make(name))
    return library


@pytest.mark.parametrize("names", [(), ("one",), ("zeta", "alpha", "with.dots and spaces")], ids=len)
def test_it_comes_back_as_it_was(tmp_path: Path, names: tuple[str, ...]) -> None:
    library = build(*names)
    save_library(library, tmp_path)
    found = load_library(tmp_path)
    assert found.source == SOURCE and list(found.skills) == list(names)
    for name in names:
        assert found.skills[name].record == library.skills[name].record
        np.testing.assert_array_equal(found.skills[name].mean, library.skills[name].mean)
        np.testing.assert_array_equal(found.prompts[name], library.prompts[name])
        np.testing.assert_array_equal(found.answers[name], library.answers[name])


def test_a_skill_costs_its_mean_and_its_sample(tmp_path: Path) -> None:
    sizes = []
    for names in (("a",), ("a", "bb")):
        save_library(build(*names), tmp_path)
        sizes.append((tmp_path / TENSORS).stat().st_size)
    assert sizes[1] - sizes[0] < (1 + 5 + 3) * 8 * 4 + 300


def test_another_one_is_made_and_the_old_one_stays() -> None:
    one = build("a")
    two = one.with_skill(make("b"))
    assert list(one.skills) == ["a"] and list(two.skills) == ["a", "b"]
    assert two.skills["a"] is one.skills["a"]
    assert two.experts == {"a": "a_expert", "b": "b_expert"}


def test_a_loss_is_set_once_it_is_measured(tmp_path: Path) -> None:
    before = build("a", "b")
    after = before.with_loss("b", 0.25)
    assert after.skills["b"].record == replace(before.skills["b"].record, loss=0.25)
    assert before.skills["b"].record.loss == 0.75 and after.skills["a"] is before.skills["a"]
    assert after.skills["b"].sample is before.skills["b"].sample
    save_library(after, tmp_path)
    assert load_library(tmp_path).skills["b"].record.loss == 0.25


def test_what_does_not_belong_is_refused() -> None:
    with pytest.raises(RunError, match="there is one named 'a'"):
        build("a", "a")
    with pytest.raises(RunError, match=r"the size of the others, 8, got 9 for 'b'"):
        build("a").with_skill(make("b", features=9))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (Source(base="b", revision=None, tap_layer=2), "not of b, layer 2"),
        (Source(base="a-base", revision="abd", tap_layer=2), "a-base at abc, layer 2, not of a-base at abd, layer 2"),
        (Source(base="a-base", revision="abc", tap_layer=3), "layer 3"),
    ],
)
def test_another_base_or_tap_is_refused_with_both_named(other: Source, told: str) -> None:
    library = build("a")
    library.check_source(SOURCE)
    with pytest.raises(RunError) as refused:
        library.check_source(other)
    assert told in str(refused.value) and "a-base at abc, layer 2" in str(refused.value)


@pytest.mark.parametrize("name", [RECORD, TENSORS])
@pytest.mark.parametrize("kind", ["deleted", "truncated", "nonsense"])
def test_a_damaged_library_is_told(tmp_path: Path, name: str, kind: str) -> None:
    save_library(build("a", "b"), tmp_path)
    path = tmp_path / name
    if kind == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if kind == "truncated" else b"[1]")
    with pytest.raises(RunError, match="must hold a skill library"):
        load_library(tmp_path)


def test_another_format_is_told(tmp_path: Path) -> None:
    save_library(build("a"), tmp_path)
    content = json.loads((tmp_path / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps({**content, "format": 9}))
    with pytest.raises(RunError, match="format 2 to be read by this version, got 9"):
        load_library(tmp_path)
