"""Numbers alone: the loss and the gradient norm of each step -> update, skip, roll back, or stop. No files, no tensors.

A step is judged before its update. What is not finite, or a spike, is not applied: its batch is skipped, and the
weights are those of the step before, exactly as if the run had gone back, replayed and left that batch out. Only
where `patience` steps in a row are bad are the weights themselves suspect. Then the run goes back to a saved state
and leaves out, beside the bad batches, those before them that may have done the harm: `patience` of them, twice as
many at each further attempt. A skipped batch uses up its step, so that all other steps keep their batch, learning
rate and seed.

A spike is a value far above the median of the last steps, in units of the median absolute deviation of such forecasts
(Rousseeuw and Croux 1993; robust to spikes themselves), above a floor, and beyond twice the worst of the window: noise
with long tails raises its own threshold, a falling loss does not lower it. Where the step after a spike is good again,
batches like it are part of the data, and are let through as long as the window remembers it.

    >>> watch = Watch(HealthConfig())
    >>> watch.judge(1, loss=10.9, norm=2.5).action
    'update'
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from puyu.train.health.config import HealthConfig

_ENOUGH = 32
"""Forecasts that a threshold needs: so many steps after the start and after a change of phase are not judged."""
_SIGMA = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a step. To roll back: load a state of fewer than `before` steps."""

    action: Literal["update", "skip", "roll back", "stop"]
    reason: str = ""
    before: int = 0


class Series:
    """Recent values of one quantity, and how far each lay above the median of those before it."""

    def __init__(self, window: int) -> None:
        self.values: deque[float] = deque(maxlen=window // 8)
        self.errors: deque[float] = deque(maxlen=window)
        self._held: list[float] = []

    def is_spike(self, value: float, *, threshold: float, floor: float) -> bool:
        """Whether the value lies far above what was to be expected."""
        if len(self.errors) < _ENOUGH:
            return False
        center = median(self.errors)
        scale = _SIGMA * median(abs(error - center) for error in self.errors)
        return value - self.level > max(threshold * scale, floor, 2 * max(self.errors))

    @property
    def level(self) -> float:
        return median(self.values)

    def admit(self, value: float) -> None:
        """Take a good value in. Spikes before it were of their batches, not of the weights: their like is known now."""
        self.errors.extend(self._held)
        self._held.clear()
        if self.values:
            self.errors.append(value - self.level)
        self.values.append(value)

    def hold(self, value: float) -> None:
        """Remember a spike until it is known whether the weights are sound."""
        self._held.append(value - self.level)

    def state(self) -> list[list[float]]:
        return [list(self.values), list(self.errors), list(self._held)]

    def load(self, state: Iterable[Iterable[float]]) -> None:
        for kept, saved in zip((self.values, self.errors, self._held), state, strict=True):
            kept.clear()
            kept.extend(saved)


class Watch:
    """Judges the steps of one run in their order. Its whole state is JSON and is saved with the run's."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.skip: set[int] = set()
        """Steps (counted from 1) whose batches are not trained on: drawn, and discarded."""
        self.streak: list[int] = []
        """Bad steps in a row, up to now."""
        self._place = self._rollbacks = 0
        self._phase: Any = None
        self._loss, self._norm = Series(config.window), Series(config.window)

    def enter(self, phase: Any) -> None:
        """Name what the next step is part of; in another phase (context, mixture) the levels are learned anew."""
        if phase != self._phase:
            self._phase = phase
            self._loss, self._norm = Series(self.config.window), Series(self.config.window)

    def judge(self, step: int, loss: float, norm: float) -> Verdict:
        """Decide on a step, counted from 1, from its mean loss and the norm of its gradient, before its update."""
        reason = self._problem(loss, norm)
        if not reason:
            self._loss.admit(loss)
            self._norm.admit(_log(norm))
            self.streak.clear()
            return Verdict("update")
        if math.isfinite(loss) and math.isfinite(norm):
            self._loss.hold(loss)
            self._norm.hold(_log(norm))
        self.streak.append(step)
        self.skip.add(step)
        if self.config.patience == 0:
            return Verdict("stop", reason)
        if len(self.streak) < self.config.patience:
            return Verdict("skip", reason)
        return self._roll_back(reason)

    def _problem(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(norm):
            return f"gradient norm is {norm} (loss {loss:.4g})"
        threshold = self.config.spike
        if not threshold:
            return ""
        floor = max(0.3, 0.1 * abs(self._loss.level)) if self._loss.values else 0.0
        if self._loss.is_spike(loss, threshold=threshold, floor=floor):
            return f"loss {loss:.4g} is a spike (before: {self._loss.level:.4g})"
        if self._norm.is_spike(_log(norm), threshold=threshold, floor=math.log(10.0)):
            return f"gradient norm {norm:.4g} is a spike (before: {math.exp(self._norm.level):.4g})"
        return ""

    def _roll_back(self, reason: str) -> Verdict:
        first, last = self.streak[0], self.streak[-1]
        same = self._rollbacks > 0 and first <= self._place + self.config.window
        self._rollbacks = self._rollbacks + 1 if same else 1
        self._place = last
        self.streak.clear()
        if self._rollbacks > self.config.rollbacks:
            return Verdict("stop", reason)
        before = max(1, first - self.config.patience * 2 ** (self._rollbacks - 1))
        self.skip.update(range(before, first))
        return Verdict("roll back", reason, before)

    def state(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "phase": self._phase,
            "loss": self._loss.state(),
            "norm": self._norm.state(),
            "streak": list(self.streak),
            "skip": sorted(self.skip),
            "rollbacks": [self._place, self._rollbacks],
        }

    def load(self, state: Mapping[str, Any], *, rolled_back: int | None = None) -> None:
        """Continue from a saved state; after a roll-back to that step, what is decided of the steps behind it stays.

        A state that is younger than was asked for was trained on some of the batches that were to be left out: these
        are not skipped, as they were not.
        """
        self._phase = state["phase"]
        self._loss.load(state["loss"])
        self._norm.load(state["norm"])
        if rolled_back is None:
            self.streak, self.skip = list(state["streak"]), set(state["skip"])
            self._place, self._rollbacks = state["rollbacks"]
        else:
            self.skip = {step for step in self.skip if step > rolled_back} | set(state["skip"])


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))
