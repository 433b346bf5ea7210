"""Raw files -> a clean corpus with a ledger: read, language, rules, duplicates, personal data.

    >>> config = DataConfig(sources=[{"name": "notes", "path": "notes/*.txt"}])
    >>> numbers = run(config, out=Path("runs/mine/data"))                     # doctest: +SKIP

Writes to `out`: `kept.jsonl` (text, scores, metadata), `dropped.jsonl` (rule, value, threshold, head of the text),
`quarantined.jsonl` (file, line, byte offset, reason) and, last, `ledger.json`, where the sums agree. The same config
and inputs give the same bytes, however many workers there are. Each source is committed to `out/work` as soon as it
has been read and measured, so that a killed run goes on with the next source. The corpus is held in memory.
The order follows InternLM2 (2024, section 3.1.1): format, rules, then duplicates; safety and quality models come later.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from puyu.configure import Config, dump
from puyu.data import pii
from puyu.data.dedup import DedupConfig, ExactDedup, NearDedup, ParagraphDedup
from puyu.data.filters import LanguageFilter, Policies, RuleFilter, bounds, margins
from puyu.documents import texts
from puyu.documents.document import Document
from puyu.documents.ledger import Ledger, funnel_lines, funnel_steps
from puyu.documents.readers import ReadReport, SourceConfig, input_files, read
from puyu.documents.stages import Drop, GroupStage, MapStage
from puyu.errors import ConfigError, InputError
from puyu.files import BadRecord, clear_folder, hash_file, hash_json, read_json, read_jsonl, write_json, write_jsonl
from puyu.log import Progress, say

VERSION = 2
"""Raised by hand when the same config gives other bytes."""
HEAD = 160
BATCH = 512
"""Documents that stages see at a time, at most."""
_BATCH_CHARACTERS = 4_000_000
# Below this size the start of worker processes costs more than they save.
_POOL_FROM_BYTES = 32_000_000


class DataConfig(Config):
    """The data stage: which files, which rules."""

    sources: list[SourceConfig]
    """Where the documents are."""
    languages: tuple[str, ...] = ("en", "zh")
    """Languages to keep (ISO 639); empty: all. Sources that declare a language are not asked."""
    policies: Policies = Policies()
    """Thresholds of the rules, per language."""
    dedup: DedupConfig = DedupConfig()
    """Duplicates."""
    mask: tuple[pii.Kind, ...] = pii.KINDS
    """Personal data to replace by placeholders: email, id_number, card, phone, ip."""
    workers: int = 0
    """Processes; 0: one per core for large inputs, none for small ones."""

    def inputs(self) -> list[tuple[str, Path]]:
        """Every file that is read, under the name of its source."""
        return [(f"sources.{source.name}", path) for source in self.sources for path in input_files(source)]


@dataclass(frozen=True, slots=True)
class _Row:
    """One document on its way: its scores, and the stage and reason where it left."""

    document: Document
    scores: dict[str, float] = field(default_factory=dict)
    stage: str = ""
    drop: Drop | None = None


@dataclass(frozen=True, slots=True)
class _SourceRows:
    """What one source gave: the commit unit."""

    rows: list[_Row]
    quarantined: list[dict[str, Any]]
    files: int
    files_not_selected: int
    records_not_selected: dict[str, int]


def run(config: DataConfig, *, out: Path) -> dict[str, Any]:
    """Clean the corpus into `out`; prints the funnel and returns its numbers."""
    _check_names(config.sources)
    if texts.load() is None:
        say(
            "texts are measured in Python, many times more slowly; to build the library: python -m puyu.documents.texts"
        )
    sources = _map_all(config, out / "work")
    rows = _group_all([row for source in sources.values() for row in source.rows], _group_stages(config.dedup))
    ledger = Ledger(stage_names(config))
    rows, masked = _mask_all(rows, config.mask)
    ledger.masked.update(masked)
    _count(ledger, sources, rows)
    ledger.check()
    _write(out, config, rows, sources, ledger)
    clear_folder(out / "work")
    for line in funnel_lines(ledger):
        say(line)
    numbers = _numbers(ledger, rows)
    if numbers["kept"] == 0:
        raise InputError(f"no document was kept out of {numbers['read']}", remedy=f"see why in {out}/dropped.jsonl")
    return numbers


def stage_names(config: DataConfig) -> tuple[str, ...]:
    """The stages of the funnel, in order."""
    return ("language", "rules", "identical", *(stage.name for stage in _group_stages(config.dedup)))


def _check_names(sources: Sequence[SourceConfig]) -> None:
    if not sources:
        raise ConfigError("sources: at least one source is needed")
    twice = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
    if twice:
        raise ConfigError(f"sources: two sources are named {twice[0]!r}", remedy="give each source its own name")


# ---- map: read, language, rules; one commit per source


def _map_all(config: DataConfig, work: Path) -> dict[str, _SourceRows]:
    """Rows of every source in the order of the config; sources that an earlier run committed are not read again."""
    jobs = [
        (config.model_copy(update={"sources": [source]}), work / _commit_name(config, source))
        for source in config.sources
    ]
    todo = [job for job in jobs if not job[1].is_file()]
    progress = Progress("data: sources", len(jobs), unit="doc", start=len(jobs) - len(todo))
    for documents in _map_in_order(todo, _workers(config)):
        progress.update(work=documents)
    progress.close()
    return {job.sources[0].name: _load(path) for job, path in jobs}


def _commit_name(config: DataConfig, source: SourceConfig) -> str:
    """Named by everything that the rows depend on, so that a stale commit is never used."""
    files = [[path.as_posix(), hash_file(path)] for path in input_files(source)]
    key = [VERSION, dump(source), list(config.languages), dump(config.policies), files]
    return f"{hash_json(key)}.jsonl"


def _workers(config: DataConfig) -> int:
    if config.workers:
        return config.workers
    size = sum(path.stat().st_size for source in config.sources for path in input_files(source))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") and size >= _POOL_FROM_BYTES else 1


def _map_in_order(jobs: Sequence[tuple[DataConfig, Path]], workers: int) -> Iterator[int]:
    if workers <= 1 or len(jobs) <= 1:
        yield from (_map_source(config, path) for config, path in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        yield from pool.map(_map_source, *zip(*jobs, strict=True))


def _map_source(config: DataConfig, path: Path) -> int:
    """Read and judge one source, commit its rows; returns how many documents it has."""
    source, report = config.sources[0], ReadReport()
    stages: tuple[MapStage, ...] = (LanguageFilter(config.languages), RuleFilter(config.policies, enforce=source.rules))
    bad: list[dict[str, Any]] = []
    documents = read(source, lambda record: bad.append(_quarantine_row(source.name, record)), report=report)
    rows = [row for batch in batches(documents) for row in _map_batch(batch, stages)]
    head = {"quarantined": bad, "files": report.files, "files_not_selected": len(report.not_selected)}
    head |= {"records_not_selected": dict(report.records_not_selected)}
    write_jsonl(path, [head, *(_pack(row) for row in rows)])
    return len(rows)


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """As many at a time as make native calls cheap and memory small."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) == BATCH or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _map_batch(documents: Sequence[Document], stages: Sequence[MapStage]) -> list[_Row]:
    """Every document through the stages, as far as it comes."""
    rows = [_Row(document) for document in documents]
    for stage in stages:
        alive = [at for at, row in enumerate(rows) if row.drop is None]
        verdicts = stage([rows[at].document for at in alive], [rows[at].scores for at in alive])
        for at, verdict in zip(alive, verdicts, strict=True):
            name = stage.name if verdict.drop else ""
            rows[at] = _Row(verdict.document, {**rows[at].scores, **verdict.scores}, name, verdict.drop)
    return rows


