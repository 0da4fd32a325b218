"""Numbers -> charts as inline SVG: round ticks, labels that do not overlap, a figure under the pointer at each point.

Colours are the variables `--c0` to `--c7` of the page, which has them for light and for dark. A chart is as wide as
its space, so one that is to be read on a phone is drawn for it: text is never shrunk.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

COLOURS = 8
# Width and height in CSS pixels, where nothing is scaled.
WIDE, MIDDLE, NARROW, SMALL = (1040, 320), (680, 300), (328, 280), (328, 200)
# Of a character of 12 pixels in a usual sans serif; wide ones take more.
_CHARACTER, _LINE = 7.4, 14
# Points a line is drawn through at the most; more are brought together, with their lowest and highest shaded.
_MAX_POINTS = 120
# Of the heights in a chart over the highest, at the least.
_LEAST_SPREAD = 0.05
# Points up to which each is marked by a dot.
_MARKED = 40

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A curve.

    Attributes:
        label: Says what it is.
        points: (x, y), by x; a y that is no number leaves a gap.
        colour: Place in the palette; None for the page's grey.
        dashed: So that a line below it is seen.
    """

    label: str
    points: Points
    colour: int | None = 0
    dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """What a chart of lines is drawn in.

    Attributes:
        title: Says what is shown, to who cannot see it.
        x: Of the horizontal axis.
        y: Of the vertical axis, drawn at its top.
        low: Lowest y at the least; None to begin near the lowest value.
        high: Highest y at the least.
        marks: (label, x) of vertical lines, such as where a stage began.
        span: Lowest and highest x, where several charts are to have the same.
    """

    title: str
    x: str = "step"
    y: str = ""
    low: float | None = None
    high: float | None = None
    marks: Sequence[tuple[str, float]] = ()
    span: tuple[float, float] | None = None


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """At most that many round numbers, plus one, evenly from at or below `low` to at or above `high`.

    Ends that differ by no more than a float tells of them count as one value.
    """
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        spread = max(abs(low), abs(high)) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


def tick_label(value: float, step: float, high: float = 0.0) -> str:
    """A tick as short as its neighbours allow.

    Args:
        value: Where it is.
        step: From it to the next one.
        high: Of the ticks beside it, the one farthest from zero: they are all written alike.
    """
    size = max(abs(value), high, step)
    if abs(value) < step / 2 and (size < 1e-2 or size >= 1e4):
        return "0"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            scale = 1e3 if name == "k" else unit
            return f"{value / scale:.{_places(step / scale)}f}{name}"
    if size < 1e-2:
        return f"{value:.{_digits(value, step)}e}".replace("e-0", "e-")
    return f"{value:.{_places(step)}f}"


def _digits(value: float, step: float) -> int:
    return max(0, math.floor(math.log10(abs(value)) + 1e-9) - math.floor(math.log10(step) + 1e-9))


def _places(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9))


