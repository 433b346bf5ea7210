"""Learning rate as a pure function of the step: linear warm-up, then cosine, constant, or warm-up-stable-decay.

>>> lr_at(0, steps=100, peak=1e-3, kind="constant", warmup=10)
0.0001
"""

from __future__ import annotations

import math
from typing import Literal

Kind = Literal["cosine", "constant", "wsd"]


def lr_at(
    step: int, *, steps: int, peak: float, kind: Kind, warmup: int = 0, floor: float = 0.1, decay: float = 0.2
) -> float:
    """The rate of the 0-based `step` of `steps`.

    `floor` is the share of the peak at the end (cosine, wsd); `decay` is the share of the steps in which wsd falls.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if kind == "constant":
        return peak
    begin = warmup if kind == "cosine" else max(warmup, steps - round(decay * steps))
    share = min(max((step - begin) / max(steps - 1 - begin, 1), 0.0), 1.0)
    fall = (1 + math.cos(math.pi * share)) / 2 if kind == "cosine" else 1 - share
    return peak * (floor + (1 - floor) * fall)