def _quarantine_row(source: str, bad: BadRecord) -> dict[str, Any]:
    where = {"file": bad.path, "line": bad.line, "offset": bad.offset, "reason": bad.reason, "head": bad.head}
    return {"id": hash_json([source, where]), "source": source, **where}


def _pack(row: _Row) -> dict[str, Any]:
    document = row.document
    packed = {name: getattr(document, name) for name in ("id", "text", "source", "domain", "language")}
    drop = row.drop.to_json() if row.drop else None
    return {**packed, "metadata": dict(document.metadata), "scores": row.scores, "stage": row.stage, "drop": drop}


def _load(path: Path) -> _SourceRows:
    values = read_jsonl(path)
    head = next(values)
    return _SourceRows(rows=[_unpack(value) for value in values], **head)


def _unpack(value: Mapping[str, Any]) -> _Row:
    names = ("id", "text", "source", "domain", "language", "metadata")
    drop = Drop(**value["drop"]) if value["drop"] else None
    return _Row(Document(**{name: value[name] for name in names}), value["scores"], value["stage"], drop)


# ---- group: duplicates


def _group_stages(config: DedupConfig) -> list[GroupStage[Any]]:
    stages: list[GroupStage[Any]] = [ExactDedup()] if config.exact else []
    if config.paragraphs is not None:
        stages.append(ParagraphDedup(config.paragraphs))
    if config.near is not None:
        stages.append(NearDedup(config.near))
    return stages


