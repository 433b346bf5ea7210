"""Counts -> an n-gram model: interpolated absolute discounting in bounded memory, whatever the order of the texts.

    counts = Counts(folder, limit=1_000_000)
    counts.add(np.array([7, 7, 9], dtype=np.uint64))
    [(keys.tolist(), n.tolist()) for keys, n in counts.parts()]     # [([7, 9], [2, 1])]

An n-gram is a number: the ids of its units side by side, the first in the highest bits, so that all that follow one
context stand together in sorted order and a key gives its context by a shift. Counts are merged by sorting; beyond the
limit they go to a folder and come back range by range, and since sums do not depend on an order, neither does a model.

A count c of n-gram hw after context h gives (c - D) / C(h), and what the discounts D left over is the weight of the
shorter context (Ney, Essen and Kneser, 1994, with the three discounts of Chen and Goodman, 1999, for counts of 1, 2 and
more). Rare n-grams are left out; their mass goes to the shorter context too, so that probabilities sum to one exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puyu.data.ngram_native import SYMBOLS

Keys = NDArray[np.uint64]
Sums = NDArray[np.int64]
_PRIME = np.uint64(0x9E3779B97F4A7C15)
EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
_BINS = 1 << 16
_SAMPLE = 4096


class Counts:
    """How often each key was added; at most about `limit` different ones in memory."""

    def __init__(self, folder: Path, *, limit: int, shift: int = 0) -> None:
        """Keys that are equal above `shift` bits stay in one part."""
        self._folder, self._limit, self._shift = folder, limit, shift
        self._runs: list[tuple[Keys, Sums]] = []
        self._files: list[tuple[Keys, Sums]] = []

    def add(self, keys: Keys) -> None:
        found, counts = np.unique(keys, return_counts=True)
        self._runs.append((found, counts.astype(np.int64)))
        if sum(len(run) for run, _ in self._runs) > self._limit:
            self._runs = [merged(self._runs)]
            if 2 * len(self._runs[0][0]) > self._limit:
                self._spill()

    def _spill(self) -> None:
        names = [self._folder / f"{id(self)}-{len(self._files)}-{part}.npy" for part in ("keys", "counts")]
        for name, array in zip(names, self._runs.pop(), strict=True):
            np.save(name, array)
        keys, counts = (np.load(name, mmap_mode="r") for name in names)
        self._files.append((keys, counts))

    def parts(self) -> Iterator[tuple[Keys, Sums]]:
        """Keys in ascending order with their counts, a part at a time."""
        runs = [*self._files, *self._runs]
        for low, high in self._ranges(runs):
            inside = [(keys, counts, *np.searchsorted(keys, [low, high])) for keys, counts in runs]
            part = merged([(keys[a:b], counts[a:b]) for keys, counts, a, b in inside])
            if len(part[0]):
                yield part

    def _ranges(self, runs: Sequence[tuple[Keys, Sums]]) -> Iterator[tuple[np.uint64, np.uint64]]:
        size = sum(len(keys) for keys, _ in runs)
        step = max(size // _SAMPLE, 1)
        sample = np.sort(np.concatenate([keys[::step] for keys, _ in runs])) if runs else np.empty(0, np.uint64)
        number = size // self._limit + 1
        places = [sample[len(sample) * i // number] for i in range(1, number)]
        cuts = sorted({int(place) >> self._shift << self._shift for place in places} - {0})
        for low, high in zip([0, *cuts], [*cuts, int(EMPTY)], strict=True):
            yield np.uint64(low), np.uint64(high)


def merged(runs: Sequence[tuple[Keys, Sums]]) -> tuple[Keys, Sums]:
    """Sorted runs as one, equal keys summed."""
    if len(runs) == 1:
        return np.asarray(runs[0][0]), np.asarray(runs[0][1])
    keys = np.concatenate([keys for keys, _ in runs] or [np.empty(0, np.uint64)])
    counts = np.concatenate([counts for _, counts in runs] or [np.empty(0, np.int64)])
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    starts = run_starts(keys)
    return keys[starts], np.add.reduceat(counts, starts) if len(starts) else counts


def run_starts(sorted_keys: Keys) -> NDArray[np.int64]:
    """Where each different value begins."""
    if not len(sorted_keys):
        return np.empty(0, np.int64)
    return np.concatenate([[0], np.flatnonzero(sorted_keys[1:] != sorted_keys[:-1]) + 1])


def most_frequent(counts: Counts, *, size: int, minimum: int) -> Keys:
    """The keys of the vocabulary: most frequent first, then by their value."""
    keys, sums = np.empty(0, np.uint64), np.empty(0, np.int64)
    for part, part_sums in counts.parts():
        enough = part_sums >= minimum
        keys, sums = np.concatenate([keys, part[enough]]), np.concatenate([sums, part_sums[enough]])
        order = np.lexsort((keys, -sums))[:size]
        keys, sums = keys[order], sums[order]
    return keys


def packed(ids: NDArray[np.uint32], ends: Sums, *, n: int, bits: int) -> Keys:
    """Keys of the n-grams that end at each unit; boundaries stand before each text."""
    sizes = np.diff(ends, prepend=0)
    places = np.arange(len(ids)) + (n - 1) * (np.repeat(np.arange(len(ends)), sizes) + 1)
    padded = np.zeros(len(ids) + (n - 1) * len(ends), dtype=np.uint64)
    padded[places] = ids
    keys = np.zeros(len(ids), dtype=np.uint64)
    for back in range(n):
        keys |= padded[places - back] << np.uint64(back * bits)
    return keys


@dataclass(frozen=True, eq=False)
class Grams:
    """The n-grams of one order that stay, with probabilities, and the weights of their contexts."""

    keys: Keys
    probabilities: NDArray[np.float32]
    contexts: Keys
    weights: NDArray[np.float32]
    minimum: int
    """The smallest count that stayed."""
    seen: int


def discounts(histogram: Sums) -> NDArray[np.float64]:
    """Of counts 0, 1, 2 and more (Chen and Goodman, 1999); 0.5 where a corpus is too small to tell."""
    n1, n2, n3, n4 = (int(histogram[count]) for count in (1, 2, 3, 4))
    if min(n1, n2, n3) > 0:
        y = n1 / (n1 + 2 * n2)
        found = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (found[1:] > 0).all() and (found[1:] < [1, 2, 3]).all():
            return found
    return np.array([0.0, 0.5, 0.5, 0.5])


def histogram_of(counts: Counts) -> Sums:
    """How many keys have each count; the last bin holds all larger ones."""
    histogram = np.zeros(_BINS, dtype=np.int64)
    for _, sums in counts.parts():
        histogram += np.bincount(np.minimum(sums, _BINS - 1), minlength=_BINS)
    return histogram


def smallest_count(histogram: Sums, *, least: int, room: int) -> int:
    """The smallest count, `least` or more, from which on at most `room` keys are left."""
    left = np.cumsum(histogram[::-1])[::-1]
    fitting = np.flatnonzero(left <= room)
    return max(least, int(fitting[0]) if len(fitting) else _BINS - 1)


def grams_of(counts: Counts, *, bits: int, least: int, room: int) -> Grams:
    """Discounted probabilities of one order."""
    histogram = histogram_of(counts)
    minimum, steps = smallest_count(histogram, least=least, room=room), discounts(histogram)
    kept: list[list[NDArray[Any]]] = []
    for keys, sums in counts.parts():
        kept.append(_discounted(keys, sums, steps, bits=bits, minimum=minimum))
    keys, probabilities, contexts, weights = (np.concatenate(column) for column in zip(*kept, strict=True))
    return Grams(keys, probabilities, contexts, weights, minimum, int(histogram.sum()))


def _discounted(keys: Keys, sums: Sums, steps: NDArray[np.float64], *, bits: int, minimum: int) -> list[NDArray[Any]]:
    contexts = keys >> np.uint64(bits)
    starts = run_starts(contexts)
    totals = np.add.reduceat(sums, starts)
    run = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(keys)))
    stays = sums >= minimum
    shares = (sums - steps[np.minimum(sums, 3)]) / totals[run]
    probabilities = np.where(stays, shares, 0.0).astype(np.float32)
    # from the rounded numbers, so that nothing is lost of the sum
    weights = (1.0 - np.add.reduceat(probabilities.astype(np.float64), starts)).astype(np.float32)
    used = np.maximum.reduceat(stays, starts)
    return [keys[stays], probabilities[stays], contexts[starts][used], weights[used]]


def unigrams_of(counts: Sums) -> NDArray[np.float32]:
    """Probabilities by id (0, the boundary, has none), each with a share for what was never seen."""
    histogram = np.bincount(np.minimum(counts[1:], _BINS - 1), minlength=_BINS)
    shares = (counts - discounts(histogram)[np.minimum(counts, 3)]) / max(int(counts.sum()), 1)
    shares[0] = 0.0
    shares[1:] += (1.0 - shares.sum()) / (len(counts) - 1)
    return shares.astype(np.float32)


def spelling_of(counts: Sums) -> NDArray[np.float32]:
    """log2 [byte before, byte or end]; a unit is never empty. A twentieth of a count is added to each."""
    smoothed = counts + 0.05
    smoothed[SYMBOLS - 1, SYMBOLS - 1] = 0.0
    with np.errstate(divide="ignore"):
        return np.log2(smoothed / smoothed.sum(1, keepdims=True)).astype(np.float32)


def table_of(keys: Keys, *columns: tuple[NDArray[Any], float]) -> list[NDArray[Any]]:
    """Keys in slots by linear probing, and the columns (with what empty slots hold) in the same places.

    All keys stand in the order of their first slots, so that the layout depends on nothing else; there is room behind
    the last one instead of a way back to the front.
    """
    power = max((2 * len(keys)).bit_length(), 4)
    homes = (keys * _PRIME) >> np.uint64(64 - power)
    order = np.lexsort((keys, homes))
    places = np.maximum.accumulate(homes[order].astype(np.int64) - np.arange(len(keys))) + np.arange(len(keys))
    size = max(1 << power, int(places[-1]) + 1 if len(keys) else 0) + 1
    assert size < 2 << power
    tables: list[NDArray[Any]] = [np.full(size, EMPTY)]
    tables[0][places] = keys[order]
    for column, empty in columns:
        table = np.full(size, empty, dtype=column.dtype)
        table[places] = column[order]
        tables.append(table)
    return tables
