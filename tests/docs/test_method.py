"""docs/method.md: every equation has a source and a name, and every name is there."""

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`(dylora_moe\.[\w.]+)`", PAGE)))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_there(name: str) -> None:
    """`resolve_name` imports as much of it as are modules."""
    assert resolve_name(name) is not None


def test_each_equation_has_a_source_and_a_name() -> None:
    equations = list(re.finditer(r"\$\$.+?\$\$", PAGE, re.DOTALL))
    assert len(equations) > 20
    for equation in equations:
        rest = PAGE[equation.end() :].partition("\n#")[0]
        assert "Source: " in rest, equation[0]
        assert re.search(r"Computed by: `dylora_moe\.", rest), equation[0]


def test_a_name_that_is_not_there_is_seen() -> None:
    with pytest.raises((AttributeError, ImportError)):
        resolve_name("dylora_moe.tuner.router.softmax_gates")