def _group_all(rows: list[_Row], stages: Sequence[GroupStage[Any]]) -> list[_Row]:
    rows = _drop_identical(rows)
    for stage in stages:
        alive = [row for row in rows if row.drop is None]
        progress = Progress(f"data: {stage.name} duplicates", len(alive), unit="doc")
        keys = []
        for start in range(0, len(alive), BATCH):
            part = alive[start : start + BATCH]
            keys += stage.keys([row.document for row in part], [row.scores for row in part])
            progress.update(len(part))
        drops = stage.decide(keys)
        progress.close()
        rows = [_dropped(row, stage.name, drops.get(row.document.id)) for row in rows]
    return rows


def _dropped(row: _Row, stage: str, drop: Drop | None) -> _Row:
    return row if row.drop is not None or drop is None else replace(row, stage=stage, drop=drop)


def _drop_identical(rows: list[_Row]) -> list[_Row]:
    """Equal text of one source has one id; after this, ids are unique among the rows that are left."""
    seen: set[str] = set()
    result = []
    for row in rows:
        if row.drop is None and row.document.id in seen:
            row = replace(row, stage="identical", drop=Drop("identical", 1.0, 1.0, row.document.id))
        elif row.drop is None:
            seen.add(row.document.id)
        result.append(row)
    return result


# ---- personal data, ledger, files


def _mask_all(rows: list[_Row], kinds: Sequence[pii.Kind]) -> tuple[list[_Row], Counter[str]]:
    """Mask what is kept; counts go to the scores (`masked`) and to the ledger."""
    counts: Counter[str] = Counter()
    result = []
    for row in rows:
        if row.drop is None:
            masked = pii.mask(row.document.text, kinds)
            counts.update(masked.counts)
            scores = {**row.scores, "masked": sum(masked.counts.values())}
            row = _Row(replace(row.document, text=masked.text), scores)
        result.append(row)
    return result, counts


def _count(ledger: Ledger, sources: Mapping[str, _SourceRows], rows: Sequence[_Row]) -> None:
    for name, source in sources.items():
        counts = ledger.source(name)
        counts.files, counts.files_not_selected = source.files, source.files_not_selected
        counts.records_not_selected.update(source.records_not_selected)
        ledger.read(name, len(source.rows) + len(source.quarantined))
        for bad in source.quarantined:
            ledger.quarantine(name, bad["reason"].partition(":")[0])
    for row in rows:
        if row.drop:
            ledger.drop(row.document.source, row.stage, row.drop.rule)
        else:
            ledger.keep(row.document.source, len(row.document.text))


