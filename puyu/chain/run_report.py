"""report.html of one training run, or of several beside each other: opens from disk, no script, no request.

    write_run_report([RunView(Path("runs/nano/pretrain"))], Path("report.html"))

One run: x is the step, phases are bands, what health noted are dotted lines. More: x is tokens, which is what
runs of different batches share, and the fields of their configs that differ are listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from puyu.chain.charts import Point, Series, line_chart, short
from puyu.chain.report_parts import Section, figure, figure_grid, is_number, masthead, page, render, table
from puyu.chain.run_view import RunView
from puyu.files import write_text
from puyu.log import duration

_LAST = 4
"""Evaluations whose samples are shown."""


def write_run_report(runs: Sequence[RunView], out: Path) -> Path:
    """Write the page and return its path."""
    for run in runs:
        run.refresh()
    sections = [
        Section("loss", "Loss", lambda: _figures(runs, _LOSS), "No step has ended."),
        Section("optimizer", "Optimizer", lambda: _figures(runs, _OPTIMIZER), "No step has ended."),
        Section("speed", "Speed and memory", lambda: _figures(runs, _SPEED), "No step has ended."),
        Section("events", "What happened", lambda: _events(runs), "Health noted nothing."),
        Section("samples", "Samples", lambda: _samples(runs), "No samples were asked for (samples: [...])."),
        Section("config", "Config", lambda: _config(runs), "There is no run.json."),
    ]
    name = " and ".join(_names(runs))
    write_text(out, page(name, sections, _head(name, runs) + "".join(render(section) for section in sections)))
    return out


def _names(runs: Sequence[RunView]) -> list[str]:
    """Names that tell the runs apart: as much of the end of their folders as that takes."""
    parts = [run.folder.resolve().parts for run in runs]
    depth = next((n for n in range(1, 9) if len({part[-n:] for part in parts}) == len(runs)), 9)
    return ["/".join(part[-max(depth, 2) :]) for part in parts]


def _head(name: str, runs: Sequence[RunView]) -> str:
    tiles = []
    for run, title in zip(runs, _names(runs), strict=True):
        where = f", {title}" if len(runs) > 1 else ""
        seconds = sum(value for _, value in run.values("seconds"))
        found = [("steps", run.value("step")), ("tokens", run.value("tokens")), ("loss at the end", run.mean("loss"))]
        found += [("held-out loss", run.value("val_loss")), ("tokens/s", run.mean("tokens_per_s"))]
        tiles += [(label + where, short(value)) for label, value in found if value is not None]
        if (mfu := run.mean("mfu")) is not None:
            tiles.append((f"MFU{where}", f"{mfu:.1%}"))
        tiles.append((f"time in steps{where}", duration(seconds)))
    facts = [f"{run.status}, {run.about['processes']} x {run.about['device']}" for run in runs if run.about]
    facts += [f"{run.torn} torn lines of metrics.jsonl left out" for run in runs if run.torn]
    what = "A training run: what it" if len(runs) == 1 else f"{len(runs)} training runs: what they"
    return masthead(name, f"{what} learned, how fast, and what happened on the way.", facts, tiles)


# --- curves --------------------------------------------------------------------------------------------------------

Curve = tuple[str, str, tuple[str, ...]]
"""Title, unit, and the names of the rows' numbers."""

_LOSS: tuple[Curve, ...] = (
    ("Loss", "nats/token", ("loss", "val_loss")),
    ("Loss by source", "nats/token", ("loss/*",)),
    ("Held-out loss by language", "nats/token", ("val_loss/*",)),
    ("Bits per byte, held out", "bits/byte", ("val_bits_per_byte/*",)),
)
_OPTIMIZER: tuple[Curve, ...] = (
    ("Learning rate", "rate", ("lr",)),
    ("Gradient norm", "norm", ("grad_norm",)),
    ("Gradient norm by part", "norm", ("grad_norm/*",)),
)
_SPEED: tuple[Curve, ...] = (
    ("Tokens a second", "tokens/s", ("tokens_per_s",)),
    ("Share of the peak (MFU)", "share", ("mfu", "mfu_causal")),
    ("Waiting for data", "share of the step", ("wait",)),
    ("Memory", "GiB", ("memory_gib",)),
)
_WORDS = {"loss": "training", "val_loss": "held out", "mfu": "6N + 12LdT", "mfu_causal": "causal"}


