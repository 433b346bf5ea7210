"""Which files a source has: paths, folders, globs and the inside of `.zip` archives, by the kind of what they hold.

    >>> source = SourceConfig(name="notes", path="notes/*.txt")
    >>> [member.label for member in members(source, ReadReport(), quarantine=print)]      # doctest: +SKIP
    ['notes/a.txt', 'notes/b.txt.gz']

Files come in the order of their names. It opens nothing but archives, and decides nothing about content.
"""

from __future__ import annotations

import glob
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from puyu.configure import Config
from puyu.documents.extract import Extract
from puyu.documents.killable import Limits
from puyu.documents.repositories import files_on_disk, trees
from puyu.errors import InputError
from puyu.files import BadRecord, Quarantine, archive_errors

Kind = Literal["html", "text", "jsonl", "code", "warc", "parquet", "files", "wanjuan", "repository"]

CODE = frozenset({
    ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cs", ".go", ".java", ".js", ".ts", ".kt", ".lua", ".php", ".py", ".pyi",
    ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".toml", ".yaml", ".yml",
})  # fmt: skip
"""What `kind: code` takes from a folder; `puyu.documents.programming` names their languages."""
TEXT = frozenset({".txt", ".md", ".rst", ".text", ".tex"})
PAGES = frozenset({".html", ".htm", ".xhtml"})
BOOKS = frozenset({".pdf", ".docx", ".epub"})
_SUFFIXES: dict[Kind, frozenset[str]] = {
    "html": PAGES | {".jsonl"},
    "text": TEXT,
    "jsonl": frozenset({".jsonl", ".ndjson"}),
    "code": CODE,
    "warc": frozenset({".warc", ".wet", ".arc"}),
    "parquet": frozenset({".parquet"}),
    "files": TEXT | PAGES | BOOKS,
    "wanjuan": frozenset({".jsonl", ".ndjson"}),
    "repository": frozenset(),
}
_PACKED = (".gz", ".zst")


class SourceConfig(Config):
    """One source of documents."""

    name: str
    """Name of the source in the ledger and in every document."""
    path: str | list[str]
    """File, folder, glob or .zip (or a list of them)."""
    kind: Kind = "text"
    """html, text, jsonl, parquet, code, warc (WARC, WET and ARC files), or files: whatever holds text, by its suffix
    (txt, md, rst, tex, html, pdf, docx, epub); wanjuan: WanJuan's records of text, pictures in text, and video;
    repository: whole repositories of source code (folders, archives)."""
    domain: str = "web"
    """What the text is about, for mixtures: web, book, wiki, docs, dialogue, code."""
    language: str = ""
    """Language of all documents; empty: detected one by one."""
    text_field: str = "text"
    """The field that holds the text of a JSONL record (for html: the page), or the column of a Parquet file."""
    rules: bool = True
    """Whether the heuristic rules drop documents; false for curated text, which is only measured."""
    max_documents: int | None = None
    """Read no more than this many documents."""
    max_characters: int = 20_000
    """Longer texts are cut into documents of at most this size, at chapters and paragraphs."""
    extract: Extract = "fast"
    """How the main text of pages is found: fast, or precise (with trafilatura, about ten times as long)."""
    images: bool = False
    """Whether pages keep their pictures, as markdown links in their place and `images` in the metadata."""
    page_seconds: float = 10.0
    """Time for one page (precise) or PDF, which is quarantined (timeout) when it takes longer."""
    page_memory_mib: int = 2048
    """Memory for one page (precise) or PDF, which is quarantined (memory, crashed) when it takes more."""

    def limits(self) -> Limits:
        """What one page or PDF may use."""
        return Limits(self.page_seconds, self.page_memory_mib)


@dataclass
class ReadReport:
    """What reading saw, for the ledger."""

    files: int = 0
    not_selected: list[str] = field(default_factory=list)
    """Files of another kind."""
    records_not_selected: Counter[str] = field(default_factory=Counter)
    """Records of archives that are no documents, by what they are: `request`, `image/png`, `status 404`; files of
    repositories that are not selected: `vendored`, `binary`, `generated`."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a source: where it lies, and its name relative to the source's root."""

    path: Path
    origin: str
    inside: str = ""
    stored: int = 0
    """Bytes of a member of an archive, unpacked."""

    @property
    def label(self) -> str:
        return f"{self.path.as_posix()}!{self.inside}" if self.inside else self.path.as_posix()

    @property
    def suffix(self) -> str:
        return _plain_suffix(self.inside or self.path.name)

    @property
    def size(self) -> int:
        """Bytes on the disk; of a member of an archive its own, unpacked."""
        return self.stored if self.inside else self.path.stat().st_size


def input_files(source: SourceConfig) -> list[Path]:
    """The files on disk that the source reads, for hashing."""
    return sorted({member.path for member in members(source, ReadReport(), lambda bad: None)})


# ---- which files


def members(source: SourceConfig, report: ReadReport, quarantine: Quarantine) -> Iterator[Member]:
    if source.kind == "repository":
        units = trees(source.path, source.name)
        yield from (Member(path, path.as_posix()) for unit in units for path in files_on_disk(unit))
        return
    for pattern in [source.path] if isinstance(source.path, str) else source.path:
        for path, origin, explicit in _expand(pattern, source.name):
            if path.suffix == ".zip":
                yield from _zip_members(source, path, report, quarantine)
            elif explicit or _plain_suffix(path.name) in _SUFFIXES[source.kind]:
                yield Member(path, origin)
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


def _zip_members(source: SourceConfig, path: Path, report: ReadReport, quarantine: Quarantine) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}
    except archive_errors() as error:
        quarantine(BadRecord(path.as_posix(), 0, 0, f"archive: {error}", ""))
        return
    for inside, size in sorted(sizes.items()):
        if _plain_suffix(inside) in _SUFFIXES[source.kind]:
            yield Member(path, inside, inside, size)
        else:
            report.not_selected.append(f"{path.as_posix()}!{inside}")
