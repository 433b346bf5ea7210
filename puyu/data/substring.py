"""Stretches of text that stand elsewhere, too: all but the best copy are cut out of the documents that hold them.

    stage = Substrings(SubstringConfig())
    spans = cuts_among(stage, [best, other])       # characters to cut of each
    cut(other, spans[1])

Lee et al. (2022) take a suffix array to remove every repeated substring of 50 tokens. Here documents are known by
winnowed fingerprints (Schleimer et al., 2003): hashes of n-grams of half that length, about one in thirteen units, and
need no more than a sort. A stretch is a run of fingerprints that stand in the same distances in a better document (or
earlier in the same one); what is cut is never shorter than `units` words or Chinese characters, and a common stretch of
twice that length is always found. Case, punctuation and the value of numbers do not count. Which copy stays follows the
order that the runner hands in, so neither order nor cut of the input matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from puyu.configure import Config
from puyu.data.measure import UNIT, ngram_hashes, unit_hashes
from puyu.documents.characters import folded
from puyu.documents.document import Document
from puyu.documents.stages import Column, Ragged, first_equal
from puyu.documents.texts import Texts, load
from puyu.errors import ConfigError

Rows = NDArray[np.int64]
Span = tuple[int, int]
_DIGITS = re.compile(r"\d+")


class SubstringConfig(Config):
    """Repeated stretches inside documents."""

    units: int = 50
    """Words, or Chinese characters, that a stretch has at least (Lee et al. have 50 tokens)."""
    left_min: int = 100
    """Characters that a document keeps at least; one with less left goes."""

    @property
    def gram(self) -> int:
        return self.units // 2

    @property
    def window(self) -> int:
        return self.units - self.gram + 1


@dataclass(frozen=True)
class Cuts:
    """Stretches to cut, by row: units [begin, end) of a row, and the row where they stay."""

    rows: Rows
    begins: Rows
    ends: Rows
    of: Rows

    @staticmethod
    def none() -> Cuts:
        return Cuts(*(np.empty(0, dtype=np.int64) for _ in range(4)))

    def by_row(self) -> Cuts:
        places = np.lexsort((self.begins, self.rows))
        return Cuts(self.rows[places], self.begins[places], self.ends[places], self.of[places])


class Substrings:
    """A group stage that cuts instead of dropping."""

    name = "substrings"

    def __init__(self, config: SubstringConfig) -> None:
        if config.units < 8:
            raise ConfigError(f"dedup.substrings.units: {config.units} is too short to mean anything", remedy="50, say")
        self.config = config

    def keys(self, documents: Sequence[Document]) -> dict[str, Column | Ragged]:
        """Fingerprints: (hash, unit) a row of each."""
        hashes, places, ends = fingerprints([document.text for document in documents], self.config)
        values = np.stack([hashes, places.astype(np.uint64)], axis=1) if len(hashes) else np.empty((0, 2), np.uint64)
        return {"prints": Ragged(values, ends)}

    def cuts(self, columns: Mapping[str, Column | Ragged], order: Rows) -> Cuts:
        """`order`: rows that stay, the best first."""
        prints = columns["prints"]
        assert isinstance(prints, Ragged)
        sizes = prints.starts[order + 1] - prints.starts[order]
        rank = np.repeat(np.arange(len(order)), sizes)
        first = np.cumsum(sizes) - sizes
        at = np.repeat(prints.starts[order] - first, sizes) + np.arange(int(sizes.sum()))
        hashes, places = prints.values[at, 0], prints.values[at, 1].astype(np.int64)
        owner = first_equal(hashes)
        copied = np.flatnonzero(owner != np.arange(len(owner)))
        if not len(copied):
            return Cuts.none()
        shift = places[copied] - places[owner[copied]]
        source = rank[owner[copied]]
        # A stretch goes on while the next fingerprint of the document is copied from the same place further on.
        breaks = np.ones(len(copied), dtype=bool)
        breaks[1:] = (
            (np.diff(copied) != 1) | (np.diff(rank[copied]) != 0) | (np.diff(shift) != 0) | (np.diff(source) != 0)
        )
        begin = np.flatnonzero(breaks)
        last = np.append(begin[1:], len(copied)) - 1
        starts, ends = places[copied[begin]], places[copied[last]] + self.config.gram
        long = ends - starts >= self.config.units
        rows = order[rank[copied[begin]]]
        return Cuts(rows[long], starts[long], ends[long], order[source[begin]][long])


def fingerprints(
    texts: Sequence[str], config: SubstringConfig
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """(hashes, units where they begin, fingerprints up to each text), natively where that was built."""
    library = load()
    if library is not None:
        return library.fingerprints(Texts(texts), gram=config.gram, window=config.window)
    found = [_fingerprints(text, config) for text in texts]
    ends = np.concatenate([[0], np.cumsum([len(row) for row in found])]).astype(np.int64)
    flat = [pair for row in found for pair in row]
    hashes = np.array([hash for hash, _ in flat], dtype=np.uint64)
    return hashes, np.array([place for _, place in flat], dtype=np.int64), ends


def _fingerprints(text: str, config: SubstringConfig) -> list[tuple[int, int]]:
    units = UNIT.findall(_DIGITS.sub("0", folded(text)))
    grams = ngram_hashes(unit_hashes(units), config.gram).tolist() if units else []
    found: dict[int, int] = {}
    for end in range(config.window, len(grams) + 1):
        window = range(end - config.window, end)
        found[min(window, key=lambda i: (grams[i], -i))] = 0
    return [(grams[i], i) for i in sorted(found)]


# ---- texts


def spans_of(text: str, stretches: Sequence[Span]) -> list[Span]:
    """Stretches of units as characters of the text, joined where they meet."""
    units = [match.span() for match in UNIT.finditer(text)]
    found: list[Span] = []
    for begin, end in sorted(stretches):
        first, last = units[begin][0], units[end - 1][1]
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], last)
        else:
            found.append((first, last))
    return found


def cut(text: str, spans: Sequence[Span]) -> str:
    """The text without these characters; an empty line stands where one was."""
    parts, at = [], 0
    for begin, end in spans:
        parts.append(text[at:begin].rstrip())
        at = end
    parts.append(text[at:].lstrip(" \t\n.,;:!?。，；：！？”\"')）"))
    return "\n\n".join(part for part in parts if part.strip())


def cuts_among(stage: Substrings, texts: Sequence[str]) -> list[list[Span]]:
    """Characters to cut of texts in memory, the first of which is the best."""
    documents = [Document(str(at), text, "", "") for at, text in enumerate(texts)]
    found = stage.cuts(stage.keys(documents), np.arange(len(texts)))
    rows: list[list[Span]] = [[] for _ in texts]
    for row, begin, end in zip(found.rows.tolist(), found.begins.tolist(), found.ends.tolist(), strict=True):
        rows[row].append((begin, end))
    return [spans_of(text, stretches) for text, stretches in zip(texts, rows, strict=True)]
