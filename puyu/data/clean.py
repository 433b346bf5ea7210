"""Raw files -> a clean corpus with a ledger: read, language, rules, duplicates, personal data.

    >>> config = DataConfig(sources=[{"name": "notes", "path": "notes/*.txt"}])
    >>> numbers = run(config, out=Path("runs/mine/data"))                     # doctest: +SKIP

Writes to `out`: `kept.jsonl` (text, scores, metadata), `dropped.jsonl` (rule, value, threshold, head of the text, where
it was read), `quarantined.jsonl` (file, line, byte offset, reason), `scores.parquet` (a row for each document: what
thresholds are moved over), `ids.bin` (where each id stands), `index/` on request and, last, `ledger.json`, where the
sums agree. The same config and inputs give the same bytes, however many workers there are.

    sources -> blocks of raw records -> segments        a process pool; each is committed by its last file
            -> columns of keys -> verdicts              duplicates, over all that is left
            -> parts -> files                           a process pool; each is committed by its last file

A killed run goes on with the next block. Memory holds a few blocks and under a hundred bytes a document.
The order follows InternLM2 (2024, section 3.1.1): format, rules, then duplicates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from puyu.configure import dump
from puyu.data.columns import Columns
from puyu.data.dedup import DedupConfig
from puyu.data.emit import EmitJob, Part, Share, emit
from puyu.data.finish import write_files
from puyu.data.groups import INDEX, Verdicts, decide, gather, write_index, write_superseded
from puyu.data.plan import DataConfig, check, row_key, stage_names
from puyu.data.segments import Clock, MapJob, Segment, map_block
from puyu.device import num_cores
from puyu.documents import texts
from puyu.documents.ledger import Ledger, funnel_lines, funnel_steps
from puyu.documents.raw import Block, blocks, units
from puyu.documents.readers import ReadReport, SourceConfig, input_files
from puyu.documents.runners import RunJobs, open_engine
from puyu.errors import InputError
from puyu.files import clear_folder, hash_file, hash_json, hash_path, write_json
from puyu.log import Progress, say

__all__ = ["DataConfig", "run"]

VERSION = 4
"""Raised by hand when the same config gives other bytes."""
# Below this size the start of worker processes costs more than they save.
_POOL_FROM_BYTES = 32_000_000


def run(config: DataConfig, *, out: Path) -> dict[str, Any]:
    """Clean the corpus into `out`; prints the funnel and returns its numbers."""
    check(config)
    if texts.load() is None:
        say(
            "texts are measured in Python, many times more slowly; to build the library: python -m puyu.documents.texts"
        )
    work, clock = out / "work", Clock()
    counts: list[int] = []
    with open_engine(engine=config.engine, workers=_workers(config)) as run_jobs:
        sources = _map_all(config, work, clock, run_jobs)
        with clock.of("gather"):
            columns, own = gather(_keys(sources, counts), config.dedup, work / "keys")
        verdicts = decide(columns, own, config.dedup, clock)
        parts = _emit_all(config, (sources, counts), verdicts, work, run_jobs)
    shares = [(source, part.share()) for source, part in parts]
    ledger = _ledger(config, sources, shares)
    write_files(out, [part for _, part in parts], [row for source in sources for row in source.quarantined()])
    _write_indexes(config.dedup, out, columns, own, verdicts)
    write_json(out / "ledger.json", {**ledger.to_json(), "config": _asked(config)})
    clear_folder(work)
    for line in [*funnel_lines(ledger), *clock.lines(sum(source.size for source in sources))]:
        say(line)
    numbers = _numbers(ledger, [share for _, share in shares])
    if numbers["kept"] == 0:
        raise InputError(f"no document was kept out of {numbers['read']}", remedy=f"see why in {out}/dropped.jsonl")
    return numbers


def _asked(config: DataConfig) -> dict[str, Any]:
    """The config, less what changes nothing."""
    return {name: value for name, value in dump(config).items() if name not in ("workers", "engine")}


def _keys(sources: Sequence[_Source], counts: list[int]) -> Iterator[pa.Table]:
    for source in sources:
        for segment in source.segments:
            table = segment.keys()
            counts.append(table.num_rows)
            yield table


def _write_indexes(config: DedupConfig, out: Path, columns: Columns, own: int, verdicts: Verdicts) -> None:
    clear_folder(out / INDEX)
    (out / "superseded.jsonl").unlink(missing_ok=True)
    if config.index:
        write_index(columns, np.flatnonzero(verdicts.stage[:own] == 0), config, out / INDEX)
    if config.against and config.against_keeps == "newer":
        write_superseded(verdicts, own, out / "superseded.jsonl")


# ---- map: blocks of raw records -> segments


@dataclass
class _Source:
    """One source: where its segments are, and what reading saw."""

    number: int
    config: SourceConfig
    folder: Path
    report: ReadReport = field(default_factory=ReadReport)
    segments: list[Segment] = field(default_factory=list)
    heads: list[dict[str, Any]] = field(default_factory=list)
    """Of the segments, once all are there."""
    counted: int = 0
    """Segments that are done without a gap, and the documents in them."""
    total: int = 0

    @property
    def size(self) -> int:
        return sum(head["size"] for head in self.heads)

    def segment(self, block: Block) -> Segment:
        return Segment(self.folder / f"{block.number:06d}")

    def quarantined(self) -> list[dict[str, Any]]:
        """In the order of files, lines and bytes, whatever block they were found in."""
        rows = [row for head in self.heads for row in head["quarantined"]]
        return sorted(rows, key=lambda row: (row["file"], row["line"], row["offset"], row["reason"]))

    def is_full(self) -> bool:
        """Whether the segments that are done, without a gap, hold all documents that may be read."""
        limit = self.config.max_documents
        if limit is None:
            return False
        while self.counted < len(self.segments) and self.segments[self.counted].is_done():
            self.total += self.segments[self.counted].head()["documents"]
            self.counted += 1
        return self.total >= limit


def _map_all(config: DataConfig, work: Path, clock: Clock, run_jobs: RunJobs) -> list[_Source]:
    """Segments of every source in the order of the config; what an earlier run committed is not made again."""
    sources = [
        _Source(number, source, work / _folder_name(config, source)) for number, source in enumerate(config.sources)
    ]
    text = config.model_dump_json()
    files = sum(1 for source in config.sources for _ in units(source, ReadReport(), lambda bad: None))
    progress = Progress("data: files", files, unit="doc")
    seen = 0
    for done in run_jobs(map_block, _jobs(sources, text)):
        clock.add(done.seconds)
        opened = sum(source.report.files for source in sources)
        progress.update(opened - seen, work=done.documents)
        seen = opened
    progress.close()
    for source in sources:
        if source.config.max_documents is not None:
            _cut(source, text, source.config.max_documents)
        source.heads = [segment.head() for segment in source.segments]
    return sources


def _jobs(sources: Sequence[_Source], text: str) -> Iterator[MapJob]:
    for source in sources:
        for block in blocks(source.config, source.report):
            segment = source.segment(block)
            source.segments.append(segment)
            if not segment.is_done():
                yield MapJob(text, source.number, block, segment.path)
            if source.is_full():
                break


def _cut(source: _Source, text: str, limit: int) -> None:
    """Segments up to the document where the limit is reached; the last of them is made anew when it has too many."""
    used: list[Segment] = []
    left = limit
    for block in blocks(source.config, report := ReadReport()):
        segment = source.segment(block)
        if (documents := segment.head()["documents"]) > left:
            segment = Segment(source.folder / f"{block.number:06d}-{left}")
            if not segment.is_done():
                map_block(MapJob(text, source.number, block, segment.path, left))
        used.append(segment)
        left -= documents
        if left <= 0:
            break
    source.segments, source.report = used, report


def _folder_name(config: DataConfig, source: SourceConfig) -> str:
    """Named by everything that the rows depend on, so that a stale segment is never used."""
    files = [[path.as_posix(), hash_file(path)] for path in input_files(source)]
    return hash_json([VERSION, row_key(config, source), files])


def _workers(config: DataConfig) -> int:
    if config.workers:
        return config.workers
    size = sum(path.stat().st_size for source in config.sources for path in input_files(source))
    return num_cores() if size >= _POOL_FROM_BYTES else 1


# ---- emit: segments and verdicts -> parts


def _emit_all(
    config: DataConfig,
    counted: tuple[Sequence[_Source], Sequence[int]],
    verdicts: Verdicts,
    work: Path,
    run_jobs: RunJobs,
) -> list[tuple[_Source, Part]]:
    """A part for each segment, in their order; those of an earlier run are not made again.

    `counted`: the sources, and the rows with keys of each of their segments.
    """
    sources, counts = counted
    text = config.model_dump_json()
    made_of = [hash_json([source.folder.name, len(source.segments)]) for source in sources]
    indexes = [hash_path(earlier / INDEX) for earlier in config.dedup.against]
    folder = work / f"parts-{hash_json([_asked(config), made_of, indexes])}"
    places = [(source, segment) for source in sources for segment in source.segments]
    parts = [(source, Part(folder / f"{source.number:04d}-{segment.path.name}")) for source, segment in places]
    starts = accumulate(counts, initial=0)

    def jobs() -> Iterator[EmitJob]:
        for (source, segment), (_, part), start, count in zip(places, parts, starts, counts, strict=False):
            if not part.is_done():
                end = start + count
                decided = verdicts.of_rows(start, end), verdicts.cuts_of(start, end)
                yield EmitJob(text, source.number, segment.path, part.path, *decided)

    progress = Progress("data: write", len(parts), unit="doc", start=sum(part.is_done() for _, part in parts))
    for documents in run_jobs(emit, jobs()):
        progress.update(work=documents)
    progress.close()
    return parts


# ---- ledger and numbers


def _ledger(config: DataConfig, sources: Sequence[_Source], shares: Sequence[tuple[_Source, Share]]) -> Ledger:
    ledger = Ledger(stage_names(config))
    for source in sources:
        name, counts, quarantined = source.config.name, ledger.source(source.config.name), source.quarantined()
        counts.files, counts.files_not_selected = source.report.files, len(source.report.not_selected)
        for head in source.heads:
            counts.records_not_selected.update(head["records_not_selected"])
        ledger.read(name, sum(head["documents"] for head in source.heads) + len(quarantined))
        for bad in quarantined:
            ledger.quarantine(name, bad["reason"].partition(":")[0])
    for source, share in shares:
        counts = ledger.source(source.config.name)
        counts.kept += share.kept
        counts.kept_characters += share.kept_characters
        for key, count in share.dropped.items():
            stage, _, rule = key.partition("/")
            ledger.drop(source.config.name, stage, rule, count)
        ledger.masked.update(share.masked)
    ledger.check()
    return ledger


def _numbers(ledger: Ledger, shares: Iterable[Share]) -> dict[str, Any]:
    total = ledger.total()
    languages: Counter[str] = Counter()
    for share in shares:
        languages.update(share.kept_bytes)
    by_rule: Counter[str] = Counter()
    for (_, rule), count in total.dropped.items():
        by_rule[rule] += count
    return {
        "read": total.read,
        "kept": total.kept,
        "dropped": total.dropped.total(),
        "quarantined": total.quarantined.total(),
        "kept_characters": total.kept_characters,
        "kept_bytes": sum(languages.values()),
        "kept_bytes_by_language": dict(sorted(languages.items())),
        "dropped_by_rule": dict(sorted(by_rule.items())),
        "masked": dict(sorted(ledger.masked.items())),
        "funnel": [[label, left] for label, left in funnel_steps(ledger)],
    }
