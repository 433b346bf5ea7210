"""Texts -> hashed features -> a linear classifier, natively where that was built.

    >>> model = train(["good good", "bad"] * 8, [True, False] * 8, shape=Shape(bits=10), plan=Plan(epochs=4))
    >>> good, bad = margins(["good", "bad"], model, shape=Shape(bits=10))
    >>> bool(good > 0 > bad)
    True

A feature is an n-gram of folded units (words; single Han characters) or of characters, put into one of 2^bits buckets
by its hash (Weinberger et al. 2009, arXiv 0902.2206). A text is the vector of its distinct features, of length 1, so
that neither its size nor a repeated phrase decides. The classifier is logistic regression by Adagrad (Duchi et al.
2011), in the spirit of fastText (Joulin et al. 2016), one thread, the same weights in every run.
It knows no labels' meaning, no calibration and no file.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from puyu.configure import Config
from puyu.data.measure import UNIT, mix, ngram_hashes, unit_hashes
from puyu.documents.characters import folded
from puyu.documents.texts import TextLibrary, Texts, load, with_room

Weights = NDArray[np.float32]
"""One of each bucket, the bias last."""

_BATCH_BYTES = 8_000_000
_START = np.float32(1e-3)
_DIGIT = re.compile(r"\d")
_DIGITS = re.compile(r"\d+")
_BLANKS = re.compile(r"\s+")


class Shape(Config):
    """Which features a text has."""

    bits: int = Field(default=20, ge=8, le=24)
    """2^bits buckets."""
    words: int = Field(default=3, ge=0, le=5)
    """Longest n-gram of words (of characters for Chinese and Japanese); 0: none."""
    shortest: int = Field(default=1, ge=1, le=8)
    """Shortest n-gram of characters, blanks and marks included."""
    longest: int = Field(default=3, ge=0, le=8)
    """Longest n-gram of characters; 0: none."""


class Plan(Config):
    """How a classifier is trained."""

    epochs: int = Field(default=4, ge=1)
    """Walks over all texts."""
    rate: float = Field(default=0.3, gt=0)
    """Adagrad's step."""
    decay: float = Field(default=1e-5, ge=0)
    """Pull of the weights toward 0, at each text that has them."""
    seed: int = 0
    """Chooses the order of the texts."""


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("bits", "words", "shortest", "longest")]


def _native(shape: Shape) -> _Shape:
    return _Shape(shape.bits, shape.words, shape.shortest, shape.longest)


def features(texts: Sequence[str], *, shape: Shape) -> list[NDArray[np.uint32]]:
    """The distinct buckets of each text, in the order in which they first stand."""
    library = load()
    if library is None:
        return [text_features(text, shape=shape) for text in texts]
    return [part for batch in batches(texts) for part in _features(library, batch, shape)]


def _features(library: TextLibrary, texts: Sequence[str], shape: Shape) -> list[NDArray[np.uint32]]:
    packed, ends = Texts(texts), np.zeros(len(texts), dtype=np.int64)

    def fill(room: int) -> tuple[int, NDArray[np.uint32]]:
        buckets = np.empty(room, dtype=np.uint32)
        library.call("puyu_features", packed.native, _native(shape), buckets, ctypes.c_int64(room), ends)
        return int(ends[-1]), buckets

    total, buckets = with_room(fill, sum(map(len, texts)) * 4 + 64)
    return np.split(buckets[:total], ends[:-1])


def margins(texts: Sequence[str], weights: Weights, *, shape: Shape) -> NDArray[np.float64]:
    """[texts]: the log-odds that the classifier gives, before calibration."""
    assert weights.shape == ((1 << shape.bits) + 1,), "weights of another shape"
    library, found = load(), np.empty(len(texts))
    if library is None:
        return np.array([text_margin(text, weights, shape=shape) for text in texts], dtype=np.float64)
    for start, batch in _places(texts):
        packed, part = Texts(batch), np.empty(len(batch))  # `packed` must live as long as the call
        library.call("puyu_linear_margins", packed.native, _native(shape), weights, part)
        found[start : start + len(batch)] = part
    return found


