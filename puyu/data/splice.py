"""Where two documents were joined to one: does what stands before a border help to predict what stands behind it?

    >>> model = train(["the cat sat on the mat. ", "stock prices fell again today. "] * 50)
    >>> joined = "the cat sat on the mat. " * 40 + "stock prices fell again today. " * 40
    >>> found = splices([joined], model, SpliceConfig(segment_bytes=200))[0]
    >>> 900 < found.splice.begin < 1020
    True

InternLM2 (2024, section 3.1.3) compares P(S2 | S1) with P(S2): where S1 makes S2 harder, S1 is a distraction. A
language model is asked there; here it is an n-gram model with a cache of S1 (`puyu.data.ngram`). The text is cut into
segments, and each is scored with the cache of each of its neighbors: its gain, in bits per unit, is how much easier it
becomes. No unit gains more than a bound, so that one name does not outweigh a page.

The gain over a border alone says more about the kind of text than about the border: verse, lists and dialogue differ.
So each segment is its own measure. A text that is cut into two groups of segments has the value: the mean over segments
of (gain from segments of its own group) - (gain from those of the other), times sqrt(n / (n + 1)) for n segments in the
smaller group, since few segments vary more. It is near 0 where the cut means nothing; the model's own bias cancels out,
as in the report. Three kinds of cuts are tried, and the largest value of each kind is the text's:

`splice`     before and behind a border: the head of one document, the tail of another
`insert`     a run of segments and what stands around it: a foreign piece
`mixed`      by the sign and the order of the first eigenvector of the gains: two documents in turns

A window holds 2 reach segments; longer texts are looked at window by window, each half in two of them. Text that is
joined from two places of one work is not found, nor are pieces well below two segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from puyu.configure import Config
from puyu.data.ngram import NgramModel, cache_share, spans, unit_hashes
from puyu.data.ngram_native import load

Floats = NDArray[np.float64]


class SpliceConfig(Config):
    """How borders are looked for."""

    segment_bytes: int = 4096
    """Size of a segment."""
    reach: int = 15
    """Segments that are compared with one another, up to this distance."""
    cache: float = 0.3
    """Weight of the cache in the mixture."""
    pairs: float = 0.5
    """Weight of pairs of units in the cache, against single ones."""
    bound: float = 2.0
    """Bits that one unit can gain, at most."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A way to cut a text in two: how much better segments are explained by their own side, in bits per unit."""

    value: float
    """0 where there is nothing to cut."""
    begin: int
    """Character where the segments behind the border (of the foreign piece) begin; 0 for `mixed`."""
    end: int
    """Character where they end."""
    gain: float
    """What both sides do for each other, in bits per unit; below 0 they make each other harder."""


@dataclass(frozen=True, slots=True)
class Splices:
    """The most suspicious cut of each kind; all 0 for a text of fewer than three segments."""

    splice: Cut
    insert: Cut
    mixed: Cut
    context: float
    """What all segments do for each other, in the mean: how much of one piece the text is."""


def splices(texts: Sequence[str], model: NgramModel, config: SpliceConfig | None = None) -> list[Splices]:
    """The most suspicious cuts of each text."""
    found = gains(texts, model, config or SpliceConfig())
    return [_worst(table, [*starts.tolist(), len(text)]) for text, (table, starts) in zip(texts, found, strict=True)]


def gains(texts: Sequence[str], model: NgramModel, config: SpliceConfig) -> list[tuple[Floats, NDArray[np.int64]]]:
    """For each text: gains [segments, 2 reach + 1] and where segments begin, in characters.

    Row j, column reach + i - j: what segment i does for segment j; NaN at j itself and beyond the text.
    """
    library = load()
    if library is None:
        return [_gains(text, model, config) for text in texts]
    weights = (config.cache, config.pairs, config.bound)
    return library.splice(model.native, texts, sizes=(config.segment_bytes, config.reach), weights=weights)


def _gains(text: str, model: NgramModel, config: SpliceConfig) -> tuple[Floats, NDArray[np.int64]]:
    """The slow twin of `cpp/splice.h`."""
    begins = [begin for begin, _ in spans(text)]
    bounds = [*_cut(text, begins, config.segment_bytes), len(begins)]
    hashes, probabilities = unit_hashes([text]), np.exp2(model.walk(text))
    count = len(bounds) - 1
    table = np.full((count, 2 * config.reach + 1), np.nan)
    parts = [hashes[a:b] for a, b in itertools.pairwise(bounds)]
    for j in range(count):
        own = probabilities[bounds[j] : bounds[j + 1]]
        for i in range(max(0, j - config.reach), min(count, j + config.reach + 1)):
            if i != j:
                share = cache_share(parts[j], parts[i], pairs=config.pairs, ahead=hashes[: bounds[j]])
                table[j, config.reach + i - j] = _gain(own, share, config)
    return table, np.array([begins[at] if at else 0 for at in bounds[:-1]], dtype=np.int64)


