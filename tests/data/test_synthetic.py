"""The built-in skills as data: counts, distinctness, determinism, and answers that are tidy Python.

That the answers do what was asked is tested against the real libraries in test_synthetic_<skill>.py.
"""

import ast
import hashlib
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from string import Template

import pytest

from dylora_moe.data.example import Message
from dylora_moe.data.synthetic import SKILLS, Family, families, make_examples
from dylora_moe.errors import DataError

ALL_FAMILIES = [pytest.param(family, id=f"{skill}-{family.name}") for skill in SKILLS for family in families(skill)]


def num_available(skill: str) -> int:
    return sum(family.num_answers for family in families(skill))


def placeholders(text: str) -> set[str]:
    found = Template.pattern.finditer(text)
    return {match["named"] or match["braced"] for match in found}


def test_the_skills():
    assert SKILLS == ("requests", "stripe", "flask")


@pytest.mark.parametrize("skill", SKILLS)
def test_enough_families_and_answers(skill: str):
    names = [family.name for family in families(skill)]

    assert len(names) == len(set(names)) >= 12
    assert num_available(skill) >= 600


@pytest.mark.parametrize("skill", SKILLS)
def test_every_answer_and_every_instruction_of_a_skill_is_distinct(skill: str):
    examples = make_examples(skill, num_examples=num_available(skill), seed=0)

    assert len({example.answer for example in examples}) == num_available(skill)
    assert len({example.prompt[-1].content for example in examples}) == num_available(skill)


@pytest.mark.parametrize("skill", SKILLS)
def test_records(skill: str):
    example = make_examples(skill, num_examples=1, seed=3)[0]

    assert example.messages == (
        Message(role="user", content=example.prompt[0].content),
        Message(role="assistant", content=example.answer),
    )
    assert (example.domain, example.source, example.licence) == (skill, f"synthetic:{skill}", "CC0-1.0")


@pytest.mark.parametrize("skill", SKILLS)
def test_the_seed_decides(skill: str):
    first = make_examples(skill, num_examples=50, seed=1)

    assert first == make_examples(skill, num_examples=50, seed=1)
    assert first != make_examples(skill, num_examples=50, seed=2)


def test_another_process_makes_the_same_examples():
    code = (
        "import hashlib; from dylora_moe.data.synthetic import make_examples; "
        "print(hashlib.sha256(repr(make_examples('flask', num_examples=40, seed=9)).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    here = repr(make_examples("flask", num_examples=40, seed=9)).encode()
    assert there.stdout.strip() == hashlib.sha256(here).hexdigest()


@pytest.mark.parametrize("skill", ["stripe", "flask"])
def test_examples_are_spread_evenly_and_mixed(skill: str):
    owner = {
        family.draft(index, 0).answer: family.name for family in families(skill) for index in range(family.num_answers)
    }
    each = 10
    examples = make_examples(skill, num_examples=each * len(families(skill)), seed=0)
    order = [owner[example.answer] for example in examples]

    assert set(Counter(order).values()) == {each}
    assert len(set(order[: len(families(skill))])) > len(families(skill)) / 3


def test_small_families_are_used_up_before_the_maximum():
    small = [family for family in families("stripe") if family.num_answers < 60]
    examples = make_examples("stripe", num_examples=26 * 80, seed=0)
    answers = {example.answer for example in examples}

    assert len(examples) == 26 * 80
    assert small
    for family in small:
        assert all(family.draft(index, 0).answer in answers for index in range(family.num_answers))


def test_no_examples_is_an_empty_list():
    assert make_examples("flask", num_examples=0, seed=0) == []


@pytest.mark.parametrize("skill", SKILLS)
def test_too_many_names_the_maximum(skill: str):
    limit = num_available(skill)
    with pytest.raises(DataError, match=f"between 0 and {limit} .*got {limit + 1}"):
        make_examples(skill, num_examples=limit + 1, seed=0)


def test_a_negative_number_is_refused():
    with pytest.raises(DataError, match="got -1"):
        make_examples("flask", num_examples=-1, seed=0)


@pytest.mark.parametrize(("given", "meant"), [("stripes", "stripe"), ("Flask", "flask"), ("request", "requests")])
def test_an_unknown_skill_names_the_nearest(given: str, meant: str):
    with pytest.raises(DataError, match=f"got '{given}'. Did you mean '{meant}'"):
        make_examples(given, num_examples=1, seed=0)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_word_of_the_answer_is_in_the_instruction(family: Family):
    assert len(family.phrasings) >= 3
    for names in family.choices:
        assert placeholders(family.solution) & set(names.split("|"))
        for phrasing in family.phrasings:
            assert placeholders(phrasing) & set(names.split("|")), (names, phrasing)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_build_draws_from_the_family(family: Family):
    draft = family.build(random.Random(0))

    assert draft == family.build(random.Random(0))
    assert len({family.build(random.Random(seed)).answer for seed in range(20)}) > 10
    for names, words in family.choices.items():
        assert "|".join(draft.parameters[name] for name in names.split("|")) in words


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_are_short_ascii_python_that_compiles(skill: str):
    for example in make_examples(skill, num_examples=600, seed=5):
        ast.parse(example.answer)
        compile(example.answer, skill, "exec")
        assert example.answer.isascii() and example.prompt[0].content.isascii()
        assert 4 <= len(example.answer.splitlines()) <= 34
        assert "$" not in example.answer + example.prompt[0].content


def test_answers_pass_the_linter_and_the_formatter(tmp_path: Path):
    pytest.importorskip("ruff")
    for skill in SKILLS:
        for number, example in enumerate(make_examples(skill, num_examples=150, seed=6)):
            (tmp_path / f"{skill}_{number}.py").write_text(example.answer + "\n", encoding="ascii")
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--isolated", "--no-cache", "--line-length", "100", str(tmp_path)]
    rules = "E,F,I,UP,B,SIM,RET,A"

    lint = subprocess.run([*ruff, "check", "--select", rules, *options], capture_output=True, text=True)
    layout = subprocess.run([*ruff, "format", "--diff", *options], capture_output=True, text=True)

    assert lint.returncode == 0, lint.stdout
    assert layout.returncode == 0, layout.stdout
