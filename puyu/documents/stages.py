"""The stage contract: `map` looks at each document by itself, `group` at the keys of all; neither does I/O.

A runner owns files, processes and order. Because a map stage says of a document what it would say of it alone, and a
group stage answers by document id, the result depends neither on the order of the input nor on how it is cut into
batches and shards. Documents come many at a time, since native code measures a thousand texts in one call.

    map     documents -> a Verdict each       the (changed) document, its scores, and a Drop or None
    group   keys of all -> {id: Drop}
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

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


K = TypeVar("K")
Scores = Mapping[str, float]


class MapStage(Protocol):
    """A pure function of each document and the scores that it has so far; `name` labels it in the ledger."""

    name: str

    def __call__(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[Verdict]: ...


class GroupStage(Protocol[K]):
    """`keys` is a map (runs beside the texts); `decide` sees keys only and answers by id."""

    name: str

    def keys(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[K]: ...

    def decide(self, keys: Sequence[K]) -> Mapping[str, Drop]: ...


def rank(quality: float, size: int, id: str) -> tuple[Hashable, ...]:
    """Sort key of the one to keep: best quality first, then the longer, then the smaller id."""
    return (-quality, -size, id)
