"""Charts as inline SVG text: lines with axes, dots with intervals, lanes of a lineage. Pure functions, no script.

Colors come from CSS classes (`c0` ... `c5`), so one drawing serves light and dark. Drawings are about 480 units wide
with 13-unit text, which stays readable on a phone. Every string that comes from data is escaped here.

    svg = line_chart([Series("loss", points, smooth=True)], x="step", y="loss, nats/token")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise

Point = tuple[float, float]

WIDTH, HEIGHT = 480.0, 260.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 28.0, 40.0
COLORS = 6


@dataclass(frozen=True, slots=True)
class Series:
    """One line. `smooth` draws the raw values faintly and their running mean over them."""

    name: str
    points: Sequence[Point]
    smooth: bool = False
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Band:
    """A labeled stretch of the x axis (a training phase)."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear scale from data to the drawing, with its ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


# --- numbers -------------------------------------------------------------------------------------------------------


def finite(points: Sequence[Point]) -> list[Point]:
    """Points with both coordinates finite: NaN and infinities cannot be drawn."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def nice_ticks(low: float, high: float, count: int = 5) -> tuple[float, ...]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high]."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return (low,)
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return tuple(round(i * step, 12) for i in range(first, last + 1))


def axis(values: Sequence[float], start: float, end: float, *, pad: float = 0.06, count: int = 5) -> Axis:
    """A scale that holds all values; a constant gets room above and below."""
    low, high = min(values), max(values)
    if high == low:
        room = abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    else:
        low, high = low - (high - low) * pad, high + (high - low) * pad
    return Axis(low, high, start, end, nice_ticks(low, high, count))


def smoothed(points: Sequence[Point], reach: int) -> list[Point]:
    """Centered running mean over `reach` neighbors on each side, so that it does not lag.

    It starts at the first value and ends at the mean of the last ones: a start is steep, an end is noisy.
    """
    sums = [0.0, *accumulate(y for _, y in points)]
    result = []
    for i, (x, _) in enumerate(points):
        left = min(reach, i)
        right = min(left, len(points) - 1 - i)
        result.append((x, (sums[i + right + 1] - sums[i - left]) / (left + right + 1)))
    return result


def thinned(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` points, each the mean of a run of neighbors; all of them when there are few."""
    if len(points) <= limit:
        return list(points)
    edges = [round(i * len(points) / limit) for i in range(limit + 1)]
    groups = [points[a:b] for a, b in pairwise(edges) if b > a]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def plain(value: float) -> str:
    """A number for a sentence: counts in full up to a million, else as `short`."""
    return f"{value:,}" if isinstance(value, int) and abs(value) < 1_000_000 else short(value)


