"""Text drawings for a terminal: curves in braille dots, sparklines, texts cut and padded by the columns they take.

Chinese characters take two columns. Whatever comes from data is stripped of control characters before it is shown.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from puyu.chain.charts import Point, finite, short, smoothed, thinned

_BARS = "▁▂▃▄▅▆▇█"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bits of a braille cell, by row and column of its dots."""


def columns(text: str) -> int:
    """How many columns a text takes."""
    return sum(_columns(char) for char in text)


def _columns(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def cut(text: str, width: int) -> str:
    """At most `width` columns, an ellipsis where something is left out; control characters become spaces."""
    text = "".join(" " if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp", "Co", "Cn") else char for char in text)
    text = "".join(char for char in text if unicodedata.category(char) != "Cf")
    if columns(text) <= width:
        return text
    taken, used = "", 0
    for char in text:
        if used + _columns(char) > width - 1:
            break
        taken, used = taken + char, used + _columns(char)
    return f"{taken}…"[: max(width, 0)]


def fit(text: str, width: int, *, right: bool = False) -> str:
    """Exactly `width` columns."""
    text = cut(text, width)
    pad = " " * max(width - columns(text), 0)
    return pad + text if right else text + pad


def bar(share: float, width: int) -> str:
    """A bar that is full at 1."""
    full = round(min(max(share, 0), 1) * width)
    return "█" * full + "░" * (width - full)


def spark(points: Sequence[Point], width: int) -> str:
    """Values as small bars, one a column."""
    values = [y for _, y in thinned(finite(points), width)]
    if not values:
        return ""
    low, high = min(values), max(values)
    return "".join(_BARS[round((value - low) / (high - low) * 7) if high > low else 3] for value in values)


def curve(points: Sequence[Point], width: int, height: int) -> list[str]:
    """A smoothed line with its scale in `width` columns and `height` lines, the last one for the steps; maybe none."""
    found = finite(points)
    inner = width - 9
    if not found or inner < 8 or height < 3:
        return []
    line = thinned(smoothed(found, max(1, len(found) // 60)), inner * 2)
    low, high = min(y for _, y in line), max(y for _, y in line)
    span = (high - low) or max(abs(high) * 0.1, 1e-9)
    low = low if high > low else low - span / 2
    levels = [(y - low) / span for y in _spread(line, inner * 2)]
    cells = _drawn(levels, inner, height - 1)
    lines = []
    for row, cell in enumerate(cells):
        label = short(low + span * (1 - row / max(height - 2, 1))) if row % 2 == 0 or row == height - 2 else ""
        lines.append(f"{fit(label, 7, right=True)} ┤{''.join(chr(0x2800 + bits) for bits in cell)}")
    first, last = (f"{points[i][0]:,.0f}" for i in (0, -1))
    return [*lines, f"{'':8}└{first} {'─' * max(inner - len(first) - len(last) - 7, 0)} step {last}"]


def _spread(line: Sequence[Point], count: int) -> list[float]:
    """Values at `count` places, evenly spaced between the first and the last point."""
    first, last, at, values = line[0][0], line[-1][0], 0, []
    for place in range(count):
        x = first + (last - first) * place / (count - 1)
        while at + 2 < len(line) and line[at + 1][0] < x:
            at += 1
        (x1, y1), (x2, y2) = line[at], line[min(at + 1, len(line) - 1)]
        share = min(max((x - x1) / (x2 - x1), 0.0), 1.0) if x2 > x1 else 0.0
        values.append(y1 + (y2 - y1) * share)
    return values


def _drawn(levels: Sequence[float], width: int, height: int) -> list[list[int]]:
    """Braille cells of heights between 0 and 1, two a column; neighbors are joined."""
    cells = [[0] * width for _ in range(height)]
    dots = [round((1 - level) * (height * 4 - 1)) for level in levels]
    for place, dot in enumerate(dots):
        before = dots[max(place - 1, 0)]
        for row in range(min(before, dot), max(before, dot) + 1):
            cells[row // 4][place // 2] |= _DOTS[row % 4][place % 2]
    return cells
