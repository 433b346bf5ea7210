"""What became of one document: rule, measured value, threshold, and the place in the text that the rule counted.

    print(why(Path("runs/nano/data"), "3f9a"))

An id is found by a binary search over `ids.bin`, so that the size of the corpus does not matter. A dropped text is not
kept: it is read again from the file, line or byte that its row names, while that is still there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from puyu.data.emit import ID
from puyu.data.evidence import first_evidence
from puyu.data.filters import bounds, margins
from puyu.data.finish import FILES
from puyu.data.plan import DataConfig
from puyu.documents.raw import units, walk
from puyu.documents.readers import ReadReport, SourceConfig, parse
from puyu.errors import InputError
from puyu.files import read_object

_AROUND = 60


def why(out: Path, id: str) -> str:
    """What happened to a document. `id` may be shortened while it is unambiguous."""
    asked = DataConfig.model_validate(read_object(out / "ledger.json")["config"])
    found = list(find(out, id))
    if not found:
        raise InputError(f"no document with id {id!r} in {out}", remedy="ids stand in kept.jsonl and dropped.jsonl")
    if len({row["id"] for _, row in found}) > 1:
        raise InputError(f"id {id!r} is ambiguous: {', '.join(sorted({row['id'] for _, row in found})[:4])} ...")
    return "\n".join(_explain(name, row, asked) for name, row in found)


def find(out: Path, id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kept, dropped or quarantined; the row) of documents whose id begins like this; of very many a few."""
    head = id.lower()[:16]
    if not all(c in "0123456789abcdef" for c in head):
        return
    path = out / "ids.bin"
    places = np.memmap(path, dtype=ID, mode="r") if path.is_file() and path.stat().st_size else np.empty(0, dtype=ID)
    first = np.searchsorted(places["id"], np.uint64(int(head.ljust(16, "0"), 16)))
    behind = np.searchsorted(places["id"], np.uint64(int(head.ljust(16, "f"), 16)), side="right")
    for place in places[first : min(behind, first + 64)]:
        name = FILES[int(place["kind"])]
        with open(out / f"{name}.jsonl", "rb") as stream:
            stream.seek(int(place["offset"]))
            row = json.loads(stream.readline())
        if row["id"].startswith(id.lower()):
            yield name, row


def _explain(name: str, row: Mapping[str, Any], asked: DataConfig) -> str:
    place = f"{row['id']} ({row['source']}{_where(row)})"
    if name == "quarantined":
        return f"{place}\n  quarantined: {row['reason']}, {row['file']} line {row['line']}, byte {row['offset']}"
    if name == "dropped":
        copy = f", copy of {row['of']}" if "of" in row else ""
        text = f"dropped by {row['rule']} ({row['stage']}): value {row['value']}, threshold {row['threshold']}{copy}"
        source = next(source for source in asked.sources if source.name == row["source"])
        read = f"read from {row['at']['file']}, {_read_at(source, row['at'])}"
        return "\n  ".join([place, text, read, _evidence(row, source)])
    return f"{place}\n  kept: {_passed(row, asked)}"


def _read_at(source: SourceConfig, at: Mapping[str, Any]) -> str:
    if source.kind == "parquet":
        return f"row group {at['offset']}, whose first row is {at['record']}"
    return f"record {at['record']}, byte {at['offset']}"


def _where(row: Mapping[str, Any]) -> str:
    metadata = row.get("metadata", {})
    place = metadata.get("path") or metadata.get("url")
    return f": {place}" if place else ""


def _evidence(row: Mapping[str, Any], source: SourceConfig) -> str:
    """The span that the rule counted; without one, or without the file, the head of the text."""
    text = _text_again(source, row)
    span = None if text is None else first_evidence(text, row["rule"], language=row["language"])
    if text is None or span is None:
        return repr(row["head"][:100])
    begin, end = span
    shown = text[max(begin - _AROUND, 0) : begin], text[begin : min(end, begin + 200)], text[end : end + _AROUND]
    return f"characters {begin} to {end}: {shown[0]!r} >>> {shown[1]!r} <<< {shown[2]!r}"


def _text_again(source: SourceConfig, row: Mapping[str, Any]) -> str | None:
    """The text as it was read; None when its file has gone or changed."""
    at = row["at"]
    try:
        found = [m for m in units(source, ReadReport(), lambda bad: None) if m.label == at["file"]]
    except InputError:  # the path of the source is no longer there
        return None
    for member in found:
        for raw in walk(source, member, lambda bad: None):
            if (raw.number, raw.offset) == (at["record"], at["offset"]):
                documents = parse(source, raw, quarantine=lambda bad: None, report=ReadReport())
                return next((document.text for document in documents if document.id == row["id"]), None)
    return None


def _passed(row: Mapping[str, Any], asked: DataConfig) -> str:
    policy, scores = asked.policies.of(row["language"], row["domain"]), row["scores"]
    limits = {rule: (scores[score], threshold) for rule, score, _, threshold in bounds(policy)}
    closest = sorted(margins(scores, policy).items(), key=lambda item: (item[1], item[0]))[:3]
    near = "; ".join(f"{rule} value {limits[rule][0]}, threshold {limits[rule][1]}" for rule, _ in closest)
    return f"passed {len(limits)} rules of {row['language']}; closest: {near}; {scores['masked']} masked"
