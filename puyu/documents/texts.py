"""Many texts at once through the native library: scores, digests, MinHash signatures, languages.

    library = load()                               # None where it was not built
    library.digests(Texts(["one", "two"]))         # [2, 16] bytes

Each has a slower twin in plain Python, which gives the same and says what it means (`puyu.data.measure`,
`puyu.data.dedup`, `puyu.documents.language`); tests compare them character by character. Calls release the interpreter.

    python -m puyu.documents.texts                 # build, print the path of the library
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from puyu.documents.characters import read_tables
from puyu.native import Library, Loader, argument, native_folder, pointer

R = TypeVar("R")
SOURCE = Path(__file__).parent / "cpp" / "texts.cpp"
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-ffp-contract=off"]

LIBRARY = Library("texts", SOURCE, FLAGS, without="texts are measured in Python, many times more slowly")


C4_FAMILY = 3
"""Behind the families of `TextLibrary.published`."""


class _Unicode(ctypes.Structure):
    _fields_ = [("kinds", ctypes.c_void_p), ("lower", ctypes.c_void_p), ("num_lower", ctypes.c_int64)]


class _Texts(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_void_p), ("starts", ctypes.c_void_p), ("count", ctypes.c_int64)]


class _Bayes(ctypes.Structure):
    _names = ("moves", "weights", "priors")
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _names),
        ("num_features", ctypes.c_int64),
        ("num_languages", ctypes.c_int64),
    ]


class _MinHash(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("factors", "offsets")),
        *((name, ctypes.c_int64) for name in ("size", "ngram", "sketch")),
    ]


class _NearTask(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("order", "buckets", "shingles", "starts")),
        *((name, ctypes.c_int64) for name in ("count", "bands", "num_buckets", "width", "sketch")),
        *((name, ctypes.c_double) for name in ("threshold", "doubt")),
        ("most", ctypes.c_int64),
    ]


class _Values(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("file", ctypes.c_int32)]


class _LineRules(ctypes.Structure):
    _numbers = ("longest_word", "line_words", "lorem_ipsum", "curly_brackets")
    _switches = ("citations", "words_after_citations", "javascript", "policy")
    _fields_ = [
        *((name, ctypes.c_int64) for name in _numbers),
        ("ends", ctypes.c_void_p),
        ("num_ends", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in _switches),
    ]


class Texts:
    """Texts one after the other, as the library reads them."""

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [text.encode("utf-8") for text in texts]
        self._bytes = b"".join(encoded)
        self._starts = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in encoded], out=self._starts[1:])
        self.count, self.size = len(encoded), len(self._bytes)
        self.native = _Texts(
            ctypes.cast(ctypes.c_char_p(self._bytes), ctypes.c_void_p), self._starts.ctypes.data, self.count
        )


@dataclass(frozen=True, eq=False)
class Bayes:
    """Tables of a classifier over n-grams of bytes (`cpp/language.h`)."""

    moves: NDArray[np.uint64]
    weights: NDArray[np.float32]
    priors: NDArray[np.float32]

    def native(self) -> _Bayes:
        arrays = (self.moves, self.weights, self.priors)
        return _Bayes(*(array.ctypes.data for array in arrays), *self.weights.shape)


class Automaton:
    """Many phrases, found in one walk; ASCII in any case."""

    def __init__(self, library: ctypes.CDLL, phrases: Sequence[str]) -> None:
        assert all(phrases), "an empty phrase stands everywhere"
        self._library = library
        texts = Texts(phrases)  # which must live as long as the call
        self.handle = ctypes.c_void_p(library.puyu_automaton(ctypes.byref(texts.native)))

    def __del__(self) -> None:
        self._library.puyu_automaton_free(self.handle)


@dataclass(frozen=True)
class MinHashes:
    """Of each text its signature [texts, hashes], how many shingles it has (with none there is no signature), and its
    sketch: the smallest hashes of its shingles, in order, `sketches[starts[i] : starts[i + 1]]`."""

    signatures: NDArray[np.uint32]
    counts: NDArray[np.int64]
    sketches: NDArray[np.uint32]
    starts: NDArray[np.int64]


@dataclass(frozen=True)
class Compared:
    """What near copies are found among. `order`: rows, best first; `buckets` [bands, places]: 0 where a document is
    alone; `sketch`: shingles that a sketch holds, at most (0: there are none); the rest by row."""

    order: NDArray[np.int64]
    buckets: NDArray[np.uint32]
    signatures: NDArray[np.uint32]
    shingles: NDArray[np.int64]
    sketches: NDArray[np.uint32]
    starts: NDArray[np.int64]
    sketch: int


Found = tuple[NDArray[np.int64], NDArray[np.float64]]


def with_room(fill: Callable[[int], tuple[int, R]], room: int) -> tuple[int, R]:
    """(size, arrays) of a call whose size is known when it ends: `fill` makes arrays of a size and says how much they
    should hold; where that is more, it is called again with it."""
    size, arrays = fill(room)
    return (size, arrays) if size <= room else fill(size)


class TextLibrary:
    """The native library with the tables of characters."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.puyu_automaton.restype = ctypes.c_void_p
        for function in (library.puyu_automaton, library.puyu_automaton_free):
            function.argtypes = [ctypes.c_void_p]
        library.puyu_num_scores.restype = library.puyu_num_published.restype = ctypes.c_int64
        self.num_scores = int(library.puyu_num_scores())
        self._tables, self._unicode = character_tables()

    def automaton(self, phrases: Sequence[str]) -> Automaton:
        """Ready to search for these."""
        return Automaton(self._library, phrases)

    def measure(self, texts: Texts, hows: Sequence[int], boilerplate: Automaton) -> NDArray[np.float64]:
        """Scores [texts, num_scores] in the order of `puyu.data.measure.SCORES`; NaN where a score has no meaning."""
        scores = np.empty((texts.count, self.num_scores))
        kinds = np.asarray(hows, dtype=np.uint8)
        assert len(kinds) == texts.count
        self._call("puyu_measure", boilerplate.handle, texts.native, kinds, scores)
        return scores

    def digests(self, texts: Texts) -> NDArray[np.uint8]:
        """[texts, 16]: BLAKE2b of each in lower case, with runs of blanks as one."""
        found = np.empty((texts.count, 16), dtype=np.uint8)
        self._call("puyu_digests", texts.native, found)
        return found

    def minhash(
        self, texts: Texts, functions: tuple[NDArray[np.uint64], NDArray[np.uint64]], *, ngram: int, sketch: int
    ) -> MinHashes:
        """`functions`: factors and offsets, one of each for a hash; `sketch`: shingles that a sketch holds, at most."""
        factors, offsets = functions
        size = len(factors)
        assert size % 32 == 0, "signatures are computed 32 hashes at a time"
        signatures, counts = np.empty((texts.count, size), dtype=np.uint32), np.empty(texts.count, dtype=np.int64)
        sketches, starts = np.empty(texts.size + 1, dtype=np.uint32), np.zeros(texts.count + 1, dtype=np.int64)
        how = _MinHash(factors.ctypes.data, offsets.ctypes.data, size, ngram, sketch)
        self._call("puyu_minhash", texts.native, how, signatures, counts, sketches, starts[1:])
        return MinHashes(signatures, counts, sketches[: starts[-1]].copy(), starts)

    def near_copies(self, compared: Compared, *, threshold: float, doubt: float, most: int) -> Found:
        """(place of the one that stays or -1, how alike they are) of each place in the order.

        An estimate within `doubt` of the threshold is settled by the sketches, where there are any. A column that is a
        memory map is read from its file row by row. `most`: kept documents of a bucket that others are compared with.
        """
        bands, count = compared.buckets.shape
        of, value = np.empty(count, dtype=np.int64), np.empty(count)
        columns = (compared.order, compared.buckets, compared.shingles, compared.starts)
        arrays: list[NDArray[Any]] = [np.ascontiguousarray(column) for column in columns]
        sizes = count, bands, int(compared.buckets.max(initial=0)), compared.signatures.shape[1], compared.sketch
        task = _NearTask(*(array.ctypes.data for array in arrays), *sizes, threshold, doubt, most)
        with contextlib.ExitStack() as stack:
            files = [_values(column, stack) for column in (compared.signatures, compared.sketches)]
            handles = (ctypes.byref(task), *(ctypes.byref(values) for values, _ in files))
            failed = self._library.puyu_near_copies(*handles, pointer(of), pointer(value))
        if failed:
            raise OSError("signatures or sketches cannot be read")
        return of, value

    def may_hold(self, texts: Texts) -> NDArray[np.uint8]:
        """[texts]: bits of what kinds of personal data a text can hold at all (`cpp/personal.h`)."""
        found = np.empty(texts.count, dtype=np.uint8)
        self._call("puyu_may_hold", texts.native, found)
        return found

    def count_words(self, texts: Texts, words: Automaton, whole: NDArray[np.uint8]) -> NDArray[np.int64]:
        """[texts, 2]: how many different phrases stand in each, and how many places. `whole` [phrases]: 1 where no
        letter or digit may touch the phrase."""
        counts = np.zeros((texts.count, 2), dtype=np.int64)
        self._call("puyu_count_words", words.handle, texts.native, whole, counts)
        return counts

    def fingerprints(
        self, texts: Texts, *, gram: int, window: int
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
        """(hashes, units where they begin, fingerprints up to each text [texts + 1]) by winnowing (`cpp/winnow.h`)."""
        ends = np.zeros(texts.count + 1, dtype=np.int64)

        def fill(room: int) -> tuple[int, tuple[NDArray[np.uint64], NDArray[np.int64]]]:
            hashes, places = np.empty(room, dtype=np.uint64), np.empty(room, dtype=np.int64)
            sizes = ctypes.c_int64(gram), ctypes.c_int64(window)
            self._call("puyu_fingerprints", texts.native, *sizes, hashes, places, ctypes.c_int64(room), ends[1:])
            return int(ends[-1]), (hashes, places)

        total, (hashes, places) = with_room(fill, texts.size // max(window, 1) + 64 * texts.count + 64)
        return hashes[:total].copy(), places[:total].copy(), ends

    def scripts(self, texts: Texts) -> NDArray[np.int64]:
        """[texts, 5]: Han characters, kana, hangul, words of two and more Latin letters, letters of any kind."""
        counts = np.empty((texts.count, 5), dtype=np.int64)
        self._call("puyu_scripts", texts.native, counts)
        return counts

    def languages(self, texts: Texts, model: Bayes) -> NDArray[np.float32]:
        """Log-probabilities [texts, languages] up to a constant; all 0 where nothing was known of a text."""
        scores = np.empty((texts.count, model.weights.shape[1]), dtype=np.float32)
        arguments = (ctypes.byref(model.native()), ctypes.byref(texts.native))
        self._library.puyu_languages(*arguments, pointer(scores))
        return scores

    def call(self, name: str, *arguments: Any) -> None:
        """A function of the library that takes the tables of characters first: for rooms with arrays of their own."""
        self._call(name, *arguments)

    def published(
        self, texts: Texts, by_characters: Sequence[bool], marks: NDArray[np.uint8], *, family: int, short_line: int
    ) -> NDArray[np.float64]:
        """Scores [texts, scores of the family] in the order of `puyu.data.published`; `marks`: bits of code points."""
        scores = np.empty((texts.count, self._library.puyu_num_published(ctypes.c_int64(family))))
        units = np.asarray(by_characters, dtype=np.uint8)
        numbers = ctypes.c_int64(family), ctypes.c_int64(short_line)
        self._call("puyu_published", texts.native, units, marks, *numbers, scores)
        return scores

    def c4(self, texts: Texts, rules: Mapping[str, int], ends: str) -> tuple[list[str], NDArray[np.float64]]:
        """(what is kept of each text, scores [texts, C4's]); a negative rule is off, as are no `ends`."""
        points = np.array([ord(end) for end in ends], dtype=np.uint32)
        given = _LineRules(ends=points.ctypes.data, num_ends=len(points), **rules)
        scores = np.empty((texts.count, self._library.puyu_num_published(ctypes.c_int64(C4_FAMILY))))
        kept, stops = np.empty(texts.size + 1, dtype=np.uint8), np.zeros(texts.count + 1, dtype=np.int64)
        self._call("puyu_c4", texts.native, given, scores, kept, stops[1:])
        whole = kept[: stops[-1]].tobytes()
        places = stops.tolist()
        return [whole[a:b].decode("utf-8").strip() for a, b in pairwise(places)], scores

    def _call(self, name: str, *arguments: Any) -> None:
        getattr(self._library, name)(self._unicode, *map(argument, arguments))


def _values(column: NDArray[np.uint32], stack: contextlib.ExitStack) -> tuple[_Values, Any]:
    """A column as the library reads it, and what must live as long."""
    if isinstance(column, np.memmap) and column.filename is not None:
        return _Values(None, stack.enter_context(open(column.filename, "rb")).fileno()), None
    base = np.ascontiguousarray(column)
    return _Values(base.ctypes.data, -1), base


def character_tables() -> tuple[Any, Any]:
    """What a library is told of characters: the arrays, which it must outlive, and the argument over them."""
    kinds, lower = tables = read_tables(native_folder())
    return tables, ctypes.byref(_Unicode(kinds.ctypes.data, lower.ctypes.data, len(lower)))


load = Loader(LIBRARY, TextLibrary)


def build() -> Path:
    """Compile, unless it is there, and make the tables; DependencyError when there is no compiler or it fails."""
    path = load.build()
    read_tables(native_folder())
    return path


if __name__ == "__main__":
    print(build(), file=sys.stdout)
