"""A cleaned corpus on disk -> Documents, for what looks at it afterward: scorers, enrichment, contamination.

    for document in documents([Path("runs/mine/data")], quarantine=print): ...

A path is a JSONL file (`.gz`, `.zst`) or a folder: its `kept.jsonl`, or else all JSONL files in it. A row has `text`
(or another field that is named) and may have `id`, `source`, `domain`, `language`, `metadata`; ids that are missing
are computed. A row without text goes to quarantine with file and line. It reads anew each time and holds one row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from puyu.documents.document import Document, document_id
from puyu.documents.language import detect_all
from puyu.documents.readers import text_problem
from puyu.errors import InputError
from puyu.files import BadRecord, Quarantine, read_jsonl_lines

_FIELDS = ("id", "source", "domain", "language", "url")
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def corpus_files(path: Path) -> list[Path]:
    """The files of a corpus in the order of their names; InputError where there is none."""
    if path.is_file():
        return [path]
    if (path / "kept.jsonl").is_file():
        return [path / "kept.jsonl"]
    found = sorted(p for p in path.rglob("*") if p.name.endswith(_SUFFIXES) and p.is_file()) if path.is_dir() else []
    if not found:
        raise InputError(f"no JSONL file at {path}", remedy="name a JSONL file, or a folder that `puyu data` wrote")
    return found


def rows(
    paths: Sequence[Path], *, quarantine: Quarantine, text_field: str = "text"
) -> Iterator[tuple[dict[str, Any], Document]]:
    """(row, Document) of every line that has a text; the language stays empty where the row has none."""
    for path in [file for place in paths for file in corpus_files(place)]:
        for number, value in read_jsonl_lines(path, quarantine=quarantine):
            problem = text_problem(value, text_field, _FIELDS)
            if problem:
                head = json.dumps(value, ensure_ascii=True)[:80]
                quarantine(BadRecord(str(path), number, 0, problem, head))
            else:
                yield value, _document(value, value[text_field], source=path.name)


def documents(paths: Sequence[Path], *, quarantine: Quarantine, text_field: str = "text") -> Iterator[Document]:
    """The Documents alone."""
    return (document for _, document in rows(paths, quarantine=quarantine, text_field=text_field))


def _document(value: dict[str, Any], text: str, *, source: str) -> Document:
    name = str(value.get("source") or source)
    id = str(value.get("id") or document_id(text, name))
    metadata = value.get("metadata")
    known = metadata if isinstance(metadata, dict) else {k: value[k] for k in ("url",) if isinstance(value.get(k), str)}
    return Document(id, text, name, str(value.get("domain") or ""), str(value.get("language") or ""), known)


def languages_of(texts: Sequence[str], languages: Sequence[str]) -> list[str]:
    """The languages that are given; the others are detected."""
    asked = [at for at, language in enumerate(languages) if not language]
    found = list(languages)
    for at, guess in zip(asked, detect_all([texts[at] for at in asked]), strict=True):
        found[at] = guess.language
    return found


def in_batches(items: Iterator[Any], size: int = 512) -> Iterator[list[Any]]:
    """Lists of `size`, the last one shorter."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