def short(value: float) -> str:
    """A number for a label: 1.2k, 3.4M, 0.003, 12."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


# --- lines ---------------------------------------------------------------------------------------------------------


def line_chart(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    bands: Sequence[Band] = (),
    notes: Sequence[tuple[float, str]] = (),
    zero: bool = False,
) -> str:
    """Lines over axes with ticks; `notes` mark places on the x axis; `zero` keeps 0 in view. Empty text when there is
    nothing to draw."""
    drawn = [Series(s.name, finite(s.points), s.smooth, s.dashed) for s in series if finite(s.points)]
    if not drawn:
        return ""
    across = axis([px for s in drawn for px, _ in s.points], LEFT, WIDTH - RIGHT, pad=0.0)
    values = [py for s in drawn for _, py in s.points] + ([0.0] if zero else [])
    up = axis(values, HEIGHT - BOTTOM, TOP, pad=0.1)
    parts = [_bands(bands, across), _grid(across, up, x=x, y=y)]
    parts += [_line(s, i, across, up) for i, s in enumerate(drawn)]
    parts += [_marks(s, i, across, up, x=x) for i, s in enumerate(drawn)]
    inside = [(place, text) for place, text in notes if across.low <= place <= across.high]
    parts += [_rule("alarm", (across.at(p), TOP), (across.at(p), HEIGHT - BOTTOM), title=text) for p, text in inside]
    parts.append(_ends(drawn, across, up, top=TOP + 27 if bands else TOP))
    legend = _legend([s.name for s in drawn]) if len(drawn) > 1 else ""
    return legend + svg(WIDTH, HEIGHT, "".join(parts), label=f"{y} over {x}")


def svg(width: float, height: float, body: str, *, label: str) -> str:
    """The frame of a drawing; `label` is read aloud in its place."""
    return (
        f'<svg viewBox="0 0 {_n(width)} {_n(height)}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )


def _text(css: str, x: float, y: float, text: str, *, anchor: str = "start", dy: str = "0") -> str:
    place = f'x="{_n(x)}" y="{_n(y)}" dy="{dy}" text-anchor="{anchor}"'
    return f'<text class="{css}" {place}>{escape(text)}</text>'


def _rule(css: str, start: Point, end: Point, *, title: str = "") -> str:
    place = f'x1="{_n(start[0])}" y1="{_n(start[1])}" x2="{_n(end[0])}" y2="{_n(end[1])}"'
    return f'<line class="{css}" {place}>{_title(title)}</line>'


def _circle(css: str, x: float, y: float, radius: float, *, title: str = "") -> str:
    return f'<circle class="{css}" cx="{_n(x)}" cy="{_n(y)}" r="{radius}">{_title(title)}</circle>'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _grid(across: Axis, up: Axis, *, x: str, y: str) -> str:
    base, left, right = HEIGHT - BOTTOM, LEFT, WIDTH - RIGHT
    parts = [_text("unit", 2, 11, y)]
    for tick in up.ticks:
        parts.append(_rule("grid", (left, up.at(tick)), (right, up.at(tick))))
        parts.append(_text("tick", left - 7, up.at(tick), short(tick), anchor="end", dy=".35em"))
    for tick in across.ticks:
        place = across.at(tick)
        parts.append(_rule("axis", (place, base), (place, base + 4)))
        anchor = "end" if place > right - 12 else "middle"
        parts.append(_text("tick", place, base + 17, short(tick), anchor=anchor))
    parts.append(_rule("axis", (left, base), (right, base)))
    parts.append(_text("unit", right, HEIGHT - 5, x, anchor="end"))
    return "".join(parts)


def _bands(bands: Sequence[Band], across: Axis) -> str:
    parts = []
    for number, band in enumerate(bands):
        left, right = across.at(max(band.start, across.low)), across.at(min(band.end, across.high))
        size = f'width="{_n(max(right - left, 0))}" height="{_n(HEIGHT - BOTTOM - TOP)}"'
        parts.append(f'<rect class="band b{number % 2}" x="{_n(left)}" y="{_n(TOP)}" {size}/>')
        if right - left > 7 * len(band.name):  # a name must fit into its band
            parts.append(_text("tick", right - 5, TOP + 13, band.name, anchor="end"))
    return "".join(parts)


def _line(series: Series, color: int, across: Axis, up: Axis) -> str:
    main = _main(series)
    raw = _path(thinned(series.points, 400), across, up, f"raw c{color % COLORS}") if series.smooth else ""
    dashed = " dashed" if series.dashed else ""
    return raw + _path(thinned(main, 240), across, up, f"line c{color % COLORS}{dashed}")


def _main(series: Series) -> list[Point]:
    return smoothed(series.points, max(1, len(series.points) // 50)) if series.smooth else list(series.points)


def _path(points: Sequence[Point], across: Axis, up: Axis, css: str) -> str:
    steps = " ".join(f"{_n(across.at(x))},{_n(up.at(y))}" for x, y in points)
    return f'<polyline class="{css}" points="{steps}"/>'


def _marks(series: Series, color: int, across: Axis, up: Axis, *, x: str) -> str:
    """Places to point at: hovering one names its step and value; the last value stands beside its dot."""
    main, css, parts = _main(series), f"c{color % COLORS}", []
    for px, py in [*thinned(main, 40), main[-1]]:
        title = f"{series.name}: {py:.4g} at {x} {short(px)}"
        parts.append(_circle(f"mark {css}", across.at(px), up.at(py), 5, title=title))
    return "".join(parts)


def _ends(series: Sequence[Series], across: Axis, up: Axis, *, top: float) -> str:
    """The last value of each line beside its dot: the lowest below it, the others above, a line of text apart, between
    `top` and the axis."""
    ordered = sorted(enumerate(series), key=lambda item: -_main(item[1])[-1][1])
    room, lowest, above = 13.0, HEIGHT - BOTTOM - 4, top - 13.0
    dots, texts = "", ""
    for rank, (color, line) in enumerate(ordered):
        (px, py), css, left = _main(line)[-1], f"c{color % COLORS}", len(ordered) - rank - 1
        wanted = up.at(py) + (17 if rank and not left else -9)
        above = min(max(wanted, above + room), lowest - room * left)
        dots += _circle(f"end {css}", across.at(px), up.at(py), 3.2)
        texts += _text(f"value {css}", across.at(px), above, short(float(f"{py:.3g}")), anchor="end")
    return texts + dots


def _legend(names: Sequence[str]) -> str:
    items = (f'<span><i class="swatch c{i % COLORS}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="legend">{"".join(items)}</div>'


# --- dots with intervals -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dot:
    """A value with its 95 % interval."""

    name: str
    value: float
    low: float
    high: float
    note: str = ""


Rows = Sequence[tuple[str, Sequence[Dot]]]


def dot_chart(rows: Rows, names: Sequence[str], *, reference: Mapping[str, float]) -> str:
    """One block per row on a scale of 0 to 100 %: a dot and a whisker per name; `reference` marks chance by row."""
    if not rows:
        return ""
    line, gap = 15.0, 30.0
    scale = Axis(0.0, 1.0, 10.0, WIDTH - 56.0, (0.0, 0.25, 0.5, 0.75, 1.0))
    parts, y = [], 4.0
    for title, dots in rows:
        bottom = y + gap - 8 + line * len(dots)
        parts.append(_text("rowname", scale.start, y + 14, title))
        parts += [_rule("grid", (scale.at(tick), y + 21), (scale.at(tick), bottom)) for tick in scale.ticks]
        if title in reference:
            place, note = scale.at(reference[title]), f"blind guessing: {reference[title]:.1%}"
            parts.append(_rule("chance", (place, y + 21), (place, bottom), title=note))
        for number, dot in enumerate(dots):
            parts.append(_dot(dot, names.index(dot.name), scale, y + gap + line * number))
        y = bottom + 8
    parts += [_text("tick", scale.at(tick), y + 10, f"{tick:.0%}", anchor="middle") for tick in scale.ticks]
    return _legend(names) + svg(WIDTH, y + 16, "".join(parts), label="results with 95 % intervals")


def _dot(dot: Dot, color: int, scale: Axis, y: float) -> str:
    css = f"c{color % COLORS}"
    low, high = (scale.at(min(1.0, max(0.0, value))) for value in (dot.low, dot.high))
    title = f"{dot.name}: {dot.value:.1%} [{dot.low:.1%}, {dot.high:.1%}] {dot.note}".rstrip()
    whisker = _rule(f"whisker {css}", (low, y), (high, y))
    point = _circle(f"end {css}", scale.at(dot.value), y, 4.4)
    label = _text(f"value {css}", WIDTH, y, f"{dot.value:.0%}", anchor="end", dy=".35em")
    return f"<g>{_title(title)}{whisker}{point}{label}</g>"


# --- lineage as lanes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lane:
    """One artifact: its label, a line of detail, and the names of the artifacts that it was made from."""

    name: str
    label: str
    detail: str
    parents: tuple[str, ...]


def lane_chart(nodes: Sequence[Lane]) -> str:
    """Artifacts from top to bottom; each one's lane runs down to the last that was made from it (as in a git log)."""
    if not nodes:
        return ""
    rows = {node.name: number for number, node in enumerate(nodes)}
    last = {node.name: rows[node.name] for node in nodes}
    for node in nodes:
        for parent in node.parents:
            last[parent] = max(last[parent], rows[node.name])
    columns = _columns(nodes, rows, last)
    width, height = 18.0, 46.0
    text_x = (max(columns.values()) + 1) * width + 16

    def x_of(name: str) -> float:
        return 12 + columns[name] * width

    def y_of(name: str) -> float:
        return 24 + rows[name] * height

    parts = [_edges(node, rows, x_of, y_of) for node in nodes]
    for node in nodes:
        y = y_of(node.name)
        parts.append(_circle(f"node c{rows[node.name] % COLORS}", x_of(node.name), y, 6))
        parts.append(_text("rowname", text_x, y - 1, node.label))
        parts.append(_text("tick", text_x, y + 15, node.detail))
    return svg(WIDTH, len(nodes) * height + 8, "".join(parts), label="lineage")


