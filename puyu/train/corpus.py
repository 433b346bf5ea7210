"""kept.jsonl -> one TokenShard per source for training, and one per language held out by content hash.

A source is a domain, or a quality class of it (see data/classes.py).

Each document is `<s>` text `</s>`; those without any text (sources with `rules: false` keep them) are left out, and
counted. Written once under a key of the data and the tokenizer; later runs open it.
Whether a document is held out depends on its own text, so more data does not move it across; a language without
such a document gives its smallest hash. No source is emptied.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from msgspec import MsgspecError, Struct
from msgspec.json import Decoder
from numpy.typing import NDArray

from puyu.data.classes import Classes
from puyu.data.shards import ShardWriter, TokenShard
from puyu.errors import InputError
from puyu.files import (
    clear_folder,
    decode_json,
    hash_bytes,
    hash_file,
    hash_json,
    read_json,
    read_jsonl_lines,
    write_json,
)
from puyu.log import Progress
from puyu.tokenizer.tokenizer import Tokenizer

Ids = NDArray[np.int32]
_BATCH_BYTES = 1 << 22
_NEWS = 1024
"""Lines between two signs of life."""


@dataclass(frozen=True)
class Corpus:
    """Open shards. `heldout_bytes` counts the UTF-8 bytes behind each held-out shard.

    `unscored` counts, by domain with classes, the documents without the score: they are in the domain's own source.
    `empty` counts, by domain, those without text: they are nowhere.
    """

    train: Mapping[str, TokenShard]
    heldout: Mapping[str, TokenShard]
    heldout_bytes: Mapping[str, int]
    unscored: Mapping[str, int]
    empty: Mapping[str, int]


def open_corpus(
    data: Path,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    heldout: float,
    classes: Classes | None = None,
    writes: bool = True,
    moved: Callable[[], object] = lambda: None,
) -> Corpus:
    """Tokenize into `folder`, unless that is done already. One process writes, and says now and then that it has
    `moved`; the others wait for its index."""
    path = data / "kept.jsonl" if data.is_dir() else data
    if not path.is_file():
        raise InputError(
            f"no such file: {path}", remedy="give the folder of the data stage, or a JSONL file with 'text'"
        )
    rows = KeptRows(path, classes or {}, moved)
    rules = {domain: rule.model_dump() for domain, rule in rows.classes.items()}
    key = hash_json([hash_file(path), tokenizer.fingerprint, heldout, rules])
    if writes and _index(folder, key) is None:
        _write(rows, tokenizer, folder, heldout=heldout, key=key)
    while (index := _index(folder, key)) is None:  # not a barrier: tokenizing may outlast its timeout
        time.sleep(0.2)

    def opened(kind: str) -> dict[str, TokenShard]:
        return {name: TokenShard.open(folder / _name(kind, name)) for name in index[kind]}

    return Corpus(opened("train"), opened("heldout"), index["heldout"], index["unscored"], index.get("empty", {}))


def _index(folder: Path, key: str) -> dict[str, Any] | None:
    if not (folder / "index.json").is_file():
        return None
    index: dict[str, Any] = read_json(folder / "index.json")
    return index if index.get("key") == key else None


def _name(kind: str, name: str) -> str:
    return f"{kind}-{quote(name, safe='')}"


def _write(rows: KeptRows, tokenizer: Tokenizer, folder: Path, *, heldout: float, key: str) -> None:
    clear_folder(folder)
    chosen, counts = choose_heldout(rows, heldout)
    rows.check(counts)
    byte_counts: Counter[str] = Counter()
    unscored = dict.fromkeys(rows.classes, 0)
    bar = Progress("tokenize", counts.total(), unit="tok")
    numbered = enumerate(rows)
    with ExitStack() as stack:
        writers: dict[tuple[str, str], ShardWriter] = {}
        for batch, encoded in _encoded(numbered, tokenizer):
            found: dict[tuple[str, str], list[Ids]] = {}
            for (number, row), ids in zip(batch, encoded, strict=True):
                place = ("train", row.source)
                if number in chosen:
                    place = ("heldout", row.language)
                    byte_counts[row.language] += len(row.text.encode())
                elif row.unscored:
                    unscored[row.source] += 1
                found.setdefault(place, []).append(ids)
            for place, docs in found.items():
                if place not in writers:
                    shard = ShardWriter(
                        folder / _name(*place), tokenizer_hash=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size
                    )
                    writers[place] = stack.enter_context(shard)
                writers[place].extend(docs)
            bar.update(len(batch), work=sum(map(len, encoded)))
    bar.close()
    sources = sorted(name for kind, name in writers if kind == "train")
    index = {"key": key, "train": sources, "heldout": dict(sorted(byte_counts.items())), "unscored": unscored}
    index["empty"] = dict(sorted(rows.empty.items()))
    write_json(folder / "index.json", index)


def _encoded(rows: Iterable[Numbered], tokenizer: Tokenizer) -> Iterator[tuple[list[Numbered], list[Ids]]]:
    """Batches with their ids; the next one is read while one is encoded."""

    # A document as the model sees it: `<s>` ids `</s>`, as far as the tokenizer has them.
    ends = ([] if id is None else [id] for id in (tokenizer.bos_id, tokenizer.eos_id))
    before, after = (np.array(end, dtype=np.int32) for end in ends)

    def encode(batch: list[Numbered]) -> list[Ids]:
        texts = [row.text for _, row in batch]
        return [np.concatenate([before, ids, after]) for ids in tokenizer.encode_arrays(texts)]

    with ThreadPoolExecutor(1) as pool:
        last: tuple[list[Numbered], Future[list[Ids]]] | None = None
        for batch in _batches(rows):
            now = batch, pool.submit(encode, batch)
            if last is not None:
                yield last[0], last[1].result()
            last = now
        if last is not None:
            yield last[0], last[1].result()


@dataclass(frozen=True, slots=True)
class KeptRow:
    """A document and the source it belongs to. `unscored`: its domain has classes, but it has not their score."""

    text: str
    source: str
    language: str
    unscored: bool


Numbered = tuple[int, KeptRow]
"""A row and its number in the file, from 0."""


class _Row(Struct):
    text: Any = None
    domain: Any = None
    language: Any = None


class _ScoredRow(_Row):
    scores: Any = None


_ROWS, _SCORED_ROWS = Decoder(_Row), Decoder(_ScoredRow)


@dataclass(frozen=True)
class KeptRows:
    """The rows of a JSONL file, sorted into sources; errors name file and line."""

    path: Path
    classes: Classes
    moved: Callable[[], object] = lambda: None
    empty: Counter[str] = field(default_factory=Counter)
    """Documents without text that the last pass has left out, by domain."""

    def __iter__(self) -> Iterator[KeptRow]:
        self.empty.clear()
        taken = {source for domain, rule in self.classes.items() for source in rule.sources(domain)}
        for number, row in read_jsonl_lines(self.path, decode=self._decoded):
            if not isinstance(row, _Row) or not isinstance(row.text, str):
                raise InputError(f"{self.path}, line {number}: a document needs the field 'text'")
            domain, language = str(row.domain or "default"), str(row.language or "und")
            if number % _NEWS == 0:
                self.moved()
            if not row.text:
                self.empty[domain] += 1
                continue
            if domain in taken:
                raise InputError(
                    f"{self.path}, line {number}: the domain {domain!r} has the name of a quality class",
                    remedy="name the class otherwise",
                )
            source, unscored = domain, False
            if isinstance(row, _ScoredRow) and (rule := self.classes.get(domain)):
                source, unscored = rule.source(domain, row.scores), rule.value(row.scores) is None
            yield KeptRow(row.text, source, language, unscored)

    def _decoded(self, line: bytes) -> Any:
        """A row without what nobody asks for, such as its scores; whatever else a line holds as it is."""
        try:
            return (_SCORED_ROWS if self.classes else _ROWS).decode(line)
        except MsgspecError as error:
            value = decode_json(line)
            if isinstance(value, dict):
                raise ValueError(str(error)) from error
            return value

    def check(self, counts: Mapping[str, int]) -> None:
        """InputError where a class of a domain has no document."""
        for domain, rule in self.classes.items():
            for source, bound in zip(rule.sources(domain), rule.at_least.values(), strict=True):
                if not counts.get(source):
                    raise InputError(
                        f"{self.path}: classes: no document of {source!r}: none of the domain {domain!r} belongs there "
                        f"by its score {rule.score!r} (at least {bound:g})",
                        remedy="`puyu data explore` shows which scores there are and how they are distributed",
                    )


def _batches(rows: Iterable[Numbered]) -> Iterator[list[Numbered]]:
    """Rows in groups of a few megabytes: enough for all cores of the tokenizer."""
    batch, size = [], 0
    for number, row in rows:
        batch.append((number, row))
        size += len(row.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _hash(text: str) -> int:
    return int(hash_bytes(text.encode("utf-8", "surrogatepass"))[:15], 16)


def choose_heldout(rows: KeptRows, share: float) -> tuple[set[int], Counter[str]]:
    """Numbers of the rows to hold out, and the rows of each source. No source is emptied; share 0 holds out nothing."""
    rows_of: dict[int, list[tuple[int, str]]] = {}
    """Of each text the numbers and sources of its copies, which are held out together."""
    languages: dict[str, set[int]] = {}
    left = Counter[str]()
    for number, row in enumerate(rows):
        value = _hash(row.text)
        rows_of.setdefault(value, []).append((number, row.source))
        languages.setdefault(row.language, set()).add(value)
        left[row.source] += 1
    if not left:
        raise InputError(f"{rows.path} holds no document", remedy="loosen the filters of the data stage")
    counts, chosen = left.copy(), set[int]()
    for values in languages.values():
        for rank, value in enumerate(sorted(values)):
            copies = Counter(source for _, source in rows_of[value])
            wanted = value < share * 16**15 or (rank == 0 and share > 0)
            if wanted and rows_of[value][0][0] not in chosen and all(left[name] > n for name, n in copies.items()):
                chosen |= {number for number, _ in rows_of[value]}
                left -= copies
    return chosen, counts
