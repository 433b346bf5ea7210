"""One block of raw records -> a segment on disk: its documents with scores, verdicts and the keys of duplicates.

A segment is three files: `NAME.rows.arrow` (a row for each document; of what was dropped its line of `dropped.jsonl`
instead of the text), `NAME.keys.arrow` (a row for each document that is still there) and `NAME.json`, written last: its
commit. It depends on the block and the config alone, so that whoever finds it need not make it again.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec.json import encode

from puyu.data.columns import as_table
from puyu.data.dedup import words_of
from puyu.data.plan import config_of, map_stages
from puyu.data.substring import Substrings
from puyu.documents.document import Document
from puyu.documents.raw import Block, Raw
from puyu.documents.readers import ReadReport, SourceConfig, parse
from puyu.documents.stages import Column, Drop, GroupStage, MapStage, Ragged
from puyu.files import BadRecord, disk_errors, hash_json, read_object, write_json

HEAD = 160
"""Characters that are kept of a text that was dropped."""
BATCH = 512
"""Documents that stages see at a time, at most."""
_BATCH_CHARACTERS = 4_000_000


@dataclass(slots=True)
class Row:
    """One document on its way: its scores so far, and the stage and reason where it left."""

    document: Document
    scores: dict[str, float] = field(default_factory=dict)
    stage: str = ""
    drop: Drop | None = None


@dataclass(frozen=True, slots=True)
class MapJob:
    """A block of a source, and where its segment belongs. `limit`: documents that may still be read."""

    config: str
    source: int
    block: Block
    path: Path
    limit: int | None = None


@dataclass
class Clock:
    """Seconds by what they were spent on."""

    seconds: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began  # type: ignore[assignment]

    def add(self, seconds: Mapping[str, float]) -> None:
        self.seconds.update(seconds)  # type: ignore[arg-type]

    def lines(self, size: int) -> list[str]:
        """Seconds by step and the rate of one core, over `size` bytes of raw input; no line when nothing was done."""
        rows = [(name, seconds) for name, seconds in self.seconds.items() if seconds >= 0.05]
        if not rows:
            return []
        parts = [f"{name} {seconds:.1f} s ({size / 1e6 / seconds:.0f} MB/s)" for name, seconds in rows]
        total = sum(self.seconds.values())
        return [f"  {size / 1e6:.0f} MB in {total:.1f} s of a core, {size / 1e6 / total:.1f} MB/s: {', '.join(parts)}"]

    def timed(self, name: str, items: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self.of(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


@dataclass(frozen=True, slots=True)
class Done:
    """How many documents a block had, and what they took."""

    documents: int
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Segment:
    """A committed segment."""

    path: Path

    @property
    def head_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def is_done(self) -> bool:
        return self.head_path.is_file()

    def head(self) -> dict[str, Any]:
        return read_object(self.head_path)

    def rows(self) -> pa.Table:
        return _read(self.path.with_name(f"{self.path.name}.rows.arrow"))

    def keys(self) -> pa.Table:
        return _read(self.path.with_name(f"{self.path.name}.keys.arrow"))


def map_block(job: MapJob) -> Done:
    """Parse and judge a block, commit its segment."""
    config = config_of(job.config)
    source, clock, report = config.sources[job.source], Clock(), ReadReport()
    bad = list(job.block.bad)
    found = clock.timed("read", islice(_parsed(source, job.block, bad, report), job.limit))
    maps, groups = _stages(job.config, job.source, job.path.parent.name), config.dedup.keyed()
    rows, keys = [], []
    for batch in batches(found):
        table, key = _batch(source, batch, maps, groups, clock)
        rows.append(table)
        keys.append(key)
    with clock.of("write"):
        segment = Segment(job.path)
        _write(job.path.with_name(f"{job.path.name}.rows.arrow"), rows, compression="lz4")
        _write(job.path.with_name(f"{job.path.name}.keys.arrow"), keys, compression=None)
    documents = sum(table.num_rows for table in rows)
    head = {"documents": documents, "size": job.block.size, "records_not_selected": dict(report.records_not_selected)}
    write_json(segment.head_path, {**head, "quarantined": [_quarantine_row(source.name, record) for record in bad]})
    return Done(documents, dict(clock.seconds))


@lru_cache(maxsize=8)
def _stages(config: str, source: int, key: str) -> tuple[MapStage, ...]:
    """The map stages of a source, kept by a process with the models that they read; `key` names what is in those."""
    found = config_of(config)
    return map_stages(found, found.sources[source])


def _parsed(
    source: SourceConfig, block: Block, bad: list[BadRecord], report: ReadReport
) -> Iterator[tuple[Document, Raw]]:
    for raw in block.raws:
        for document in parse(source, raw, quarantine=bad.append, report=report):
            yield document, raw


def batches(documents: Iterable[tuple[Document, Raw]]) -> Iterator[list[tuple[Document, Raw]]]:
    """As many at a time as make native calls cheap and memory small."""
    batch: list[tuple[Document, Raw]] = []
    size = 0
    for pair in documents:
        batch.append(pair)
        size += len(pair[0].text)
        if len(batch) == BATCH or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def map_batch(documents: Sequence[Document], stages: Sequence[MapStage], clock: Clock) -> list[Row]:
    """Every document through the stages, as far as it comes."""
    rows = [Row(document) for document in documents]
    alive = rows
    for stage in stages:
        with clock.of(stage.name):
            verdicts = stage([row.document for row in alive], [row.scores for row in alive])
            for row, verdict in zip(alive, verdicts, strict=True):
                row.document, row.drop = verdict.document, verdict.drop
                row.scores.update(verdict.scores)
                if verdict.drop:
                    row.stage = stage.name
            alive = [row for row in alive if row.drop is None]
    return rows


def _batch(
    source: SourceConfig,
    batch: Sequence[tuple[Document, Raw]],
    maps: Sequence[MapStage],
    groups: Sequence[GroupStage | Substrings],
    clock: Clock,
) -> tuple[pa.Table, pa.Table]:
    rows = map_batch([document for document, _ in batch], maps, clock)
    alive = [row for row in rows if row.drop is None]
    keys = _standing(alive)
    for stage in groups:
        with clock.of(f"{stage.name} keys"):
            found = stage.keys([row.document for row in alive])
            keys |= {f"{stage.name}.{name}": column for name, column in found.items()}
    with clock.of("write"):
        return _row_table(source, rows, [raw for _, raw in batch]), as_table(keys)


def _standing(rows: Sequence[Row]) -> dict[str, Column | Ragged]:
    """What the order of the best is made of."""
    ids = np.array([words_of(row.document.id) for row in rows], dtype=np.uint64).reshape(-1, 2)
    return {
        "id_high": ids[:, 0].copy(),
        "id_low": ids[:, 1].copy(),
        "quality": np.array([row.scores.get("quality", 0.0) for row in rows], dtype=np.float64),
        "size": np.array([len(row.document.text) for row in rows], dtype=np.int64),
        "date": np.array([_date(row.document) for row in rows], dtype=np.int64),
    }


def _date(document: Document) -> int:
    """The digits of an ISO date up to its seconds as one number, so that later is larger; 0 without a date."""
    text = document.metadata.get("date")
    digits = "".join(c for c in text if c in "0123456789")[:14] if isinstance(text, str) else ""
    return int(digits.ljust(14, "0")) if digits else 0


def _row_table(source: SourceConfig, rows: Sequence[Row], raws: Sequence[Raw]) -> pa.Table:
    lines = [None if row.drop is None else _dropped_line(source, row, raw) for row, raw in zip(rows, raws, strict=True)]
    metadata = [encode(row.document.metadata).decode() if row.drop is None else "" for row in rows]
    texts: dict[str, list[Any]] = {
        "id": [row.document.id for row in rows],
        "text": [row.document.text if row.drop is None else "" for row in rows],
        "language": [row.document.language for row in rows],
        "metadata": metadata,
        "file": [raw.member.label for raw in raws],
        "stage": [row.stage for row in rows],
        "rule": [row.drop.rule if row.drop else "" for row in rows],
    }
    columns: dict[str, Any] = {name: pa.array(values, pa.large_string()) for name, values in texts.items()}
    columns["line"] = pa.array(lines, pa.large_binary())
    columns["characters"] = pa.array([len(row.document.text) for row in rows], pa.int64())
    columns["record"] = pa.array([raw.number for raw in raws], pa.int64())
    columns["offset"] = pa.array([raw.offset for raw in raws], pa.int64())
    return pa.table(columns | score_columns([row.scores for row in rows]))


def score_columns(scores: Sequence[Mapping[str, float]]) -> dict[str, pa.Array]:
    """A column `score.NAME` for each name, null where a row has none. Most rows have the same names: one step each."""
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for at, row in enumerate(scores):
        alike[tuple(row)].append(at)
    names = sorted(set().union(*alike))
    values, there = np.zeros((len(names), len(scores))), np.zeros((len(names), len(scores)), dtype=bool)
    for own, places in alike.items():
        where = np.ix_([names.index(name) for name in own], places)
        values[where] = np.array([list(scores[at].values()) for at in places], dtype=np.float64).T
        there[where] = True
    return {f"score.{name}": pa.array(values[i], mask=~there[i]) for i, name in enumerate(names)}


def _dropped_line(source: SourceConfig, row: Row, raw: Raw) -> bytes:
    assert row.drop is not None
    document = row.document
    at = {"file": raw.member.label, "record": raw.number, "offset": raw.offset}
    drop = {"stage": row.stage, **row.drop.to_json()}
    return dropped_line(source, document, drop, scores=row.scores, at=at)


def dropped_line(
    source: SourceConfig,
    document: Document,
    drop: Mapping[str, Any],
    *,
    scores: Mapping[str, float],
    at: Mapping[str, Any],
) -> bytes:
    """A line of `dropped.jsonl`; `drop` says stage, rule, value and threshold."""
    head = {"id": document.id, "source": source.name, "domain": source.domain, "language": document.language}
    ordered = {name: scores[name] for name in sorted(scores)}
    tail = {"head": document.text[:HEAD], "scores": ordered, "metadata": document.metadata, "at": at}
    return encode({**head, **drop, **tail}) + b"\n"


def _quarantine_row(source: str, bad: BadRecord) -> dict[str, Any]:
    where = {"file": bad.path, "line": bad.line, "offset": bad.offset, "reason": bad.reason, "head": bad.head}
    return {"id": hash_json([source, where]), "source": source, **where}


# ---- files


def _write(path: Path, tables: Sequence[pa.Table], *, compression: str | None) -> None:
    table = pa.concat_tables(tables, promote_options="default") if tables else pa.table({})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    options = pa.ipc.IpcWriteOptions(compression=compression)
    try:
        with disk_errors(path), pa.OSFile(str(temporary), "wb") as sink:
            with pa.ipc.new_file(sink, table.schema, options=options) as writer:
                writer.write_table(table)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()
