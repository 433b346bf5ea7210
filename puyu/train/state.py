"""A saved state: what it is on a disk, and how a run goes on from the newest good one, in any world and layout.

`train_state/step-00000100/` holds one `part-RANK.safetensors` a process, with the rectangles of weights and moments
that it owns (any safetensors reader opens it; a rectangle of a larger tensor is named `NAME@START`), beside it
`part-RANK.json` (which rectangle stands where, a CRC-32 of every `CHUNK` bytes), and `state.json` (step, cursor, hashes
of the indexes). All stand in `step-*.tmp-*` first, on the disk; its rename commits. Loading reads what the running
layout needs of each rectangle, and verifies what it reads before it is used: a state with a wrong byte is named and
passed over for the one before. Random streams are functions of (seed, step, rank), so there is no generator to save.
No pickle. Knows no thread and no collective but the agreement of `restore`; `saver.py` writes.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from puyu.dist import current_world
from puyu.errors import CheckpointError
from puyu.files import hash_bytes, hash_json
from puyu.log import logger
from puyu.train.layouts import Layout
from puyu.train.layouts.base import first_of
from puyu.train.pieces import Piece

FOLDER = "train_state"
STATE = "state.json"
CHUNK = 4 << 20
"""Bytes under one checksum."""

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BYTES = {"U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_INTS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
_DTYPES = _FLOATS | _BYTES | _INTS
"""By safetensors' names."""
_KINDS = {dtype: name for name, dtype in _DTYPES.items()}


class TornError(CheckpointError):
    """A state that is not whole, or not what was saved."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: completed steps, tokens seen, the source's cursor, what others keep by name."""

    step: int
    tokens: int
    source: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)


class Shelf(Protocol):
    """One state as it is read, from either tier."""

    def span(self, name: str, start: int, stop: int) -> memoryview:
        """Those bytes of a file (fewer where it ends before); OSError when it cannot be read."""

    def whole(self, name: str) -> bytes:
        """A small file."""


class Folder(NamedTuple):
    """A state in a local folder."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def span(self, name: str, start: int, stop: int) -> memoryview:
        with open(self.path / name, "rb", buffering=0) as stream:
            stream.seek(start)
            block = memoryview(bytearray(stop - start))
            count = 0
            while count < len(block) and (more := stream.readinto(block[count:])):
                count += more
            return block[:count]

    def whole(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


# --- the form of a part ----------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A rectangle and where its bytes stand in the part's file."""

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    kind: str
    offset: int

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.kind]

    @property
    def nbytes(self) -> int:
        return prod(self.size) * self.dtype.itemsize

    @property
    def key(self) -> str:
        """Its name in the safetensors file."""
        return self.name if self.size == self.shape else f"{self.name}@{','.join(map(str, self.start))}"


