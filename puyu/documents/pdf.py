"""PDF -> plain text, page after page, with PDFium (Apache-2.0).

    pdf_text(Path("paper.pdf").read_bytes())

Text comes in the order in which the file has it. A word that was cut at the end of a line is joined, a line that was
cut within a paragraph stays cut. Pictures are not read, so a scan gives no text; what needs a password or cannot be
opened raises Unreadable with the reason.
"""

from __future__ import annotations

import re
from typing import Any

from puyu.documents.books import Book, Unreadable
from puyu.errors import DependencyError

# PDFium marks a hyphen at the end of a line by U+FFFE (older ones by U+0002).
_CUT_WORD = re.compile("[\ufffe\x02][ \t]*\n?")


def pdf_text(data: bytes) -> Book:
    """All pages, an empty line between them."""
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
