"""Figures of a moment -> the panel that shows them, in a given width and height. Pure."""

from collections.abc import Sequence
from datetime import timedelta
from itertools import zip_longest

from rich.box import ROUNDED
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from dylora_moe.train.live.figures import Curve, Figures, Load, Place
from dylora_moe.train.live.sparkline import sparkline

# The one colour besides those that judge.
_ACCENT, _QUIET, _GOOD, _BAD, _WARN = "cyan", "dim", "green", "red", "yellow"
_TITLE = "bold not dim"  # on the frame, which is dim
# Of the whole panel; a wider one only takes the eye longer ways.
_MAX_WIDTH = 140
# From here on losses and loads stand side by side, and figures have names of full length.
_WIDE, _MEDIUM = 110, 66
_HALF = (_WIDE - 4) // 2
# Lines of the terminal that are left for what scrolls, the frame, and the empty line below it for the cursor.
_ABOVE, _FRAME, _BELOW = 6, 2, 1
# Experts with a bar of their own.
_MAX_EXPERTS = 12
_WARNINGS = 2
# Widths of columns; the first is that of a name which a third of the row would cut.
_LABEL, _VALUE, _CHANGE, _SHARE = 15, 7, 6, 4
_MIN_CURVE = 4


def draw(figures: Figures, *, width: int, height: int) -> RenderableType:
    """The panel; where there is no room for all of it, the less important parts are left out.

    Args:
        figures: To show.
        width: Of the room for it, in characters.
        height: Of the terminal, in lines.
    """
    width = min(width, _MAX_WIDTH)
    inner, room = width - 4, max(height - _ABOVE - _FRAME - _BELOW, 1)
    if inner < 1:
        return Text(f"{_percent(figures)}%"[: max(width, 0)])
    rows = _rows(figures, inner, room)
    panel = Panel(
        Group(*rows), box=ROUNDED, width=width, title=_title(figures), title_align="left", border_style=_QUIET
    )
    return Group(panel, Text(""))


def _title(figures: Figures) -> Text:
    place = figures.place
    if place is None:
        return Text(_plain(figures.name), style=_TITLE)
    skill = place.decided[-1].skill if place.decided else figures.name
    return Text.assemble(
        (_plain(place.run), _TITLE), (f"  skill {place.number} of {place.total}: {_plain(skill)}", "not dim")
    )


