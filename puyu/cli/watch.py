"""`puyu watch RUN`: a training run in the terminal, while it goes on; one summary where the output is no terminal.

    puyu watch runs/nano/pretrain
    puyu watch runs/nano/pretrain --once

Loss, rates, share of the peak, norms, time left, phase, held-out loss, saved states, samples, and what health noted.
It reads the run's files, so it works wherever the folder is seen, and needs no torch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from puyu.log import duration

if TYPE_CHECKING:
    from puyu.chain.run_view import RunView

_STYLES = {"head": "\x1b[1m", "curve": "\x1b[36m", "alarm": "\x1b[31m", "soft": "\x1b[2m"}
_LEAST = 8
"""Lines that the curve needs."""
_CELL = 38
"""Columns of one label with its value."""


class Part(NamedTuple):
    """Some lines of the screen. Where there is no room for all, those of the highest `rank` go first."""

    rank: int
    style: str
    lines: list[str]

    @property
    def listing(self) -> bool:
        """Whether it needs no blank line beside its like."""
        return self.rank in (5, 6, 7)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="puyu watch", description="a training run, live", allow_abbrev=False)
    parser.add_argument("run", type=Path, help="the folder of a training run (its --out)")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between looks [2]")
    parser.add_argument("--once", action="store_true", help="one summary; the default where this is no terminal")
    given = parser.parse_args(list(arguments))
    from puyu.chain.run_view import RunView

    run = RunView(given.run)
    if not given.once and sys.stdout.isatty():
        _follow(run, max(given.every, 0.1))
    run.refresh()
    text = "\n".join(line for _, line in screen(run, width=min(shutil.get_terminal_size((100, 24)).columns, 120)))
    coding = sys.stdout.encoding or "utf-8"
    print(text.encode(coding, "replace").decode(coding))
    return 0


def _follow(run: RunView, every: float) -> None:
    """Draw until the run has finished, or Ctrl-C, on the terminal's second page."""
    sys.stdout.write("\x1b[?1049h\x1b[?25l")
    try:
        while True:
            run.refresh()
            size = shutil.get_terminal_size()
            lines = [_styled(style, line) for style, line in screen(run, width=size.columns, height=size.lines)]
            sys.stdout.write("\x1b[H" + "\x1b[K\n".join(lines) + "\x1b[K\x1b[J")
            sys.stdout.flush()
            if run.status == "finished":
                return
            time.sleep(every)
    except KeyboardInterrupt:
        return
    finally:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")


def _styled(style: str, line: str) -> str:
    plain = not style or os.environ.get("NO_COLOR")
    return line if plain else f"{_STYLES[style]}{line}\x1b[0m"


def screen(run: RunView, *, width: int, height: int = 0) -> list[tuple[str, str]]:
    """(style, line) of the whole picture, each line at most `width` columns; `height` 0 is without bound."""
    from puyu.cli.screen import curve, cut

    parts = [part for part in _parts(run, width) if part.lines]
    while height and _height(parts) + _LEAST > height and len(parts) > 2:
        parts.remove(max(parts, key=lambda part: part.rank))
    room = min(height - _height(parts) - 1, 14) if height else 12
    if line := curve(run.values("loss"), width, room):
        parts.insert(2, Part(0, "curve", line))
    drawn: list[tuple[str, str]] = []
    for before, part in zip([None, *parts], parts, strict=False):
        drawn += [("", "")] * _apart(before, part)
        drawn += [(part.style, cut(line, width)) for line in part.lines]
    return drawn[:height] if height else drawn


def _apart(before: Part | None, part: Part) -> int:
    """Blank lines between two parts."""
    return int(before is not None and before.style != "head" and not (before.listing and part.listing))


def _height(parts: Sequence[Part]) -> int:
    return sum(len(part.lines) + _apart(before, part) for before, part in zip([None, *parts], parts, strict=False))


def _parts(run: RunView, width: int) -> Iterator[Part]:
    yield Part(0, "head", list(_head(run, width)))
    if not run.rows:
        yield Part(1, "", ["no step has ended yet"])
        return
    yield Part(1, "", [_losses(run)])
    yield Part(2, "", _grid(list(_numbers(run)), width))
    yield Part(6, "", _listed("by source", [f"{n} {_short(run.mean(f'loss/{n}'))}" for n in run.parts("loss")], width))
    held = [_heldout(run, name) for name in run.parts("val_loss")]
    yield Part(5, "", _listed("held out", held, width))
    norms = [f"{name} {_short(run.value(f'grad_norm/{name}'))}" for name in run.parts("grad_norm")]
    yield Part(7, "", _listed("norms", norms, width))
    yield Part(3, "alarm", [f"! step {row['step']}: {row.get('text', row.get('event'))}" for row in run.events[-4:]])
    yield Part(8, "soft", list(_samples(run)))


