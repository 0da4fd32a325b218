"""Charts: round ticks, labels apart, points where the figures are, nothing lost without being said."""

import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dylora_moe.report.charts import (
    NARROW,
    SMALL,
    WIDE,
    Axes,
    Line,
    line_chart,
    range_chart,
    round_ticks,
    spread_labels,
    stacked_chart,
    thin,
    tick_label,
)


@pytest.mark.parametrize(
    ("low", "high", "count", "ticks"),
    [
        (0, 1, 2, [0, 0.5, 1]),
        (0.4, 1.82, 4, [0, 0.5, 1, 1.5, 2]),
        (0, 24, 5, [0, 5, 10, 15, 20, 25]),
        (-3, 7, 3, [-5, 0, 5, 10]),
        (5, 5, 2, [4.5, 5, 5.5]),
        (0, 0, 2, [-1, 0, 1]),
    ],
)
def test_ticks_are_round_and_hold_the_values(low: float, high: float, count: int, ticks: list[float]) -> None:
    assert round_ticks(low, high, count) == pytest.approx(ticks)


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9), st.integers(2, 12))
@example(6925363.0, 1e-9, 2)
def test_any_range_has_a_few_ticks_around_it(low: float, width: float, count: int) -> None:
    high = low + width
    ticks = round_ticks(low, high, count)
    slack = max(abs(low), abs(high), width) * 1e-6
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack and 2 <= len(ticks) <= count + 3


@pytest.mark.parametrize(
    ("value", "step", "high", "label"),
    [
        (0.5, 0.5, 1, "0.5"),
        (300, 100, 300, "300"),
        (2500, 500, 5000, "2500"),
        (12_000, 2000, 20_000, "12k"),
        (12_500, 500, 20_000, "12.5k"),
        (0, 5000, 20_000, "0"),
        (5000, 5000, 20_000, "5k"),
        (2e6, 1e6, 3e6, "2M"),
        (4e-4, 2e-4, 6e-4, "4e-4"),
        (0, 2e-4, 6e-4, "0"),
        (0.7005, 5e-4, 0.701, "0.7005"),
    ],
)
def test_ticks_are_written_short_and_alike(value: float, step: float, high: float, label: str) -> None:
    assert tick_label(value, step, high) == label


@given(st.lists(st.floats(0, 300), min_size=1, max_size=14))
def test_labels_do_not_overlap(wanted: list[float]) -> None:
    found = spread_labels(wanted, 0, 300)
    ordered = sorted(found)
    gap = min(14, 300 / max(len(wanted) - 1, 1))
    assert all(later - earlier >= gap - 1e-6 for earlier, later in pairwise(ordered))
    assert ordered[0] >= -1e-6 and ordered[-1] <= 300 + 1e-6
    assert [label for label, _ in sorted(enumerate(found), key=lambda each: each[1])] == [
        label for label, _ in sorted(enumerate(wanted), key=lambda each: each[1])
    ]


def test_labels_that_are_apart_stay() -> None:
    assert spread_labels([10, 200, 100], 0, 300) == [10, 200, 100]


def test_few_points_stay_and_many_become_means_with_their_range() -> None:
    points = [(step, step % 2) for step in range(1000)]
    assert thin(points[:50], 120) == (points[:50], [])
    means, band = thin(points, 100)
    assert len(means) == len(band) == 100
    assert means[0] == (9, 0.5) and band[0] == (9, 0, 1) and means[-1][0] == 999


def test_a_point_is_where_its_figure_is() -> None:
    drawn = line_chart(
        [Line(label="loss", points=[(0, 0.0), (10, 1.0), (20, 0.5)])], Axes(title="t", low=0.0, high=1.0)
    )
    dots = [(float(x), float(y)) for x, y in re.findall(r'class="dot" cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    rules = sorted({float(y) for y in re.findall(r'class="grid"[^>]* y1="([\d.]+)"', drawn)})
    assert [y for _, y in dots] == pytest.approx([rules[-1], rules[0], (rules[0] + rules[-1]) / 2], abs=0.11)
    assert dots[1][0] == pytest.approx((dots[0][0] + dots[2][0]) / 2, abs=0.11)
    assert "<title>loss, step 10: 1</title>" in drawn and 'role="img" aria-label="t"' in drawn


def test_a_gap_and_figures_that_are_no_numbers_break_a_curve() -> None:
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 2.0), (4, 1.0), (5, math.inf), (6, 1.5)]
    drawn = line_chart([Line(label="loss", points=points)], Axes(title="t"))
    assert re.search(r'class="line" d="(M[^M]+){2}"', drawn) and drawn.count('class="dot"') == 5
    assert "nan" not in drawn and "inf" not in drawn


