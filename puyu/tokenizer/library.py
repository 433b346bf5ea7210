"""The native library of byte-level BPE: cut and encode texts, count pieces, learn merges.

    library = load()                                   # None where it was not built
    pieces = library.pieces(program, longest=64)       # then pieces.add(texts), pieces.weighed(1)

Each has a slower twin that says what it means: encoding in `tokenizers`, counting and learning in `puyu.tokenizer.bpe`;
tests compare them. Calls release the interpreter. It refuses to know files, special tokens and models.

    python -m puyu.tokenizer.library                   # build, print the path of the library
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from puyu.device import num_cores
from puyu.native import Library, Loader, pointer
from puyu.tokenizer.pattern import Program

SOURCE = Path(__file__).parent / "cpp" / "bpe.cpp"
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fPIC", "-shared"]

LIBRARY = Library("bpe", SOURCE, FLAGS, without="texts are encoded by `tokenizers`, more slowly")

MAX_ID, MAX_MERGES = (1 << 20) - 1, (1 << 24) - 1
"""What the tables hold; larger vocabularies are left to `tokenizers`."""
MOST_CHARACTERS = 1 << 20
"""The longest pre-token that the table of pieces holds: in four bytes each, well within one of its blocks."""
_SHARE = 1 << 16  # bytes that are worth a thread
I = TypeVar("I")
_ROOM = 8  # ids that a cached piece may write past its end


class Packed:
    """Byte strings one after the other, as the library reads them."""

    def __init__(self, items: Sequence[bytes]) -> None:
        self.bytes = b"".join(items)
        self.starts = np.zeros(len(items) + 1, dtype=np.int64)
        np.cumsum([len(item) for item in items], out=self.starts[1:])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def arguments(self) -> tuple[Any, Any]:
        return ctypes.c_char_p(self.bytes), pointer(self.starts)


@dataclass(frozen=True, eq=False)
class Weighed:
    """Pieces with counts: all bytes in a row, starts [pieces + 1], counts [pieces]."""

    data: NDArray[np.uint8]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]

    def items(self) -> Iterator[tuple[bytes, int]]:
        data = self.data.tobytes()
        borders = self.starts.tolist()
        for begin, end, count in zip(borders, borders[1:], self.counts.tolist(), strict=False):
            yield data[begin:end], count


class BpeLibrary:
    """The functions of the library with their types."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.c = library
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        made: dict[str, tuple[Any, list[Any]]] = {
            "puyu_splitter": (pointer, [pointer] * 2),
            "puyu_encoder": (pointer, [pointer, pointer, number]),
            "puyu_encoder_words": (None, [pointer] * 4 + [number]),
            "puyu_encode": (None, [pointer] * 4 + [number, pointer, pointer]),
            "puyu_pieces": (pointer, []),
            "puyu_pieces_add": (None, [pointer] * 4 + [number] * 3),
            "puyu_pieces_weigh": (None, [pointer] * 4 + [number]),
            "puyu_pieces_size": (None, [pointer, number, pointer, pointer]),
            "puyu_pieces_kept": (None, [pointer, number] + [pointer] * 3),
            "puyu_trainer": (pointer, [pointer] * 3 + [number] * 4),
            "puyu_trainer_learn": (number, [pointer, number, pointer]),
        }
        made |= {f"puyu_{name}_free": (None, [pointer]) for name in ("splitter", "encoder", "pieces", "trainer")}
        for name, (result, arguments) in made.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments

    def splitter(self, program: Program) -> Handle:
        """Cuts texts by a pattern."""
        made = self.c.puyu_splitter(pointer(program.numbers), pointer(program.kinds))
        return Handle(made, self.c.puyu_splitter_free)

    def encoder(self, byte_ids: NDArray[np.int32], merges: NDArray[np.int32]) -> Encoder:
        """Encodes by merges [count, 3] of (left id, right id, new id), best first; byte_ids [256]."""
        assert byte_ids.shape == (256,) and merges.shape == (len(merges), 3)
        made = self.c.puyu_encoder(pointer(byte_ids), pointer(merges), len(merges))
        return Encoder(self, Handle(made, self.c.puyu_encoder_free))

    def pieces(self, program: Program, *, longest: int) -> Pieces:
        """An empty table of pre-tokens, none longer than so many characters."""
        assert 1 <= longest <= MOST_CHARACTERS
        return Pieces(self, self.splitter(program), longest)

    def learn(
        self,
        ids: NDArray[np.int32],
        words: tuple[NDArray[np.int64], NDArray[np.int64]],
        *,
        tokens: int,
        wanted: int,
        min_count: int,
        on_merge: Callable[[int], None] | None = None,
    ) -> NDArray[np.int32]:
        """Merges [count, 2] that follow on `tokens` tokens until there are `wanted`.

        `ids` of all words in a row are used up; `words`: starts [words + 1] and counts [words]. `on_merge` hears of
        each few hundred merges.
        """
        starts, counts = words
        arguments = (pointer(ids), pointer(starts), pointer(counts), len(counts))
        trainer = Handle(self.c.puyu_trainer(*arguments, tokens, wanted, min_count), self.c.puyu_trainer_free)
        found, step = [], 256
        while True:
            merges = np.empty((step, 2), dtype=np.int32)
            count = int(self.c.puyu_trainer_learn(trainer.value, step, pointer(merges)))
            found.append(merges[:count])
            if on_merge:
                on_merge(count)
            if count < step:
                return np.concatenate(found)


