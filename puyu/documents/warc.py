"""Web archives -> pages: WARC (ISO 28500), WET, and the older ARC, plain or with a gzip member for each record.

    for found in records(stream, "crawl.warc.gz", quarantine=print): ...
    answer = http_answer(found.body)               # of a record of type `response`

Damage costs the record that it is in: reading goes on at the next gzip member, or the next line that begins a record,
and what was lost is quarantined with its byte offset in the file. Nothing is fetched; nothing is decided about content.
"""

from __future__ import annotations

import mmap
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO

from puyu.files import BadRecord, Quarantine

MAX_RECORD = 64_000_000
"""Bytes of a record, unpacked; longer ones are quarantined."""
_BLOCK = 1 << 16
_MAGIC = b"\x1f\x8b\x08"
_START = re.compile(rb"(?:^|\n)(?=WARC/\d)")
_ARC_LINE = re.compile(rb"(\S.*) (\S+) (\d{8,14}) (\S+) (\d+)\r?\n")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")
_HEADER_END = re.compile(rb"\r?\n\r?\n")

Bytes = bytes | mmap.mmap


@dataclass(frozen=True, slots=True)
class Record:
    """One record. `kind` is WARC's type (`response`, `conversion` ...); those of ARC files are responses."""

    kind: str
    url: str
    date: str
    media: str
    """Media type of the record, without parameters."""
    body: bytes
    offset: int
    """Where it begins in the file."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered. `charset` is the one that it declared."""

    status: int
    media: str
    charset: str
    body: bytes


class Damaged(Exception):
    """Why bytes are no record."""


def records(stream: IO[bytes], label: str, *, quarantine: Quarantine) -> Iterator[Record]:
    """All records of an archive in order; `stream` is the file as it lies on the disk."""
    number = 0
    for offset, data, problem in _parts(stream):
        if problem:
            quarantine(BadRecord(label, number + 1, offset, f"archive: {problem}", _head(data)))
        for found in _parse(data, offset):
            number += 1
            if isinstance(found, Record):
                yield found
            elif not problem:
                quarantine(BadRecord(label, number, found[0], f"record: {found[1]}", found[2]))


def _head(data: Bytes) -> str:
    return data[:80].decode("utf-8", "replace")


# ---- gzip members; a plain file is one part


def _parts(stream: IO[bytes]) -> Iterator[tuple[int, Bytes, str]]:
    """(offset in the file, bytes, what is wrong with them) of every gzip member, or of the whole plain file."""
    window = _Window(stream)
    if not window.starts_with(_MAGIC):
        yield 0, _mapped(stream) or window.rest(), ""
        return
    while not window.is_empty:
        offset = window.offset
        try:
            data = _member(window)
        except Damaged as error:
            window.find(_MAGIC, beyond=offset + 1)
            yield offset, error.args[1], error.args[0]
            continue
        yield offset, data, ""
        if not window.is_empty and not window.starts_with(_MAGIC):
            offset = window.offset
            window.find(_MAGIC, beyond=offset)
            yield offset, b"", "bytes between two members"


def _mapped(stream: IO[bytes]) -> mmap.mmap | None:
    """The whole file without reading it; None for what is no file on a disk."""
    try:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # inside another archive, or empty
        return None


def _member(window: _Window) -> bytes:
    """Unpack the member at the window's place and go behind it."""
    window.begin()
    unpacker, size = zlib.decompressobj(wbits=31), 0
    parts: list[bytes] = []
    while not unpacker.eof:
        block = window.take(_BLOCK)
        if not block:
            raise Damaged("the compressed stream ends early", b"".join(parts))
        try:
            parts.append(unpacker.decompress(block, MAX_RECORD - size + 1))
        except zlib.error as error:
            raise Damaged(str(error), b"".join(parts)) from error
        size += len(parts[-1])
        if size > MAX_RECORD:
            raise Damaged(f"a record of more than {MAX_RECORD} bytes", parts[0])
        window.give_back(unpacker.unused_data)
    return b"".join(parts)


class _Window:
    """A file read once, with a look ahead and steps back within what was read last."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._ready, self.offset = stream, b"", 0
        self._past = bytearray()
        """What was taken since `begin`: a search may start inside it."""

    @property
    def is_empty(self) -> bool:
        return not self._look(1)

    def _look(self, size: int) -> bytes:
        while len(self._ready) < size and (block := self._stream.read(_BLOCK)):
            self._ready += block
        return self._ready[:size]

    def starts_with(self, mark: bytes) -> bool:
        return self._look(len(mark)) == mark

    def begin(self) -> None:
        """A member begins here; nobody goes back beyond it."""
        self._past = bytearray()

    def take(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end."""
        block = self._look(size)
        self._ready, self.offset = self._ready[len(block) :], self.offset + len(block)
        self._past += block
        return block

    def give_back(self, tail: bytes) -> None:
        """These, taken last, are still to come."""
        if tail:
            self._ready, self.offset = tail + self._ready, self.offset - len(tail)
            del self._past[-len(tail) :]

    def find(self, mark: bytes, *, beyond: int) -> None:
        """Go to the next place of the mark from `beyond` on, which may have been taken already, or to the end."""
        back = self.offset - beyond
        if 0 < back <= len(self._past):
            self.give_back(bytes(self._past[-back:]))
        while (at := self._ready.find(mark)) < 0 and (block := self._stream.read(_BLOCK)):
            drop = max(len(self._ready) - len(mark), 0)
            self._ready, self.offset = self._ready[drop:] + block, self.offset + drop
        at = len(self._ready) if at < 0 else at
        self._ready, self.offset = self._ready[at:], self.offset + at

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._ready)) + self._stream.read()