def _head(run: RunView, width: int) -> Iterator[str]:
    from puyu.cli.screen import bar, columns, fit

    right = run.status + (f" · {run.about['processes']} x {run.about['device']}" if run.about else "")
    yield fit(f"puyu · {run.name} · {run.folder}", max(width - columns(right) - 2, 0)) + f"  {right}"
    left = run.seconds_left
    words = f"step {run.step:,}/{run.steps:,}" if run.steps else f"step {run.step:,}"
    if run.steps:
        words += f" {run.step / run.steps:4.0%}"
        words += f"  ETA {duration(left)}" if left and run.status != "finished" else ""
    room = min(width - columns(words) - 2, 60)
    yield f"{bar(run.step / run.steps, room)}  {words}" if run.steps and room >= 8 else words
    for band in run.phases:
        if band.start < max(run.step, 1) <= band.end:
            yield f"phase {band.name}: steps {band.start + 1:,.0f} to {band.end:,.0f}"


def _losses(run: RunView) -> str:
    found = run.values("loss")
    if not found:
        return "no loss yet"
    text = f"loss {_short(run.value('loss'))}   mean of the last {min(len(found), 50)} {_short(run.mean('loss'))}"
    held = run.values("val_loss")
    return text + (f"   held out {_short(held[-1][1])} (step {held[-1][0]:,.0f})" if held else "")


def _heldout(run: RunView, name: str) -> str:
    bits = run.value(f"val_bits_per_byte/{name}")
    return f"{name} {_short(run.value(f'val_loss/{name}'))}" + (f" ({bits:.3f} bits/byte)" if bits else "")


def _numbers(run: RunView) -> Iterator[tuple[str, str]]:
    """Labels and values of the grid."""
    from puyu.cli.screen import spark

    rate, mfu, causal = run.mean("tokens_per_s"), run.mean("mfu"), run.mean("mfu_causal")
    yield "tokens/s", f"{_short(rate)}  {spark(run.values('tokens_per_s')[-200:], 14)}"
    yield "MFU", f"{mfu:.1%} (causal {causal:.1%})" if mfu is not None and causal is not None else "–"
    yield "grad norm", f"{_short(run.value('grad_norm'))}  {spark(run.values('grad_norm')[-200:], 14)}"
    yield "lr", _short(run.value("lr"))
    wait, memory = run.share("data"), run.value("memory_gib")
    yield "data wait", f"{wait:.1%} of the time" if wait is not None else "–"
    yield "memory", f"{memory:.2f} GiB" if memory is not None else "–"
    yield "tokens", _short(run.value("tokens"))
    yield "saved", run.saved
    if run.torn:
        yield "torn lines", f"{run.torn} of metrics.jsonl"


def _grid(pairs: Sequence[tuple[str, str]], width: int) -> list[str]:
    """As many pairs beside each other as fit."""
    from puyu.cli.screen import fit

    across = max(min(width // _CELL, 3), 1)
    cells = [fit(f"{label:<10} {value}", _CELL if across > 1 else width) for label, value in pairs]
    return ["".join(cells[i : i + across]).rstrip() for i in range(0, len(cells), across)]


def _listed(label: str, items: Sequence[str], width: int) -> list[str]:
    """Items in lines, broken between them."""
    from puyu.cli.screen import columns

    lines: list[str] = []
    for item in items:
        if lines and columns(f"{lines[-1]} · {item}") <= width:
            lines[-1] += f" · {item}"
        else:
            lines.append(f"{'' if lines else label:<10} {item}")
    return lines


def _samples(run: RunView) -> Iterator[str]:
    last = [row for row in run.samples if row["step"] == run.samples[-1]["step"]]
    if last:
        yield f"samples of step {last[0]['step']:,}"
    for row in last:
        yield f"  {row.get('prompt')} → {row.get('text')}"


def _short(value: float | None) -> str:
    from puyu.chain.charts import short

    return "–" if value is None else short(value)
