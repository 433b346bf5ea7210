"""metrics.jsonl and its summary. On a full disk rows wait in memory, are tried again ever less often, never dropped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from puyu.errors import ResourceError, RetryError, TrainingError
from puyu.files import read_jsonl
from puyu.log import MetricsWriter
from puyu.train.health.journal import Journal


class Rows:
    """Writes rows through `open_from(step)`, a writer of the rows from that step on."""

    def __init__(self, open_from: Callable[[int], MetricsWriter], journal: Journal, *, step: int) -> None:
        self._open, self._journal = open_from, journal
        self._writer: MetricsWriter | None = open_from(step)
        self._waiting: list[tuple[int, Mapping[str, Any]]] = []

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Write a row, now or when there is room."""
        self._waiting.append((step, row))
        count = len(self._waiting)
        if count & (count - 1) == 0:  # 1, 2, 4, 8 ... rows wait
            self._flush()

    def _flush(self) -> None:
        first = self._waiting[0][0]
        try:
            self._writer = self._writer or self._open(first)
            for step, row in self._waiting:
                self._writer.write(step, row)
            self._waiting.clear()
        except ResourceError as error:
            if self._writer:
                with contextlib.suppress(OSError):  # what it still holds is written again
                    self._writer.close()
            self._writer = None
            if len(self._waiting) == 1:
                self._journal.note("disk full", f"rows wait in memory: {error.message}", step=first)

    def close(self) -> None:
        """Write what waits; RetryError where that is still impossible."""
        if self._waiting:
            self._flush()
        if self._waiting:
            raise RetryError(
                f"{len(self._waiting)} rows of metrics.jsonl could not be written: the disk is full",
                remedy="free some space and run the same command again: the steps behind the last state are made again",
            )
        if self._writer:
            self._writer.close()


def summarize(metrics: Path) -> dict[str, Any]:
    """Key numbers of a run, from its metrics file."""
    every = list(read_jsonl(metrics))
    rows = [row for row in every if "skipped" not in row]
    if not rows:
        raise TrainingError(f"{metrics}: no step was trained, all were skipped", remedy="see train_state/health.jsonl")
    tail = rows[-max(1, len(rows) // 20) :]
    seconds = sum(row["seconds"] for row in rows)
    return {
        "steps": every[-1]["step"],
        "skipped": len(every) - len(rows),
        "tokens": rows[-1]["tokens"],
        "loss_first": rows[0]["loss"],
        "loss_last": sum(row["loss"] for row in tail) / len(tail),
        "tokens_per_s": round(sum(row["step_tokens"] for row in rows) / max(seconds, 1e-9), 1),
        "train_seconds": round(seconds, 1),
    }