def _rows(figures: Figures, width: int, room: int) -> list[Text]:
    """As many rows as there is room for."""
    head = [_progress(figures, width), *_facts(figures, width)][:room]
    tail = [*_decided(figures.place, width), *_warnings(figures.warnings, width)]
    tail = tail[max(len(tail) - (room - len(head)) // 3, 0) :]
    body = _body(figures, width, room - len(head) - len(tail))
    parts = [part for part in (head, *body, tail) if part]
    if sum(map(len, parts)) + len(parts) - 1 > room:  # no room to set them apart
        return [row for part in parts for row in part]
    return [row for place, part in enumerate(parts) for row in ([Text("")] if place else []) + part]


def _body(figures: Figures, width: int, room: int) -> list[list[Text]]:
    """Losses and loads: side by side where the width allows, else one above the other."""
    if width >= _WIDE and figures.loads and figures.training:
        half = (width - 4) // 2
        left, right = _losses(figures, half, room), _loads(figures, width - 4 - half, room)
        pairs = zip_longest(left, right, fillvalue=Text(""))
        return [[_fit(one, half) + Text("    ") + other for one, other in pairs]]
    losses, loads = _losses(figures, width, room), _loads(figures, width, room)
    if len(losses) + len(loads) > room:
        for_losses = max(room - len(loads), -(-room // 2))
        losses = _losses(figures, width, for_losses)
        loads = _loads(figures, width, room - len(losses))
    return [losses, loads]


def _progress(figures: Figures, width: int) -> Text:
    digits = len(str(figures.max_steps))
    steps = f"{figures.step:>{digits}}/{figures.max_steps}"
    if width >= _MEDIUM:
        steps = f"step {figures.step:>{digits}} of {figures.max_steps}"
    text = f"{_percent(figures):>3}%  {steps}"
    bar = _bar(figures.step / max(figures.max_steps, 1), width - len(text) - 1)
    return _fit(bar + Text(f" {text}"), width)


def _percent(figures: Figures) -> int:
    """Rounded down, so that the last step alone is 100."""
    return 100 * figures.step // max(figures.max_steps, 1)


def _facts(figures: Figures, width: int) -> list[Text]:
    """Name and figure in columns, the most important first."""
    columns = 5 if width >= _WIDE else 3 if width >= _MEDIUM else 2
    long = width >= _MEDIUM
    facts = [("elapsed ", _time(figures.elapsed_s))]
    facts.append(("left ", _time(figures.left_s) if figures.left_s is not None else "-"))
    if figures.tokens_per_second is not None:
        facts.append(("", f"{figures.tokens_per_second:,.0f} tokens/s"))
    if figures.memory_gb is not None:
        share = "" if figures.memory_share is None else f", {figures.memory_share:.0%}"
        facts.append(("memory " if long else "", f"{figures.memory_gb:.2f} GB{share}"))
    if figures.learning_rate is not None and long:
        facts.append(("learning rate ", f"{figures.learning_rate:.2e}"))
    cells = [Text.assemble((name, _QUIET), value) for name, value in facts]
    each = width // columns
    return [
        _fit(Text("").join(_fit(cell, each) for cell in cells[start : start + columns]), width)
        for start in range(0, len(cells), columns)
    ]


def _losses(figures: Figures, width: int, room: int) -> list[Text]:
    """Training loss, the mean of validation, and its domains where there are several, in so many rows."""
    domains = figures.domains if len(figures.domains) > 1 else ()
    totals = [curve for curve in (figures.training, figures.validation) if curve is not None][: max(room, 0)]
    left = room - len(totals)
    shown = domains if len(domains) <= left else domains[: max(left - 1, 0)]
    label = _label_width([curve.name for curve in totals] + [f"  {curve.name}" for curve in shown], width)
    rows = [_loss(curve, curve.name, label, width) for curve in totals]
    rows += [_loss(curve, f"  {curve.name}", label, width) for curve in shown]
    if len(domains) > len(shown) and left > 0:
        rows.append(_fit(Text(f"  and {len(domains) - len(shown)} more domains", style=_QUIET), width))
    return rows


def _loss(curve: Curve, name: str, label: int, width: int) -> Text:
    gap = _gap(width)
    value = f"{curve.last:.3f}" if abs(curve.last) < 1000 else f"{curve.last:.2g}"
    across = width - label - _VALUE - _CHANGE - 2 * gap
    # Where there is no room for a curve, the figures alone.
    drawn = Text("")
    if across >= _MIN_CURVE:
        drawn = _fit(Text(sparkline(curve.points, across - gap), style=_ACCENT), across)
    cells = [_fit(Text(_plain(name)), label), drawn + Text(f"{value:>{_VALUE}}"), _change(curve)]
    return _fit(Text(" " * gap).join(cells), width)


def _change(curve: Curve) -> Text:
    change = curve.change
    if change is None:
        return Text(" " * _CHANGE)
    text = f"{change:+.0%}" if change < 9.995 else ">+999%"
    style = _QUIET if text in ("+0%", "-0%") else _GOOD if change < 0 else _BAD
    return Text(f"{text:>{_CHANGE}}", style=style)


def _loads(figures: Figures, width: int, room: int) -> list[Text]:
    """A bar an expert, in the router's order: of all, or of the largest and a row for the rest."""
    loads = figures.loads
    most = min(_MAX_EXPERTS, room - 1)
    if not loads or most < min(len(loads), 2):
        return []
    shown, rest = list(loads), list[Load]()
    if len(loads) > most:
        largest = sorted(loads, key=lambda load: -load.share)[: most - 1]
        shown, rest = ([load for load in loads if (load in largest) is inside] for inside in (True, False))
    title = Text("load of experts", style=_QUIET)
    if figures.router_entropy is not None:
        entropy = Text.assemble(("router entropy ", _QUIET), f"{figures.router_entropy:.2f}")
        title = _fit(title, width - entropy.cell_len) + entropy
    others = f"{len(rest)} others"
    label = _label_width([load.name for load in shown] + ([others] if rest else []), width)
    scale = max(load.share for load in loads) or 1.0
    rows = [_load(load, label, width, scale) for load in shown]
    if rest:
        dead = sum(load.dead for load in rest)
        note = Text(f"{dead} of them dead" if dead else "", style=_BAD)
        rows.append(_load_row(Text(others, style=_QUIET), label, note, sum(load.share for load in rest), width))
    return [_fit(title, width), *rows]


def _load(load: Load, label: int, width: int, scale: float) -> Text:
    bar = Text("dead", style=_BAD) if load.dead else _bar(load.share / scale, _across(label, width), track=False)
    return _load_row(Text(_plain(load.name)), label, bar, load.share, width)


def _load_row(name: Text, label: int, bar: Text, share: float, width: int) -> Text:
    gap = Text(" " * _gap(width))
    across = _across(label, width)
    return _fit(Text("").join([_fit(name, label), gap, _fit(bar, across), gap, Text(f"{share:>{_SHARE}.0%}")]), width)


def _across(label: int, width: int) -> int:
    """Room for the bar of an expert."""
    return width - label - _SHARE - 2 * _gap(width)


def _gap(width: int) -> int:
    return 2 if width >= _HALF else 1


def _decided(place: Place | None, width: int) -> list[Text]:
    """The newest decisions that fit into a row, older ones counted."""
    if place is None or not place.decided:
        return []
    words = [
        f"{_plain(one.skill)} {one.kind}" + (f" {_plain(one.expert)}" if one.kind in ("reuse", "extend") else "")
        for one in place.decided
    ]
    for skipped in range(len(words)):
        parts = ([f"{skipped} earlier"] if skipped else []) + words[skipped:]
        row = Text.assemble(("decided  ", _QUIET), ", ".join(parts))
        if row.cell_len <= width or skipped == len(words) - 1:
            return [_fit(row, width)]
    return []


def _warnings(warnings: Sequence[str], width: int) -> list[Text]:
    return [_fit(Text(_plain(text), style=_WARN), width) for text in warnings[-_WARNINGS:]]


def _bar(part: float, width: int, *, track: bool = True) -> Text:
    """A line whose length is a part of the width, to half a character."""
    halves = round(max(0.0, min(part, 1.0)) * 2 * max(width, 0))
    done = "\u2501" * (halves // 2) + "\u2578" * (halves % 2)
    rest = max(width, 0) - len(done)
    return Text.assemble((done, _ACCENT), (("\u2501" if track else " ") * rest, _QUIET))


def _label_width(names: Sequence[str], width: int) -> int:
    """The longest name, if a third of the row has room for it."""
    return min(max((Text(_plain(name)).cell_len for name in names), default=0), max(width // 3, _LABEL))


def _time(seconds: float) -> str:
    return str(timedelta(seconds=max(int(seconds), 0)))


def _fit(text: Text, width: int) -> Text:
    """Exactly so wide: filled with blanks, or cut."""
    fitted = Text(no_wrap=True).append_text(text)  # which makes its style one of its own characters only
    fitted.truncate(max(width, 0), overflow="ellipsis", pad=True)
    return fitted


def _plain(text: str) -> str:
    """Nothing that would move the cursor, whatever a name is made of."""
    return "".join(character if character.isprintable() else " " for character in text)
