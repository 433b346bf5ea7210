"""Columns of numbers on disk, one flat file each: what duplicates are found by, and the index that a run leaves.

    with ColumnWriter(folder) as writer: writer.append(table)          # Arrow tables, one block of documents each
    columns = Columns.open(folder)
    columns["near.signature"]                                          # a memory map [rows, width], or a Ragged

A folder holds `NAME.bin` files and `columns.json`, written last: without it the folder does not exist. Numbers, rows of
numbers of one width, and ragged rows are what a column may be; all columns have the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from puyu.documents.stages import Column, Ragged
from puyu.errors import InputError
from puyu.files import atomic_write, disk_errors, read_object, write_json

_HEAD = "columns.json"


def as_table(columns: Mapping[str, Column | Ragged]) -> pa.Table:
    """Columns as Arrow: numbers, fixed-size lists, lists of those."""
    return pa.table({name: _as_array(column) for name, column in columns.items()})


def _as_array(column: Column | Ragged) -> pa.Array:
    if isinstance(column, Ragged):
        return pa.LargeListArray.from_arrays(pa.array(column.starts), _as_array(column.values))
    if column.ndim == 1:
        return pa.array(column)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(column).reshape(-1)), column.shape[1])


def _as_column(array: pa.Array) -> Column | Ragged:
    if pa.types.is_large_list(array.type):
        starts = array.offsets.to_numpy()
        values = _as_column(array.values)
        assert not isinstance(values, Ragged)
        return Ragged(values[starts[0] : starts[-1]], starts - starts[0])
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy().reshape(-1, array.type.list_size)  # type: ignore[no-any-return]
    return array.to_numpy()  # type: ignore[no-any-return]


class ColumnWriter:
    """Appends tables of equal columns; as a context manager, so that what is torn has no head."""

    def __init__(self, folder: Path, *, about: Mapping[str, Any] | None = None, durable: bool = True) -> None:
        self._folder, self._about, self._durable = folder, dict(about or {}), durable
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _HEAD).unlink(missing_ok=True)
        self._stack = ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        self._shapes: dict[str, tuple[str, int]] = {}
        self._ends: dict[str, int] = {}
        self.rows = 0

    def append(self, table: pa.Table) -> None:
        for name in table.column_names:
            column = _as_column(table.column(name).combine_chunks())
            if isinstance(column, Ragged):
                end = self._ends.get(name, 0)
                if not self.rows:
                    self._write(f"{name}.starts", np.zeros(1, dtype=np.int64))
                self._write(f"{name}.starts", column.starts[1:] + end)
                self._ends[name] = end + int(column.starts[-1])
                column = column.values
            self._write(name, column)
        self.rows += table.num_rows

    def _write(self, name: str, values: NDArray[Any]) -> None:
        shape = values.dtype.str, values.shape[1] if values.ndim > 1 else 0
        assert self._shapes.setdefault(name, shape) == shape, f"column {name} changes its type"
        if name not in self._files:
            self._files[name] = self._stack.enter_context(
                atomic_write(self._folder / f"{name}.bin", "wb", durable=self._durable)
            )
        with disk_errors(self._folder):
            self._files[name].write(np.ascontiguousarray(values).data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            head = {**self._about, "rows": self.rows, "columns": {n: list(s) for n, s in self._shapes.items()}}
            write_json(self._folder / _HEAD, head)


class Columns(Mapping[str, Column | Ragged]):
    """Columns of a folder, mapped when they are asked for."""

    def __init__(self, folder: Path, head: Mapping[str, Any]) -> None:
        self.folder, self.about, self.rows = folder, head, int(head["rows"])
        self._shapes: dict[str, list[Any]] = head["columns"]

    @staticmethod
    def open(folder: Path) -> Columns:
        """InputError when there are no columns."""
        if not (folder / _HEAD).is_file():
            raise InputError(f"no columns in {folder}", remedy="run the stage that writes them again")
        return Columns(folder, read_object(folder / _HEAD))

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._shapes if not name.endswith(".starts"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Column | Ragged:
        if f"{name}.starts" in self._shapes:
            return Ragged(self._map(name), self._map(f"{name}.starts"))
        return self._map(name)

    def _map(self, name: str) -> Column:
        dtype, width = self._shapes[name]
        path = self.folder / f"{name}.bin"
        shape = (-1, width) if width else (-1,)
        if not path.is_file():
            raise InputError(f"column {path} is missing", remedy="run the stage that writes it again")
        if path.stat().st_size == 0:
            return np.empty((0, width) if width else 0, dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r").reshape(shape)

    def table(self, rows: NDArray[np.int64], names: Sequence[str]) -> pa.Table:
        """Some rows of some columns."""
        return as_table({name: _take(self[name], rows) for name in names})


def _take(column: Column | Ragged, rows: NDArray[np.int64]) -> Column | Ragged:
    if not isinstance(column, Ragged):
        return column[rows]
    sizes = column.starts[rows + 1] - column.starts[rows]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    places = np.repeat(column.starts[rows] - starts[:-1], sizes) + np.arange(starts[-1])
    return Ragged(column.values[places], starts)


def stage_columns(columns: Mapping[str, Column | Ragged], stage: str) -> Mapping[str, Column | Ragged]:
    """The columns of one group stage by the names it gave them, mapped when they are asked for."""
    return _Prefixed(columns, f"{stage}.")


class _Prefixed(Mapping[str, Column | Ragged]):
    def __init__(self, columns: Mapping[str, Column | Ragged], prefix: str) -> None:
        self._columns, self._prefix = columns, prefix

    def __getitem__(self, name: str) -> Column | Ragged:
        return self._columns[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._columns if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
