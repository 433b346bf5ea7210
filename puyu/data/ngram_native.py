"""The native half of the n-gram model: units, ids, scores and gains of many texts in one call.

    library = load()                               # None where it was not built
    library.units(["One two."])                    # (hashes of one, two and the stop; [3])

What each call means is said by its twin in `puyu.data.ngram`, `splice` and `discourse`; tests compare them. Calls
release the interpreter.

    python -m puyu.data.ngram_native               # build, print the path of the library
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puyu.documents import texts as document_texts
from puyu.documents.characters import read_tables
from puyu.documents.texts import Texts
from puyu.native import Library, Loader, argument, native_folder, pointer

SOURCE = Path(__file__).parent / "cpp" / "ngram.cpp"
LIBRARY = Library(
    "ngram",
    SOURCE,
    document_texts.FLAGS,
    without="the n-gram model counts and scores in Python, many times more slowly",
    includes=(document_texts.SOURCE.parent,),
)
MAX_ORDER = 5
SYMBOLS = 257
"""Bytes, and the end of a unit."""
NUM_DISCOURSE = 8
Arrays = Mapping[str, NDArray[Any]]


class _Slots(ctypes.Structure):
    _fields_ = [("keys", ctypes.c_void_p), ("shift", ctypes.c_int64)]


class _Vocabulary(ctypes.Structure):
    _fields_ = [("slots", _Slots), ("ids", ctypes.c_void_p)]


class _Grams(ctypes.Structure):
    _fields_ = [("slots", _Slots), ("probabilities", ctypes.c_void_p), ("weights", ctypes.c_void_p)]


class _Model(ctypes.Structure):
    _fields_ = [
        ("vocabulary", _Vocabulary),
        ("order", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("unigrams", "weights", "spelling")),
        ("grams", _Grams * (MAX_ORDER - 1)),
    ]


class _Phrases(ctypes.Structure):
    _fields_ = [("slots", _Slots), ("classes", ctypes.c_void_p), ("longest", ctypes.c_int64)]


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("window", "passage")]


class _Options(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("segment", "reach")),
        *((name, ctypes.c_double) for name in ("cache", "pairs", "bound")),
    ]


def _slots(keys: NDArray[Any]) -> _Slots:
    return _Slots(keys.ctypes.data, shift_of(keys))


def shift_of(keys: NDArray[Any]) -> int:
    """Of a hash to its first slot, from the size of a table: a power of two and room behind it."""
    return 64 - (len(keys).bit_length() - 1)


def vocabulary_of(arrays: Arrays) -> _Vocabulary:
    """The tables that turn the hash of a unit into its id."""
    return _Vocabulary(_slots(arrays["unit_keys"]), arrays["unit_ids"].ctypes.data)


def model_of(arrays: Arrays, *, order: int, bits: int) -> _Model:
    """The arrays of a model, which must outlive what is returned."""
    pointers = (arrays[name].ctypes.data for name in ("unigrams", "weights", "spelling"))
    model = _Model(vocabulary_of(arrays), order, bits, *pointers)
    for n in range(2, order + 1):
        keys, *values = (arrays[f"{name}_{n}"] for name in ("keys", "probabilities", "weights"))
        model.grams[n - 2] = _Grams(_slots(keys), *(value.ctypes.data for value in values))
    return model


class NgramLibrary:
    """The native library with the tables of characters."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.puyu_ngram_walk.restype = ctypes.c_int64
        self._tables, self._unicode = document_texts.character_tables()

    def units(self, texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """(hashes of all units, text by text; how many there are up to the end of each text)."""
        given = Texts(texts)
        hashes, ends = np.empty(_room(texts), dtype=np.uint64), np.zeros(given.count, dtype=np.int64)
        self._call("puyu_ngram_units", given, hashes, ends)
        return hashes[: _total(ends)].copy(), ends

    def ids(
        self, arrays: Arrays, texts: Sequence[str]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
        """(ids of all units, ends likewise, bytes of the unknown ones [SYMBOLS before, SYMBOLS])."""
        given, vocabulary = Texts(texts), vocabulary_of(arrays)
        ids, ends = np.empty(_room(texts), dtype=np.uint32), np.zeros(given.count, dtype=np.int64)
        spellings = np.zeros((SYMBOLS, SYMBOLS), dtype=np.int64)
        self._call("puyu_ngram_ids", vocabulary, given, ids, ends, spellings)
        return ids[: _total(ends)].copy(), ends, spellings

    def score(self, model: _Model, texts: Sequence[str]) -> NDArray[np.float64]:
        """[texts, 4]: bits, units, unknown units, bits of those."""
        given = Texts(texts)
        scores = np.zeros((given.count, 4))
        self._call("puyu_ngram_score", model, given, scores)
        return scores

    def walk(self, model: _Model, text: str) -> NDArray[np.float64]:
        """log2 of the probability of each unit."""
        logs = np.empty(_room([text]))
        count = self._library.puyu_ngram_walk(
            self._unicode, ctypes.byref(model), ctypes.byref(Texts([text]).native), pointer(logs)
        )
        return logs[:count].copy()

    def splice(
        self, model: _Model, texts: Sequence[str], *, sizes: tuple[int, int], weights: tuple[float, float, float]
    ) -> list[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """(gains [segments, 2 reach + 1], where segments begin) of each text.

        sizes: of a segment, and reach; weights: of the cache, of pairs, and the bound.
        """
        given, options = Texts(texts), _Options(*sizes, *weights)
        room = sum(len(text.encode("utf-8")) // sizes[0] + 2 for text in texts)
        gains, starts = np.empty((room, 2 * sizes[1] + 1)), np.empty(room, dtype=np.int64)
        ends = np.zeros(given.count, dtype=np.int64)
        self._call("puyu_splice", model, options, given, gains, starts, ends)
        bounds = [0, *ends.tolist()]
        return [(gains[a:b], starts[a:b]) for a, b in itertools.pairwise(bounds)]

    def discourse(
        self, texts: Sequence[str], phrases: tuple[NDArray[Any], NDArray[Any], int], *, sizes: tuple[int, int]
    ) -> NDArray[np.float64]:
        """[texts, 8] as `puyu.data.discourse.NAMES`; phrases: keys, classes, most units; sizes: window and passage."""
        keys, classes, longest = phrases
        given, scores = Texts(texts), np.empty((len(texts), NUM_DISCOURSE))
        native = _Phrases(_slots(keys), classes.ctypes.data, longest)
        self._call("puyu_discourse", native, _Sizes(*sizes), given, scores)
        return scores

    def _call(self, name: str, *arguments: Any) -> None:
        native = (value.native if isinstance(value, Texts) else value for value in arguments)
        getattr(self._library, name)(self._unicode, *map(argument, native))


def _room(texts: Sequence[str]) -> int:
    """Units, at most: one a character."""
    return sum(map(len, texts)) + 1


def _total(ends: NDArray[np.int64]) -> int:
    return int(ends[-1]) if len(ends) else 0


load = Loader(LIBRARY, NgramLibrary)


def build() -> Path:
    """Compile, unless it is there, and make the tables; DependencyError when there is no compiler or it fails."""
    path = load.build()
    read_tables(native_folder())
    return path


if __name__ == "__main__":
    print(build(), file=sys.stdout)
