"""A run of `puyu bench serve` as one SVG: distributions of TTFT and ITL, and output over time.

Stands alone in a browser, light or dark; the times have a logarithmic axis where they span more than a decade.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from puyu.chain.charts import Axis, Point, nice_ticks, short, svg
from puyu.load.report import describe, percentile, rates, samples, summary
from puyu.load.run import LoadConfig, Result, Row

WIDTH, PANEL, LEFT, RIGHT, HEAD, GAP = 640.0, 190.0, 58.0, 22.0, 82.0, 62.0
POINTS, BINS = 300, 40
MARKED = {"median": 0.5, "p99": 0.99}

STYLE = """<style>
svg { --page: #fbfaf7; --ink: #1d282d; --soft: #5d6a70; --line: #e5e1d8; --c0: #0f766e; --c1: #b45309; --c2: #4f46e5;
  background: var(--page); font-family: ui-sans-serif, system-ui, "Segoe UI", "Noto Sans", sans-serif; }
@media (prefers-color-scheme: dark) { svg { --page: #11171a; --ink: #e4e9e8; --soft: #95a3a8; --line: #2b363b;
  --c0: #4fc9b8; --c1: #f0b055; --c2: #a3a8ff; } }
text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.title { font-size: 14px; font-weight: 600; fill: var(--ink); }
.big { font-size: 17px; font-weight: 600; fill: var(--ink); }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); opacity: .6; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.l0 { stroke: var(--c0); } .l1 { stroke: var(--c1); } .l2 { stroke: var(--c2); }
.d0 { fill: var(--c0); } .d1 { fill: var(--c1); } .d2 { fill: var(--c2); } .mark { font-weight: 600; }
</style>"""


@dataclass(frozen=True, slots=True)
class Scale:
    """From data to the drawing, linear or logarithmic."""

    axis: Axis
    is_log: bool

    def at(self, value: float) -> float:
        return self.axis.at(math.log10(value) if self.is_log else value)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Place and label of each."""
        found = [(tick, 10**tick if self.is_log else tick) for tick in self.axis.ticks]
        return [(self.axis.at(tick), short(float(f"{value:.4g}"))) for tick, value in found]


def drawing(result: Result, config: LoadConfig) -> str:
    """The whole picture."""
    values = samples(result.rows)
    tops = [HEAD + 30 + number * (PANEL + GAP) for number in range(3)]
    panels = [
        _distribution(values["ttft"], tops[0], title="Time to first token", color=0),
        _distribution(values["itl"], tops[1], title="Time between pieces of text", color=1),
        _output(result, tops[2]),
    ]
    head = _text("big", LEFT - 40, 28, f"{result.model} at {config.url}")
    head += _text("", LEFT - 40, 48, describe(config)) + _text("", LEFT - 40, 66, rates(summary(result, config)))
    body = STYLE + head + "".join(panels)
    return svg(WIDTH, HEAD + len(panels) * (PANEL + GAP), body, label="a run of puyu bench serve") + "\n"


def _distribution(seconds: Sequence[float], top: float, *, title: str, color: int) -> str:
    """Share of values that are at most so large."""
    ordered = sorted(1000 * value for value in seconds)
    if not ordered:
        return _text("title", LEFT, top - 12, f"{title}: no values")
    # pieces that came together have a gap of 0, which a logarithmic axis cannot show
    floor = max(percentile(ordered, 0.5) / 100, 1e-3)
    ordered = [max(value, floor) for value in ordered]
    across = _scale(ordered[0], ordered[-1])
    up = Axis(0.0, 1.0, top + PANEL, top, (0.0, 0.25, 0.5, 0.75, 1.0))
    parts = [_frame(across, up, title=f"{title}, ms", percent=True)]
    parts.append(_line([(across.at(x), up.at(y)) for x, y in cumulative(ordered)], color))
    for name, share in MARKED.items():
        value = percentile(ordered, share)
        x, y = across.at(value), up.at(share)
        parts.append(f'<circle class="d{color}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
        # the curve leaves room at its lower right and at its upper left
        right = x < WIDTH - 160
        place, level, anchor = (x + 8, y + 16, "start") if right else (x - 8, y - 7, "end")
        parts.append(_text(f"mark d{color}", place, level, f"{name} {value:,.1f} ms", anchor=anchor))
    return "".join(parts)


def cumulative(ordered: Sequence[float]) -> Iterator[Point]:
    """Points of the distribution function, which meets every `percentile`: evenly spaced, and all of the largest."""
    last = len(ordered) - 1
    stride = max(1, last // POINTS)
    for index in range(last + 1):
        if index % stride == 0 or index >= last - 20:
            yield ordered[index], index / last if last else 1.0


def _scale(low: float, high: float) -> Scale:
    if high / low <= 10:
        return Scale(_axis(low, high), False)
    first, last = math.floor(math.log10(low) * 3) / 3, math.ceil(math.log10(high) * 3) / 3
    powers = range(math.floor(first), math.ceil(last) + 1)
    spots = [power + math.log10(part) for power in powers for part in (1, 2, 5)]
    ticks = [spot for spot in spots if first <= spot <= last]
    few = ticks if len(ticks) <= 9 else [spot for spot in ticks if abs(spot - round(spot)) < 1e-9]
    return Scale(Axis(first, last, LEFT, WIDTH - RIGHT, tuple(few)), True)


def _axis(low: float, high: float) -> Axis:
    room = 0.05 * (high - low) or 0.1 * high or 1.0
    low, high = max(low - room, 0.0), high + room
    return Axis(low, high, LEFT, WIDTH - RIGHT, nice_ticks(low, high, 7))


def output_over_time(rows: Sequence[Row], seconds: float) -> tuple[list[Point], bool]:
    """(second, tokens a second) by bins; pieces of text where nobody counted tokens, then False."""
    counted = all(row.output_tokens is not None for row in rows)
    width = max(seconds, 1e-6) / BINS
    bins = [0.0] * BINS
    for row in rows:
        each = (row.output_tokens or 0) / len(row.chunks) if counted and row.chunks else 1.0
        for chunk in row.chunks:
            bins[min(int((row.sent + chunk) / width), BINS - 1)] += each
    return [((index + 0.5) * width, value / width) for index, value in enumerate(bins)], counted


def _output(result: Result, top: float) -> str:
    rows = [row for row in result.rows if row.is_ok]
    points, counted = output_over_time(rows, result.seconds)
    most = max(value for _, value in points) or 1.0
    across = Scale(Axis(0.0, max(result.seconds, 1e-6), LEFT, WIDTH - RIGHT, nice_ticks(0.0, result.seconds, 7)), False)
    up = Axis(0.0, 1.08 * most, top + PANEL, top, nice_ticks(0.0, 1.08 * most, 4))
    unit = "tokens" if counted else "pieces"
    title = f"Output, {unit} a second, over the seconds of the run"
    return _frame(across, up, title=title) + _line([(across.at(x), up.at(y)) for x, y in points], 2)


def _frame(across: Scale, up: Axis, *, title: str, percent: bool = False) -> str:
    """Axes with ticks under a title."""
    base, parts = up.start, [_text("title", LEFT, up.end - 14, title)]
    for tick in up.ticks:
        y = up.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(_text("", LEFT - 8, y + 4, f"{tick:.0%}" if percent else short(tick), anchor="end"))
    for x, label in across.ticks:
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{base}" x2="{x:.1f}" y2="{base + 4}"/>')
        parts.append(_text("", x, base + 18, label, anchor="middle"))
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{base}" x2="{WIDTH - RIGHT}" y2="{base}"/>')
    return "".join(parts)


def _line(points: Sequence[Point], color: int) -> str:
    return f'<polyline class="line l{color}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _text(css: str, x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