def _figures(runs: Sequence[RunView], curves: Sequence[Curve]) -> str:
    """A figure of all numbers of a curve; with two runs one for each number, so that a color is a run."""
    figures = []
    for title, unit, keys in curves:
        names = list(dict.fromkeys(name for run in runs for name in _expanded(run, keys)))
        if len(runs) == 1:
            figures.append(_figure(runs, title, unit, names))
        else:
            figures += [_figure(runs, f"{title}: {_word(key)}" if names[1:] else title, unit, [key]) for key in names]
    return figure_grid(figures)


def _figure(runs: Sequence[RunView], title: str, unit: str, keys: Sequence[str]) -> str:
    lines = []
    for run, name in zip(runs, _names(runs), strict=True):
        for key in keys:
            points = _points(run, key, by_tokens=len(runs) > 1)
            lines.append(Series(_word(key) if len(runs) == 1 else name, points, smooth=len(points) > 100))
    one = runs[0] if len(runs) == 1 else None
    drawn = line_chart(
        [line for line in lines if line.points],
        x="step" if one else "tokens",
        y=unit,
        bands=one.phases if one else (),
        notes=[(float(row["step"]), str(row.get("text", ""))) for row in one.events] if one else (),
        zero="share" in unit,
    )
    return figure(title, drawn)


def _word(key: str) -> str:
    return _WORDS.get(key, key.partition("/")[2] or key)


def _expanded(run: RunView, keys: Sequence[str]) -> Iterator[str]:
    """The names of numbers, `kind/*` being all of a kind."""
    for key in keys:
        kind, _, rest = key.partition("/")
        yield from [f"{kind}/{name}" for name in run.parts(kind)] if rest == "*" else [key]


def _points(run: RunView, key: str, *, by_tokens: bool) -> list[Point]:
    rows = [row for row in run.rows if is_number(row.get("tokens"))] if by_tokens else run.rows
    x = "tokens" if by_tokens else "step"
    if key == "wait":
        found = [row for row in rows if is_number(row.get("time/data")) and row.get("seconds")]
        return [(float(row[x]), row["time/data"] / row["seconds"]) for row in found]
    return [(float(row[x]), float(row[key])) for row in rows if is_number(row.get(key))]


# --- words ---------------------------------------------------------------------------------------------------------


def _events(runs: Sequence[RunView]) -> str:
    found = [(name, row) for run, name in zip(runs, _names(runs), strict=True) for row in run.events]
    return "".join(
        f'<p class="note"><b>{escape(name)}, step {row["step"]}</b> {escape(str(row.get("text", "")))}</p>'
        for name, row in found
    )


def _samples(runs: Sequence[RunView]) -> str:
    parts = []
    for run, name in zip(runs, _names(runs), strict=True):
        groups = [(step, list(rows)) for step, rows in groupby(run.samples, key=lambda row: int(row["step"]))]
        for step, rows in groups[-_LAST:][::-1]:
            parts.append(f"<h3>{escape(name)}, step {step:,}</h3>")
            for row in rows:
                prompt, text = escape(str(row.get("prompt", ""))), escape(str(row.get("text", "")))
                parts.append(f'<blockquote><span class="muted">{prompt}</span> {text}</blockquote>')
    return "".join(parts)


def _config(runs: Sequence[RunView]) -> str:
    """All fields, or with two runs those that differ."""
    flat = [dict(_flat(run.about.get("config", {}))) for run in runs]
    names = list(dict.fromkeys(name for fields in flat for name in fields))
    if len(runs) > 1:
        names = [name for name in names if len({fields.get(name, "–") for fields in flat}) > 1]
        if not names and any(flat):
            return "<p>The configs are equal.</p>"
    rows = [[escape(name), *(escape(fields.get(name, "–")) for fields in flat)] for name in names]
    return table(["field", *_names(runs)], rows) if rows else ""


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted fields with their values as text."""
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if pairs is None or not value:
        yield name, str(value)
        return
    for key, item in pairs:
        yield from _flat(item, f"{name}.{key}" if name else str(key))
