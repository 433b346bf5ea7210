"""A segment and what was decided about duplicates -> a part of the output: kept, dropped, scores, places of the ids.

Personal data is masked here, in what is kept. A part is a function of its segment, the decisions and the config; its
`NAME.json` is written last and holds its share of the ledger.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from puyu.data import pii
from puyu.data.dedup import words_of
from puyu.data.plan import config_of
from puyu.data.segments import BATCH, HEAD, Segment
from puyu.documents.readers import SourceConfig
from puyu.files import atomic_write, read_object, write_json

ID = np.dtype([("id", "<u8"), ("kind", "u1"), ("offset", "<u8")])
"""Where a row stands: the first half of its id, the file (0 kept, 1 dropped, 2 quarantined), the byte in it."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What group stages said of one document: the stage, the rule, and the one that stays."""

    stage: str
    drop: dict[str, Any]


@dataclass(frozen=True, slots=True)
class EmitJob:
    """One segment; `decisions` by the place among its documents that had reached the group stages."""

    config: str
    source: int
    segment: Path
    path: Path
    decisions: Mapping[int, Decision]


@dataclass
class Share:
    """What a part adds to the ledger."""

    kept: int = 0
    kept_characters: int = 0
    kept_bytes: Counter[str] = field(default_factory=Counter)
    """UTF-8 bytes by language."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Documents by `stage/rule`."""
    masked: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        counts = {name: dict(sorted(getattr(self, name).items())) for name in ("kept_bytes", "dropped", "masked")}
        return {"kept": self.kept, "kept_characters": self.kept_characters, **counts}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Share:
        counts = (Counter(value[name]) for name in ("kept_bytes", "dropped", "masked"))
        return Share(value["kept"], value["kept_characters"], *counts)


@dataclass(frozen=True)
class Part:
    """A committed part."""

    path: Path

    def file(self, kind: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{kind}")

    def is_done(self) -> bool:
        return self.file("json").is_file()

    def share(self) -> Share:
        return Share.from_json(read_object(self.file("json")))

    def ids(self) -> NDArray[Any]:
        return np.fromfile(self.file("ids"), dtype=ID)

    def scores(self) -> pa.Table:
        with pa.memory_map(str(self.file("scores"))) as source:
            return pa.ipc.open_file(source).read_all()


def emit(job: EmitJob) -> int:
    """Write a part; returns how many documents it keeps."""
    config = config_of(job.config)
    source, table, share = config.sources[job.source], Segment(job.segment).rows(), Share()
    stages, rules = [], []
    places: list[tuple[int, int, int]] = []
    part = Part(job.path)
    with atomic_write(part.file("kept"), "wb") as kept, atomic_write(part.file("dropped"), "wb") as dropped:
        for row, masked in _masked(_rows(table, source, job.decisions), config.mask):
            if masked is None:
                line, stream, kind = _dropped_row(row), dropped, 1
                share.dropped[f"{row.stage}/{row.drop['rule']}"] += 1
            else:
                line, stream, kind = _kept_row(row, masked, share), kept, 0
            places.append((words_of(row.id)[0], kind, stream.tell()))
            stream.write(json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n")
            stages.append(row.stage)
            rules.append(row.drop["rule"] if row.stage else "")
    with atomic_write(part.file("ids"), "wb") as file:
        file.write(np.array(places, dtype=ID).tobytes())
    _write_scores(part.file("scores"), table, source, {"stage": stages, "rule": rules})
    write_json(part.file("json"), share.to_json())
    return share.kept


@dataclass(frozen=True, slots=True)
class _Row:
    id: str
    text: str
    source: SourceConfig
    language: str
    scores: dict[str, float]
    metadata: dict[str, Any]
    stage: str
    drop: dict[str, Any]
    place: dict[str, Any]


def _rows(table: pa.Table, source: SourceConfig, decisions: Mapping[int, Decision]) -> Iterator[_Row]:
    alive = 0
    for batch in table.to_batches(max_chunksize=2048):
        names = sorted(name for name in batch.schema.names if name.startswith("score."))
        columns = {name: batch.column(name).to_pylist() for name in batch.schema.names if name not in names}
        values = [batch.column(name).to_pylist() for name in names]
        bare = [name.removeprefix("score.") for name in names]
        for i in range(batch.num_rows):
            scores = {name: column[i] for name, column in zip(bare, values, strict=True) if column[i] is not None}
            stage, drop = columns["stage"][i], columns["drop"][i]
            decided = None
            if not stage:
                decided = decisions.get(alive)
                alive += 1
            yield _Row(
                columns["id"][i],
                columns["text"][i],
                source,
                columns["language"][i],
                scores,
                json.loads(columns["metadata"][i]),
                decided.stage if decided else stage,
                decided.drop if decided else json.loads(drop) if drop else {},
                {"file": columns["file"][i], "record": columns["record"][i], "offset": columns["offset"][i]},
            )


def _masked(rows: Iterator[_Row], kinds: Sequence[pii.Kind]) -> Iterator[tuple[_Row, pii.Masked | None]]:
    """Each row with its masked text; none for what was dropped."""
    while batch := list(islice(rows, BATCH)):
        masked = iter(pii.mask_all([row.text for row in batch if not row.stage], kinds))
        yield from ((row, None if row.stage else next(masked)) for row in batch)


def _kept_row(row: _Row, masked: pii.Masked, share: Share) -> dict[str, Any]:
    share.kept += 1
    share.kept_characters += len(masked.text)
    share.kept_bytes[row.language] += len(masked.text.encode("utf-8"))
    share.masked.update(masked.counts)
    scores = {**row.scores, "masked": sum(masked.counts.values())}
    head = {"id": row.id, "source": row.source.name, "domain": row.source.domain, "language": row.language}
    return {**head, "text": masked.text, "scores": scores, "metadata": row.metadata}


def _dropped_row(row: _Row) -> dict[str, Any]:
    head = {"id": row.id, "source": row.source.name, "domain": row.source.domain, "language": row.language}
    tail = {"head": row.text[:HEAD], "scores": row.scores, "metadata": row.metadata, "at": row.place}
    return {**head, "stage": row.stage, **row.drop, **tail}


def _write_scores(path: Path, table: pa.Table, source: SourceConfig, verdicts: Mapping[str, list[str]]) -> None:
    """The score columns: what thresholds are moved over without the texts."""
    count = table.num_rows
    words = {"source": [source.name] * count, "domain": [source.domain] * count}
    words |= {"language": table["language"].to_pylist(), **verdicts} if count else {}
    columns: dict[str, Any] = {name: pa.array(value, pa.string()) for name, value in words.items()}
    columns = {"id": table["id"], "characters": table["characters"], **columns} if count else {}
    columns["curated"] = pa.array([not source.rules] * count, pa.bool_())
    for name in table.column_names:
        if name.startswith("score."):
            columns[name.removeprefix("score.")] = table[name].cast(pa.float32())
    result = pa.table(columns)
    with atomic_write(path, "wb") as stream, pa.ipc.new_file(stream, result.schema) as writer:
        writer.write_table(result)