def rows_of(pieces: Iterable[Piece]) -> tuple[bytes, list[Row], list[Piece]]:
    """The header of a safetensors file, its rows, and the pieces in their order (wide types first: all are aligned)."""
    owned = [piece for piece in pieces if piece.owner and piece.tensor.numel()]
    owned.sort(key=lambda piece: -piece.tensor.element_size())
    ends = list(accumulate((piece.tensor.nbytes for piece in owned), initial=0))
    rows = [
        Row(p.name, p.shape, p.start, tuple(p.tensor.shape), _KINDS[p.tensor.dtype], at)
        for p, at in zip(owned, ends, strict=False)
    ]
    places = {r.key: {"dtype": r.kind, "shape": r.size, "data_offsets": (r.offset, r.offset + r.nbytes)} for r in rows}
    assert len(places) == len(rows), "two owned pieces of one rectangle"
    text = json.dumps(places, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [row._replace(offset=row.offset + len(header)) for row in rows], owned


def part_name(rank: int) -> str:
    return f"part-{rank:05d}"


def checked(data: memoryview) -> list[int]:
    """CRC-32 of every `CHUNK` bytes."""
    return [zlib.crc32(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]


def put(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """Write a file that has its name only when it is on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for block in blocks:
            view = memoryview(block)
            while view:
                view = view[os.write(number, view) :]
        os.fsync(number)
    finally:
        os.close(number)
    os.replace(temporary, path)


def sync_folder(path: Path) -> None:
    """The names in a folder are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def state_text(progress: Progress, *, identity: str, indexes: Mapping[str, bytes]) -> bytes:
    """state.json: `indexes` are the part-RANK.json files."""
    value = {"step": progress.step, "tokens": progress.tokens, "identity": identity}
    value |= {"source": dict(progress.source), "extra": dict(progress.extra)}
    value["parts"] = {name: hash_bytes(text) for name, text in indexes.items()}
    value = json.loads(json.dumps(value))  # as it will be read: keys are text
    text = json.dumps({"checksum": hash_json(value), "state": value}, ensure_ascii=False, indent=1)
    return text.encode() + b"\n"


def index_text(file: str, header: bytes, rows: Sequence[Row], checksums: Sequence[Sequence[int]]) -> bytes:
    """part-RANK.json, a row a line."""
    lines = [json.dumps([*row, sums]) for row, sums in zip(rows, checksums, strict=True)]
    about = f'{{"file": {json.dumps(file)}, "header": {[len(header), zlib.crc32(header)]}, "rows": [\n'
    return (about + ",\n".join(lines) + "\n]}\n").encode()


# --- reading ---------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A row with the file that it stands in and the checksums of its bytes."""

    file: str
    row: Row
    checksums: Sequence[int]


def _checked_state(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
        value: dict[str, Any] = found["state"]
        if hash_json(value) == found["checksum"]:
            return value
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TornError(f"{STATE}: {error}") from error
    raise TornError(f"{STATE} does not match its checksum")


class State:
    """A state whose indexes are good; its tensors are verified as they are read."""

    def __init__(self, shelf: Shelf) -> None:
        """TornError where an index is missing or wrong."""
        self.shelf = shelf
        try:
            value = _checked_state(shelf.whole(STATE))
            self.identity: str = value["identity"]
            self.progress = Progress(value["step"], value["tokens"], value["source"], value["extra"])
            self.rows: dict[str, list[Stored]] = {}
            self._headers: dict[str, tuple[int, int]] = {}  # of the files that were not yet looked into
            for name, digest in value["parts"].items():
                self._add(name, digest)
        except OSError as error:
            raise TornError(str(error).splitlines()[0]) from error

    def _add(self, name: str, digest: str) -> None:
        text = self.shelf.whole(name)
        if hash_bytes(text) != digest:
            raise TornError(f"{name} does not match its checksum")
        part = json.loads(text)
        self._headers[part["file"]] = tuple(part["header"])
        for entry in part["rows"]:
            name, shape, start, size, kind, offset, checksums = entry
            row = Row(name, tuple(shape), tuple(start), tuple(size), kind, offset)
            self.rows.setdefault(row.name, []).append(Stored(part["file"], row, checksums))

    def fill(self, pieces: Iterable[Piece], *, copy: bool = True) -> None:
        """Copy what was saved into the pieces; TornError where a byte is wrong. Without `copy`: verify only."""
        for piece in pieces:
            covered = 0
            for stored in self.rows.get(piece.name, ()):
                self._check(piece, stored.row)
                if (window := _overlap(piece, stored.row)) is not None:
                    tensor = self._read(stored, window)
                    covered += tensor.numel()
                    if copy:
                        here = tuple(slice(a - o, b - o) for (a, b), o in zip(window, piece.start, strict=True))
                        piece.tensor[here].copy_(tensor)
            if covered != piece.tensor.numel():
                raise CheckpointError(f"{self.shelf} does not hold all of {piece.name}", remedy=_OTHER)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything by name, whole; TornError where a byte is wrong."""
        for name, rows in self.rows.items():
            whole = torch.empty(rows[0].row.shape, dtype=rows[0].row.dtype)
            for stored in rows:
                window = [(a, a + n) for a, n in zip(stored.row.start, stored.row.size, strict=True)]
                whole[tuple(slice(a, b) for a, b in window)] = self._read(stored, window)
            yield name, whole

    def _check(self, piece: Piece, row: Row) -> None:
        if row.shape != piece.shape or row.dtype != piece.tensor.dtype:
            ours = f"{piece.shape} {_KINDS[piece.tensor.dtype]}"
            raise CheckpointError(f"{self.shelf}: {row.name} is {row.shape} {row.kind}, not {ours}", remedy=_OTHER)

    def _read(self, stored: Stored, window: Sequence[tuple[int, int]]) -> Tensor:
        """That window of the whole tensor, out of one row; only the chunks that hold it are read."""
        if header := self._headers.pop(stored.file, None):
            size, wanted = header
            if zlib.crc32(self.shelf.span(stored.file, 0, size)) != wanted:
                raise TornError(f"{stored.file} does not match its checksum")
        row, inside = stored.row, [(a - o, b - o) for (a, b), o in zip(window, stored.row.start, strict=True)]
        line = row.nbytes // row.size[0] if row.size else row.nbytes
        first, last = inside[0] if inside else (0, 1)
        low, high = first * line // CHUNK, -(-last * line // CHUNK)
        begin, end = low * CHUNK, min(high * CHUNK, row.nbytes)
        data = self.shelf.span(stored.file, row.offset + begin, row.offset + end)
        if len(data) != end - begin or checked(data) != list(stored.checksums[low:high]):
            raise TornError(f"{stored.file} does not match its checksum")
        lines = torch.frombuffer(data[first * line - begin : last * line - begin], dtype=torch.uint8)
        tensor = lines.clone().view(row.dtype) if first * line % 8 else lines.view(row.dtype)
        tensor = tensor.view(last - first, *row.size[1:]) if row.size else tensor.view(())
        return tensor[tuple(slice(a, b) for a, b in ((0, last - first), *inside[1:]))] if row.size else tensor


_OTHER = "the saved run had another model or optimizer: choose another --out"


def _overlap(piece: Piece, row: Row) -> list[tuple[int, int]] | None:
    """Where both lie, in the whole tensor; None where they do not meet."""
    sizes = piece.tensor.shape
    bounds = [
        (max(a, b), min(a + n, b + m)) for a, n, b, m in zip(piece.start, sizes, row.start, row.size, strict=True)
    ]
    return bounds if all(low < high for low, high in bounds) else None


# --- going on --------------------------------------------------------------------------------------------------------


def saved(out: Path) -> list[Folder]:
    """The committed states of a run, newest first; some may be torn."""
    return [Folder(path) for path in sorted((out / FOLDER).glob("step-????????"), reverse=True)]


def restore(shelves: Sequence[Shelf], *, layout: Layout, identity: str) -> tuple[Progress, Shelf] | None:
    """Fill the layout from the first good state; CheckpointError when that is of another run, or where none of several
    is good.

    Every process calls it with the same states. One that is torn for any process is passed over by all, and named. The
    last one is verified before it is used: there is none behind it that would fill again what it filled.
    """
    found, problem = None, ""
    for number, shelf in enumerate(shelves):
        last = number == len(shelves) - 1
        for copy in (False, True) if last else (True,):
            found, problem = _tried(shelf, layout, identity, copy=copy)
            if problem := first_of(problem):
                break
        if found is not None and not problem:
            return found, shelf
        if current_world().is_main:
            where = "going on from the state before it" if not last else "there is none before it"
            logger.warning("%s is torn (%s): %s", shelf, problem, where)
    if len(shelves) > 1:  # those before the last have left something in the layout
        remedy = "put back one of them from a copy, or remove them all to start over"
        raise CheckpointError(f"none of {len(shelves)} saved states is whole, the last is {shelves[-1]}", remedy=remedy)
    return None


@torch.no_grad()
def _tried(shelf: Shelf, layout: Layout, identity: str, *, copy: bool) -> tuple[Progress | None, str]:
    """The progress of a state that this process could read, or what is wrong with it."""
    try:
        state = State(shelf)
        if state.identity != identity:
            raise CheckpointError(
                f"{shelf} was saved by a run with another config or other inputs",
                remedy="choose another --out, or remove its saved states to start over",
            )
        for pieces in (layout.trained(), layout.moments()):
            state.fill(pieces, copy=copy)
    except (TornError, OSError) as error:
        return None, str(error).splitlines()[0]
    return state.progress, ""
