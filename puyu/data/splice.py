"""Where two documents were joined to one: does what stands before a border help to predict what stands behind it?

    >>> model = train(["the cat sat on the mat. ", "stock prices fell again today. "] * 50)
    >>> joined = "the cat sat on the mat. " * 40 + "stock prices fell again today. " * 40
    >>> found = splices([joined], model, SpliceConfig(segment_bytes=200))[0]
    >>> 900 < found.at < 1020
    True

InternLM2 (2024, section 3.1.3) compares P(S2 | S1) with P(S2): where S1 makes S2 harder, S1 is a distraction. A language
model is asked there; here it is an n-gram model with a cache of S1 (`puyu.data.ngram`). The text is cut into segments,
and each is scored with the cache of each of its neighbors: its gain, in bits per unit, is how much easier it becomes.
No unit gains more than a bound, so that one name does not outweigh a page.

The gain over a border alone says more about the kind of text than about the border: verse, lists and dialogue differ.
So each segment is its own measure: at a border, `splice` is the mean over the segments on both sides of (gain from
segments of the same side) - (gain from those of the other side), times sqrt(n / (n + 1)) for n segments on the shorter
side, since few segments vary more. It is near 0 inside a text, and the largest one is the text's. The model's own bias
cancels out, as in the report. `gain` is the mean gain across that border: below 0, S1 makes S2 harder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """Segments that are compared with one another, up to this distance; a border looks at half of it on each side."""
    cache: float = 0.3
    """Weight of the cache in the mixture."""
    pairs: float = 0.5
    """Weight of pairs of units in the cache, against single ones."""
    bound: float = 2.0
    """Bits that one unit can gain, at most."""


@dataclass(frozen=True, slots=True)
class Splice:
    """The most suspicious border of a text; all 0 for a text of fewer than three segments."""

    value: float
    """How much better a segment is explained by its own side than by the other, in bits per unit."""
    at: int
    """Character where the segment behind the border begins."""
    before: int
    """Character where the segment before it begins: the join stands near or between."""
    gain: float
    """What both sides do for each other, in bits per unit; below 0 they make each other harder."""
    context: float
    """What all segments do for each other, in the mean: how much of one piece the text is."""


def splices(texts: Sequence[str], model: NgramModel, config: SpliceConfig | None = None) -> list[Splice]:
    """The most suspicious border of each text."""
    config = config or SpliceConfig()
    return [_worst(table, starts) for table, starts in gains(texts, model, config)]


def gains(
    texts: Sequence[str], model: NgramModel, config: SpliceConfig
) -> list[tuple[Floats, NDArray[np.int64]]]:
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
    parts = [hashes[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    ahead = [hashes[max(at - 1, 0) : at] if at else hashes[:1] for at in bounds[:-1]]
    for j in range(count):
        own = probabilities[bounds[j] : bounds[j + 1]]
        for i in range(max(0, j - config.reach), min(count, j + config.reach + 1)):
            if i != j:
                share = cache_share(parts[j], parts[i], pairs=config.pairs, first=(ahead[j], ahead[i]))
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


def _worst(table: Floats, starts: NDArray[np.int64]) -> Splice:
    found = [border for at in range(1, len(table)) if (border := _border(table, at)) is not None]
    if not found:
        return Splice(0.0, 0, 0, 0.0, 0.0)
    value, gain, at = max(found, key=lambda border: (border[0], -border[2]))
    context = float(np.nanmean(table))
    return Splice(*(round(value, 4), int(starts[at]), int(starts[at - 1]), round(gain, 4), round(context, 4)))


def _border(table: Floats, at: int) -> tuple[float, float, int] | None:
    """(value, gain across, number of the segment behind) of a border; None where no side has two segments."""
    count, width = table.shape
    reach = width // 2
    low, high = max(0, at - (reach + 1) // 2), min(count, at + (reach + 1) // 2)
    rows = np.arange(low, high)[:, None]
    others = rows + np.arange(width) - reach
    part = table[low:high]
    inside = (others >= low) & (others < high) & ~np.isnan(part)
    own, cross = inside & ((others < at) == (rows < at)), inside & ((others < at) != (rows < at))
    judged = own.any(axis=1)
    if not judged.any():
        return None
    filled = np.where(inside, part, 0.0)
    means = [(filled * mask).sum(1) / np.maximum(mask.sum(1), 1) for mask in (own, cross)]
    smaller = min(at - low, high - at)
    value = float((means[0] - means[1])[judged].mean()) * float(np.sqrt(smaller / (smaller + 1)))
    return value, float(means[1].mean()), at
