"""Clean documents for other tools: Parquet, JSONL (plain, .gz, .zst), WanJuan's records or plain text, all or some.

    count = export(Path("runs/web/data"), Path("web.parquet"), language="zh")
    count = export_wanjuan(Path("runs/web/data"), Path("web.jsonl.zst"), quarantine=print)

Parquet has the columns id, source, domain, language, text, metadata (JSON) and scores (a map from name to number), and
reads back with `kind: parquet`. Memory holds a thousand documents; the file appears when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from puyu.data.corpus import documents
from puyu.documents.interleaved import write_interleaved
from puyu.errors import ConfigError, InputError
from puyu.files import Quarantine, atomic_write, read_jsonl, write_jsonl

FORMS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
_ROWS = 1024
T = TypeVar("T")


def export(folder: Path, target: Path, **wanted: str) -> int:
    """Write the kept documents of a run whose fields (source, domain, language) are as wanted; returns how many.

    ConfigError for a form that is not known, InputError when nothing fits.
    """
    form = _form_of(target, FORMS)
    path = folder / "kept.jsonl" if folder.is_dir() else folder
    rows = (row for row in read_jsonl(path) if all(row.get(name) == value for name, value in wanted.items()))
    found = _some(rows, path, wanted)
    if form == ".parquet":
        return _write_parquet(target, found)
    return _write_text(target, found) if form == ".txt" else write_jsonl(target, found)


def export_wanjuan(folder: Path, target: Path, *, quarantine: Quarantine, **wanted: str) -> int:
    """Write the same documents as WanJuan's records (text, and text with pictures in place); returns how many.

    A row without text, and a text with a link to a picture that its metadata do not list, goes to quarantine.
    """
    _form_of(target, tuple(form for form in FORMS if form.startswith(".jsonl")))
    found = documents([folder], quarantine=quarantine)
    chosen = (one for one in found if all(getattr(one, name) == value for name, value in wanted.items()))
    return write_interleaved(target, _some(chosen, folder, wanted), quarantine=quarantine)


def _some(rows: Iterator[T], path: Path, wanted: Mapping[str, str]) -> Iterator[T]:
    """The same rows; InputError where there is none, before anything is written."""
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path} holds no document of {wanted or 'any kind'}")
    return chain([first], rows)


def _form_of(target: Path, forms: Sequence[str]) -> str:
    for form in forms:
        if target.name.endswith(form):
            return form
    raise ConfigError(f"{target} has no form that is known", remedy=f"name it *{', *'.join(forms)}")


def _write_text(target: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Texts one below the other, an empty line between."""
    count = 0
    with atomic_write(target) as stream:
        for row in rows:
            stream.write(f"{row['text']}\n\n")
            count += 1
    return count


def _write_parquet(target: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    import pyarrow as pa
    from pyarrow import parquet

    texts = [(name, pa.large_string()) for name in ("id", "source", "domain", "language", "text", "metadata")]
    schema = pa.schema([*texts, ("scores", pa.map_(pa.string(), pa.float64()))])
    count, todo = 0, iter(rows)
    with atomic_write(target, "wb") as stream, parquet.ParquetWriter(stream, schema, compression="zstd") as writer:
        while batch := [_flat(row) for row in islice(todo, _ROWS)]:
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            count += len(batch)
    return count


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: str(row.get(name, "")) for name in ("id", "source", "domain", "language", "text")}
    metadata = json.dumps(row.get("metadata", {}), ensure_ascii=False)
    return {**flat, "metadata": metadata, "scores": list(row.get("scores", {}).items())}
