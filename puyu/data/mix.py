"""Mixture: which document comes next, from several named sources, without ever drawing one twice in an epoch.

Within a source an epoch is a permutation that is computed, not stored: a Feistel network over the document numbers,
walked until it lands inside (format-preserving encryption, Black and Rogaway 2002). Among sources the one with the
largest deficit to the phase's weights, counted in tokens, is next. New weights start new counts of the phase but
move no cursor, so nothing is drawn again. A source may have a number of epochs: once they are used up it leaves, and
the others share its weight. The state is a few numbers a source, whatever has been read.
Knows nothing of rows, ranks, or torch.

    >>> mixture = Mixture({"web": web, "code": code}, {"web": 0.8, "code": 0.2}, seed=0)
    >>> mixture.draw()
    Draw(source='web', doc=4711)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from puyu.errors import CheckpointError, ConfigError

_MASK = (1 << 64) - 1
_ROUNDS = 6


class Documents(Protocol):
    """What a mixture must know of a source; a TokenShard is one."""

    @property
    def num_docs(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    def length(self, index: int, /) -> int: ...


@dataclass(frozen=True, slots=True)
class Draw:
    """The next document."""

    source: str
    doc: int


@dataclass(slots=True)
class Cursor:
    """Where a source stands. `phase_tokens` counts since the weights were last changed."""

    epoch: int = 0
    position: int = 0
    tokens: int = 0
    phase_tokens: int = 0


def mix64(value: int) -> int:
    """SplitMix64's finalizer: a bijection of 64 bits whose output looks random."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key_of(*parts: int) -> int:
    """Mix several numbers into one 64-bit key."""
    key = 0
    for part in parts:
        key = mix64(key ^ (part & _MASK))
    return key


