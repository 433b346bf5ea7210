"""Word documents (.docx) and electronic books (.epub) -> plain text; headings stay as markdown, tables as rows.

    book_text(Path("novel.epub").read_bytes(), ".epub")

Both are ZIP archives of XML (ECMA-376; EPUB 3). Text that was deleted or moved away, footers and pictures are left out;
what is encrypted or torn raises Unreadable with the reason. Sizes are bounded, so that a small archive cannot unpack
for ever.
"""

from __future__ import annotations

import io
import posixpath
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import unquote
from xml.etree import ElementTree

from puyu.documents.extract import whole_page
from puyu.files import archive_errors

MAX_PART = 64_000_000
"""Bytes of one file inside an archive."""
_COMPATIBILITY = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"
_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_CONTAINER = "{urn:oasis:names:tc:opendocument:xmlns:container}"
_PACKAGE = "{http://www.idpf.org/2007/opf}"
_CORE = "{http://purl.org/dc/elements/1.1/}"
_LEFT_OUT = frozenset(
    {
        *(f"{_WORD}{name}" for name in ("del", "moveFrom", "pPr", "rPr")),
        f"{_COMPATIBILITY}Fallback",  # what stands before it once more, for older programs
    }
)
_WRAPPERS = frozenset(f"{_WORD}{name}" for name in ("sdt", "sdtContent", "customXml"))
"""Fields that are filled in, and marks of other programs; their content is ordinary."""
_HEADING = re.compile(r"(?:heading|标题)\s*(\d)", re.IGNORECASE)


class Unreadable(Exception):
    """Why a file gives no text."""


@dataclass(frozen=True, slots=True)
class Book:
    """The text, and what the file says of itself; empty where it says nothing."""

    text: str
    title: str = ""


def book_text(data: bytes, suffix: str) -> Book:
    """Read a .docx or .epub."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return _word(archive) if suffix == ".docx" else _epub(archive)
    except ElementTree.ParseError as error:
        raise Unreadable(f"XML: {error}") from error
    except _torn() as error:
        raise Unreadable(f"archive: {error}") from error


def _torn() -> tuple[type[Exception], ...]:
    """What damaged archives and their XML raise; LookupError is an encoding that is not known."""
    return (*archive_errors(), OSError, struct.error, ValueError, LookupError)


def _part(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError as error:
        raise Unreadable(f"archive: {name} is missing") from error
    if info.file_size > MAX_PART:
        raise Unreadable(f"archive: {name} has {info.file_size} bytes, more than {MAX_PART}")
    return archive.read(info)


# ---- Word


def _word(archive: zipfile.ZipFile) -> Book:
    body = ElementTree.fromstring(_part(archive, "word/document.xml")).find(f"{_WORD}body")
    if body is None:
        raise Unreadable("the document has no body")
    levels = _heading_levels(archive)
    text = "\n\n".join(filter(None, (_block(element, levels) for element in body)))
    title = ""
    if "docProps/core.xml" in archive.namelist():
        title = ElementTree.fromstring(_part(archive, "docProps/core.xml")).findtext(f"{_CORE}title") or ""
    return Book(text, title.strip())


def _heading_levels(archive: zipfile.ZipFile) -> Mapping[str, int]:
    """Styles that are headings. Their ids may be anything ("1", "Titre1"); their names are Word's own."""
    if "word/styles.xml" not in archive.namelist():
        return {}
    levels = {}
    for style in ElementTree.fromstring(_part(archive, "word/styles.xml")).iter(f"{_WORD}style"):
        name = style.find(f"{_WORD}name")
        match = _HEADING.fullmatch(name.get(f"{_WORD}val", "").strip()) if name is not None else None
        if match:
            levels[style.get(f"{_WORD}styleId", "")] = int(match[1])
    return levels


def _block(element: ElementTree.Element, levels: Mapping[str, int]) -> str:
    if element.tag == f"{_WORD}p":
        return _paragraph(element, levels)
    if element.tag == f"{_WORD}tbl":
        return "\n".join(filter(None, map(_row, _inside(element, f"{_WORD}tr"))))
    if element.tag in _WRAPPERS:
        return "\n\n".join(filter(None, (_block(child, levels) for child in element)))
    return ""


def _inside(element: ElementTree.Element, tag: str) -> Iterator[ElementTree.Element]:
    """The children of a kind; not those of a table in a cell."""
    for child in element:
        if child.tag == tag:
            yield child
        elif child.tag in _WRAPPERS:
            yield from _inside(child, tag)


def _row(row: ElementTree.Element) -> str:
    cells = (" ".join(filter(None, _paragraphs(cell))) for cell in _inside(row, f"{_WORD}tc"))
    return " | ".join(cells).strip(" |")


def _paragraphs(cell: ElementTree.Element) -> Iterator[str]:
    """The paragraphs of a cell and of the tables in it, each once."""
    for child in cell:
        if child.tag == f"{_WORD}p":
            yield _text(child)
        elif child.tag not in _LEFT_OUT:
            yield from _paragraphs(child)


def _paragraph(element: ElementTree.Element, levels: Mapping[str, int]) -> str:
    text = _text(element)
    style = element.find(f"{_WORD}pPr/{_WORD}pStyle")
    level = levels.get(style.get(f"{_WORD}val", ""), 0) if style is not None else 0
    if text and level:
        return f"{'#' * level} {text}"
    is_item = element.find(f"{_WORD}pPr/{_WORD}numPr") is not None
    return f"- {text}" if text and is_item else text


def _text(element: ElementTree.Element) -> str:
    return "".join(_runs(element)).strip()


def _runs(element: ElementTree.Element) -> Iterator[str]:
    for child in element:
        if child.tag == f"{_WORD}t":
            yield child.text or ""
        elif child.tag == f"{_WORD}tab":
            yield "\t"
        elif child.tag in (f"{_WORD}br", f"{_WORD}cr"):
            yield "\n"
        elif child.tag not in _LEFT_OUT:
            yield from _runs(child)


# ---- EPUB


def _epub(archive: zipfile.ZipFile) -> Book:
    if "META-INF/rights.xml" in archive.namelist():
        raise Unreadable("the book is encrypted")
    root = ElementTree.fromstring(_part(archive, "META-INF/container.xml")).find(f".//{_CONTAINER}rootfile")
    place = root.get("full-path", "") if root is not None else ""
    package = ElementTree.fromstring(_part(archive, place))
    files = {item.get("id"): item for item in package.iter(f"{_PACKAGE}item")}
    chapters = []
    for reference in package.iter(f"{_PACKAGE}itemref"):
        item = files.get(reference.get("idref"))
        if item is None:
            raise Unreadable(f"the book has no part {reference.get('idref')!r}")
        if "html" in item.get("media-type", "") and "nav" not in item.get("properties", "").split():
            name = posixpath.normpath(posixpath.join(posixpath.dirname(place), unquote(item.get("href", ""))))
            chapters.append(whole_page(_part(archive, name)))
    title = package.findtext(f"{_PACKAGE}metadata/{_CORE}title") or ""
    return Book("\n\n".join(filter(None, chapters)), title.strip())
