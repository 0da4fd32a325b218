"""The panel at several sizes of a terminal: what it shows, what it leaves out, and that it is never too large."""

import io
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from dylora_moe.train.live.draw import draw
from dylora_moe.train.live.figures import Curve, Figures, Learned, Load, Place

SIZES = [40, 80, 140]
GREEN, RED = "\x1b[32m", "\x1b[31m"


def curve(name: str, *points: float) -> Curve:
    return Curve(name=name, points=points, first=points[0], last=points[-1])


def loads(*shares: float, dead: Sequence[int] = ()) -> tuple[Load, ...]:
    return tuple(Load(name=f"expert_{i}", share=share, dead=i in dead) for i, share in enumerate(shares))


WHOLE = Figures(
    name="code-and-chat",
    step=120,
    max_steps=500,
    elapsed_s=751,
    left_s=2389,
    tokens_per_second=1234.4,
    memory_gb=3.2,
    memory_share=0.21,
    learning_rate=1.8e-4,
    training=curve("training loss", 2.0, 1.5, 1.0),
    validation=curve("validation loss", 2.0, 1.6),
    domains=(curve("requests", 2.0, 1.0), curve("stripe", 2.0, 2.2)),
    loads=loads(0.56, 0.30, 0.0, 0.14, dead=[2]),
    router_entropy=0.42,
    warnings=("Warning at step 60: the first.", "Warning at step 80: the second.", "Warning at step 90: the third."),
)


def shown(figures: Figures, width: int, height: int = 40, **options: Any) -> str:
    settings = {"color_system": None} | options
    console = Console(record=True, width=width, force_terminal=True, file=io.StringIO(), **settings)
    console.print(draw(figures, width=width, height=height))
    return console.export_text(styles=bool(options))


def row_of(text: str, start: str) -> str:
    (row,) = [line for line in text.splitlines() if re.search(rf"\u2502[^\u2502]*{start}", line)]
    return row


@pytest.mark.parametrize("width", SIZES)
def test_everything_is_there_at_every_width(width: int) -> None:
    text = shown(WHOLE, width)
    for part in ("code-and-chat", "24%", "0:12:31", "0:39:49", "1,234 tokens/s", "3.20 GB, 21%", "router entropy 0.42"):
        assert part in text, part
    assert re.search(r"training loss +\u2588\u2585\u2581 +1\.000 +-50%", text)
    assert re.search(r"validation loss +\u2588\u2581 +1\.600 +-20%", text)
    assert re.search(r"  requests +\u2588\u2581 +1\.000 +-50%", text)
    assert re.search(r"  stripe +\u2581\u2588 +2\.200 +\+10%", text)
    assert re.search(r"expert_0 +\u2501+ +56%", text) and re.search(r"expert_2 +dead +0%", text)
    assert "the second." in text and "the third." in text and "the first." not in text
    assert ("learning rate 1.80e-04" in text) == (width > 40)  # the first to go


def test_bars_are_as_long_as_shares_and_the_columns_are_aligned() -> None:
    text = shown(WHOLE, 80)
    first, second = (row_of(text, name).count("\u2501") for name in ("expert_0", "expert_1"))
    assert second / first == pytest.approx(0.30 / 0.56, abs=0.03)
    rows = [row_of(text, name) for name in ("training loss", "validation loss", "requests", "stripe")]
    assert (
        len({row.index("%") for row in rows}) == len({re.search("[\u2581-\u2588]", row).start() for row in rows}) == 1
    )  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("step", "done", "percent"), [(0, 0, "0%"), (250, 27, "50%"), (499, 54, "99%"), (500, 54, "100%")]
)
def test_the_bar_is_as_long_as_the_steps_that_are_made(step: int, done: int, percent: str) -> None:
    """Percents are rounded down: 100 is the last step's alone."""
    row = row_of(shown(replace(WHOLE, step=step), 80, color_system="standard"), f"step +{step} of 500")
    coloured = re.search("\x1b\\[36m([\u2501\u2578]+)\x1b", row)
    assert len(coloured[1]) == done if coloured else not done
    assert f" {percent} " in row


def test_lower_losses_are_green_and_higher_ones_red() -> None:
    text = shown(WHOLE, 80, color_system="standard")
    assert f"{GREEN}  -50%" in row_of(text, "requests") and f"{RED}  +10%" in row_of(text, "stripe")
    same = shown(replace(WHOLE, training=curve("training loss", 1.0, 1.001)), 80, color_system="standard")
    assert GREEN not in row_of(same, "training loss") and RED not in row_of(same, "training loss")