def _columns(nodes: Sequence[Lane], rows: Mapping[str, int], last: Mapping[str, int]) -> dict[str, int]:
    """The leftmost lane that is free from a node's row on (it may end there) to the row of its last child."""
    busy_until: list[int] = []
    columns = {}
    for node in nodes:
        row = rows[node.name]
        free = next((i for i, until in enumerate(busy_until) if until <= row), len(busy_until))
        if free == len(busy_until):
            busy_until.append(0)
        busy_until[free] = last[node.name]
        columns[node.name] = free
    return columns


def _edges(node: Lane, rows: Mapping[str, int], x_of: Callable[[str], float], y_of: Callable[[str], float]) -> str:
    """From each parent straight down its lane, then with a round corner to the node."""
    parts = []
    x2, y2 = x_of(node.name), y_of(node.name)
    for parent in node.parents:
        x1, y1 = x_of(parent), y_of(parent)
        turn = min(14.0, abs(x2 - x1))
        corner = x1 + math.copysign(turn, x2 - x1)
        shape = f"M{_n(x1)},{_n(y1)} V{_n(y2 - 14)} Q{_n(x1)},{_n(y2)} {_n(corner)},{_n(y2)} H{_n(x2)}"
        if x1 == x2:
            shape = f"M{_n(x1)},{_n(y1)} V{_n(y2)}"
        color = rows[parent] % COLORS
        title = f"<title>{escape(parent)} → {escape(node.name)}</title>"
        parts.append(f'<path class="edge c{color}" d="{shape}">{title}</path>')
    return "".join(parts)


def _n(value: float) -> str:
    """A coordinate: one decimal at most."""
    return f"{value:.1f}".removesuffix(".0")
