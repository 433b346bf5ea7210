"""Files -> Documents, by kind: `html`, `text`, `jsonl`, `code`, `warc`. What cannot be read goes to quarantine.

    >>> source = SourceConfig(name="notes", path="notes/*.txt", kind="text")
    >>> documents = list(read(source, quarantine=print))                      # doctest: +SKIP

Paths are files, folders, globs or `.zip` archives of files; `.gz` and `.zst` are opened on the way. Files are read in
the order of their names. A torn line, a bad byte or a truncated archive costs one record, which is reported with file,
line and byte offset; reading goes on. A path that does not exist is an InputError before anything is read.
It filters nothing: what is unwanted is for the rules to say.
"""

from __future__ import annotations

import contextlib
import glob
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from puyu.configure import Config
from puyu.documents.document import Document, make_document, normalize
from puyu.documents.extract import decode_html, page
from puyu.documents.split import split
from puyu.documents.warc import Answer, Damaged, Record, http_answer, records
from puyu.errors import InputError
from puyu.files import BadRecord, open_bytes, torn_errors

Kind = Literal["html", "text", "jsonl", "code", "warc"]
Quarantine = Callable[[BadRecord], None]

PROGRAMMING = {
    ".c": "c", ".h": "c", ".cc": "cpp", ".cpp": "cpp", ".hpp": "cpp", ".cu": "cuda", ".cs": "csharp", ".go": "go",
    ".java": "java", ".js": "javascript", ".ts": "typescript", ".kt": "kotlin", ".lua": "lua", ".php": "php",
    ".py": "python", ".pyi": "python", ".r": "r", ".rb": "ruby", ".rs": "rust", ".scala": "scala", ".sh": "shell",
    ".sql": "sql", ".swift": "swift", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml",
}  # fmt: skip
_SUFFIXES: dict[Kind, frozenset[str]] = {
    "html": frozenset({".html", ".htm", ".xhtml", ".jsonl"}),
    "text": frozenset({".txt", ".md", ".rst", ".text", ".tex"}),
    "jsonl": frozenset({".jsonl", ".ndjson"}),
    "code": frozenset(PROGRAMMING),
    "warc": frozenset({".warc", ".wet", ".arc"}),
}
_PACKED = (".gz", ".zst")
_HTML = ("text/html", "application/xhtml+xml")


class SourceConfig(Config):
    """One source of documents."""

    name: str
    """Name of the source in the ledger and in every document."""
    path: str | list[str]
    """File, folder, glob or .zip (or a list of them)."""
    kind: Kind = "text"
    """html, text, jsonl, code or warc (WARC, WET and ARC files)."""
    domain: str = "web"
    """What the text is about, for mixtures: web, book, wiki, docs, dialogue, code."""
    language: str = ""
    """Language of all documents; empty: detected one by one."""
    text_field: str = "text"
    """The field that holds the text of a JSONL record (for html: the page)."""
    rules: bool = True
    """Whether the heuristic rules drop documents; false for curated text, which is only measured."""
    max_documents: int | None = None
    """Read no more than this many documents."""
    max_characters: int = 20_000
    """Longer texts are cut into documents of at most this size, at chapters and paragraphs."""


@dataclass
class ReadReport:
    """What reading saw, for the ledger."""

    files: int = 0
    not_selected: list[str] = field(default_factory=list)
    """Files of another kind."""
    records_not_selected: Counter[str] = field(default_factory=Counter)
    """Records of archives that are no documents, by what they are: `request`, `image/png`, `status 404`."""


@dataclass(frozen=True, slots=True)
class _Member:
    """One file of a source: where it lies, and its name relative to the source's root."""

    path: Path
    origin: str
    inside: str = ""

    @property
    def label(self) -> str:
        return f"{self.path.as_posix()}!{self.inside}" if self.inside else self.path.as_posix()

    @property
    def suffix(self) -> str:
        return _plain_suffix(self.inside or self.path.name)


def read(source: SourceConfig, quarantine: Quarantine, *, report: ReadReport | None = None) -> Iterator[Document]:
    """Documents of one source in the order of file names. Raises InputError for a path that does not exist."""
    seen = report if report is not None else ReadReport()
    members = list(_members(source, seen, quarantine))
    count = 0
    for member in members:
        seen.files += 1
        for document in _read_member(source, member, quarantine, seen):
            if source.max_documents is not None and count >= source.max_documents:
                return
            count += 1
            yield document


def input_files(source: SourceConfig) -> list[Path]:
    """The files on disk that the source reads, for hashing."""
    return sorted({member.path for member in _members(source, ReadReport(), lambda bad: None)})


# ---- which files


