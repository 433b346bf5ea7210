"""Loss scaling for float16: gradients are made `scale` times larger, so that small ones do not become zero.

Micikevicius et al. 2018 (arXiv 1710.03740); numbers as in InternEvo: 2^16 at first, twice as much after 1,000 good
steps in a row, half at each overflow but the first since it last grew. A step that overflows makes no update, and is no
illness.

    scaler = LossScaler(); scaler.overflowed(); scaler.state()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class LossScaler:
    """The scale and what it has seen; the same on every process, saved with the run."""

    def __init__(self, *, scale: float = 2.0**16, growth: int = 1000, hysteresis: int = 2) -> None:
        self.scale, self.growth, self.hysteresis = scale, growth, hysteresis
        self._good, self._patience = 0, hysteresis

    def succeeded(self) -> None:
        """A step was made."""
        self._good += 1
        if self._good == self.growth:
            self.scale, self._good, self._patience = self.scale * 2, 0, self.hysteresis

    def overflowed(self) -> bool:
        """A gradient was not finite. False where a smaller scale cannot help: then the run itself is ill."""
        if self.scale <= 1:
            return False
        self._good, self._patience = 0, self._patience - 1
        if self._patience <= 0:
            self.scale /= 2
        return True

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "good": self._good, "patience": self._patience}

    def load(self, state: Mapping[str, Any], /) -> None:
        self.scale, self._good, self._patience = state["scale"], int(state["good"]), int(state["patience"])