# ---- records


def _parse(data: Bytes, base: int) -> Iterator[Record | tuple[int, str, str]]:
    """Records of a part, and (offset, problem, head) of what is none. Offsets in a packed part count from its member's,
    in unpacked bytes."""
    at = 0
    while True:
        while data[at : at + 1] in (b"\r", b"\n"):
            at += 1
        if at >= len(data):
            return
        try:
            found, end = _record_at(data, at, base)
            yield found
            at = end
        except Damaged as error:
            yield base + at, str(error), _head(data[at : at + 80])
            following = _START.search(data, at + 1)
            if following is None:
                return
            at = following.end()


def _record_at(data: Bytes, at: int, base: int) -> tuple[Record, int]:
    if data[at : at + 5] == b"WARC/":
        return _warc_at(data, at, base)
    line = _ARC_LINE.match(data, at)
    if line is None:
        raise Damaged("no header of a record")
    url, _, date, media, length = (part.decode("utf-8", "replace") for part in line.groups())
    body = _body(data, line.end(), int(length))
    kind = "arcinfo" if url.startswith("filedesc:") else "response"
    return Record(kind, url, date, media.lower(), body, base + at), line.end() + len(body)


def _warc_at(data: Bytes, at: int, base: int) -> tuple[Record, int]:
    end = _HEADER_END.search(data, at)
    if end is None:
        raise Damaged("a header without an end")
    headers = _headers(data[at : end.start()])
    length = headers.get("content-length", "")
    if not length.isascii() or not length.isdigit():
        raise Damaged(f"Content-Length is {length!r}")
    body = _body(data, end.end(), int(length))
    media, url = headers.get("content-type", ""), headers.get("warc-target-uri", "").strip("<>")
    kind, date = headers.get("warc-type", "").lower(), headers.get("warc-date", "")
    return Record(kind, url, date, media.partition(";")[0].strip().lower(), body, base + at), end.end() + len(body)


def _body(data: Bytes, start: int, length: int) -> bytes:
    if start + length > len(data):
        raise Damaged(f"the record ends early: {len(data) - start} of {length} bytes")
    if length > MAX_RECORD:
        raise Damaged(f"a record of more than {MAX_RECORD} bytes")
    return data[start : start + length]


def _headers(lines: bytes) -> Mapping[str, str]:
    """Names in lower case; of two of one name the first."""
    found: dict[str, str] = {}
    for line in lines.splitlines()[1:]:
        name, colon, value = line.decode("utf-8", "replace").partition(":")
        if colon:
            found.setdefault(name.strip().lower(), value.strip())
    return found


# ---- what a server answered


def http_answer(body: bytes) -> Answer:
    """The answer inside a record of type `response`; Damaged says what is wrong with it."""
    end = _HEADER_END.search(body)
    status = re.match(rb"HTTP/\d(?:\.\d)? +(\d{3})", body)
    if status is None or end is None:
        raise Damaged("no HTTP answer")
    headers, content = _headers(body[: end.start()]), body[end.end() :]
    if "chunked" in headers.get("transfer-encoding", "").lower():
        content = _unchunked(content)
    coding = headers.get("content-encoding", "identity").lower()
    if coding in ("gzip", "x-gzip", "deflate"):
        content = _unpacked(content, coding)
    elif coding not in ("identity", ""):
        raise Damaged(f"Content-Encoding is {coding!r}")
    media, _, parameters = headers.get("content-type", "").partition(";")
    charset = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", parameters, re.IGNORECASE)
    return Answer(int(status[1]), media.strip().lower(), charset[1].lower() if charset else "", content)


def _unchunked(content: bytes) -> bytes:
    """Chunks joined; archives often hold the joined body under the old header, which is then given as it is."""
    parts: list[bytes] = []
    at = 0
    while line := _CHUNK.match(content, at):
        size = int(line[1], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(content[line.end() : line.end() + size])
        at = line.end() + size + 2
    return content


def _unpacked(content: bytes, coding: str) -> bytes:
    for wbits in (31,) if "gzip" in coding else (15, -15):
        unpacker = zlib.decompressobj(wbits=wbits)
        try:
            found = unpacker.decompress(content, MAX_RECORD)
        except zlib.error:
            continue
        if not unpacker.eof:
            raise Damaged("the packed content ends early")
        return found
    if coding == "deflate" or not content.startswith(_MAGIC):
        return content  # archives often hold it unpacked under the old header
    raise Damaged("the packed content is damaged")