def _gain(probabilities: Floats, share: Floats, config: SpliceConfig) -> float:
    with np.errstate(divide="ignore"):  # a unit of no probability gains all that it may
        ratio = np.divide(share, probabilities, out=np.zeros(len(share)), where=share > 0)
    found = np.minimum(np.log2(1 - config.cache + config.cache * ratio), config.bound)
    return float(found.mean()) if len(found) else 0.0


def _cut(text: str, begins: Sequence[int], size: int) -> list[int]:
    """Numbers of the units that begin segments; a last one below half the size belongs to the one before."""
    ends = np.concatenate([[0], np.cumsum([len(character.encode("utf-8")) for character in text])])
    bounds, since = [0], 0
    for number, begin in enumerate(begins):
        if ends[begin] - since >= size:
            bounds.append(number)
            since = int(ends[begin])
    if len(bounds) > 1 and 2 * (ends[-1] - since) < size:
        bounds.pop()
    return bounds


# ---- cuts


def _worst(table: Floats, bounds: Sequence[int]) -> Splices:
    """`bounds`: characters where segments begin, and where the text ends."""
    none = Cut(0.0, 0, 0, 0.0)
    best = [none, none, none]
    reach = table.shape[1] // 2
    for low in range(0, max(len(table) - reach, 1), reach):
        matrix = _window(table, low, min(low + 2 * reach, len(table)))
        places = bounds[low : low + len(matrix) + 1]
        if len(matrix) > 2:
            cuts = [_best(matrix, groups, places) for groups in (_prefixes(len(matrix)), _runs(len(matrix)))]
            cuts.append(replace(_best(matrix, _eigen(matrix), places), begin=0, end=0))
            best = [max(a, b, key=lambda cut: cut.value) for a, b in zip(best, cuts, strict=True)]
    return Splices(best[0], best[1], best[2], _rounded(float(np.nanmean(table))) if len(table) > 1 else 0.0)


def _rounded(value: float) -> float:
    return round(float(value), 4)


def _window(table: Floats, low: int, high: int) -> Floats:
    """Gains [n, n]: row j, column i is what segment i does for segment j; NaN where it was not measured."""
    reach, count = table.shape[1] // 2, high - low
    columns = np.arange(count)[None] - np.arange(count)[:, None] + reach
    inside = (columns >= 0) & (columns <= 2 * reach)
    return np.where(inside, np.take_along_axis(table[low:high], columns.clip(0, 2 * reach), axis=1), np.nan)


def _prefixes(count: int) -> NDArray[np.bool_]:
    """[cuts, segments]: all that stands behind each border."""
    return np.arange(count)[None] >= np.arange(1, count)[:, None]


@lru_cache(maxsize=64)
def _runs(count: int) -> NDArray[np.bool_]:
    """Every run of segments that has others before it and behind it."""
    at = np.arange(count)
    rows = [(at >= begin) & (at < end) for begin in range(1, count - 1) for end in range(begin + 1, count)]
    return np.array(rows, dtype=bool).reshape(-1, count)


def _eigen(matrix: Floats) -> NDArray[np.bool_]:
    """Segments up to each place in the order of the first eigenvector of the centered gains."""
    centered = np.nan_to_num(matrix - np.nanmean(matrix, axis=1, keepdims=True))
    middle = np.eye(len(matrix)) - 1 / len(matrix)
    leading = _leading(middle @ (centered + centered.T) @ middle)
    ranks = np.argsort(np.argsort(leading, kind="stable"), kind="stable")
    return ranks[None] >= np.arange(1, len(matrix))[:, None]


def _leading(symmetric: Floats) -> Floats:
    """The eigenvector of the largest eigenvalue, by squaring: for such small matrices much quicker than all of them."""
    power = symmetric + np.eye(len(symmetric)) * max(float(np.abs(symmetric).sum(1).max()), 1e-12)
    for _ in range(10):
        power = power @ power
        power /= np.abs(power).max()
    return power[:, power.diagonal().argmax()]


def _best(matrix: Floats, groups: NDArray[np.bool_], bounds: Sequence[int]) -> Cut:
    known = ~np.isnan(matrix)
    gains, inside = np.where(known, matrix, 0.0), groups.astype(np.float64)
    in_sum, in_count = inside @ gains.T, inside @ known.T.astype(np.float64)
    own_sum = np.where(groups, in_sum, gains.sum(1) - in_sum)
    own_count = np.where(groups, in_count, known.sum(1) - in_count)
    cross_sum, cross_count = gains.sum(1) - own_sum, known.sum(1) - own_count
    judged = (own_count > 0) & (cross_count > 0)
    better = own_sum / np.maximum(own_count, 1) - cross_sum / np.maximum(cross_count, 1)
    smaller = np.minimum(groups.sum(1), len(matrix) - groups.sum(1))
    values = (better * judged).sum(1) / np.maximum(judged.sum(1), 1) * np.sqrt(smaller / (smaller + 1))
    best = int(values.round(9).argmax())
    members = np.flatnonzero(groups[best])
    gain = cross_sum[best].sum() / max(cross_count[best].sum(), 1)
    return Cut(_rounded(values[best]), bounds[members[0]], bounds[members[-1] + 1], _rounded(gain))
