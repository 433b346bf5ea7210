"""A segment and what was decided about duplicates -> a part of the output: kept, dropped, scores, places of the ids.

Personal data is masked here, in what is kept. A part is a function of its segment, the decisions and the config; its
`NAME.json` is written last and holds its share of the ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec.json import decode, encode
from numpy.typing import NDArray

from puyu.data import pii
from puyu.data.dedup import words_of
from puyu.data.plan import DataConfig, config_of
from puyu.data.segments import BATCH, Segment, dropped_line
from puyu.data.substring import cut, spans_of
from puyu.documents.document import Document
from puyu.documents.readers import SourceConfig
from puyu.files import atomic_write, read_object, write_json

ID = np.dtype([("id", "<u8"), ("kind", "u1"), ("offset", "<u8")])
"""Where a row stands: the first half of its id, the file (0 kept, 1 dropped, 2 quarantined), the byte in it."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What group stages said of one document: the stage, the rule, and the one that stays."""

    stage: str
    drop: dict[str, Any]


Stretch = tuple[int, int, str]
"""Units [begin, end) to cut, and the id of the document where they stay."""


@dataclass(frozen=True, slots=True)
class EmitJob:
    """One segment; `decisions` and `cuts` by the place among its documents that had reached the group stages."""

    config: str
    source: int
    segment: Path
    path: Path
    decisions: Mapping[int, Decision]
    cuts: Mapping[int, list[Stretch]]


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
    verdicts: dict[str, list[str]] = {"stage": [], "rule": []}
    places: list[tuple[int, int, int]] = []
    part = Part(job.path)
    with atomic_write(part.file("kept"), "wb") as kept, atomic_write(part.file("dropped"), "wb") as dropped:
        for row in _rows(table, source, job, config):
            if row.stage:
                stream, kind = dropped, 1
                share.dropped[f"{row.stage}/{row.rule}"] += 1
            else:
                stream, kind = kept, 0
                _count(row, share)
            places.append((words_of(row.id)[0], kind, stream.tell()))
            stream.write(row.line)
            verdicts["stage"].append(row.stage)
            verdicts["rule"].append(row.rule)
    with atomic_write(part.file("ids"), "wb") as file:
        file.write(np.array(places, dtype=ID).tobytes())
    _write_scores(part.file("scores"), table, source, verdicts)
    write_json(part.file("json"), share.to_json())
    return share.kept


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of the output; `stage` is empty for what is kept, which has its masked text."""

    id: str
    line: bytes
    stage: str
    rule: str
    language: str = ""
    masked: pii.Masked | None = None


def _count(row: _Row, share: Share) -> None:
    assert row.masked is not None
    share.kept += 1
    share.kept_characters += len(row.masked.text)
    share.kept_bytes[row.language] += len(row.masked.text.encode("utf-8"))
    share.masked.update(row.masked.counts)


def _rows(table: pa.Table, source: SourceConfig, job: EmitJob, config: DataConfig) -> Iterator[_Row]:
    alive = 0
    for batch in table.to_batches(max_chunksize=BATCH):
        columns = {name: batch.column(name).to_pylist() for name in ("id", "line", "stage", "rule")}
        here = [at for at, line in enumerate(columns["line"]) if line is None]
        made = iter(_decided(batch.take(pa.array(here, pa.int64())), source, job, config, alive))
        alive += len(here)
        for id, line, stage, rule in zip(*columns.values(), strict=True):
            yield next(made) if line is None else _Row(id, line, stage, rule)


def _decided(batch: pa.RecordBatch, source: SourceConfig, job: EmitJob, config: DataConfig, first: int) -> list[_Row]:
    """Documents that had reached the group stages: kept, cut and masked, or dropped as copies."""
    columns = {name: column.to_pylist() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    scores, metadata = _scores(columns), [decode(text) for text in columns["metadata"]]
    found = [job.decisions.get(first + at) for at in range(batch.num_rows)]
    texts = list(columns["text"])
    for at in range(batch.num_rows):
        if found[at] is None and (stretches := job.cuts.get(first + at)):
            texts[at], found[at] = _cut(texts[at], stretches, scores[at], metadata[at], config)
    masked = iter(pii.mask_all([text for text, gone in zip(texts, found, strict=True) if not gone], config.mask))
    rows = []
    for at, decision in enumerate(found):
        own = {name: columns[name][at] for name in ("id", "language", "text")}
        if decision is None:
            rows.append(_kept(source, own, scores[at], metadata[at], next(masked)))
            continue
        document = Document(own["id"], own["text"], source.name, source.domain, own["language"], metadata[at])
        place = {name: columns[name][at] for name in ("file", "record", "offset")}
        drop = {"stage": decision.stage, **decision.drop}
        line = dropped_line(source, document, drop, scores=scores[at], at=place)
        rows.append(_Row(own["id"], line, decision.stage, decision.drop["rule"]))
    return rows


def _cut(
    text: str, stretches: Sequence[Stretch], scores: dict[str, float], metadata: dict[str, Any], config: DataConfig
) -> tuple[str, Decision | None]:
    """The text without what stands elsewhere; with too little left it goes. What was cut stands in `metadata.cut`."""
    assert config.dedup.substrings is not None
    spans = spans_of(text, [(begin, end) for begin, end, _ in stretches])
    left = cut(text, spans)
    scores["cut_characters"] = float(sum(end - begin for begin, end in spans))
    metadata["cut"] = [[*span, stretch[2]] for stretch in stretches for span in spans_of(text, [stretch[:2]])]
    least = config.dedup.substrings.left_min
    if len(left) >= least:
        return left, None
    drop = {"rule": "cut_left_min", "value": len(left), "threshold": least, "of": stretches[0][2]}
    return text, Decision("substrings", drop)


def _scores(columns: Mapping[str, list[Any]]) -> list[dict[str, float]]:
    names = sorted(name for name in columns if name.startswith("score."))
    bare = [name.removeprefix("score.") for name in names]
    values = zip(*(columns[name] for name in names), strict=True) if names else [()] * len(columns["id"])
    return [{name: value for name, value in zip(bare, row, strict=True) if value is not None} for row in values]


def _kept(
    source: SourceConfig, own: Mapping[str, str], scores: dict[str, float], metadata: Any, masked: pii.Masked
) -> _Row:
    scores["masked"] = sum(masked.counts.values())
    head = {"id": own["id"], "source": source.name, "domain": source.domain, "language": own["language"]}
    line = encode({**head, "text": masked.text, "scores": scores, "metadata": metadata}) + b"\n"
    return _Row(own["id"], line, "", "", own["language"], masked)


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
