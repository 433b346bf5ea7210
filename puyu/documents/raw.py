"""Files -> raw records, at the price of opening and cutting; parsing them comes later, perhaps in another process.

    for block in blocks(source, ReadReport()):            # doctest: +SKIP
        documents = [d for raw in block.raws for d in parse(source, raw, quarantine=print, report=ReadReport())]

A raw record is a line of JSONL, a stretch of a text file, a record of a web archive, a row group of a Parquet file, or
a whole file where a file is one document. Memory is bounded: a line, page or record of more than `MAX_RECORD` bytes is
quarantined, a text file of any size comes in stretches of at most `STRETCH` bytes that end where a line ends, if they
can. How the records of a source fall into blocks depends on the files alone, so a block is what a run commits.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from puyu.documents.repositories import Tree, files_on_disk, trees
from puyu.documents.sources import BOOKS, PAGES, Member, ReadReport, SourceConfig, members
from puyu.documents.tables import row_groups
from puyu.documents.warc import MAX_RECORD, Record, records
from puyu.files import BadRecord, Quarantine, archive_errors, open_bytes

STRETCH = 8_000_000
"""Bytes of a text file that are parsed at a time."""
BLOCK_BYTES = 8_000_000
BLOCK_RECORDS = 8_192
_BOOK = 1 << 30


@dataclass(frozen=True, slots=True)
class Raw:
    """One record as it lies in its file; without a payload whoever parses opens the file."""

    member: Member
    number: int
    """1-based: the line, the record; for a stretch of a text its first line, for a row group its first row."""
    offset: int
    """Byte where it begins, in the unpacked file; of a row group its place among those of the file, from 0 on."""
    size: int
    payload: bytes | Record | None = None
    ends: bool = True
    """False for a stretch of a text after which another comes."""


@dataclass(frozen=True, slots=True)
class Block:
    """Records of one source that are parsed together, and what could not be cut out among them."""

    number: int
    raws: tuple[Raw, ...]
    bad: tuple[BadRecord, ...]

    @property
    def size(self) -> int:
        return sum(raw.size for raw in self.raws)

    def __reduce__(self) -> tuple[Any, ...]:
        # Thousands of small objects go to another process: as tuples, which pickle writes and reads in C.
        rows = [(raw.member, raw.number, raw.offset, raw.size, raw.payload, raw.ends) for raw in self.raws]
        return _block_of, (self.number, rows, self.bad)


def _block_of(number: int, rows: list[tuple[Any, ...]], bad: tuple[BadRecord, ...]) -> Block:
    return Block(number, tuple(Raw(*row) for row in rows), bad)


def blocks(source: SourceConfig, report: ReadReport) -> Iterator[Block]:
    """All records of a source in the order of its files. Raises InputError for a path that does not exist."""
    bad: list[BadRecord] = []
    raws: list[Raw] = []
    number = size = 0
    for member in list(units(source, report, bad.append)):
        report.files += 1
        for raw in walk(source, member, bad.append):
            raws.append(raw)
            size += raw.size
            if size >= BLOCK_BYTES or len(raws) >= BLOCK_RECORDS:
                yield Block(number, tuple(raws), tuple(bad))
                number, size, raws, bad[:] = number + 1, 0, [], []
    if raws or bad:
        yield Block(number, tuple(raws), tuple(bad))


def units(source: SourceConfig, report: ReadReport, quarantine: Quarantine) -> Iterator[Member]:
    """What is opened one by one: files, members of archives, whole repositories."""
    if source.kind == "repository":
        yield from (Member(tree.path, tree.name) for tree in trees(source.path, source.name))
    else:
        yield from members(source, report, quarantine)


def walk(source: SourceConfig, member: Member, quarantine: Quarantine) -> Iterator[Raw]:
    """The raw records of one file."""
    whole = source.kind == "code" or member.suffix in BOOKS or _is_page(source, member)
    try:
        if source.kind == "repository":
            size = sum(path.stat().st_size for path in files_on_disk(Tree(member.origin, member.path)))
            yield Raw(member, 1, 0, size)
        elif source.kind == "warc":
            yield from _archive(member, quarantine)
        elif source.kind == "parquet":
            with open_packed(member) as stream:
                for first, group, size in row_groups(stream, member.label, quarantine):
                    yield Raw(member, first, group, size)
        elif source.kind in ("jsonl", "wanjuan") or member.suffix in (".jsonl", ".ndjson"):
            yield from _lines(member, quarantine)
        elif whole:
            yield Raw(member, 1, 0, member.size)
        else:
            yield from _stretches(member, quarantine)
    except archive_errors() as error:
        quarantine(BadRecord(member.label, 0, 0, f"archive: {error}", ""))


def _is_page(source: SourceConfig, member: Member) -> bool:
    return member.suffix in PAGES or (source.kind == "html" and member.suffix != ".jsonl")


# ---- opening


@contextlib.contextmanager
def open_packed(member: Member) -> Iterator[IO[bytes]]:
    """The member's bytes as they are stored."""
    if member.inside:
        with open_member(member) as stream:
            yield stream
    else:
        with open(member.path, "rb") as stream:
            yield stream


