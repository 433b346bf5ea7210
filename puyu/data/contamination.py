"""Evaluation items that stand in a corpus, by n-grams: one walk over the corpus, any number of evaluation sets.

    index = Index([read_items(Path("gsm8k_test.jsonl"))], Method())
    report = check(lambda: documents([Path("runs/mine/data")], quarantine=print), index)

Units are words and single Han characters in lower case, without punctuation; numbers count as they are. An item with
fewer units than n is looked for as a whole, down to `shortest`; shorter ones are counted as not checkable. The presets
follow GPT-3 (Brown et al. 2020, appendix C), Llama 2 (Touvron et al. 2023, appendix A.6) and PaLM (Chowdhery et al.
2022, section 8) in n and thresholds, on our units; Llama 2's budget of skipped tokens is not part of it. Reworded and
translated items are not found by any n-gram: for these see the loss comparison (`puyu.data.leaks`).
"""

from __future__ import annotations

import ctypes
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from puyu.configure import Config
from puyu.data.corpus import in_batches
from puyu.data.measure import UNIT, ngram_hashes, unit_hashes
from puyu.documents.characters import folded
from puyu.documents.contamination import FORMAT, item_id, load_contamination
from puyu.documents.document import Document
from puyu.documents.stages import Drop, Scores, Verdict
from puyu.documents.texts import Texts, load, with_room
from puyu.errors import ConfigError, InputError
from puyu.files import hash_file, read_jsonl_lines

__all__ = ["Index", "Method", "check", "load_contamination", "read_items"]

SPAN = 300
"""Characters of a matched span that the report shows."""
FIELDS = (
    *("passage", "context", "problem", "question", "Question", "prompt", "instruction", "input", "text", "messages"),
    *("choices", "options", "answer", "output", "solution", "canonical_solution"),
)
"""Fields of an evaluation item whose text is looked for."""


class Method(Config):
    """What counts as contaminated."""

    n: int = Field(default=13, ge=2)
    """Units of an n-gram."""
    shortest: int = Field(default=8, ge=2)
    """Shorter items cannot be checked."""
    adaptive: bool = False
    """n is the 5th percentile of the lengths of a set's items, between `shortest` and `n` (GPT-3)."""
    share: float = Field(default=0.0, ge=0, le=1)
    """Share of the item that must stand in the corpus; 0: one n-gram is enough."""
    of: Literal["units", "grams"] = "units"
    """What the share is of: units inside matched n-grams, or n-grams."""
    common: int | None = Field(default=None, ge=1)
    """N-grams in more documents than this are phrases, not leaks, and do not count (GPT-3)."""


GPT3 = Method(n=13, shortest=8, adaptive=True, common=10)
"""Any shared n-gram of 8 to 13 words, unless it stands in more than 10 documents."""
LLAMA2 = Method(n=10, shortest=10, share=0.8)
"""80 % of the item's units inside spans of 10 and more ("dirty")."""
PALM = Method(n=8, shortest=8, share=0.7, of="grams")
"""70 % of the item's 8-grams."""


def preset(name: str) -> Method:
    """A method by its name."""
    known = {"default": Method(), "gpt3": GPT3, "llama2": LLAMA2, "palm": PALM}
    if name not in known:
        raise ConfigError(f"unknown method {name!r}", remedy=f"one of: {', '.join(known)}")
    return known[name]


# ---- items


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation set: the texts of its items by their id."""

    name: str
    hash: str
    items: Mapping[str, str]


def read_items(path: Path, *, fields: Sequence[str] = FIELDS) -> Evaluation:
    """A JSONL file of items; InputError for a row in which no field is known, and for an id that is given twice."""
    items: dict[str, str] = {}
    for line, value in read_jsonl_lines(path):
        parts = [text for name in fields if isinstance(value, dict) and name in value for text in _texts(value[name])]
        if not parts:
            known = ", ".join(fields[:6])
            raise InputError(f"{path}, line {line}: no text in any known field ({known}, ...)", remedy="see --fields")
        id = item_id(value, line)
        if id in items:
            raise InputError(f"{path}, line {line}: a second item has the id {id!r}", remedy="give each its own id")
        items[id] = "\n".join(parts)
    if not items:
        raise InputError(f"{path} holds no item")
    return Evaluation(path.name, hash_file(path), items)


def _texts(value: Any) -> Iterator[str]:
    """The texts in a field: itself, those of a list, the contents of messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for name in ("content", "text", "value"):
            yield from _texts(value.get(name))