class Handle:
    """Something the library made, given back when nobody holds it any more."""

    def __init__(self, value: int, free: Callable[[int], None]) -> None:
        self.value, self._free = value, free

    def __del__(self) -> None:
        self._free(self.value)


class Encoder:
    """Texts -> ids; any number of threads at once."""

    def __init__(self, library: BpeLibrary, handle: Handle) -> None:
        self._library, self._handle = library, handle

    def set_words(self, words: Mapping[bytes, int]) -> None:
        """Pieces that are one token before any merge (`ignore_merges`)."""
        packed, ids = Packed(list(words)), np.array(list(words.values()), dtype=np.int32)
        self._library.c.puyu_encoder_words(self._handle.value, *packed.arguments(), pointer(ids), len(packed))

    def encode(self, packed: Packed, splitter: Handle | None) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """(ids of all texts in a row, the end of each; ~end, which is negative, where one holds foreign characters)."""
        ids = np.empty(int(packed.starts[-1]) + _ROOM, dtype=np.int32)
        ends = np.empty(len(packed), dtype=np.int64)
        cut = splitter.value if splitter else None
        target = (len(packed), pointer(ids), pointer(ends))
        self._library.c.puyu_encode(self._handle.value, cut, *packed.arguments(), *target)
        return ids, ends

    def encode_pieces(self, pieces: Weighed) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """(ids of each piece in a row, starts [pieces + 1])."""
        ids = np.empty(int(pieces.starts[-1]) + _ROOM, dtype=np.int32)
        starts = np.zeros(len(pieces.starts), dtype=np.int64)
        arguments = (pointer(pieces.data), pointer(pieces.starts), len(pieces.counts), pointer(ids))
        self._library.c.puyu_encode(self._handle.value, None, *arguments, pointer(starts[1:]))
        return ids, starts

    def lists(self, texts: Sequence[bytes], splitter: Handle) -> list[list[int] | None]:
        """Ids of each text, on all cores; None where one holds foreign characters."""
        return self._shared(texts, lambda ids, ends: _cut(ids.tolist(), ends), splitter)

    def arrays(self, texts: Sequence[bytes], splitter: Handle) -> list[NDArray[np.int32] | None]:
        """The same as arrays, which share their memory."""
        return self._shared(texts, _cut, splitter)

    def _shared(
        self, texts: Sequence[bytes], cut: Callable[[NDArray[np.int32], list[int]], list[I | None]], splitter: Handle
    ) -> list[I | None]:
        def encoded(part: Sequence[bytes]) -> list[I | None]:
            ids, ends = self.encode(Packed(part), splitter)
            places = ends.tolist()
            last = max(places[-1], ~places[-1]) if places else 0
            return cut(ids[:last], places)

        shares = _shares(texts, _threads(sum(map(len, texts))))
        if len(shares) == 1:
            return encoded(texts)
        with ThreadPoolExecutor(len(shares)) as pool:
            return [ids for found in pool.map(encoded, [texts[share] for share in shares]) for ids in found]


