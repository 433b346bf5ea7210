"""Is this run still sound? Finite numbers before every update, and a polite stop on SIGTERM.

A loss or gradient that is not finite stops the run *before* the optimizer sees it: the weights in memory and the
last saved state stay good.
"""

from __future__ import annotations

import math
import signal
import threading
from types import FrameType
from typing import Any, Self

from puyu.errors import TrainingError
from puyu.train.layouts import Layout


def check_finite(loss: float, norm: float, *, step: int, layout: Layout, saved: str) -> None:
    """Raise TrainingError, naming the step and the first bad parameter, unless both are finite."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm} (loss {loss:.4g})"
    where = f", first in the gradient of {name}" if (name := layout.bad_gradient()) else ""
    raise TrainingError(
        f"step {step}: {what}{where}; the update was not made",
        remedy=f"lower optim.lr or raise optim.warmup, then run again in a new folder; last good state: {saved}",
    )


class StopSignal:
    """Remembers SIGTERM while active, so that a step can be finished and saved. Only in the main thread."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