@pytest.mark.parametrize("size", [WIDE, NARROW, SMALL])
def test_text_is_inside_and_apart(size: tuple[int, int]) -> None:
    lines = [
        Line(label=f"a domain of a long name {place}", points=[(0, 2.0), (12, 1 + place / 100)]) for place in range(9)
    ]
    drawn = line_chart(lines, Axes(title="t", y="nats a token"), size)
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="start" class="name"', drawn)
    places = [(float(x), float(y)) for x, y in found]
    heights = sorted(y for _, y in places)
    assert len(places) == 9 and heights[0] > 0 and heights[-1] <= size[1]
    assert min(later - earlier for earlier, later in pairwise(heights)) >= 13.9
    shown = re.findall(r"</title>([^<]+)</text>", drawn)
    assert all(len(label) <= 18 for label in shown) and "a domain of a long name 8" in drawn


def test_nothing_to_draw_is_nothing() -> None:
    assert line_chart([Line(label="a", points=[])], Axes(title="t")) == ""
    assert line_chart([Line(label="a", points=[(0, math.nan)])], Axes(title="t")) == ""
    assert stacked_chart(["a"], [], Axes(title="t"), SMALL) == "" and range_chart([], Axes(title="t"), SMALL) == ""


def test_one_point_and_flat_lines_are_drawn() -> None:
    for points in ([(5, 3.0)], [(0, 0.0), (9, 0.0)], [(0, 7.0), (9, 7.0)]):
        assert line_chart([Line(label="a", points=points)], Axes(title="t")).count('class="dot"') == len(points)


def test_noise_does_not_fill_a_chart() -> None:
    drawn = line_chart([Line(label="a", points=[(0, 0.7001), (9, 0.7002)])], Axes(title="t"))
    low, high = (float(y) for y in re.findall(r'class="dot" cx="[\d.]+" cy="([\d.]+)"', drawn))
    assert abs(low - high) < 1


def test_shares_stand_on_each_other_and_small_experts_are_put_together() -> None:
    names = [f"e{place}" for place in range(12)]
    rows = [(float(step), [1 / 12] * 12) for step in range(3)]
    drawn = stacked_chart(names, rows, Axes(title="t"), SMALL)
    assert drawn.count('class="area"') == 9 and "4 others" in drawn
    edges = [float(y) for y in re.search(r'class="area"[^>]*d="M([^Z]+)Z"', drawn)[1].replace("L", " ").split()[1::2]]  # type: ignore[index]
    assert edges[3] - edges[0] == pytest.approx((SMALL[1] - 44) / 12, abs=0.2)
    assert "step 1: e0 8%, e1 8%" in drawn


def test_a_range_has_both_ends_and_its_interval() -> None:
    drawn = range_chart([("code", 2.0, 1.0, (0.5, 1.25)), ("maths", 1.5, None, None)], Axes(title="t"), SMALL)
    assert drawn.count('class="ring"') == 2 and drawn.count('class="dot"') == 1 and drawn.count('class="interval"') == 1
    assert "code, before: 2" in drawn and "code, interval 0.5 to 1.25" in drawn


def test_names_cannot_write_into_a_chart() -> None:
    bad = '"><script>x</script>'
    drawn = line_chart(
        [Line(label=bad, points=[(0, 1.0)]), Line(label="b", points=[(0, 2.0)])], Axes(title=bad, marks=[(bad, 0)])
    )
    drawn += stacked_chart([bad, "b"], [(0, [0.5, 0.5]), (1, [0.5, 0.5])], Axes(title=bad), SMALL)
    drawn += range_chart([(bad, 1.0, 2.0, (1, 2))], Axes(title=bad), SMALL)
    tags, titles = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            titles.extend(value for name, value in attrs if name == "aria-label")

    Reader().feed(drawn)
    assert set(tags) <= {"svg", "g", "line", "path", "circle", "rect", "text", "title", "p", "span"}
    assert titles == [bad] * 3
