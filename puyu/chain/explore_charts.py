"""The drawings of the explorer page: a histogram with its thresholds, and bars in parts. Pure functions, no script.

svg = histogram(facts.histograms[0])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from puyu.chain.charts import nice_ticks, short
from puyu.data.explore import COUNTS, Histogram, scaled

Across = Callable[[float], float]
"""A score on its axis -> x."""

WIDTH, HEIGHT = 480.0, 210.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 42.0, 12.0, 26.0, 30.0
_CUT = 2.5


def histogram(h: Histogram) -> str:
    """Stacked bars of the three outcomes over the score, thresholds as dashed lines, their dropped side shaded."""
    is_count = h.score in COUNTS
    edges = [scaled(edge, is_count) for edge in h.edges]
    low, high = edges[0], edges[-1]

    def across(value: float) -> float:
        return _LEFT + (min(max(value, low), high) - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    totals = [sum(parts) for parts in zip(h.passed, h.here, h.elsewhere, strict=True)]
    top, floor = _top(totals), HEIGHT - _BOTTOM
    places = [across(edge) for edge in edges]
    unit = (floor - _TOP) / top
    parts = [_shade(h, across, is_count), _grid(top, unit), _bars(h, places, unit=unit, top=top)]
    parts += [_cuts(totals, places, top), _ticks(low, high, across, is_count), _thresholds(h, across, is_count)]
    label = escape(f"{h.score} {h.language}")
    return f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def parted_bar(parts: Sequence[tuple[str, int]], whole: int) -> str:
    """A horizontal bar in colored parts; (class, documents)."""
    drawn = "".join(
        f'<i class="{escape(name)}" style="width:{count / whole:.2%}"></i>' for name, count in parts if count and whole
    )
    return f'<div class="bar parts">{drawn}</div>'


def _top(totals: Sequence[int]) -> float:
    """What the axis reaches to: one bar that towers over all others is cut."""
    ranked = sorted(totals, reverse=True)
    second = next((count for count in ranked[1:] if count), 0)
    if second and ranked[0] > _CUT * second:
        return 1.35 * second
    return float(max(ranked[0], 1))


def _bars(h: Histogram, places: Sequence[float], *, unit: float, top: float) -> str:
    """A path for each outcome, so that the page stays small."""
    floor = HEIGHT - _BOTTOM
    heights = [floor] * len(h.passed)
    drawn = []
    for name, counts in (("passed", h.passed), ("here", h.here), ("elsewhere", h.elsewhere)):
        path = []
        for i, count in enumerate(counts):
            rise = min(count * unit, heights[i] - (floor - top * unit))
            if rise > 0:
                # A single document among thousands must still be seen.
                rise = max(rise, 1.0)
                width = max(places[i + 1] - places[i] - 0.8, 0.8)
                path.append(f"M{places[i]:.1f} {heights[i]:.1f}h{width:.1f}v{-rise:.1f}h{-width:.1f}z")
                heights[i] -= rise
        if path:
            drawn.append(f'<path class="{name}" d="{"".join(path)}"/>')
    return "".join(drawn)


def _cuts(totals: Sequence[int], places: Sequence[float], top: float) -> str:
    """A gap across each bar that is taller than the axis, and its count above it."""
    drawn = []
    for i, count in enumerate(totals):
        if count > top:
            left, right = places[i] - 2, places[i + 1] + 1.5
            drawn.append(f'<path class="cut" d="M{left:.1f} {_TOP + 11:.1f}L{right:.1f} {_TOP + 6:.1f}"/>')
            anchor, at = ("start", left + 2) if left < WIDTH / 2 else ("end", right)
            drawn.append(f'<text class="count" x="{at:.1f}" y="{_TOP - 4:.1f}" text-anchor="{anchor}">{count:,}</text>')
    return "".join(drawn)


def _grid(top: float, unit: float) -> str:
    drawn = []
    for tick in nice_ticks(0, top, 3):
        if tick and tick != int(tick):
            continue
        y = HEIGHT - _BOTTOM - tick * unit
        drawn.append(f'<path class="grid" d="M{_LEFT:g} {y:.1f}H{WIDTH - _RIGHT:g}"/>')
        drawn.append(f'<text x="{_LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    return "".join(drawn)


def _ticks(low: float, high: float, across: Across, is_count: bool) -> str:
    if is_count:
        values = [0.0, *(10.0**power for power in range(8))]
        values = [value for value in values if low <= scaled(value, True) <= high]
    else:
        values = [tick for tick in nice_ticks(low, high, 5) if tick >= 0]
    return "".join(
        f'<text x="{across(scaled(value, is_count)):.1f}" y="{HEIGHT - _BOTTOM + 17:g}" '
        f'text-anchor="middle">{short(value)}</text>'
        for value in values
    )


def _shade(h: Histogram, across: Across, is_count: bool) -> str:
    """The sides on which this score's rules drop."""
    spans = []
    if h.minimum is not None:
        spans.append((_LEFT, across(scaled(h.minimum, is_count))))
    if h.maximum is not None:
        spans.append((across(scaled(h.maximum, is_count)), WIDTH - _RIGHT))
    return "".join(
        f'<rect class="out" x="{a:.1f}" y="{_TOP:g}" width="{max(b - a, 0):.1f}" height="{HEIGHT - _BOTTOM - _TOP:g}"/>'
        for a, b in spans
    )


def _thresholds(h: Histogram, across: Across, is_count: bool) -> str:
    drawn = []
    for sign, bound in (("≥", h.minimum), ("≤", h.maximum)):
        if bound is None:
            continue
        x = across(scaled(bound, is_count))
        anchor, at = ("start", x + 4) if x < WIDTH * 0.75 else ("end", x - 4)
        drawn.append(f'<path class="threshold" d="M{x:.1f} {_TOP - 12:g}V{HEIGHT - _BOTTOM:g}"/>')
        drawn.append(
            f'<text class="bound" x="{at:.1f}" y="{_TOP - 9:g}" text-anchor="{anchor}">{sign} {bound:,g}</text>'
        )
    return "".join(drawn)