def permuted(index: int, size: int, key: int) -> int:
    """The image of `index` under the permutation of range(size) that `key` names; no memory, O(1) expected time."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mix64(key ^ (turn << 58) ^ right) & low)
        index = left << half | right
        if index < size:
            return index


class Mixture:
    """Draws documents; deterministic given seed, sources, epochs and the sequence of weights.

    `epochs`: how often a source may be drawn, counted in its tokens; those without a number without end. A document is
    drawn at most ceil(epochs) times, and never fewer tokens than epochs x size are there to draw.
    """

    def __init__(
        self,
        sources: Mapping[str, Documents],
        weights: Mapping[str, float],
        *,
        seed: int,
        epochs: Mapping[str, float] | None = None,
    ) -> None:
        self._sources = {name: sources[name] for name in sorted(sources)}
        self._keys = {name: key_of(seed, int.from_bytes(name.encode(), "little")) for name in self._sources}
        self._cursors = {name: Cursor() for name in self._sources}
        self._limits = limits_of(epochs or {}, self._sources)
        self.on_leave: Callable[[str], None] | None = None
        """Called with the name of a source when the last document of its epochs has been drawn."""
        self.seed = seed
        self.weights: dict[str, float] = {}
        self.set_weights(weights)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the shares (normalized to sum 1). Cursors stay; equal weights change nothing at all."""
        shares = check_weights(weights, self._sources)
        if shares == self.weights:
            return
        self.weights = shares
        for cursor in self._cursors.values():
            cursor.phase_tokens = 0
        self._share_out()

    def _share_out(self) -> None:
        """Shares of the sources that are left; they sum to 1."""
        left = {name: weight for name, weight in self.weights.items() if not self._used_up(name)}
        total = sum(left.values()) if len(left) < len(self.weights) else 1.0
        self._shares = {name: weight / total for name, weight in left.items()}

    def _used_up(self, name: str) -> bool:
        return name in self._limits and self._cursors[name].tokens >= self._limits[name]

    @property
    def can_draw(self) -> bool:
        """Whether a source with a weight has documents left."""
        return bool(self._shares)

    def draw(self) -> Draw:
        """Take the next document of the source that is furthest behind its share; only while `can_draw`."""
        assert self._shares, "every source with a weight is used up"
        total = sum(self._cursors[name].phase_tokens for name in self._shares)
        name = max(self._shares, key=lambda n: self._shares[n] * (total + 1) - self._cursors[n].phase_tokens)
        source, cursor = self._sources[name], self._cursors[name]
        doc = permuted(cursor.position, source.num_docs, key_of(self._keys[name], cursor.epoch))
        cursor.position += 1
        if cursor.position == source.num_docs:
            cursor.epoch, cursor.position = cursor.epoch + 1, 0
        cursor.tokens += source.length(doc)
        cursor.phase_tokens += source.length(doc)
        if self._used_up(name):
            self._share_out()
            if self.on_leave:
                self.on_leave(name)
        return Draw(name, doc)

    def report(self) -> dict[str, dict[str, Any]]:
        """Per source: tokens drawn, epochs begun as a number with a fraction, share of this phase, and `used_up`."""
        total = max(sum(cursor.phase_tokens for cursor in self._cursors.values()), 1)
        return {
            name: {
                "tokens": cursor.tokens,
                "epochs": round(cursor.epoch + cursor.position / max(self._sources[name].num_docs, 1), 4),
                "phase_share": round(cursor.phase_tokens / total, 4),
                "used_up": self._used_up(name),
            }
            for name, cursor in self._cursors.items()
        }

    def state(self) -> dict[str, Any]:
        """JSON-able, and of one size for ever."""
        sizes = {name: source.num_docs for name, source in self._sources.items()}
        cursors = {name: asdict(cursor) for name, cursor in self._cursors.items()}
        seen = {"seed": self.seed, "sizes": sizes, "limits": dict(self._limits)}
        return {**seen, "weights": dict(self.weights), "cursors": cursors}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; CheckpointError when it was taken over other sources, or with other epochs or seed."""
        sizes = {name: source.num_docs for name, source in self._sources.items()}
        if (state["seed"], state["sizes"], state["limits"]) != (self.seed, sizes, self._limits):
            raise CheckpointError(
                f"the saved data cursor (seed {state['seed']}, documents {state['sizes']}, tokens to draw "
                f"{state['limits']}) does not fit the data (seed {self.seed}, documents {sizes}, tokens to draw "
                f"{self._limits})",
                remedy="restore the data, epochs and seed of the saved run, or start in another output folder",
            )
        self.weights = dict(state["weights"])
        self._cursors = {name: Cursor(**cursor) for name, cursor in state["cursors"].items()}
        self._share_out()


def limits_of(epochs: Mapping[str, float], sources: Mapping[str, Documents]) -> dict[str, int]:
    """How many tokens may be drawn of each source that has epochs; ConfigError for a bad name or number."""
    for name, count in epochs.items():
        if name not in sources:
            raise ConfigError(
                f"epochs names the unknown source {name!r}", remedy=f"the data has: {', '.join(sorted(sources))}"
            )
        if not math.isfinite(count) or count <= 0:
            raise ConfigError(f"epochs of {name!r} must be a number above 0, not {count}")
    return {name: max(1, round(epochs[name] * sources[name].num_tokens)) for name in sorted(epochs)}


def expected_use(left: Mapping[str, float], weights: Mapping[str, float], tokens: float) -> dict[str, float]:
    """Of `tokens` tokens drawn by weight, how many come of each source that has `left` tokens (inf: without end).

    What is used up leaves its share to the others; the sum is below `tokens` when all are used up before.
    """
    used, active = dict.fromkeys(weights, 0.0), {name for name in weights if weights[name] > 0 and left[name] > 0}
    while active:
        rest = {name: (left[name] - used[name]) / weights[name] for name in active}
        total = sum(weights[name] for name in active)
        step = min(tokens / total, *rest.values())
        used |= {name: used[name] + step * weights[name] for name in active}
        if step == tokens / total:
            break
        tokens -= step * total
        active = {name for name in active if rest[name] > step}
    return used


def check_weights(weights: Mapping[str, float], sources: Mapping[str, Documents]) -> dict[str, float]:
    """Weights in name order, normalized; ConfigError for an unknown or empty source or a bad number."""
    for name, weight in weights.items():
        if name not in sources:
            raise ConfigError(
                f"mixture names the unknown source {name!r}", remedy=f"the data has: {', '.join(sorted(sources))}"
            )
        if not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"mixture weight of {name!r} must be a number >= 0, not {weight}")
        if weight > 0 and sources[name].num_docs == 0:
            raise ConfigError(f"mixture source {name!r} has no documents", remedy="give it weight 0 or leave it out")
    total = sum(weights.values())
    if total <= 0:
        raise ConfigError("the mixture has no source with a weight above 0")
    return {name: weights[name] / total for name in sorted(weights) if weights[name] > 0}