# ---- the index


@dataclass(frozen=True, slots=True)
class _Item:
    """One item in the index. `size` is its n; 0: too short."""

    evaluation: int
    id: str
    units: int
    size: int

    @property
    def grams(self) -> int:
        return self.units - self.size + 1 if self.size else 0


class _Known(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("filter", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("filter_bits", ctypes.c_int64),
    ]


class _Table:
    """The n-grams of one length: sorted hashes, and which items have them where."""

    def __init__(self, n: int, rows: Sequence[tuple[int, NDArray[np.uint64]]]) -> None:
        self.n = n
        hashes = np.concatenate([grams for _, grams in rows])
        items = np.concatenate([np.full(len(grams), item) for item, grams in rows])
        places = np.concatenate([np.arange(len(grams)) for _, grams in rows])
        order = np.argsort(hashes, kind="stable")
        self.keys, starts = np.unique(hashes[order], return_index=True)
        self.owners = np.stack([items[order], places[order]], axis=1)
        self.starts = np.append(starts, len(order))
        bits = min(max(len(self.keys).bit_length() + 4, 8), 26)
        self.filter = np.zeros(1 << bits, dtype=np.uint8)
        self.filter[self.keys >> np.uint64(64 - bits)] = 1
        self._native = _Known(self.keys.ctypes.data, self.filter.ctypes.data, len(self.keys), bits)

    def places(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """[places, 4]: text, key, first byte, byte behind, of every known n-gram."""
        library = load()
        if library is None:
            rows = [row for at, text in enumerate(texts) for row in self._slow_places(at, text)]
            return np.array(rows, dtype=np.int64).reshape(-1, 4)
        packed, found = Texts(texts), np.zeros(1, dtype=np.int64)

        def fill(room: int) -> tuple[int, NDArray[np.int64]]:
            places = np.empty((room, 4), dtype=np.int64)
            sizes = ctypes.c_int64(self.n), self._native, places, ctypes.c_int64(room), found
            library.call("puyu_overlaps", packed.native, *sizes)
            return int(found[0]), places

        count, places = with_room(fill, 1024)
        return places[:count]

    def _slow_places(self, at: int, text: str) -> Iterator[tuple[int, int, int, int]]:
        """What the library does, for one text."""
        units = list(UNIT.finditer(text))
        grams = ngram_hashes(unit_hashes([folded(unit.group()) for unit in units]), self.n)
        keys = np.searchsorted(self.keys, grams)
        for first, key in enumerate(keys.tolist()):
            if key < len(self.keys) and self.keys[key] == grams[first]:
                begin, end = units[first].start(), units[first + self.n - 1].end()
                size = len(text[:begin].encode("utf-8"))
                yield at, key, size, size + len(text[begin:end].encode("utf-8"))


class Index:
    """The n-grams of all items of some evaluation sets."""

    def __init__(self, evaluations: Sequence[Evaluation], method: Method) -> None:
        self.evaluations, self.method = list(evaluations), method
        self.items: list[_Item] = []
        rows: dict[int, list[tuple[int, NDArray[np.uint64]]]] = defaultdict(list)
        for at, evaluation in enumerate(evaluations):
            hashes = {id: unit_hashes(UNIT.findall(folded(text))) for id, text in evaluation.items.items()}
            n = self._length([len(units) for units in hashes.values()])
            for id, units in hashes.items():
                size = min(n, len(units)) if len(units) >= method.shortest else 0
                if size:
                    rows[size].append((len(self.items), ngram_hashes(units, size)))
                self.items.append(_Item(at, id, len(units), size))
        self.tables = [_Table(n, rows[n]) for n in sorted(rows)]

    def _length(self, lengths: Sequence[int]) -> int:
        if not self.method.adaptive:
            return self.method.n
        return int(np.clip(np.percentile(lengths, 5), self.method.shortest, self.method.n))

    def matches(self, documents: Sequence[Document]) -> Iterator[_Match]:
        """What each document shares with each item."""
        for table in self.tables:
            places = table.places([document.text for document in documents])
            if len(places):
                for at in np.unique(places[:, 0]).tolist():
                    yield from _matches(documents[at], table, places[places[:, 0] == at])

    def share(self, item: int, places: NDArray[np.int64]) -> float:
        """Share of the item that n-grams at these places cover, as the method counts."""
        one = self.items[item]
        return len(places) / one.grams if self.method.of == "grams" else _covered(places, one.size) / one.units


@dataclass(frozen=True, slots=True)
class _Match:
    """One document and one item: which n-grams of the item, and the longest run of them as text."""

    document: str
    item: int
    places: NDArray[np.int64]
    keys: tuple[tuple[int, int], ...]
    """(n, key) of each place."""
    span: str


def _matches(document: Document, table: _Table, places: NDArray[np.int64]) -> Iterator[_Match]:
    """By item; of an n-gram that stands often in the document, the first place counts."""
    _, first = np.unique(places[:, 1], return_index=True)
    found: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
    for _, key, begin, end in places[np.sort(first)].tolist():
        for item, place in table.owners[table.starts[key] : table.starts[key + 1]].tolist():
            found[item].append((place, key, begin, end))
    for item, rows in found.items():
        rows.sort()
        begin, end = _longest_run(rows)
        span = document.text.encode("utf-8")[begin:end].decode("utf-8")
        keys = tuple((table.n, key) for _, key, _, _ in rows)
        yield _Match(document.id, item, np.array([row[0] for row in rows]), keys, span)


def _longest_run(rows: Sequence[tuple[int, int, int, int]]) -> tuple[int, int]:
    """Bytes of the longest part of the document in which neighboring n-grams of the item follow one another."""
    best, start = (rows[0][2], rows[0][3]), 0
    for at in range(1, len(rows) + 1):
        if at == len(rows) or not _follows(rows[at - 1], rows[at]):
            begin, end = rows[start][2], rows[at - 1][3]
            best, start = max(best, (begin, end), key=lambda span: span[1] - span[0]), at
    return best


def _follows(row: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    """Whether the other is the item's next n-gram, and stands behind and over this one in the document."""
    return other[0] == row[0] + 1 and row[2] < other[2] < row[3]


def _covered(places: NDArray[np.int64], n: int) -> int:
    """Units inside n-grams that begin at these places (sorted, distinct)."""
    return int(np.minimum(np.diff(places, append=places[-1] + n), n).sum()) if len(places) else 0


# ---- the report


@dataclass(slots=True)
class Overlaps:
    """The report, and what each document shares with contaminated items."""

    report: dict[str, Any]
    documents: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Document id -> {"file", "id", "share"} of the contaminated items that it shares an n-gram with."""


def check(corpus: Callable[[], Iterable[Document]], index: Index) -> Overlaps:
    """One walk over the corpus."""
    matches: list[_Match] = []
    count = 0
    for batch in in_batches(iter(corpus())):
        matches += index.matches(batch)
        count += len(batch)
    common = _common(matches, index.method.common)
    by_item: dict[int, list[_Match]] = defaultdict(list)
    for match in matches:
        left = [at for at, key in enumerate(match.keys) if key not in common]
        if left:
            by_item[match.item].append(
                _Match(match.document, match.item, match.places[left], tuple(match.keys[at] for at in left), match.span)
            )
    rows = {item: _row(index, item, found) for item, found in sorted(by_item.items())}
    result = Overlaps({}, _by_document(index, by_item, rows))
    result.report = {
        "format": FORMAT,
        "method": index.method.model_dump(mode="json"),
        "documents": count,
        "documents_contaminated": len(result.documents),
        "common_ngrams": len(common),
        "evaluations": [_evaluation(index, at, rows) for at in range(len(index.evaluations))],
        "losses": None,
    }
    return result


def _common(matches: Sequence[_Match], limit: int | None) -> set[tuple[int, int]]:
    """N-grams that stand in more documents than the limit."""
    if limit is None:
        return set()
    documents: dict[tuple[int, int], set[str]] = defaultdict(set)
    for match in matches:
        for key in match.keys:
            documents[key].add(match.document)
    return {key for key, found in documents.items() if len(found) > limit}


def _row(index: Index, item: int, found: Sequence[_Match]) -> dict[str, Any]:
    """An item of which something stands in the corpus."""
    one = index.items[item]
    places = np.unique(np.concatenate([match.places for match in found]))
    best = min(found, key=lambda match: (-len(match.places), match.document))
    share = index.share(item, places)
    return {
        "id": one.id,
        "units": one.units,
        "covered": round(_covered(places, one.size) / one.units, 4),
        "ngrams": round(len(places) / one.grams, 4),
        "contaminated": share > 0 and share >= index.method.share,
        "documents": len({match.document for match in found}),
        "document": best.document,
        "document_covered": round(_covered(best.places, one.size) / one.units, 4),
        "span": best.span[:SPAN],
    }


def _by_document(
    index: Index, by_item: Mapping[int, Sequence[_Match]], rows: Mapping[int, Mapping[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Who holds a contaminated item alone, as the method counts; where nobody does, all that hold some of it."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item, matches in sorted(by_item.items()):
        if not rows[item]["contaminated"]:
            continue
        name = index.evaluations[index.items[item].evaluation].name
        shares = [(match.document, index.share(item, match.places)) for match in matches]
        alone = [pair for pair in shares if pair[1] >= index.method.share]
        for document, share in alone or shares:
            found[document].append({"file": name, "id": index.items[item].id, "share": round(share, 4)})
    return dict(found)


def _evaluation(index: Index, at: int, rows: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    numbers = [number for number, item in enumerate(index.items) if item.evaluation == at]
    found = [rows[number] for number in numbers if number in rows]
    sizes = Counter(index.items[number].size for number in numbers)
    return {
        "name": index.evaluations[at].name,
        "hash": index.evaluations[at].hash,
        "items": len(numbers),
        "too_short": sizes.pop(0, 0),
        "too_short_ids": [index.items[number].id for number in numbers if not index.items[number].size],
        "n": {str(size): count for size, count in sorted(sizes.items())},
        "touched": len(found),
        "contaminated": sum(row["contaminated"] for row in found),
        "rows": found,
    }


# ---- the stage


class ContaminationConfig(Config):
    """Documents that hold items of evaluation sets go."""

    against: list[Path]
    """JSONL files of evaluation items."""
    method: Method = Method()
    """What counts; `common` has no meaning for one document at a time."""


class ContaminationFilter:
    """Map stage: the largest share of an item that stands in the document; drops where the method counts it."""

    name = "contamination"

    def __init__(self, config: ContaminationConfig) -> None:
        self.index = Index([read_items(path) for path in config.against], config.method)

    def __call__(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[Verdict]:
        worst: dict[str, float] = {}
        for match in self.index.matches(documents):
            share = round(self.index.share(match.item, match.places), 4)
            worst[match.document] = max(share, worst.get(match.document, 0.0))
        least = self.index.method.share
        return [self._judge(document, worst.get(document.id, 0.0), least) for document in documents]

    def _judge(self, document: Document, share: float, least: float) -> Verdict:
        drop = Drop("contamination_max", share, least) if share > 0 and share >= least else None
        return Verdict(document, {"contamination": share}, drop)
