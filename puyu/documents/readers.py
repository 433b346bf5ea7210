"""Files -> Documents, by the kind of their source. What cannot be read goes to quarantine.

    >>> source = SourceConfig(name="notes", path="notes/*.txt", kind="text")
    >>> documents = list(read(source, quarantine=print))                      # doctest: +SKIP

Paths are files, folders, globs or `.zip` archives of files; `.gz` and `.zst` are opened on the way. Files are read in
the order of their names. A torn line, a bad byte or a truncated archive costs one record, which is reported with file,
line and byte offset; reading goes on. A path that does not exist is an InputError before anything is read.
It filters nothing: what is unwanted is for the rules to say.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import IO, Any

from puyu.documents.books import Unreadable, book_text
from puyu.documents.document import Document, make_document, normalize
from puyu.documents.extract import decode_html, page
from puyu.documents.pdf import pdf_text
from puyu.documents.repositories import repository_documents, trees
from puyu.documents.sources import (
    BOOKS,
    PAGES,
    PROGRAMMING,
    Member,
    ReadReport,
    SourceConfig,
    input_files,
    members,
)
from puyu.documents.split import split
from puyu.documents.tables import METADATA, table_rows
from puyu.documents.warc import Answer, Damaged, Record, http_answer, records
from puyu.files import BadRecord, Quarantine, open_bytes, torn_errors

__all__ = ["ReadReport", "SourceConfig", "input_files", "read"]

_HTML = ("text/html", "application/xhtml+xml")


def read(source: SourceConfig, quarantine: Quarantine, *, report: ReadReport | None = None) -> Iterator[Document]:
    """Documents of one source in the order of file names. Raises InputError for a path that does not exist."""
    seen = report if report is not None else ReadReport()
    found = _all_repositories if source.kind == "repository" else _all_members
    for count, document in enumerate(found(source, quarantine, seen)):
        if source.max_documents is not None and count >= source.max_documents:
            return
        yield document


def _all_members(source: SourceConfig, quarantine: Quarantine, report: ReadReport) -> Iterator[Document]:
    for member in list(members(source, report, quarantine)):
        report.files += 1
        yield from _read_member(source, member, quarantine, report)


def _all_repositories(source: SourceConfig, quarantine: Quarantine, report: ReadReport) -> Iterator[Document]:
    """Files are not cut here: a window of the whole repository is (`puyu.data.code`)."""
    place = {"source": source.name, "domain": source.domain}
    for tree in trees(source.path, source.name):
        found = repository_documents(tree, **place, skipped=report.records_not_selected, quarantine=quarantine)
        for document in found:
            report.files += 1
            yield document


# ---- one file


def _read_member(
    source: SourceConfig, member: Member, quarantine: Quarantine, report: ReadReport
) -> Iterator[Document]:
    if source.kind == "warc":
        yield from _read_archive(source, member, quarantine, report)
        return
    if source.kind == "parquet":
        yield from _read_table(source, member, quarantine)
        return
    if member.suffix in (".jsonl", ".ndjson") or source.kind == "jsonl":
        yield from _read_jsonl(source, member, quarantine)
        return
    data = _bytes_of(member, quarantine)
    if data is None:
        return
    if source.kind == "html" or (source.kind == "files" and member.suffix in PAGES):
        yield from _read_page(source, data, member.label, {"path": member.origin}, quarantine)
    elif source.kind == "code":
        yield from _read_code(source, data, member, quarantine)
    elif source.kind == "files" and member.suffix in BOOKS:
        yield from _read_book(source, data, member, quarantine)
    else:
        text = _decode_lines(data, member.label, quarantine)
        yield from _documents(source, normalize(text), {"path": member.origin})


@contextlib.contextmanager
def _open_packed(member: Member) -> Iterator[IO[bytes]]:
    """The member's bytes as they are stored."""
    if member.inside:
        with _open_member(member) as stream:
            yield stream
    else:
        with open(member.path, "rb") as stream:
            yield stream