def _write(
    out: Path, config: DataConfig, rows: Sequence[_Row], sources: Mapping[str, _SourceRows], ledger: Ledger
) -> None:
    kept = write_jsonl(out / "kept.jsonl", (_kept_row(row) for row in rows if row.drop is None))
    dropped = write_jsonl(out / "dropped.jsonl", (_dropped_row(row, row.drop) for row in rows if row.drop))
    bad = write_jsonl(out / "quarantined.jsonl", (row for source in sources.values() for row in source.quarantined))
    total = ledger.total()
    assert (kept, dropped, bad) == (total.kept, total.dropped.total(), total.quarantined.total())
    write_json(out / "ledger.json", {**ledger.to_json(), "policies": dump(config.policies)})


def _kept_row(row: _Row) -> dict[str, Any]:
    packed = _pack(row)
    return {key: packed[key] for key in ("id", "source", "domain", "language", "text", "scores", "metadata")}


def _dropped_row(row: _Row, drop: Drop) -> dict[str, Any]:
    packed = _pack(row)
    head = {key: packed[key] for key in ("id", "source", "domain", "language")}
    tail = {"head": row.document.text[:HEAD], "scores": row.scores, "metadata": packed["metadata"]}
    return {**head, "stage": row.stage, **drop.to_json(), **tail}


def _numbers(ledger: Ledger, rows: Sequence[_Row]) -> dict[str, Any]:
    total = ledger.total()
    kept = [row.document for row in rows if row.drop is None]
    languages: Counter[str] = Counter()
    for document in kept:
        languages[document.language] += len(document.text.encode("utf-8"))
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


# ---- why


def why(out: Path, id: str) -> str:
    """What happened to a document: rule, value and threshold. `id` may be shortened while it is unambiguous."""
    ledger = read_json(out / "ledger.json")
    found = list(_find(out, id))
    if not found:
        raise InputError(f"no document with id {id!r} in {out}", remedy="ids stand in kept.jsonl and dropped.jsonl")
    if len({row["id"] for _, row in found}) > 1:
        raise InputError(f"id {id!r} is ambiguous: {', '.join(sorted({row['id'] for _, row in found})[:4])} ...")
    policies = Policies.model_validate(ledger["policies"])
    return "\n".join(_explain(name, row, policies) for name, row in found)


def _find(out: Path, id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in ("kept", "dropped", "quarantined"):
        for row in read_jsonl(out / f"{name}.jsonl"):
            if row["id"].startswith(id):
                yield name, row


def _explain(name: str, row: Mapping[str, Any], policies: Policies) -> str:
    place = f"{row['id']} ({row['source']}{_where(row)})"
    if name == "quarantined":
        return f"{place}\n  quarantined: {row['reason']}, {row['file']} line {row['line']}, byte {row['offset']}"
    if name == "dropped":
        copy = f", copy of {row['of']}" if "of" in row else ""
        text = f"dropped by {row['rule']} ({row['stage']}): value {row['value']}, threshold {row['threshold']}{copy}"
        return f"{place}\n  {text}\n  {row['head'][:100]!r}"
    return f"{place}\n  kept: {_passed(row, policies)}"


def _where(row: Mapping[str, Any]) -> str:
    metadata = row.get("metadata", {})
    place = metadata.get("path") or metadata.get("url")
    return f": {place}" if place else ""


def _passed(row: Mapping[str, Any], policies: Policies) -> str:
    policy, scores = policies.of(row["language"]), row["scores"]
    limits = {rule: (scores[score], threshold) for rule, score, _, threshold in bounds(policy)}
    closest = sorted(margins(scores, policy).items(), key=lambda item: (item[1], item[0]))[:3]
    near = "; ".join(f"{rule} value {limits[rule][0]}, threshold {limits[rule][1]}" for rule, _ in closest)
    return f"passed {len(limits)} rules of {row['language']}; closest: {near}; {scores['masked']} masked"
