"""A polite stop on SIGTERM (schedulers) and SIGUSR1 (Slurm's --signal), and errors that another try may heal."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

from puyu.errors import RetryError

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LOST = ("gloo", "nccl", "connection closed", "connection reset")


class StopSignal:
    """Remembers the signals while active, so that a step can be finished and saved. Only in the main thread."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def as_retry(error: RuntimeError) -> RetryError | None:
    """The error as one that a new start may heal: a lost process, a failing accelerator; None for any other."""
    remedy = "run the same command again: it goes on from the last saved state"
    line = str(error).strip().partition("\n")[0]
    if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
        return RetryError(f"the accelerator failed: {line}", remedy=remedy)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    if isinstance(error, dist.DistError) or any(word in line.lower() for word in _LOST):
        return RetryError(f"rank {os.environ['RANK']} lost another process: {line}", remedy=remedy)
    return None