@contextlib.contextmanager
def _open_member(member: Member) -> Iterator[IO[bytes]]:
    if member.inside:
        with zipfile.ZipFile(member.path) as archive, archive.open(member.inside) as stream:
            yield stream
    else:
        with open_bytes(member.path) as stream:
            yield stream


def _bytes_of(member: Member, quarantine: Quarantine) -> bytes | None:
    """All bytes of a member; None (and a quarantined record) when its compression is torn."""
    try:
        with _open_member(member) as stream:
            data = stream.read()
        return data
    except _damaged() as error:
        quarantine(BadRecord(member.label, 0, 0, f"archive: {error}", ""))
        return None


def _damaged() -> tuple[type[Exception], ...]:
    """What a damaged archive raises."""
    return (zipfile.BadZipFile, *torn_errors())


def _decode_lines(data: bytes, label: str, quarantine: Quarantine) -> str:
    """UTF-8 text; when it does not decode as a whole, the lines that do not are quarantined one by one."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        good: list[str] = []
    offset = 0
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            good.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            head = line[:80].decode("utf-8", "replace")
            quarantine(BadRecord(label, number, offset + error.start, f"encoding: {error.reason}", head))
        offset += len(line) + 1
    return "\n".join(good)


def _read_code(source: SourceConfig, data: bytes, member: Member, quarantine: Quarantine) -> Iterator[Document]:
    """A file is one document; metadata keeps its path and programming language."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        quarantine(_bad_bytes(member.label, data, error))
        return
    metadata = {"path": member.origin, "programming_language": PROGRAMMING.get(member.suffix, "")}
    yield from _documents(source, normalize(text, code=True), metadata)


def _read_book(source: SourceConfig, data: bytes, member: Member, quarantine: Quarantine) -> Iterator[Document]:
    try:
        book = pdf_text(data) if member.suffix == ".pdf" else book_text(data, member.suffix)
    except Unreadable as error:
        quarantine(BadRecord(member.label, 0, 0, f"record: {error}", ""))
        return
    metadata = {"path": member.origin, "title": book.title} if book.title else {"path": member.origin}
    yield from _documents(source, normalize(book.text), metadata)


def _read_table(source: SourceConfig, member: Member, quarantine: Quarantine) -> Iterator[Document]:
    with _open_packed(member) as stream:
        for number, row in table_rows(stream, member.label, text_field=source.text_field, quarantine=quarantine):
            if problem := _problem(row, source.text_field):
                quarantine(BadRecord(member.label, number, 0, problem, ""))
            else:
                yield from _record(source, row, member.label, quarantine)


def _bad_bytes(label: str, data: bytes, error: UnicodeDecodeError) -> BadRecord:
    line = data.count(b"\n", 0, error.start) + 1
    return BadRecord(label, line, error.start, f"encoding: {error.reason}", data[:80].decode("utf-8", "replace"))


def _read_page(
    source: SourceConfig,
    data: bytes | str,
    label: str,
    metadata: dict[str, Any],
    quarantine: Quarantine,
    *,
    charset: str = "",
) -> Iterator[Document]:
    try:
        found = page(data, charset=charset)
    except UnicodeDecodeError as error:
        assert isinstance(data, bytes)
        quarantine(_bad_bytes(label, data, error))
        return
    named = {**metadata, "title": found.title} if found.title else metadata
    yield from _documents(source, normalize(found.full_text()), named)


