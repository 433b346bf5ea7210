"""Parts -> the files of the data stage: joined, with the place of every id, and the score columns as Parquet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from puyu.data.dedup import words_of
from puyu.data.emit import ID, Part
from puyu.files import atomic_write, disk_errors

FILES = ("kept", "dropped", "quarantined")
"""By the numbers that `ids.bin` has for them."""
_GROUP = 100_000


def write_files(out: Path, parts: Sequence[Part], quarantined: Sequence[Mapping[str, Any]]) -> None:
    """`kept.jsonl`, `dropped.jsonl`, `quarantined.jsonl`, `ids.bin` and `scores.parquet`."""
    ids = [part.ids() for part in parts]
    for kind, name in enumerate(FILES[:2]):
        with atomic_write(out / f"{name}.jsonl", "wb") as stream:
            for part, places in zip(parts, ids, strict=True):
                places["offset"][places["kind"] == kind] += stream.tell()
                _append(part.file(name), stream)
    with atomic_write(out / "quarantined.jsonl", "wb") as stream:
        ids.append(_write_rows(quarantined, stream))
    places = np.concatenate(ids)
    places = places[np.lexsort((places["offset"], places["kind"], places["id"]))]
    with atomic_write(out / "ids.bin", "wb") as stream:
        stream.write(places.tobytes())
    _write_scores(out / "scores.parquet", parts)


def _append(path: Path, stream: IO[bytes]) -> None:
    with open(path, "rb") as source, disk_errors(path):
        shutil.copyfileobj(source, stream, 1 << 20)


def _write_rows(rows: Sequence[Mapping[str, Any]], stream: IO[bytes]) -> NDArray[Any]:
    places = []
    for row in rows:
        places.append((words_of(row["id"])[0], FILES.index("quarantined"), stream.tell()))
        stream.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")
    return np.array(places, dtype=ID)


def _write_scores(path: Path, parts: Sequence[Part]) -> None:
    """One row group for about a hundred thousand documents, columns in the order of their names."""
    types: dict[str, pa.DataType] = {"id": pa.large_string()}
    for part in parts:
        types |= {field.name: field.type for field in part.scores().schema}
    schema = pa.schema([(name, types[name]) for name in sorted(types)])
    with atomic_write(path, "wb") as stream, parquet.ParquetWriter(stream, schema, compression="zstd") as writer:
        for table in _groups(parts, schema):
            writer.write_table(table, row_group_size=2 * _GROUP)


def _groups(parts: Sequence[Part], schema: pa.Schema) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    rows = 0
    for part in parts:
        table = part.scores()
        if table.num_rows == 0:
            continue
        waiting.append(table)
        rows += table.num_rows
        if rows >= _GROUP:
            yield _aligned(waiting, schema)
            waiting, rows = [], 0
    if waiting:
        yield _aligned(waiting, schema)


def _aligned(tables: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    """All columns of the schema, null where a part has none."""
    joined = pa.concat_tables(tables, promote_options="default")
    columns = [
        joined[field.name] if field.name in joined.column_names else pa.nulls(joined.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
