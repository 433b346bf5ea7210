"""What a person sees while it works: one logger, progress with rate and ETA, one metrics.jsonl sink.

On a terminal, progress rewrites one line; in a file or a pipe it prints a line every ten seconds.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from puyu.errors import DependencyError
from puyu.files import atomic_write, disk_errors, hash_bytes, read_jsonl

logger = logging.getLogger("puyu")


def say(text: str = "") -> None:
    """One line for the person at the terminal (standard error, so that pipes stay clean)."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`7.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Progress of one long step: `name  120/400  30 %  8.1 k tok/s  ETA 35.0 s  loss 4.21`.

    `work` counts what the rate is in (`unit`), which may differ from the steps.
    """

    def __init__(
        self, name: str, total: int, *, unit: str = "it", start: int = 0, stream: TextIO | None = None
    ) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done, self.start, self.work = start, start, 0.0
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.began = time.monotonic()
        self.printed = self.began if not self.live else 0.0
        self._shown = -1
        self.note = ""

    def update(self, steps: int = 1, *, work: float | None = None, **notes: float | str) -> None:
        """Count `steps` (and `work` units); notes are shown at the end of the line."""
        self.done += steps
        self.work += steps if work is None else work
        if notes:
            self.note = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in notes.items())
        now = time.monotonic()
        if now - self.printed >= (0.2 if self.live else 10.0):
            self.printed = now
            self._print("\r" if self.live else "", "" if self.live else "\n")

    def close(self) -> float:
        """Print the last line, unless a file has it already; returns the seconds."""
        if self.live or self._shown != self.done:
            self._print("\r" if self.live else "", "\n")
        return time.monotonic() - self.began

    def _print(self, before: str, after: str) -> None:
        line, self._shown = self.line(), self.done
        self.stream.write(f"{before}{line:<100}{after}" if self.live else f"{line}{after}")
        self.stream.flush()

    def line(self) -> str:
        """The line as it would be shown now."""
        elapsed = max(time.monotonic() - self.began, 1e-9)
        share = self.done / self.total if self.total else 1.0
        left = elapsed / max(self.done - self.start, 1) * max(self.total - self.done, 0)
        times = f"ETA {duration(left)}" if self.done < self.total else f"in {duration(elapsed)}"
        rate = f"{_short(self.work / elapsed)} {self.unit}/s"
        return f"  {self.name}  {self.done}/{self.total}  {share:4.0%}  {rate}  {times}  {self.note}".rstrip()


def _short(value: float) -> str:
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.1f} "


class MetricsWriter:
    """Append-only `metrics.jsonl`, one object a step, flushed at once; TensorBoard and W&B beside it on request.

    Opening at `from_step` removes rows of that step and later (and a torn last line), so that a resumed run
    leaves one row per step.
    """

    def __init__(self, path: Path, *, from_step: int = 0, tensorboard: bool = False, wandb: str = "") -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in self._rows() if row.get("step", 0) < from_step]
        with atomic_write(path) as stream:
            stream.writelines(json.dumps(row) + "\n" for row in kept)
        self._stream = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._board = _summary_writer(path.parent / "tensorboard") if tensorboard else None
        self._wandb = _wandb_run(path.parent, wandb) if wandb else None

    def _rows(self) -> Iterator[dict[str, Any]]:
        if self.path.is_file():
            yield from read_jsonl(
                self.path, quarantine=lambda bad: logger.warning("torn metrics line dropped: %s", bad)
            )

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Write one row; numbers go to TensorBoard too."""
        with disk_errors(self.path):
            self._stream.write(json.dumps({"step": step, **values}, allow_nan=True) + "\n")
            self._stream.flush()
        if self._board:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log({"step": step, **values})

    def close(self) -> None:
        self._stream.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def _summary_writer(folder: Path) -> Any:
    try:
        from tensorboard.summary import Writer
    except ImportError as error:
        raise DependencyError("tensorboard: true needs TensorBoard", remedy="pip install 'puyu-llm[train]'") from error
    return Writer(str(folder))


def _wandb_run(folder: Path, project: str) -> Any:
    """A W&B run in `folder`/wandb; the same folder is the same run again. No network unless WANDB_MODE asks for it.

    Its own step only grows and drops what comes later with a smaller one, as rows after a roll-back do: the axis is the
    field `step`.
    """
    try:
        import wandb
    except ImportError as error:
        raise DependencyError(f"wandb: {project} needs Weights & Biases", remedy="pip install wandb") from error
    name = hash_bytes(str(folder.resolve()).encode())[:16]
    mode = os.environ.get("WANDB_MODE", "offline")
    run = wandb.init(project=project, dir=folder, name=folder.name, id=name, resume="allow", mode=mode)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
