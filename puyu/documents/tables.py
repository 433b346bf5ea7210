"""Parquet files -> rows, a bounded number at a time.

    for first, group, size in row_groups(stream, "part.parquet", quarantine=print): ...

Only the text and the columns that become metadata are read. A text that is no UTF-8 costs its row, a row group that is
damaged its rows, which are counted in what is quarantined; a file whose footer is torn costs the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from puyu.errors import DependencyError, InputError
from puyu.files import BadRecord, Quarantine

METADATA = ("url", "path", "title", "license", "date")
"""Fields of a record that stay with the document."""
_ROWS = 256


def row_groups(stream: IO[bytes], label: str, quarantine: Quarantine) -> Iterator[tuple[int, int, int]]:
    """(1-based number of its first row, its place among the groups, bytes) of every row group."""
    parquet, damaged = _parquet()
    try:
        file = parquet.ParquetFile(stream)
    except damaged as error:
        quarantine(BadRecord(label, 0, 0, f"archive: {error}", ""))
        return
    first = 1
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        yield first, group, about.total_byte_size
        first += about.num_rows


def table_rows(
    stream: IO[bytes], label: str, *, group: int, first: int, text_field: str, quarantine: Quarantine
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based number, row) of every row of a group that can be read. InputError where no column holds the text."""
    parquet, damaged = _parquet()
    file = parquet.ParquetFile(stream)
    names = file.schema_arrow.names
    if text_field not in names:
        raise InputError(
            f"{label} has no column {text_field!r}", remedy=f"set text_field to one of: {', '.join(names)}"
        )
    columns = [name for name in (text_field, *METADATA) if name in names]
    number, behind = first, first + file.metadata.row_group(group).num_rows
    try:
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns):
            for row in _rows(batch):
                if isinstance(row, dict):
                    yield number, row
                else:
                    quarantine(BadRecord(label, number, 0, f"encoding: {row.reason}", ""))
                number += 1
    except damaged as error:
        quarantine(BadRecord(label, number, 0, f"archive: rows {number} to {behind - 1}: {error}", ""))


def _rows(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """The rows of a batch; what is wrong with it in place of one whose text is no UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for at in range(batch.num_rows):
            try:
                yield from batch.slice(at, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield error


def _parquet() -> tuple[Any, tuple[type[Exception], ...]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DependencyError("reading Parquet needs pyarrow", remedy="pip install 'puyu-llm[data]'") from error
    return parquet, (ArrowException, OSError)
