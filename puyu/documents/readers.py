"""Files -> Documents, by the kind of their source. What cannot be read goes to quarantine.

    >>> source = SourceConfig(name="notes", path="notes/*.txt", kind="text")
    >>> documents = list(read(source, quarantine=print))                      # doctest: +SKIP

Paths are files, folders, globs or `.zip` archives of files; `.gz` and `.zst` are opened on the way. Files are read in
the order of their names. A torn line, a bad byte or a truncated archive costs one record, which is reported with file,
line and byte offset; reading goes on. A path that does not exist is an InputError before anything is read.
It filters nothing: what is unwanted is for the rules to say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import msgspec

from puyu.documents.books import Unreadable, book_text
from puyu.documents.document import Document, is_writable, make_document, normalize
from puyu.documents.extract import decode_html, page
from puyu.documents.interleaved import CONTENT, UNLINKED, deal_images, keep_links, problem, record_metadata, unlinked
from puyu.documents.killable import Failed
from puyu.documents.pdf import pdf_text
from puyu.documents.programming import BY_SUFFIX
from puyu.documents.raw import Raw, blocks, bytes_of, open_packed
from puyu.documents.repositories import Tree, repository_documents
from puyu.documents.sources import BOOKS, CODE, Member, ReadReport, SourceConfig, input_files
from puyu.documents.split import split
from puyu.documents.tables import METADATA, table_rows
from puyu.documents.warc import Answer, Damaged, Record, http_answer
from puyu.files import BadRecord, Quarantine

__all__ = ["ReadReport", "SourceConfig", "input_files", "parse", "read"]

_HTML = ("text/html", "application/xhtml+xml")


def read(source: SourceConfig, quarantine: Quarantine, *, report: ReadReport | None = None) -> Iterator[Document]:
    """Documents of one source in the order of file names. Raises InputError for a path that does not exist."""
    seen = report if report is not None else ReadReport()
    found = _read_all(source, quarantine, seen)
    yield from found if source.max_documents is None else islice(found, source.max_documents)


def _read_all(source: SourceConfig, quarantine: Quarantine, report: ReadReport) -> Iterator[Document]:
    for block in blocks(source, report):
        for bad in block.bad:
            quarantine(bad)
        for raw in block.raws:
            yield from parse(source, raw, quarantine=quarantine, report=report)


def parse(source: SourceConfig, raw: Raw, *, quarantine: Quarantine, report: ReadReport) -> Iterator[Document]:
    """The documents of one raw record."""
    member = raw.member
    if isinstance(raw.payload, Record):
        yield from _parse_record(source, raw, raw.payload, quarantine, report)
    elif source.kind == "repository":
        # Files are not cut here: a window of the whole repository is (`puyu.data.code`).
        tree, place = Tree(member.origin, member.path), {"source": source.name, "domain": source.domain}
        yield from repository_documents(tree, **place, skipped=report.records_not_selected, quarantine=quarantine)
    elif source.kind == "parquet":
        yield from _parse_rows(source, raw, quarantine)
    elif source.kind in ("jsonl", "wanjuan") or member.suffix in (".jsonl", ".ndjson"):
        assert raw.payload is not None
        yield from _parse_line(source, raw, raw.payload, quarantine, report)
    elif raw.payload is not None:
        text = _decode_lines(raw.payload, raw, quarantine)
        whole = raw.ends and not raw.offset
        metadata = {"path": member.origin} if whole else {"path": member.origin, "line": raw.number}
        yield from _documents(source, normalize(text), metadata)
    elif (data := bytes_of(member, quarantine)) is not None:
        yield from _parse_file(source, data, member, quarantine)


# ---- one record


def _parse_file(source: SourceConfig, data: bytes, member: Member, quarantine: Quarantine) -> Iterator[Document]:
    if source.kind == "code":
        yield from _read_code(source, data, member, quarantine)
    elif member.suffix in BOOKS:
        yield from _read_book(source, data, member, quarantine)
    else:
        yield from _read_page(source, data, member.label, {"path": member.origin}, quarantine)


def _decode_lines(data: bytes, raw: Raw, quarantine: Quarantine) -> str:
    """UTF-8 text; when it does not decode as a whole, the lines that do not are quarantined one by one."""
    try:
        return data.decode("utf-8" if raw.offset else "utf-8-sig")
    except UnicodeDecodeError:
        good: list[str] = []
    label, offset = raw.member.label, raw.offset
    for number, line in enumerate(data.split(b"\n"), raw.number):
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
    language = BY_SUFFIX[member.suffix].name if member.suffix in CODE else ""
    metadata = {"path": member.origin, "programming_language": language}
    yield from _documents(source, normalize(text, code=True), metadata)


def _read_book(source: SourceConfig, data: bytes, member: Member, quarantine: Quarantine) -> Iterator[Document]:
    try:
        pdf = member.suffix == ".pdf"
        book = pdf_text(data, limits=source.limits()) if pdf else book_text(data, member.suffix)
    except (Unreadable, Failed) as error:
        reason = str(error) if isinstance(error, Failed) else f"record: {error}"
        quarantine(BadRecord(member.label, 0, 0, reason, ""))
        return
    metadata = {"path": member.origin, "title": book.title} if book.title else {"path": member.origin}
    yield from _documents(source, normalize(book.text), metadata)


def _parse_rows(source: SourceConfig, raw: Raw, quarantine: Quarantine) -> Iterator[Document]:
    label, field = raw.member.label, source.text_field
    with open_packed(raw.member) as stream:
        rows = table_rows(stream, label, group=raw.offset, first=raw.number, text_field=field, quarantine=quarantine)
        for number, row in rows:
            if problem := text_problem(row, source.text_field, METADATA):
                quarantine(BadRecord(label, number, 0, problem, ""))
            else:
                yield from _record(source, row, label, quarantine)


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
    url, limits = str(metadata.get("url", "")), source.limits()
    try:
        found = page(data, charset=charset, extract=source.extract, images=source.images, url=url, limits=limits)
    except UnicodeDecodeError as error:
        assert isinstance(data, bytes)
        quarantine(_bad_bytes(label, data, error))
        return
    except Failed as failure:
        quarantine(BadRecord(label, 0, 0, str(failure), url[:80]))
        return
    named = {**metadata, "title": found.title} if found.title else metadata
    if source.images:
        named = {**named, "images": [dict(image) for image in found.images]}
    yield from _documents(source, normalize(found.full_text()), named)


def _parse_record(
    source: SourceConfig, raw: Raw, found: Record, quarantine: Quarantine, report: ReadReport
) -> Iterator[Document]:
    """A page or plain text of a web archive; a record that is none is counted by what it is."""
    label = raw.member.label
    try:
        answer = _content(found)
    except Damaged as error:
        quarantine(BadRecord(label, 0, found.offset, f"record: {error}", found.url[:80]))
        return
    if isinstance(answer, str):
        report.records_not_selected[answer] += 1
        return
    place: Quarantine = partial(_quarantine_at, quarantine, 0, found.offset)
    metadata = {"path": raw.member.origin, "url": found.url, "date": found.date}
    yield from _read_answer(source, answer, label, metadata, place)


def _quarantine_at(quarantine: Quarantine, line: int, offset: int, bad: BadRecord) -> None:
    """What is wrong inside a record is said of where the record begins."""
    quarantine(replace(bad, line=line, offset=offset))


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


def _parse_line(
    source: SourceConfig, raw: Raw, line: bytes, quarantine: Quarantine, report: ReadReport
) -> Iterator[Document]:
    wanjuan = source.kind == "wanjuan"
    value: Any = None
    try:
        value = json_of(line)
        wrong = _wanjuan_problem(value) if wanjuan else text_problem(value, source.text_field, METADATA)
    except (ValueError, RecursionError) as error:  # a number of too many digits is a plain ValueError
        wrong = f"{'encoding' if isinstance(error, UnicodeDecodeError) else 'json'}: {error}"
    place: Quarantine = partial(_quarantine_at, quarantine, raw.number, raw.offset)
    if wrong:
        place(BadRecord(raw.member.label, 0, 0, wrong, line[:80].decode("utf-8", "replace")))
    elif wanjuan:
        yield from _read_wanjuan(source, value, report)
    else:
        yield from _record(source, value, raw.member.label, place)


def json_of(line: bytes) -> Any:
    """What `json` makes of it, which reads a little more than msgspec (NaN, half a surrogate pair) and takes longer."""
    try:
        return msgspec.json.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return json.loads(line.decode("utf-8"))


def _wanjuan_problem(value: Any) -> str:
    """What is wrong with a record; its text is normalized, so that its links are looked for as they are kept."""
    if wrong := text_problem(value, CONTENT):
        return wrong
    value[CONTENT] = normalize(value[CONTENT])
    return problem(value)


def _read_wanjuan(source: SourceConfig, value: dict[str, Any], report: ReadReport) -> Iterator[Document]:
    metadata = record_metadata(value)
    if lost := len(unlinked(value[CONTENT], metadata.get("images", ()))):
        report.records_not_selected[UNLINKED] += lost
    yield from _documents(source, value[CONTENT], metadata)


def text_problem(value: Any, text_field: str, others: Sequence[str] = ()) -> str:
    """Why a row has no text in a field, or none that can be written there or in the others; empty where it has."""
    if not isinstance(value, dict):
        return "record: not an object"
    text = value.get(text_field)
    if not isinstance(text, str):
        return f"record: no text in field {text_field!r}"
    if not is_writable(text):
        return "encoding: a lone surrogate in the text"
    wrong = (name for name in others if isinstance(value.get(name), str) and not is_writable(value[name]))
    return next((f"encoding: a lone surrogate in field {name!r}" for name in wrong), "")


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
    if "images" in metadata:
        pieces = keep_links(text, pieces)
    for part, (piece, own) in enumerate(zip(pieces, deal_images(pieces, metadata), strict=True)):
        numbered = {**own, "part": part} if len(pieces) > 1 else own
        clean = piece.strip("\n") if source.kind == "code" else piece.strip()
        yield make_document(clean, source=source.name, domain=source.domain, language=language, metadata=numbered)