def _members(source: SourceConfig, report: ReadReport, quarantine: Quarantine) -> Iterator[_Member]:
    for pattern in [source.path] if isinstance(source.path, str) else source.path:
        for path, origin, explicit in _expand(pattern, source.name):
            if path.suffix == ".zip":
                yield from _zip_members(source, path, report, quarantine)
            elif explicit or _plain_suffix(path.name) in _SUFFIXES[source.kind]:
                yield _Member(path, origin)
            else:
                report.not_selected.append(path.as_posix())


def _expand(pattern: str, name: str) -> Iterator[tuple[Path, str, bool]]:
    """(path, name relative to the root, named by the user) for a file, a folder or a glob."""
    path = Path(pattern)
    if path.is_file():
        yield path, path.name, True
    elif path.is_dir():
        inside = (p for p in sorted(path.rglob("*")) if p.is_file() and not _is_hidden(p.relative_to(path)))
        yield from ((p, p.relative_to(path).as_posix(), False) for p in inside)
    else:
        found = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())
        if not found:
            raise InputError(f"source {name!r}: no such file, folder or glob: {pattern}", remedy="check `path`")
        root = _fixed_part(pattern)
        yield from ((p, p.relative_to(root).as_posix(), True) for p in found)


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part in ("__pycache__", "node_modules") for part in relative.parts)


def _fixed_part(pattern: str) -> Path:
    parts = Path(pattern).parts
    fixed = [part for i, part in enumerate(parts) if not any(glob.has_magic(p) for p in parts[: i + 1])]
    return Path(*fixed)


def _plain_suffix(name: str) -> str:
    path = Path(name)
    return Path(path.stem).suffix.lower() if path.suffix in _PACKED else path.suffix.lower()


def _zip_members(source: SourceConfig, path: Path, report: ReadReport, quarantine: Quarantine) -> Iterator[_Member]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(info.filename for info in archive.infolist() if not info.is_dir())
    except zipfile.BadZipFile as error:
        quarantine(BadRecord(path.as_posix(), 0, 0, f"archive: {error}", ""))
        return
    for inside in names:
        if _plain_suffix(inside) in _SUFFIXES[source.kind]:
            yield _Member(path, inside, inside)
        else:
            report.not_selected.append(f"{path.as_posix()}!{inside}")


# ---- one file


def _read_member(
    source: SourceConfig, member: _Member, quarantine: Quarantine, report: ReadReport
) -> Iterator[Document]:
    if source.kind == "warc":
        yield from _read_archive(source, member, quarantine, report)
        return
    if member.suffix in (".jsonl", ".ndjson") or source.kind == "jsonl":
        yield from _read_jsonl(source, member, quarantine)
        return
    data = _bytes_of(member, quarantine)
    if data is None:
        return
    if source.kind == "html":
        yield from _read_page(source, data, member.label, {"path": member.origin}, quarantine)
    elif source.kind == "code":
        yield from _read_code(source, data, member, quarantine)
    else:
        text = _decode_lines(data, member.label, quarantine)
        yield from _documents(source, normalize(text), {"path": member.origin})


@contextlib.contextmanager
def _open_packed(member: _Member) -> Iterator[IO[bytes]]:
    """The member's bytes as they are stored."""
    if member.inside:
        with _open_member(member) as stream:
            yield stream
    else:
        with open(member.path, "rb") as stream:
            yield stream


@contextlib.contextmanager
def _open_member(member: _Member) -> Iterator[IO[bytes]]:
    if member.inside:
        with zipfile.ZipFile(member.path) as archive, archive.open(member.inside) as stream:
            yield stream
    else:
        with open_bytes(member.path) as stream:
            yield stream


def _bytes_of(member: _Member, quarantine: Quarantine) -> bytes | None:
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


def _read_code(source: SourceConfig, data: bytes, member: _Member, quarantine: Quarantine) -> Iterator[Document]:
    """A file is one document; metadata keeps its path and programming language."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        quarantine(_bad_bytes(member.label, data, error))
        return
    metadata = {"path": member.origin, "programming_language": PROGRAMMING.get(member.suffix, "")}
    yield from _documents(source, normalize(text, code=True), metadata)


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
    source: SourceConfig, member: _Member, quarantine: Quarantine, report: ReadReport
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


def _read_jsonl(source: SourceConfig, member: _Member, quarantine: Quarantine) -> Iterator[Document]:
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


def _lines(member: _Member, quarantine: Quarantine) -> Iterator[tuple[int, int, bytes]]:
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
    metadata = {key: value[key] for key in ("url", "path", "title", "license") if isinstance(value.get(key), str)}
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