@contextlib.contextmanager
def open_member(member: Member) -> Iterator[IO[bytes]]:
    """The member's bytes, unpacked."""
    if member.inside:
        about = member.path.stat()
        archive = _archive_of(member.path, (about.st_ino, about.st_size, about.st_mtime_ns), os.getpid())
        with _bzip2_errors(), archive.open(member.inside) as stream:
            yield stream
    else:
        with open_bytes(member.path) as stream:
            yield stream


@lru_cache(maxsize=1)
def _archive_of(path: Path, stamp: tuple[int, int, int], process: int) -> zipfile.ZipFile:
    """The archive that was opened last: to read its list for every member is quadratic.

    `stamp` changes with the file. A process that was forked opens its own: two would move the place in one file.
    """
    return zipfile.ZipFile(path)


@contextlib.contextmanager
def _bzip2_errors() -> Iterator[None]:
    """Damaged bzip2 raises an OSError, and no other one lacks a number."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise zipfile.BadZipFile(str(error)) from error
        raise


def bytes_of(member: Member, quarantine: Quarantine) -> bytes | None:
    """All bytes of a member; None (and a quarantined record) when its compression is torn or it is too large."""
    limit = _BOOK if member.suffix in BOOKS else MAX_RECORD
    try:
        with open_member(member) as stream:
            data = stream.read(limit + 1)
    except archive_errors() as error:
        quarantine(BadRecord(member.label, 0, 0, f"archive: {error}", ""))
        return None
    if len(data) > limit:
        quarantine(BadRecord(member.label, 0, 0, f"record: a file of more than {limit} bytes", ""))
        return None
    return data


# ---- cutting


def _archive(member: Member, quarantine: Quarantine) -> Iterator[Raw]:
    with open_packed(member) as stream:
        for number, found in enumerate(records(stream, member.label, quarantine=quarantine), 1):
            yield Raw(member, number, found.offset, len(found.body) + 200, found)


def _lines(member: Member, quarantine: Quarantine) -> Iterator[Raw]:
    """The lines that are not blank."""
    number = offset = 0
    try:
        with open_member(member) as stream:
            while line := stream.readline(MAX_RECORD + 1):
                number, start, offset = number + 1, offset, offset + len(line)
                if len(line) > MAX_RECORD:
                    offset += _rest_of_line(stream)
                    problem = f"record: a line of more than {MAX_RECORD} bytes"
                    quarantine(BadRecord(member.label, number, start, problem, _head(line)))
                elif not line.isspace():
                    yield Raw(member, number, start, len(line), line)
    except archive_errors() as error:
        quarantine(BadRecord(member.label, number + 1, offset, f"archive: {error}", ""))


def _rest_of_line(stream: IO[bytes]) -> int:
    size = 0
    while part := stream.readline(1 << 20):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _head(line: bytes) -> str:
    return line[:80].decode("utf-8", "replace")


def _stretches(member: Member, quarantine: Quarantine) -> Iterator[Raw]:
    """A text file in parts that end with a line, or, where one line is longer than that, with a whole character."""
    line, offset = 1, 0
    try:
        with open_member(member) as stream:
            data = stream.read(STRETCH)
            while True:
                more = stream.read(STRETCH) if len(data) >= STRETCH else b""
                cut = _last_cut(data) if more else len(data)
                yield Raw(member, line, offset, cut, data[:cut], ends=not more)
                if not more:
                    return
                line, offset, data = line + data.count(b"\n", 0, cut), offset + cut, data[cut:] + more
    except archive_errors() as error:
        quarantine(BadRecord(member.label, line, offset, f"archive: {error}", ""))


def _last_cut(data: bytes) -> int:
    """Where a stretch ends: behind its last empty line or line, unless that is in its first half."""
    for mark in (b"\n\n", b"\n"):
        at = data.rfind(mark)
        if at >= len(data) // 2:
            return at + len(mark)
    at = len(data) - 1
    while at > len(data) - 4 and data[at] & 0xC0 == 0x80:
        at -= 1
    return at
