"""Pre-tokens counted and merges learned, natively where the library is built, else in Python with the same result.

    table = piece_table()
    table.add(["low lower", "lowest"])
    learned = learn(table, num_tokens=300)             # learned.merges, learned.every

The result depends on the texts alone, not on their order or on how they are handed over. Memory grows with
the different pre-tokens, then with `most_bytes`. It refuses to know files and special tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from puyu.tokenizer import bpe
from puyu.tokenizer.library import BpeLibrary, Pieces, Weighed, load
from puyu.tokenizer.pattern import compile_pattern

LONGEST = 64
"""Longer pre-tokens are cut after so many characters: a run without a border (base64, `=====`, Chinese without
punctuation) would be read again for each merge in it."""

_MIX, _MIX2, _SEED, _WORD = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0x2545F4914F6CDD1D, (1 << 64) - 1

Merge = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Learned:
    """New merges in rank order; of pre-tokens seen less than `every` times one in so many was learned from."""

    merges: list[Merge]
    every: int = 1


class PlainPieces:
    """The twin of `library.Pieces` in Python."""

    def __init__(self, pattern: str, longest: int) -> None:
        self._pattern, self._longest = pattern, longest
        self._counts: Counter[bytes] = Counter()

    def add(self, texts: Sequence[str], weight: int = 1) -> int:
        """Count the pieces of these, each so many times; returns the bytes of the texts."""
        for piece, count in bpe.count_pieces(texts, self._pattern).items():
            text = piece.decode("utf-8")
            for start in range(0, len(text), self._longest):
                self._counts[text[start : start + self._longest].encode("utf-8")] += count * weight
        return sum(len(text.encode("utf-8")) for text in texts)

    def weigh(self, pieces: Mapping[bytes, int]) -> None:
        """Count these pieces so many times more."""
        self._counts.update(pieces)

    def clear(self) -> None:
        """Forget all."""
        self._counts.clear()

    def size(self, k: int) -> tuple[int, int]:
        """(pieces, bytes) that `weighed(k)` gives."""
        kept = self._kept(k)
        return len(kept), sum(map(len, kept))

    def weighed(self, k: int) -> Weighed:
        """All pieces for k = 1, else a threshold sample of them (`library.Pieces.weighed`)."""
        kept = self._kept(k)
        starts = np.cumsum([0, *map(len, kept)], dtype=np.int64)
        data = np.frombuffer(b"".join(kept), dtype=np.uint8)
        return Weighed(data, starts, np.array(list(kept.values()), dtype=np.int64))

    def _kept(self, k: int) -> dict[bytes, int]:
        return {
            piece: max(count, k)
            for piece, count in self._counts.items()
            if count >= k or _mixed(hash_of(piece), 77) & (k - 1) < count
        }


def hash_of(data: bytes) -> int:
    """The hash of `cpp/split.h`."""
    found, whole = len(data), len(data) & ~7
    for at in range(0, whole, 8):
        found = _mixed(found, int.from_bytes(data[at : at + 8], "little"))
    return _mixed(_mixed(found, int.from_bytes(data[whole:], "little")), _SEED)


def _mixed(a: int, b: int) -> int:
    product = (a ^ _MIX) * (b ^ _MIX2)
    return (product ^ product >> 64) & _WORD


def piece_table(pattern: str = bpe.PATTERN, *, longest: int = LONGEST) -> Pieces | PlainPieces:
    """An empty table of pre-tokens."""
    library, program = load(), compile_pattern(pattern)
    if library is None or program is None:
        return PlainPieces(pattern, longest)
    return library.pieces(program, longest=longest)


def learn(
    table: Pieces | PlainPieces,
    *,
    num_tokens: int,
    min_count: int = 2,
    most_bytes: int = 1 << 27,
    kept: Sequence[Merge] = (),
    on_merge: Callable[[int], None] | None = None,
) -> Learned:
    """Merges that follow on the 256 bytes and `kept`, until there are `num_tokens` tokens or no pair is frequent.

    The table is emptied. When the different pre-tokens hold more than `most_bytes`, the rare ones are sampled; a pair
    must then occur more often than one of them counts.
    """
    every = 1
    while table.size(every)[1] > most_bytes:
        every *= 2
    pieces, library = table.weighed(every), load()
    table.clear()
    least = min_count if every == 1 else max(min_count, every + 1)
    if library is None:
        heard = (lambda: on_merge(1)) if on_merge else None
        counts = dict(pieces.items())
        merges = bpe.learn_merges(counts, num_tokens=num_tokens, min_count=least, kept=kept, on_merge=heard)
        return Learned(merges, every)
    encoded, words = _encoded(library, pieces, kept)
    del pieces
    tokens = [*bpe.base_tokens(), *(left + right for left, right in kept)]
    limits = {"tokens": len(tokens), "wanted": num_tokens, "min_count": least}
    return Learned(_named(library.learn(encoded, words, on_merge=on_merge, **limits), tokens), every)


def _encoded(
    library: BpeLibrary, pieces: Weighed, kept: Sequence[Merge]
) -> tuple[NDArray[np.int32], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(ids of all pieces by the merges that are kept, where each starts and its count)."""
    ids = {token: id for id, token in enumerate([*bpe.base_tokens(), *(left + right for left, right in kept)])}
    made = [(ids[left], ids[right], ids[left + right]) for left, right in kept]
    encoder = library.encoder(byte_ids(ids), np.array(made, dtype=np.int32).reshape(-1, 3))
    encoded, starts = encoder.encode_pieces(pieces)
    return encoded, (starts, pieces.counts)


def _named(found: NDArray[np.int32], tokens: list[bytes]) -> list[Merge]:
    """Merges of ids as merges of bytes; each makes the next token."""
    merges: list[Merge] = []
    for left, right in found.tolist():
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
    assert len(set(tokens)) == len(tokens), "two merges gave one token"
    return merges


def byte_ids(ids: Mapping[bytes, int]) -> NDArray[np.int32]:
    """Ids of the 256 bytes, [256]."""
    return np.array([ids[bytes([byte])] for byte in range(256)], dtype=np.int32)


def add_all(table: Pieces | PlainPieces, texts: Iterable[str], *, weight: int = 1) -> Iterable[int]:
    """Count the pieces of many texts, a few megabytes at a time; yields how many bytes each step had."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= 1 << 21:
            yield table.add(batch, weight)
            batch, size = [], 0
    if batch:
        yield table.add(batch, weight)
