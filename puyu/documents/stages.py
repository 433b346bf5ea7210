"""The stage contract: `map` looks at each document by itself, `group` at the keys of all; neither does I/O.

A runner owns files, processes and order. Because a map stage says of a document what it would say of it alone, and a
group stage sees documents in an order of their contents, the result depends neither on the order of the input nor on
how it is cut into batches and shards. Documents come many at a time, since native code measures a thousand in one call.

    map     documents -> a Verdict each                 the (changed) document, its scores, and a Drop or None
    group   keys of each, then all, best first -> Copies    which go, and which stay in their place
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from puyu.documents.document import Document


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a document goes: the rule, the value that was measured, the threshold it missed.

    `of` names the document that stays in its place, for duplicates.
    """

    rule: str
    value: float | str
    threshold: float | str
    of: str = ""

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"rule": self.rule, "value": self.value, "threshold": self.threshold}
        return {**row, "of": self.of} if self.of else row


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a map stage says of one document."""

    document: Document
    scores: Mapping[str, float] = field(default_factory=dict)
    drop: Drop | None = None


Scores = Mapping[str, float]
Column = NDArray[Any]
"""Fixed width: a number or a row of numbers for each document."""


class MapStage(Protocol):
    """A pure function of each document and the scores that it has so far; `name` labels it in the ledger."""

    name: str

    def __call__(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[Verdict]: ...


@dataclass(frozen=True)
class Ragged:
    """A column of rows of different lengths: row i is values[starts[i] : starts[i + 1]]."""

    values: Column
    starts: NDArray[np.int64]

    def row(self, i: int) -> Column:
        return self.values[self.starts[i] : self.starts[i + 1]]


def plain(columns: Mapping[str, Column | Ragged], name: str) -> Column:
    """A column that is not ragged."""
    column = columns[name]
    assert not isinstance(column, Ragged)
    return column


@dataclass(frozen=True)
class Copies:
    """Rows that go, the rows that stay in their place, and how alike they are."""

    rows: NDArray[np.int64]
    of: NDArray[np.int64]
    values: NDArray[np.float64]

    @staticmethod
    def none() -> Copies:
        nothing = np.empty(0, dtype=np.int64)
        return Copies(nothing, nothing, np.empty(0))


class GroupStage(Protocol):
    """`keys` runs beside the texts, for many documents at a time; `decide` sees columns of all keys only."""

    name: str
    rule: str
    threshold: float

    def keys(self, documents: Sequence[Document]) -> Mapping[str, Column | Ragged]:
        """Named columns, a row for each document."""
        ...

    def decide(self, columns: Mapping[str, Column | Ragged], order: NDArray[np.int64]) -> Copies:
        """`order`: the rows that are still there, the best first; a row goes only where a better one stays."""
        ...


def first_equal(*keys: Column, prefer: Column | None = None) -> NDArray[np.int64]:
    """Of each row the first one with equal keys: by `prefer` (smaller first), then by its place."""
    places = np.lexsort(keys if prefer is None else (prefer, *keys))
    begins = np.ones(len(places), dtype=bool)
    begins[1:] = np.any([key[places][1:] != key[places][:-1] for key in keys], axis=0)
    first = np.empty(len(places), dtype=np.int64)
    first[places] = places[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    return first


def best_first(
    ids: NDArray[np.uint64], quality: NDArray[np.float64], size: NDArray[np.int64], *before: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Rows by `before` (larger first), then quality, then length, then the smaller id [rows, 2]."""
    return np.lexsort((ids[:, 1], ids[:, 0], -size, -quality, *(-key for key in reversed(before))))