def told(value: float) -> str:
    """A figure with four digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def thin(points: Points, most: int = _MAX_POINTS) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """Points as few as asked for, means of neighbours; and their (x, lowest, highest), empty where none was lost."""
    if len(points) <= most:
        return list(points), []
    known = [(x, y) for x, y in points if math.isfinite(y)]
    parts = [known[len(known) * place // most : len(known) * (place + 1) // most] for place in range(most)]
    means = [(part[-1][0], math.fsum(y for _, y in part) / len(part)) for part in parts]
    return means, [(part[-1][0], min(y for _, y in part), max(y for _, y in part)) for part in parts]


def spread_labels(wanted: Sequence[float], low: float, high: float, gap: float = _LINE) -> list[float]:
    """Heights as near as can be to those wanted, none within `gap` of another, all between `low` and `high`."""
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    found, floor = [0.0] * len(wanted), low
    for place in order:
        found[place] = floor = max(wanted[place], floor)
        floor += gap
    ceiling = high
    for place in reversed(order):
        found[place] = ceiling = min(found[place], ceiling)
        ceiling -= gap
    return found


def line_chart(lines: Sequence[Line], axes: Axes, size: tuple[int, int] = SMALL) -> Markup:
    """Curves in one frame, each with its name at its end where there are several; nothing where there is no point."""
    lines = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    if not lines:
        return Markup("")
    return _Frame(lines, axes, size).draw()


def all_sizes(draw: Callable[[tuple[int, int]], Markup]) -> Markup:
    """A chart for wide pages, for paper and for phones; the page shows one of them."""
    drawn = [
        Markup('<div class="{}">{}</div>').format(name, chart)
        for name, size in (("on-wide", WIDE), ("on-middle", MIDDLE), ("on-narrow", NARROW))
        if (chart := draw(size))
    ]
    return Markup("").join(drawn)


class _Frame:
    """Where things are in a chart of lines."""

    def __init__(self, lines: Sequence[Line], axes: Axes, size: tuple[int, int]) -> None:
        self.axes, (self.width, self.height) = axes, size
        most = _MAX_POINTS if self.width > 500 else _MAX_POINTS // 2
        thinned = [thin(line.points, most) for line in lines]
        self.lines = [replace(line, points=points) for line, (points, _) in zip(lines, thinned, strict=True)]
        self.bands = [band for _, band in thinned]
        ys = [y for line in self.lines for _, y in line.points if math.isfinite(y)]
        ys += [y for band in self.bands for _, *ends in band for y in ends]
        low = min(ys) if axes.low is None else min(axes.low, *ys)
        high = max(ys) if axes.high is None else max(axes.high, *ys)
        if high - low < _LEAST_SPREAD * abs(high):  # noise is not to look like a trend
            middle, half = (low + high) / 2, _LEAST_SPREAD * abs(high) / 2
            low, high = middle - half, middle + half
        self.y_ticks = round_ticks(low, high, max(3, self.height // 55))
        self.y_step = self.y_ticks[1] - self.y_ticks[0]
        xs = [x for line in self.lines for x, _ in line.points]
        self.x_low, self.x_high = axes.span or (min(xs), max(xs))
        if self.x_low == self.x_high:
            self.x_low, self.x_high = self.x_low - 1, self.x_high + 1
        self.named = len(self.lines) > 1
        self.y_most = max(map(abs, self.y_ticks))
        marked = max(len(tick_label(tick, self.y_step, self.y_most)) for tick in self.y_ticks)
        self.left = 10 + _CHARACTER * marked
        self.longest = _longest_label(self.width)
        longest = max(min(len(line.label), self.longest) for line in self.lines)
        self.right = self.width - (16 + _CHARACTER * longest if self.named else 12)
        self.top, self.bottom = 22.0 if axes.y else 10.0, self.height - 34.0

    def x(self, value: float) -> float:
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def draw(self) -> Markup:
        lines, words = self._marks()
        parts = [*self._grid(), *lines]
        for line, band in zip(self.lines, self.bands, strict=True):
            parts.append(self._line(line, band))
        parts += words
        if self.named:
            parts += self._labels()
        return svg(self.axes.title, self.width, self.height, parts)

    def _grid(self) -> list[Markup]:
        parts = []
        for tick in self.y_ticks:
            y = self.y(tick)
            parts.append(_element("line", {"class": "grid", "x1": self.left, "x2": self.right, "y1": y, "y2": y}))
            parts.append(text(tick_label(tick, self.y_step, self.y_most), self.left - 6, y + 4, anchor="end"))
        if self.axes.y:
            parts.append(text(self.axes.y, 2, 11))
        step, ticks = 1.0, round_ticks(self.x_low, self.x_high, max(2, int((self.right - self.left) / 45)))
        if len(ticks) > 1:
            step = ticks[1] - ticks[0]
        for tick in ticks:
            if self.x_low <= tick <= self.x_high and tick == round(tick):
                label = tick_label(tick, max(step, 1.0), self.x_high)
                half = len(label) * _CHARACTER / 2
                at = min(max(self.x(tick), half), self.width - half)
                parts.append(text(label, at, self.bottom + 16, anchor="middle"))
        parts.append(text(self.axes.x, (self.left + self.right) / 2, self.height - 4, anchor="middle"))
        return parts

    def _marks(self) -> tuple[list[Markup], list[Markup]]:
        """Lines where something begins, and names of those that have room until the next."""
        marks = [(label, self.x(value)) for label, value in self.axes.marks if self.x_low <= value <= self.x_high]
        ends = [*(at for _, at in marks[1:]), self.right][: len(marks)]
        line = {"class": "mark", "y1": self.top, "y2": self.bottom}
        lines = [_element("line", {**line, "x1": at, "x2": at}, title=label) for label, at in marks]
        words = [
            text(label, at + 4, self.top + 10)
            for (label, at), end in zip(marks, ends, strict=True)
            if label and at + 8 + len(label) * _CHARACTER <= end
        ]
        return lines, words

    def _line(self, line: Line, band: Sequence[tuple[float, float, float]]) -> Markup:
        parts = []
        if band:
            upper = [(self.x(x), self.y(high)) for x, _, high in band]
            lower = [(self.x(x), self.y(low)) for x, low, _ in reversed(band)]
            parts.append(_element("path", {"class": "band", "d": f"M{_path(upper + lower)}Z"}))
        dashes = {"stroke-dasharray": "6 4"} if line.dashed else {}
        pieces = _pieces([(self.x(x), self.y(y)) for x, y in line.points])
        if path := "".join(f"M{_path(piece)}" for piece in pieces if len(piece) > 1):
            parts.append(_element("path", {"class": "line", "d": path, **dashes}))
        known = [(x, y) for x, y in line.points if math.isfinite(y)]
        for at, value in known:
            x, y = self.x(at), self.y(value)
            if len(known) <= _MARKED:
                parts.append(_element("circle", {"class": "dot", "cx": x, "cy": y, "r": 2.6}))
            hover = f"{line.label}, {self.axes.x} {told(at)}: {told(value)}"
            parts.append(_element("circle", {"class": "hit", "cx": x, "cy": y, "r": 7}, title=hover))
        return Markup('<g style="{}">{}</g>').format(colour(line.colour), Markup("").join(parts))

    def _labels(self) -> list[Markup]:
        wanted = [self.y([y for _, y in line.points if math.isfinite(y)][-1]) + 4 for line in self.lines]
        places = spread_labels(wanted, self.top + 4, self.bottom + 4)
        return [
            text(short(line.label, self.longest), self.right + 8, place, of=line.colour, full=line.label)
            for line, place in zip(self.lines, places, strict=True)
        ]


def stacked_chart(
    names: Sequence[str], rows: Sequence[tuple[float, Sequence[float]]], axes: Axes, size: tuple[int, int]
) -> Markup:
    """Shares of a whole over x, one above the other; at most as many as there are colours, others
    together in grey; and a legend."""
    if len(rows) < 2 or not names:
        return Markup("")
    names, rows = _largest(names, rows)
    width, height = size
    left, right, top, bottom = 44.0, width - 12.0, 10.0, height - 34.0
    first, last = rows[0][0], max(rows[-1][0], rows[0][0] + 1)
    xs = [left + (x - first) / (last - first) * (right - left) for x, _ in rows]
    parts = []
    floor = [0.0] * len(rows)
    for place, name in enumerate(names):
        ceiling = [low + shares[place] for low, (_, shares) in zip(floor, rows, strict=True)]
        edge = [(x, bottom - high * (bottom - top)) for x, high in zip(xs, ceiling, strict=True)]
        edge += [(x, bottom - low * (bottom - top)) for x, low in reversed(list(zip(xs, floor, strict=True)))]
        style = colour(place if place < COLOURS else None)
        parts.append(_element("path", {"class": "area", "style": style, "d": f"M{_path(edge)}Z"}, title=name))
        floor = ceiling
    for share in (0.0, 0.5, 1.0):
        y = bottom - share * (bottom - top)
        parts.append(_element("line", {"class": "grid", "x1": left, "x2": right, "y1": y, "y2": y}))
        parts.append(text(f"{share:.0%}", left - 6, y + 4, anchor="end"))
    for tick in round_ticks(first, last, max(2, int((right - left) / 45))):
        if first <= tick <= last and tick == round(tick):
            at = left + (tick - first) / (last - first) * (right - left)
            parts.append(text(tick_label(tick, 1.0, last), min(at, width - 14), bottom + 16, anchor="middle"))
    parts.append(text(axes.x, (left + right) / 2, height - 4, anchor="middle"))
    for place, (x, (step, shares)) in enumerate(zip(xs, rows, strict=True)):
        begin = (xs[place - 1] + x) / 2 if place else left
        end = (x + xs[place + 1]) / 2 if place + 1 < len(xs) else right
        hover = ", ".join(f"{name} {share:.0%}" for name, share in zip(names, shares, strict=True))
        box = {"class": "hit", "x": begin, "width": max(end - begin, 0.1), "y": top, "height": bottom - top}
        parts.append(_element("rect", box, title=f"{axes.x} {told(step)}: {hover}"))
    return svg(axes.title, width, height, parts) + _legend(names)


def _largest(
    names: Sequence[str], rows: Sequence[tuple[float, Sequence[float]]]
) -> tuple[list[str], list[tuple[float, list[float]]]]:
    """As many of the largest as there are colours, in their order, and the sum of the others; rows made few."""
    by_name = [thin([(x, shares[place]) for x, shares in rows], _MAX_POINTS)[0] for place in range(len(names))]
    xs = [x for x, _ in by_name[0]]
    columns = [[share for _, share in points] for points in by_name]
    order = sorted(range(len(names)), key=lambda place: -math.fsum(columns[place]))
    kept = sorted(order[:COLOURS])
    found = [str(names[place]) for place in kept]
    shown = [(x, [columns[place][row] for place in kept]) for row, x in enumerate(xs)]
    if len(names) > COLOURS:
        found.append(f"{len(names) - COLOURS} others")
        shown = [(x, [*shares, max(0.0, 1 - math.fsum(shares))]) for x, shares in shown]
    return found, shown


def range_chart(
    rows: Sequence[tuple[str, float | None, float | None, tuple[float, float] | None]],
    axes: Axes,
    size: tuple[int, int],
) -> Markup:
    """Rows of (name, value before, after, interval of the latter): a hollow dot, a full one and what lies between."""
    values = [value for _, before, after, ends in rows for value in (before, after, *(ends or ())) if value is not None]
    if not values:
        return Markup("")
    ticks = round_ticks(min(values), max(values), max(3, size[0] // 130))
    left, right, top, each = 12.0, size[0] - 16.0, 6.0, 36
    bottom, room = top + each * len(rows), int((right - left) / _CHARACTER)

    def x(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (right - left)

    parts = []
    for tick in ticks:
        parts.append(_element("line", {"class": "grid", "x1": x(tick), "x2": x(tick), "y1": top, "y2": bottom}))
        parts.append(text(tick_label(tick, ticks[1] - ticks[0]), x(tick), bottom + 16, anchor="middle"))
    parts.append(text(axes.x, (left + right) / 2, bottom + 32, anchor="middle"))
    for place, (name, before, after, ends) in enumerate(rows):
        y = top + each * place + 25
        row = [text(short(name, room), left, y - 10.0)]
        if before is not None and after is not None:
            row.append(_element("line", {"class": "line", "x1": x(before), "x2": x(after), "y1": y, "y2": y}))
        if ends is not None:
            hover = f"{name}, interval {told(ends[0])} to {told(ends[1])}"
            row.append(
                _element("line", {"class": "interval", "x1": x(ends[0]), "x2": x(ends[1]), "y1": y, "y2": y}, hover)
            )
        if before is not None:
            row.append(
                _element(
                    "circle", {"class": "ring", "cx": x(before), "cy": y, "r": 5.0}, f"{name}, before: {told(before)}"
                )
            )
        if after is not None:
            row.append(
                _element("circle", {"class": "dot", "cx": x(after), "cy": y, "r": 5.0}, f"{name}, after: {told(after)}")
            )
        parts.append(Markup('<g style="{}">{}</g>').format(colour(0), Markup("").join(row)))
    return svg(axes.title, size[0], int(bottom + 38), parts)


def _legend(names: Sequence[str]) -> Markup:
    """Names with their colours, as text of the page."""
    items = [
        Markup('<span class="key" style="{}">{}</span>').format(colour(place if place < COLOURS else None), name)
        for place, name in enumerate(names)
    ]
    return Markup('<p class="legend">{}</p>').format(Markup(" ").join(items))


def svg(title: str, width: int, height: int, parts: Sequence[Markup]) -> Markup:
    """A picture that is as wide as its place and no wider than it was drawn for."""
    return Markup(
        '<svg class="chart" role="img" aria-label="{}" viewBox="0 0 {} {}" style="max-width: {}px">{}</svg>'
    ).format(title, width, height, width, Markup("").join(parts))


def text(value: str, x: float, y: float, *, anchor: str = "start", of: int | None = -1, full: str = "") -> Markup:
    """Words in a picture; of a colour where they name a line."""
    style = Markup(' class="name" style="{}"').format(colour(of)) if of != -1 else Markup("")
    title = Markup("<title>{}</title>").format(full) if full else Markup("")
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}"{}>{}{}</text>').format(
        x, y, anchor, style, title, value
    )


def colour(place: int | None) -> str:
    """The style that sets a series' colour."""
    return "--s: var(--faint)" if place is None else f"--s: var(--c{place % COLOURS})"


def _longest_label(width: int) -> int:
    """Characters that a chart has room for beside it."""
    return 18 if width > 500 else 12


def short(label: str, most: int) -> str:
    """A label no longer than that."""
    return label if len(label) <= most else f"{label[: most - 1]}\u2026"


def _pieces(points: Points) -> list[list[tuple[float, float]]]:
    """A curve without its gaps."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            pieces[-1].append((x, y))
        else:
            pieces.append([])
    return pieces


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _element(name: str, attributes: dict[str, str | float], title: str = "") -> Markup:
    written = "".join(
        f' {key}="{value:.1f}"' if isinstance(value, float) else f' {key}="{escape(value)}"'
        for key, value in attributes.items()
    )
    inside = f"><title>{escape(title)}</title></{name}>" if title else "/>"
    return Markup(f"<{name}{written}{inside}")
