"""Rows: the documents that a mixture draws -> stretches of tokens, a row at a time, every token in exactly one row.

`hard`      the stream is cut every `seq_len` tokens; a document that is cut goes on in the next row. Always full
`soft`      a document that fits a row stays whole. A row begins with the oldest waiting document (or a row's length of
            its head) and takes those of the next 64 that leave the least slack (minimum bin slack, Gupta and Ho 1999,
            with the first item fixed, Fleszar and Hindi 2002); of equally good choices the one with the oldest. What
            stays open is filled from the head of the longest document, if that must be cut anyway
`document`  one document, or a row's length of it

Nothing is truncated, padded or dropped (Ding et al., "Fewer Truncations Improve Language Modeling", 2024, compare the
first two). Where rows are not full, `fill` says so. The state is the waiting documents and two counts.
Knows nothing of token ids, batches, ranks, or torch.

    >>> rows = Rows(shards, mixture, packing="soft")                                    # doctest: +SKIP
    >>> rows.next_row(2048)[0]                                                          # doctest: +SKIP
    Stretch(source='web', doc=4711, begin=0, end=812)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from puyu.data.mix import Documents, Mixture

Packing = Literal["hard", "soft", "document"]
WINDOW = 64
"""Documents among which soft packing chooses; weights that change reach the rows that many documents later."""
_SLACK = 1000
"""Soft packing leaves a row's thousandth open rather than cut a document for it."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens [begin, end) of a document of a source."""

    source: str
    doc: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class _Packer:
    """How far to look ahead (documents, rows' lengths of tokens), and how many tokens each waiting document gives."""

    documents: int
    rows: int
    heads: Callable[[Sequence[int], int], list[int]]


class Rows:
    """A stream of rows. Deterministic given the mixture and the lengths asked for."""

    def __init__(self, documents: Mapping[str, Documents], mixture: Mixture, *, packing: Packing = "hard") -> None:
        self.documents, self.mixture = dict(documents), mixture
        self._packer = _packer(packing)
        self._waiting: list[Stretch] = []
        self._tokens = self._room = 0

    @property
    def fill(self) -> float:
        """Tokens of all rows so far by the tokens that they had room for; 1 before the first."""
        return self._tokens / self._room if self._room else 1.0

    def next_row(self, seq_len: int) -> list[Stretch]:
        """Stretches of the next row, at most `seq_len` tokens; none when all that may be drawn has been used."""
        self._draw(seq_len)
        if not self._waiting:
            return []
        heads = self._packer.heads([stretch.end - stretch.begin for stretch in self._waiting], seq_len)
        row, left = [], []
        for stretch, count in zip(self._waiting, heads, strict=True):
            cut = stretch.begin + count
            if count:
                row.append(Stretch(stretch.source, stretch.doc, stretch.begin, cut))
            if cut < stretch.end:
                left.append(Stretch(stretch.source, stretch.doc, cut, stretch.end))
        self._waiting = left
        self._tokens += sum(stretch.end - stretch.begin for stretch in row)
        self._room += seq_len
        return row

    def _draw(self, seq_len: int) -> None:
        ahead = sum(stretch.end - stretch.begin for stretch in self._waiting)
        while len(self._waiting) < self._packer.documents or ahead < self._packer.rows * seq_len:
            if not self.mixture.can_draw:
                break
            draw = self.mixture.draw()
            length = self.documents[draw.source].length(draw.doc)
            self._waiting.append(Stretch(draw.source, draw.doc, 0, length))
            ahead += length

    def state(self) -> dict[str, Any]:
        """JSON-able; `waiting` is [source, document, first token not yet used] of each, oldest first."""
        waiting = [[stretch.source, stretch.doc, stretch.begin] for stretch in self._waiting]
        return {"mixture": self.mixture.state(), "waiting": waiting, "tokens": self._tokens, "room": self._room}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, with the next row; CheckpointError where the mixture refuses it."""
        self.mixture.load(state["mixture"])
        self._waiting = [
            Stretch(source, doc, begin, self.documents[source].length(doc)) for source, doc, begin in state["waiting"]
        ]
        self._tokens, self._room = state["tokens"], state["room"]


def _packer(packing: Packing) -> _Packer:
    match packing:
        case "hard":
            return _Packer(1, 1, in_order)
        case "soft":
            return _Packer(WINDOW, 2, whole_first)
        case "document":
            return _Packer(1, 0, one_alone)


def in_order(lengths: Sequence[int], seq_len: int) -> list[int]:
    """Tokens that each waiting document gives to a row that takes them as they come."""
    heads, room = [], seq_len
    for length in lengths:
        heads.append(min(length, room))
        room -= heads[-1]
    return heads


def one_alone(lengths: Sequence[int], seq_len: int) -> list[int]:
    """Tokens that each waiting document gives to a row that holds one of them."""
    return [min(lengths[0], seq_len), *[0] * (len(lengths) - 1)]


def whole_first(lengths: Sequence[int], seq_len: int) -> list[int]:
    """Tokens that each waiting document gives to a row, so that none is cut that fits one.

    A document longer than a row offers the head that leaves a whole number of rows.
    """
    offers = [(length - 1) % seq_len + 1 for length in lengths]
    heads, slack = [0] * len(lengths), seq_len - min(lengths[0], seq_len)
    heads[0] = seq_len - slack
    for index in least_slack(offers[1:], slack):
        heads[index + 1] = offers[index + 1]
        slack -= offers[index + 1]
    longest = max(range(len(lengths)), key=lambda index: lengths[index] - heads[index])
    if slack * _SLACK > seq_len and lengths[longest] > seq_len:
        heads[longest] += slack
    return heads


def least_slack(sizes: Sequence[int], room: int) -> list[int]:
    """Indices of the sizes whose sum comes nearest to `room` from below; the earliest ones of all such choices.

    Bit s of `sums[i]` says that s is a sum of some of `sizes[i:]`: one shift of `room` bits for each size.
    """
    mask, sums = (2 << room) - 1, [1] * (len(sizes) + 1)
    for index in range(len(sizes) - 1, -1, -1):
        later = sums[index + 1]
        sums[index] = later | (later << sizes[index] & mask) if sizes[index] <= room else later
    best, chosen = sums[0].bit_length() - 1, []
    for index, size in enumerate(sizes):
        if best == 0:
            break
        if size <= best and sums[index + 1] >> (best - size) & 1:
            chosen.append(index)
            best -= size
    return chosen
