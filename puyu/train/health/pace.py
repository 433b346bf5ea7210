"""Which process is slow? Two times that no peer can lengthen are compared: reading data, and a small known product.

Everything else in a step waits for others. Pure but for `probe`; says nothing of why a device is slow.

    pace.judge([(data_seconds, probe_seconds) of each rank], step_seconds=0.8)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, median_low

import torch

from puyu.train.health.config import HealthConfig

_IN_A_ROW = 3
_SHARE = 0.1
"""Reading that takes less of a step than this slows nobody down."""


@dataclass(frozen=True, slots=True)
class Slow:
    """A rank, what it is slow at, and how many times the median it takes."""

    rank: int
    what: str
    ratio: float


class Pace:
    """Judges windows of steps in their order; a rank is slow when it is so in three of them in a row."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self._streaks: dict[tuple[int, str], int] = {}

    def judge(self, rows: Sequence[Sequence[float]], *, step_seconds: float) -> list[Slow]:
        """Slow ranks, from (data, probe) seconds of each rank in this window."""
        found, streaks = [], {}
        for column, what in enumerate(("reading data", "computing")):
            values = [row[column] for row in rows]
            middle = max(median_low(values), 1e-9)
            for rank, value in enumerate(values):
                matters = column == 1 or value > _SHARE * step_seconds
                if value > self.config.slow_factor * middle and matters:
                    streaks[rank, what] = self._streaks.get((rank, what), 0) + 1
                    if streaks[rank, what] >= _IN_A_ROW:
                        found.append(Slow(rank, what, value / middle))
        self._streaks = streaks
        return found


def probe(device: torch.device) -> float:
    """Seconds of a product that takes about a millisecond: the median of five."""
    size = 4096 if device.type == "cuda" else 384
    block = torch.ones(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return median(_timed(block) for _ in range(6))


def _timed(block: torch.Tensor) -> float:
    began = time.perf_counter()
    float((block @ block)[0, 0])  # reading the number waits for the product
    return time.perf_counter() - began