def train(texts: Sequence[str], labels: Sequence[bool], *, shape: Shape, plan: Plan) -> Weights:
    """Weights of a classifier that tells the texts with a true label from the others."""
    marks = np.array(labels, dtype=np.uint8)
    assert len(marks) == len(texts), "a label for each text"
    order = _order(len(texts), plan)
    library = load()
    if library is None:
        return train_slowly(texts, labels, shape=shape, plan=plan)
    packed, weights = Texts(texts), np.zeros((1 << shape.bits) + 1, dtype=np.float32)
    rates = (ctypes.c_double(plan.rate), ctypes.c_double(plan.decay))
    arguments = (packed.native, _native(shape), marks, order, ctypes.c_int64(len(order)), *rates, weights)
    library.call("puyu_linear_train", *arguments)
    return weights


def _order(count: int, plan: Plan) -> NDArray[np.int64]:
    random = np.random.Generator(np.random.PCG64(plan.seed))
    return np.concatenate([random.permutation(count) for _ in range(plan.epochs)]).astype(np.int64)


def batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Some at a time, so that copies of them stay small."""
    return (batch for _, batch in _places(texts))


def _places(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    start = size = 0
    for at, text in enumerate(texts):
        size += len(text)
        if size >= _BATCH_BYTES:
            yield start, texts[start : at + 1]
            start, size = at + 1, 0
    if start < len(texts):
        yield start, texts[start:]


# ---- the same in Python: what the native side is tested against, and what runs where it was not built


def text_features(text: str, *, shape: Shape) -> NDArray[np.uint32]:
    """The distinct buckets of one text, in the order in which they first stand."""
    found: dict[int, None] = {}
    if shape.words:
        units = UNIT.findall(_DIGITS.sub("0", folded(text)))
        found |= _buckets(unit_hashes(units), range(1, shape.words + 1), shape.bits)
    if shape.longest:
        line = _BLANKS.sub(" ", f" {_DIGIT.sub('0', folded(text))} ")
        hashes = mix(np.array([ord(character) for character in line], dtype=np.uint64))
        found |= _buckets(hashes, range(shape.shortest, shape.longest + 1), shape.bits)
    return np.fromiter(found, dtype=np.uint32, count=len(found))


def _buckets(hashes: NDArray[np.uint64], sizes: range, bits: int) -> dict[int, None]:
    """By the place where an n-gram begins, then by its size."""
    grams = [(ngram_hashes(hashes, n) >> np.uint64(64 - bits)).tolist() for n in sizes]
    return {row[at]: None for at in range(len(hashes)) for row in grams if at < len(row)}


def text_margin(text: str, weights: Weights, *, shape: Shape) -> float:
    """The margin of one text."""
    buckets = text_features(text, shape=shape)
    total = float(weights[buckets].astype(np.float64).sum())
    return total / math.sqrt(max(len(buckets), 1)) + float(weights[-1])


def train_slowly(texts: Sequence[str], labels: Sequence[bool], *, shape: Shape, plan: Plan) -> Weights:
    """What `train` does, step by step; equal up to the rounding of sums."""
    weights, squares = np.zeros((2, (1 << shape.bits) + 1), dtype=np.float32)
    rate, decay = np.float32(plan.rate), np.float32(plan.decay)
    rows = [text_features(text, shape=shape) for text in texts]
    bias = bias_squares = 0.0
    for at in _order(len(texts), plan).tolist():
        row = rows[at]
        scale = 1 / math.sqrt(len(row)) if len(row) else 0.0
        margin = float(weights[row].astype(np.float64).sum()) * scale + bias
        error = 1 / (1 + math.exp(-margin)) - labels[at]
        gradient = np.float32(error * scale) + decay * weights[row]
        squares[row] += gradient * gradient
        weights[row] -= rate * gradient / np.sqrt(squares[row] + _START)
        bias_squares += error * error
        bias -= float(rate) * error / math.sqrt(bias_squares + float(_START))
    weights[-1] = bias
    return weights
