"""Estimates with intervals, and paired differences (Miller 2024, arXiv 2411.00640). Standard library only.

A mean here is a ratio, sum(w x) / sum(w), so that accuracy (w = 1) and bits per byte (w = bytes) are one formula;
its standard error is the linearized one, summed within clusters first. A proportion gets Wilson's interval (1927),
which stays inside [0, 1] and keeps its coverage near the edges, where mean +- 1.96 SE does not.
Two models on the same samples are compared by their per-sample differences, never by whether two intervals overlap.

    >>> wilson(18, 20)[0] > 0.69
    True
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

Z95 = NormalDist().inv_cdf(0.975)
"""1.96: the two-sided 95 % quantile of the normal distribution."""


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `n` samples with its standard error and 95 % interval. `method` names the interval's kind."""

    value: float
    stderr: float
    low: float
    high: float
    n: int
    method: str = "normal"


@dataclass(frozen=True, slots=True)
class Difference:
    """The paired difference b - a over `n` shared samples: normal interval, and the bootstrap's beside it."""

    value: float
    stderr: float
    low: float
    high: float
    boot_low: float
    boot_high: float
    n: int

    @property
    def is_clear(self) -> bool:
        """Whether both intervals leave out zero."""
        return (self.low > 0 and self.boot_low > 0) or (self.high < 0 and self.boot_high < 0)


def weighted_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """sum(w x) / sum(w); the plain mean without weights."""
    if weights is None:
        return math.fsum(values) / len(values)
    return math.fsum(w * x for w, x in zip(weights, values, strict=True)) / math.fsum(weights)


def standard_error(
    values: Sequence[float], weights: Sequence[float] | None = None, clusters: Sequence[str] | None = None
) -> float:
    """Standard error of `weighted_mean`: s / sqrt(n) in the plain case; by cluster sums where clusters are given.

    SE^2 = C / (C - 1) * sum over clusters of (sum of w (x - mean))^2 / (sum w)^2. One cluster alone gives 0,
    which the caller must not read as certainty.
    """
    weights = [1.0] * len(values) if weights is None else weights
    mean = weighted_mean(values, weights)
    names = list(map(str, range(len(values)))) if clusters is None else clusters
    residuals: dict[str, list[float]] = {}
    for name, x, w in zip(names, values, weights, strict=True):
        residuals.setdefault(name, []).append(w * (x - mean))
    count = len(residuals)
    if count < 2:
        return 0.0
    spread = math.fsum(math.fsum(group) ** 2 for group in residuals.values())
    return math.sqrt(count / (count - 1) * spread) / math.fsum(weights)


def wilson(successes: float, n: int, *, z: float = Z95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927; no continuity correction)."""
    p = successes / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(max(0.0, center - half), min(1.0, center + half))


def estimate(
    values: Sequence[float], weights: Sequence[float] | None = None, clusters: Sequence[str] | None = None
) -> Estimate:
    """Mean, standard error and interval: Wilson where every value is 0 or 1 and samples are independent, else normal.

    No values at all give NaN with n = 0 in no case: that is the caller's bug.
    """
    assert values, "an estimate needs at least one value"
    mean = weighted_mean(values, weights)
    error = standard_error(values, weights, clusters)
    if weights is None and clusters is None and all(x in (0.0, 1.0) for x in values):
        low, high = wilson(math.fsum(values), len(values))
        return Estimate(mean, error, low, high, len(values), "wilson")
    method = "normal" if clusters is None else "clustered"
    return Estimate(mean, error, mean - Z95 * error, mean + Z95 * error, len(values), method)


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    clusters: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> Difference:
    """b - a on the same samples in the same order: the mean of the per-sample differences, with both intervals."""
    deltas = [y - x for x, y in zip(a, b, strict=True)]
    value = weighted_mean(deltas, weights)
    error = standard_error(deltas, weights, clusters)
    boot = bootstrap(deltas, weights=weights, clusters=clusters, seed=seed, resamples=resamples)
    return Difference(value, error, value - Z95 * error, value + Z95 * error, boot.low, boot.high, len(deltas))


def bootstrap(
    values: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    clusters: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> Interval:
    """Percentile bootstrap of `weighted_mean` (Efron 1979): whole clusters are drawn with replacement."""
    weights = [1.0] * len(values) if weights is None else weights
    names = list(map(str, range(len(values)))) if clusters is None else clusters
    sums: dict[str, tuple[float, float]] = {}
    for name, x, w in zip(names, values, weights, strict=True):
        top, bottom = sums.get(name, (0.0, 0.0))
        sums[name] = (top + w * x, bottom + w)
    tops, bottoms = zip(*sums.values(), strict=True)
    draw = random.Random(seed)
    picks = range(len(tops))
    means = sorted(_ratio(tops, bottoms, draw.choices(picks, k=len(tops))) for _ in range(resamples))
    return Interval(quantile(means, 0.025), quantile(means, 0.975))


def _ratio(tops: Sequence[float], bottoms: Sequence[float], picked: Sequence[int]) -> float:
    return sum(map(tops.__getitem__, picked)) / sum(map(bottoms.__getitem__, picked))


def quantile(ordered: Sequence[float], q: float) -> float:
    """Linear interpolation between the two nearest of sorted values."""
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
