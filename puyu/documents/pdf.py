"""PDF -> plain text, page after page, with PDFium (Apache-2.0).

    pdf_text(Path("paper.pdf").read_bytes())

Text comes in the order in which the file has it. A word that was cut at the end of a line is joined, a line that was
cut within a paragraph stays cut. Pictures are not read, so a scan gives no text; what needs a password or cannot be
opened raises Unreadable with the reason. PDFium is C++ that reads what strangers wrote: it runs in a child process that
may be killed, and Failed says when it hung, crashed or ate its memory (`killable`).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from puyu.documents.books import Book, Unreadable
from puyu.documents.killable import Killable, Limits
from puyu.errors import DependencyError, PuyuError

# PDFium marks a hyphen at the end of a line by U+FFFE (older ones by U+0002).
_CUT_WORD = re.compile("[\ufffe\x02][ \t]*\n?")


_SECONDS_PER_MIB = 1.0


def pdf_text(data: bytes, *, limits: Limits = Limits()) -> Book:  # noqa: B008 - frozen
    """All pages, an empty line between them. A large file has a second more for each MiB."""
    return _child(limits)(data, seconds=limits.seconds + _SECONDS_PER_MIB * len(data) / 2**20)


@lru_cache(maxsize=1)
def _child(limits: Limits) -> Killable[bytes, Book]:
    """One child for all files, as long as the limits stay."""
    return Killable(_pages, limits, prepare=_pdfium, passes=(PuyuError, Unreadable))


def _pages(data: bytes) -> Book:
    pdfium = _pdfium()
    try:
        document = pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        raise Unreadable(f"PDF: {error}") from error
    try:
        pages = [_page(pdfium, document, number) for number in range(len(document))]
        title = str(document.get_metadata_dict().get("Title") or "").replace("\x00", " ")
    finally:
        document.close()
    return Book("\n\n".join(filter(None, pages)), " ".join(title.split()))


def _page(pdfium: Any, document: Any, number: int) -> str:
    try:
        page = document[number]
        text = page.get_textpage().get_text_bounded()
    except pdfium.PdfiumError as error:
        raise Unreadable(f"PDF: page {number + 1}: {error}") from error
    return _CUT_WORD.sub("", text.replace("\r\n", "\n").replace("\r", "\n")).strip()


def _pdfium() -> Any:
    try:
        import pypdfium2
    except ImportError as error:
        raise DependencyError("reading PDF needs pypdfium2", remedy="pip install 'puyu-llm[data]'") from error
    return pypdfium2
