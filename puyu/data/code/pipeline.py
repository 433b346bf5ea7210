"""Repositories -> long documents for pretraining: read, rules, duplicates, quality classes, dependency order, windows.

    >>> config = CodeConfig(sources=[{"name": "mine", "path": "repos", "kind": "repository"}])
    >>> numbers = run(config, out=Path("runs/code.jsonl"))                    # doctest: +SKIP

Writes `NAME.jsonl` (a window a line, in the fields of the data stage), `NAME.dropped.jsonl` (rule, value, threshold),
`NAME.quarantined.jsonl` (file, line, offset) and, last, `NAME.report.json`: the ledger (read = kept + dropped +
quarantined), files not selected by reason, edges by language, cycles, broken edges, files in parts. Every kept file is
in exactly one window, or in numbered parts. Equal inputs and config give equal bytes. The corpus is held in memory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import field_validator

from puyu.configure import Config, dump
from puyu.data.code.indent import Reindented
from puyu.data.code.rules import CodeFilter, CodeRules, QualityClass, QualityPolicy, rare_languages
from puyu.data.code.sort import Counts, Sorted, sort
from puyu.data.code.tree import SourceFile, Tree
from puyu.data.code.windows import Length, Piece, Window, windows
from puyu.data.dedup import ExactDedup, NearConfig, NearDedup, copies_among
from puyu.documents.document import Document, document_id
from puyu.documents.ledger import Ledger, funnel_lines
from puyu.documents.readers import ReadReport, SourceConfig, read
from puyu.documents.stages import Drop, GroupStage, MapStage
from puyu.errors import InputError
from puyu.files import BadRecord, write_json, write_jsonl
from puyu.log import say

STAGES = ("code rules", "exact", "near", "quality class")
_SHOWN = 5


class CodeConfig(Config):
    """Which repositories, which rules, how long a window."""

    sources: list[SourceConfig]
    """Where the repositories are (`kind: repository`)."""
    rules: CodeRules = CodeRules()
    """Thresholds of the rules."""
    exact: bool = True
    """Drop files that are equal apart from their layout and case."""
    near: NearConfig | None = NearConfig()
    """Drop near copies of files; null: keep them."""
    dedup_chars_min: int = 100
    """Shorter files are never duplicates: many repositories have the same short `__init__.py`."""
    quality: QualityPolicy = QualityPolicy()
    """Classes by a score, and their epochs."""
    window: int = 32_768
    """Tokens of a window, at most (InternLM2: 32k)."""
    tokenizer: Path | None = None
    """Counts the tokens; without one they are estimated by `characters_per_token`."""
    characters_per_token: float = 3.0
    """For the estimate."""

    @field_validator("sources")
    @classmethod
    def _repositories(cls, sources: list[SourceConfig]) -> list[SourceConfig]:
        names = [source.name for source in sources]
        if not sources or len(set(names)) < len(names):
            raise ValueError("at least one source is needed, and each needs its own name")
        other = [source.name for source in sources if source.kind != "repository"]
        if other:
            raise ValueError(f"source {other[0]!r} must be of kind repository")
        return sources


@dataclass
class _Row:
    """A file on its way."""

    document: Document
    scores: dict[str, float] = field(default_factory=dict)
    stage: str = ""
    drop: Drop | None = None


def run(config: CodeConfig, *, out: Path) -> dict[str, Any]:
    """Write the windows and what belongs to them; prints the funnel and returns the report."""
    length = _length(config)
    ledger, report, bad = Ledger(STAGES), ReadReport(), list[dict[str, Any]]()
    rows = list(_read(config, ledger, report, bad))
    _judge(config, rows)
    for row in rows:
        if row.drop:
            ledger.drop(row.document.source, row.stage, row.drop.rule)
        else:
            ledger.keep(row.document.source, len(row.document.text))
    ledger.check()
    kept = [row for row in rows if row.drop is None]
    base = out.with_name(out.name.removesuffix(".jsonl"))
    dropped = base.with_name(f"{base.name}.dropped.jsonl")
    write_jsonl(dropped, (_dropped(row) for row in rows if row.drop))
    write_jsonl(base.with_name(f"{base.name}.quarantined.jsonl"), bad)
    if not kept:
        raise InputError(f"no file was kept out of {ledger.total().read}", remedy=f"see why in {dropped}")
    found = [_repository(group, config, length) for group in _by_repository(kept)]
    write_jsonl(out, (row for _, made, _ in found for row in made))
    numbers = _report(ledger, [(name, result) for name, _, result in found])
    numbers["windows"] = sum(len(made) for _, made, _ in found)
    write_json(base.with_name(f"{base.name}.report.json"), {**numbers, "config": dump(config)})
    for line in funnel_lines(ledger):
        say(line)
    return numbers


def _length(config: CodeConfig) -> Length:
    if config.tokenizer is None:
        share = config.characters_per_token
        return lambda text: int(-(-len(text) // share))
    from puyu.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(config.tokenizer)
    return lambda text: len(tokenizer.encode(text))


# ---- read and judge


def _read(config: CodeConfig, ledger: Ledger, report: ReadReport, bad: list[dict[str, Any]]) -> Iterator[_Row]:
    """Every file, with an id of its own: equal files of two repositories are two."""
    for source in config.sources:

        def quarantine(record: BadRecord, name: str = source.name) -> None:
            ledger.read(name)
            ledger.quarantine(name, record.reason.partition(":")[0])
            where = {"file": record.path, "line": record.line, "offset": record.offset}
            bad.append({"source": name, **where, "reason": record.reason, "head": record.head})

        for document in read(source, quarantine, report=report):
            ledger.read(source.name)
            place = f"{source.name}\x00{document.metadata['repository']}\x00{document.metadata['path']}"
            yield _Row(replace(document, id=document_id(document.text, place)))
        ledger.source(source.name).files = report.files
        ledger.source(source.name).records_not_selected.update(report.records_not_selected)
        report.files = 0
        report.records_not_selected.clear()


def _judge(config: CodeConfig, rows: list[_Row]) -> None:
    counts = Counter(str(row.document.metadata["programming_language"]) for row in rows)
    rare = rare_languages(counts, config.rules.low_resource_share)
    exempt = (*config.rules.low_resource, *sorted(rare))
    _map(rows, CodeFilter(config.rules, rare=rare))
    groups: list[GroupStage] = [ExactDedup()] if config.exact else []
    groups += [NearDedup(config.near)] if config.near is not None else []
    for stage in groups:
        _group(rows, Reindented(stage), config.dedup_chars_min)
    _map(rows, QualityClass(config.quality, exempt=exempt))


def _map(rows: list[_Row], stage: MapStage) -> None:
    alive = [row for row in rows if row.drop is None]
    for row, verdict in zip(alive, stage([r.document for r in alive], [r.scores for r in alive]), strict=True):
        row.document, row.drop = verdict.document, verdict.drop
        row.scores = {**row.scores, **verdict.scores}
        row.stage = stage.name if verdict.drop else ""


def _group(rows: list[_Row], stage: GroupStage, shortest: int) -> None:
    alive = [row for row in rows if row.drop is None and len(row.document.text) >= shortest]
    copies = copies_among(stage, [row.document for row in alive], [row.scores for row in alive])
    for row, of, value in zip(copies.rows.tolist(), copies.of.tolist(), copies.values.tolist(), strict=True):
        drop = Drop(stage.rule, value, stage.threshold, alive[of].document.id)
        alive[row].drop, alive[row].stage = drop, stage.name


# ---- order and windows


def _by_repository(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    groups: dict[tuple[str, str], list[_Row]] = defaultdict(list)
    for row in rows:
        groups[row.document.source, str(row.document.metadata["repository"])].append(row)
    yield from groups.values()


def _repository(rows: Sequence[_Row], config: CodeConfig, length: Length) -> tuple[str, list[dict[str, Any]], Sorted]:
    """(name, its windows as rows, its order)."""
    metadata = {str(row.document.metadata["path"]): row.document for row in rows}
    assert len(metadata) == len(rows), "a path is given to two files"
    name = str(rows[0].document.metadata["repository"])
    tree = Tree(name, (_source_file(document) for document in metadata.values()))
    ordered = sort(tree)
    pieces = (Piece(path, tree[path].text, tree[path].language, metadata[path].id) for path in ordered.paths)
    made = list(windows(name, pieces, limit=config.window, length=length))
    placed = Counter(
        (path, part.part) for window in made for path, part in zip(window.paths, window.parts, strict=True)
    )
    assert {path for path, _ in placed} == set(metadata) and placed.most_common(1)[0][1] == 1, "a file is lost or twice"
    return name, [_row(window, len(made), metadata) for window in made], ordered


def _source_file(document: Document) -> SourceFile:
    metadata = document.metadata
    return SourceFile(str(metadata["path"]), document.text, str(metadata["programming_language"]))


def _row(window: Window, count: int, documents: Mapping[str, Document]) -> dict[str, Any]:
    first = documents[window.paths[0]]
    files: list[dict[str, Any]] = []
    for part in window.parts:
        piece, known = part.piece, documents[part.piece.path].metadata
        entry: dict[str, Any] = {"path": piece.path, "id": piece.id, "programming_language": piece.language}
        entry["length"] = part.length
        entry |= {"part": part.part, "parts": part.parts} if part.parts > 1 else {}
        files.append(entry | {"quality_class": known["quality_class"], "epochs": known["epochs"]})
    metadata = {
        "repository": window.repository,
        "window": window.index,
        "windows": count,
        "length": window.length,
        # no file is seen more often than its class allows
        "epochs": min(entry["epochs"] for entry in files),
        "files": files,
    }
    id = document_id(window.text, f"{first.source}\x00{window.repository}\x00{window.index}")
    head = {"id": id, "source": first.source, "domain": first.domain, "language": first.language}
    return {**head, "text": window.text, "scores": {}, "metadata": metadata}


def _dropped(row: _Row) -> dict[str, Any]:
    assert row.drop is not None
    document = row.document
    head = {"id": document.id, "source": document.source, "stage": row.stage, **row.drop.to_json()}
    return {**head, "head": document.text[:160], "scores": row.scores, "metadata": dict(document.metadata)}


# ---- the report


def _report(ledger: Ledger, found: Sequence[tuple[str, Sorted]]) -> dict[str, Any]:
    by_language: dict[str, Counts] = defaultdict(Counts)
    for _, result in found:
        for language, counts in result.counts.items():
            by_language[language].add(counts)
    return {
        "ledger": ledger.to_json(),
        "repositories": len(found),
        "imports": {language: vars(counts) for language, counts in sorted(by_language.items())},
        "cycles": [{"repository": name, "files": list(cycle)} for name, result in found for cycle in result.cycles],
        "broken": [
            {"repository": name, "user": edge.user, "dependency": edge.dependency, "soft": edge.soft}
            for name, result in found
            for edge in result.broken
        ],
        "missing": [{"repository": name, "file": a, "import": b} for name, result in found for a, b in result.missing],
    }


def report_lines(numbers: Mapping[str, Any]) -> list[str]:
    """The report for a terminal."""
    lines = [f"{numbers['repositories']} repositories, {numbers['windows']} windows"]
    for language, counts in numbers["imports"].items():
        edges, hard = counts["edges"], counts["hard"]
        share = f"{counts['hard_satisfied'] / hard:.1%} of {hard}" if hard else "none"
        share += f" at load, {counts['satisfied'] / edges:.1%} of all" if edges else ""
        rest = f"{counts['outside']} outside, {counts['missing']} not found, {counts['in_cycles']} in cycles"
        lines.append(f"  {language:<12} {counts['files']:>6} files {edges:>7} edges, in order {share}; {rest}")
    cycles = numbers["cycles"]
    lines.append(f"  {len(cycles)} cycles")
    for cycle in cycles[:_SHOWN]:
        names = ", ".join(cycle["files"][:_SHOWN]) + (", ..." if len(cycle["files"]) > _SHOWN else "")
        lines.append(f"    {cycle['repository']}: {names}")
    return lines