def test_wide_terminals_have_losses_and_loads_side_by_side() -> None:
    row = row_of(shown(WHOLE, 140), "validation loss")
    assert re.search(r"validation loss .* 1\.600 +-20% +expert_0 +\u2501+ +56%", row)
    lines = shown(WHOLE, 400).splitlines()
    assert max(map(len, lines)) == 140  # what is wider only takes the eye longer ways


def test_of_many_experts_the_largest_in_their_order_and_a_line_for_the_rest() -> None:
    shares = [0.01 * (i % 2) + 0.02 for i in range(40)]
    text = shown(replace(WHOLE, loads=loads(*shares, dead=[4, 6])), 140)
    names = re.findall(r"expert_(\d+)", text)
    assert names == [str(i) for i in range(1, 23, 2)]
    assert re.search(r"29 others +2 of them dead +67%", text)
    assert "others" not in shown(replace(WHOLE, loads=loads(*[1 / 12] * 12)), 140)


def test_one_domain_is_the_validation_loss_itself() -> None:
    text = shown(replace(WHOLE, domains=WHOLE.domains[:1]), 80)
    assert "validation loss" in text and "requests" not in text


def test_before_the_first_line_of_metrics_there_is_a_bar_and_the_base() -> None:
    start = Figures(name="a", step=0, max_steps=10, elapsed_s=0, validation=curve("validation loss", 2.0))
    text = shown(start, 80)
    assert "left -" in text and re.search(r"validation loss +\u2584 +2\.000 ", text)
    assert "%" not in row_of(text, "validation loss") and "tokens/s" not in text and "load" not in text


def test_a_stream_says_which_skill_it_is_at_and_what_was_decided() -> None:
    decided = (
        Learned(skill="requests", kind="grow", expert="requests"),
        Learned(skill="stripe", kind="extend", expert="requests"),
        Learned(skill="flask", kind="grow", expert="flask"),
    )
    figures = replace(WHOLE, place=Place(run="skills", number=3, total=5, decided=decided))
    text = shown(figures, 80)
    assert "skills  skill 3 of 5: flask" in text
    assert "decided  requests grow, stripe extend requests, flask grow" in text
    assert "decided  2 earlier, flask grow" in shown(figures, 40)


def test_low_terminals_keep_what_matters_most() -> None:
    low = shown(replace(WHOLE, loads=loads(*[0.1] * 10)), 80, height=24)
    assert all(part in low for part in ("24%", "training loss", "stripe", "others", "the third."))
    lowest = shown(WHOLE, 80, height=10)
    assert "24%" in lowest and len(lowest.splitlines()) <= 5
    domains = tuple(curve(f"domain{i}", 1.0, 2.0) for i in range(30))
    many = shown(replace(WHOLE, domains=domains), 80, height=24)
    assert re.search(r"and \d+ more domains", many) and "expert_0" in many


def test_names_cannot_wrap_colour_or_move_anything() -> None:
    name = "[red]a[/]\n\x1b[2Jlong" + "\u6f22" * 60
    figures = replace(
        WHOLE, name=name, domains=(curve(name, 1.0), curve("b", 1.0)), loads=(Load(name=name, share=1.0),)
    )
    for width in SIZES:
        text = shown(figures, width)
        assert "[red]a[/] " in text and "\x1b" not in text
        assert {cell_len(line) for line in text.splitlines()} <= {width, 0}


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 60),
    experts=st.integers(0, 40),
    domains=st.integers(0, 30),
    warnings=st.integers(0, 3),
    value=st.floats(),
    has_place=st.booleans(),
)
def test_it_is_never_larger_than_the_terminal(
    width: int, height: int, experts: int, domains: int, warnings: int, value: float, has_place: bool
) -> None:
    decided = tuple(Learned(skill=f"skill {i}", kind="reuse", expert="some") for i in range(domains))
    figures = replace(
        WHOLE,
        training=curve("training loss", 1.0, value),
        domains=tuple(curve(f"domain {i}", value) for i in range(domains)),
        loads=loads(*[1 / max(experts, 1)] * experts),
        warnings=("a warning " * 20,) * warnings,
        place=Place(run="stream", number=domains, total=40, decided=decided) if has_place else None,
    )
    lines = shown(figures, width, height).splitlines()
    assert all(cell_len(line) <= width for line in lines)
    assert len(lines) <= max(height - 6, 4)
    if height >= 10 and width >= 40:
        assert "24%" in "".join(lines)
