"""How many prompt tokens a step may compute beside the tokens of those who are being answered.

A long prompt in one step is a pause for all readers. The time of a step is taken to be a + b * tokens, fitted to the
steps so far with older ones forgotten; the budget is what keeps the next step within the limit. Knows no requests.

    pace = Pace(0.050)
    pace.measured(tokens=16, seconds=0.010)
    pace.budget(decoding=16)
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_TOKENS = 4
"""Of prompts in a step, however slow it is: they must come to their end."""
KEEP = 0.95
"""Weight of the past after each step."""


@dataclass(slots=True)
class Pace:
    """Longest time of a step with somebody reading, in seconds; 0 is no limit."""

    limit: float
    _weight: float = 0.0
    _tokens: float = 0.0
    _squares: float = 0.0
    _seconds: float = 0.0
    _products: float = 0.0

    def measured(self, tokens: int, seconds: float) -> None:
        """A step has taken this long."""
        self._weight = self._weight * KEEP + 1
        self._tokens = self._tokens * KEEP + tokens
        self._squares = self._squares * KEEP + tokens * tokens
        self._seconds = self._seconds * KEEP + seconds
        self._products = self._products * KEEP + tokens * seconds

    def budget(self, decoding: int) -> int | None:
        """Prompt tokens beside `decoding` others; None is as many as there are."""
        if not self.limit or not self._weight:
            return None
        base, each = self._line()
        return max(int((self.limit - base) / each) - decoding, MIN_TOKENS)

    def _line(self) -> tuple[float, float]:
        """a and b, neither below 0. Where all steps were alike, all of their time is counted to their tokens, which
        is careful: a larger step costs less than that."""
        mean_tokens, mean_seconds = self._tokens / self._weight, self._seconds / self._weight
        spread = self._squares / self._weight - mean_tokens**2
        careful = mean_seconds / mean_tokens
        if spread < 0.01 * mean_tokens**2:
            return 0.0, careful
        each = (self._products / self._weight - mean_tokens * mean_seconds) / spread
        each = min(max(each, 0.05 * careful), careful)
        return mean_seconds - each * mean_tokens, each