def _cut(ids: Any, ends: Sequence[int]) -> list[Any]:
    """Stretches of ids up to each end; None where the end is negative."""
    found, begin = [], 0
    for end in ends:
        found.append(ids[begin:end] if end >= 0 else None)
        begin = max(end, ~end)
    return found


class Pieces:
    """How often each pre-token occurs; memory grows with the number of different ones."""

    def __init__(self, library: BpeLibrary, splitter: Handle, longest: int) -> None:
        self._c, self._splitter, self._longest = library.c, splitter, longest
        self.clear()

    def add(self, texts: Sequence[str], weight: int = 1) -> int:
        """Count the pieces of these, each so many times; returns the bytes of the texts."""
        packed = Packed([text.encode("utf-8") for text in texts])
        limits = (len(packed), self._longest, weight)
        self._c.puyu_pieces_add(self._table.value, self._splitter.value, *packed.arguments(), *limits)
        return int(packed.starts[-1])

    def weigh(self, pieces: Mapping[bytes, int]) -> None:
        """Count these pieces so many times more."""
        packed, counts = Packed(list(pieces)), np.array(list(pieces.values()), dtype=np.int64)
        self._c.puyu_pieces_weigh(self._table.value, *packed.arguments(), pointer(counts), len(packed))

    def clear(self) -> None:
        """Forget all, and free the memory."""
        self._table = Handle(self._c.puyu_pieces(), self._c.puyu_pieces_free)

    def size(self, k: int) -> tuple[int, int]:
        """(pieces, bytes) that `weighed(k)` gives."""
        count, size = ctypes.c_int64(), ctypes.c_int64()
        self._c.puyu_pieces_size(self._table.value, k, ctypes.byref(count), ctypes.byref(size))
        return count.value, size.value

    def weighed(self, k: int) -> Weighed:
        """All pieces for k = 1; for a larger power of two a sample: one seen c times stays with probability
        min(1, c / k), told by its bytes alone, and counts max(c, k) times (Duffield, Lund, Thorup 2005)."""
        assert k >= 1 and k & (k - 1) == 0
        count, size = self.size(k)
        found = Weighed(np.empty(size, np.uint8), np.empty(count + 1, np.int64), np.empty(count, np.int64))
        arrays = (pointer(found.data), pointer(found.starts), pointer(found.counts))
        self._c.puyu_pieces_kept(self._table.value, k, *arrays)
        return found


def _threads(size: int) -> int:
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "0", "off", "no", "n", "f"):
        return 1
    return max(1, min(num_cores(), size // _SHARE))


def _shares(texts: Sequence[bytes], threads: int) -> list[slice]:
    """Neighboring texts, about as many bytes in each share."""
    if threads == 1 or len(texts) == 1:
        return [slice(0, len(texts))]
    ends = np.cumsum([len(text) for text in texts])
    cuts = np.searchsorted(ends, [ends[-1] * n // threads for n in range(1, threads)]) + 1
    borders = sorted({0, *map(int, cuts), len(texts)})
    return [slice(begin, end) for begin, end in itertools.pairwise(borders) if begin < end]


load = Loader(LIBRARY, BpeLibrary)


if __name__ == "__main__":
    print(load.build(), file=sys.stdout)