def _read_archive(
    source: SourceConfig, member: Member, quarantine: Quarantine, report: ReadReport
) -> Iterator[Document]:
    """Pages and plain texts of a web archive; each record that is none is counted by what it is."""
    with _open_packed(member) as stream:
        for found in records(stream, member.label, quarantine=quarantine):
            try:
                answer = _content(found)
            except Damaged as error:
                quarantine(BadRecord(member.label, 0, found.offset, f"record: {error}", found.url[:80]))
                continue
            if isinstance(answer, str):
                report.records_not_selected[answer] += 1
                continue
            place: Quarantine = partial(_quarantine_at, quarantine, found.offset)
            metadata = {"path": member.origin, "url": found.url, "date": found.date}
            yield from _read_answer(source, answer, member.label, metadata, place)


def _quarantine_at(quarantine: Quarantine, offset: int, bad: BadRecord) -> None:
    """What is wrong inside a record is said of where the record begins."""
    quarantine(replace(bad, line=0, offset=offset))


def _content(found: Record) -> Answer | str:
    """The text of a record, or what it is instead."""
    if found.kind == "response":
        answer = http_answer(found.body)
        if not 200 <= answer.status < 300:
            return f"status {answer.status}"
    elif found.kind in ("conversion", "resource"):
        answer = Answer(200, found.media, "", found.body)
    else:
        return found.kind or "no type"
    return answer if answer.media in (*_HTML, "text/plain") else answer.media or "no media type"


def _read_answer(
    source: SourceConfig, answer: Answer, label: str, metadata: dict[str, Any], quarantine: Quarantine
) -> Iterator[Document]:
    if answer.media in _HTML:
        yield from _read_page(source, answer.body, label, metadata, quarantine, charset=answer.charset)
        return
    try:
        text = decode_html(answer.body, charset=answer.charset)
    except UnicodeDecodeError as error:
        quarantine(_bad_bytes(label, answer.body, error))
        return
    yield from _documents(source, normalize(text), metadata)


def _read_jsonl(source: SourceConfig, member: Member, quarantine: Quarantine) -> Iterator[Document]:
    for number, offset, line in _lines(member, quarantine):
        value: Any = None
        try:
            value = json.loads(line.decode("utf-8"))
            problem = _problem(value, source.text_field)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            problem = f"{'json' if isinstance(error, json.JSONDecodeError) else 'encoding'}: {error}"
        if problem:
            quarantine(BadRecord(member.label, number, offset, problem, line[:80].decode("utf-8", "replace")))
        else:
            yield from _record(source, value, member.label, quarantine)


def _lines(member: Member, quarantine: Quarantine) -> Iterator[tuple[int, int, bytes]]:
    """(1-based number, byte offset in the plain text, line) of the lines that are not blank."""
    number = offset = 0
    try:
        with _open_member(member) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, offset, line
                offset += len(line)
    except _damaged() as error:
        quarantine(BadRecord(member.label, number + 1, offset, f"archive: {error}", ""))


def _problem(value: Any, text_field: str) -> str:
    if not isinstance(value, dict):
        return "record: not an object"
    text = value.get(text_field)
    if not isinstance(text, str):
        return f"record: no text in field {text_field!r}"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "encoding: a lone surrogate in the text"
    return ""


def _record(source: SourceConfig, value: dict[str, Any], label: str, quarantine: Quarantine) -> Iterator[Document]:
    metadata = {key: value[key] for key in METADATA if isinstance(value.get(key), str)}
    if source.kind == "html":
        yield from _read_page(source, value[source.text_field], label, metadata, quarantine)
    else:
        yield from _documents(source, normalize(value[source.text_field]), metadata)


def _documents(source: SourceConfig, text: str, metadata: dict[str, Any]) -> Iterator[Document]:
    """One document, or numbered parts of a long text. An empty text is a document too: the rules will drop it."""
    language = source.language or ("code" if source.kind == "code" else "")
    pieces = split(text, source.max_characters) or [""]
    for part, piece in enumerate(pieces):
        numbered = {**metadata, "part": part} if len(pieces) > 1 else metadata
        clean = piece.strip("\n") if source.kind == "code" else piece.strip()
        yield make_document(clean, source=source.name, domain=source.domain, language=language, metadata=numbered)
