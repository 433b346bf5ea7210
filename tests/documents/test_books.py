"""PDF, Word, EPUB and Parquet: made here by hand, whole and damaged."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from puyu.documents.books import MAX_PART, Unreadable, book_text
from puyu.documents.document import Document
from puyu.documents.pdf import pdf_text
from puyu.documents.readers import SourceConfig, read
from puyu.errors import InputError
from puyu.files import BadRecord

WORD = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def archive(parts: Mapping[str, str]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, text in parts.items():
            packed.writestr(name, text)
    return stream.getvalue()


def word(body: str, **more: str) -> bytes:
    styles = f'<w:styles {WORD}><w:style w:styleId="1"><w:name w:val="heading 2"/></w:style></w:styles>'
    document = f"<w:document {WORD}><w:body>{body}</w:body></w:document>"
    return archive({"word/document.xml": document, "word/styles.xml": styles, **more})


def paragraph(text: str, properties: str = "") -> str:
    return f"<w:p><w:pPr>{properties}</w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>"


def epub(*, spine: str = '<itemref idref="b"/><itemref idref="a"/>', **more: str) -> bytes:
    container = (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="OEBPS/book.opf"/></rootfiles></container>'
    )
    package = f"""<package xmlns="http://www.idpf.org/2007/opf">
      <metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>Two Rivers</dc:title></metadata><manifest>
      <item id="a" href="text/two%20b.xhtml" media-type="application/xhtml+xml"/>
      <item id="b" href="text/one.xhtml" media-type="application/xhtml+xml"/>
      <item id="n" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>
      </manifest><spine>{spine}</spine></package>"""
    chapters = {
        "OEBPS/text/one.xhtml": "<html><body><h1>One</h1><p>The first chapter.</p></body></html>",
        "OEBPS/text/two b.xhtml": "<html><body><p>第二章。</p></body></html>",
        "OEBPS/nav.xhtml": "<html><body>Contents</body></html>",
    }
    return archive({"META-INF/container.xml": container, "OEBPS/book.opf": package, **chapters, **more})


def pdf(*pages: str) -> bytes:
    """A page for each text, in a font that every reader has."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    places = []
    for text in pages:
        shown = " ".join(f"({line}) Tj 0 -14 Td" for line in text.split("\n"))
        content = f"BT /F1 12 Tf 72 700 Td {shown} ET".encode()
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content))
        font = b"/Resources << /Font << /F1 3 0 R >> >>"
        box = b"/MediaBox [0 0 612 792]"
        objects.append(b"<< /Type /Page /Parent 2 0 R %s %s /Contents %d 0 R >>" % (box, font, len(objects)))
        places.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(places), len(places))
    data, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    rows = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    table = b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, rows)
    end = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(data))
    return data + table + end


def read_all(path: Path, **values: Any) -> tuple[list[Document], list[BadRecord]]:
    bad: list[BadRecord] = []
    return list(read(SourceConfig(name="s", path=str(path), **values), bad.append)), bad


def test_word_headings_lists_tables_and_deleted_text() -> None:
    cells = "".join(f"<w:tc>{paragraph(cell)}</w:tc>" for cell in ("name", "age"))
    body = paragraph("Rivers", '<w:pStyle w:val="1"/>') + paragraph("water", "<w:numPr/>")
    body += f"<w:tbl><w:tr>{cells}</w:tr></w:tbl>"
    body += "<w:p><w:r><w:t>kept</w:t><w:br/><w:tab/></w:r><w:del><w:r><w:t>gone</w:t></w:r></w:del>"
    body += "<w:ins><w:r><w:t>山水</w:t></w:r></w:ins></w:p><w:p/>"
    body += f"<w:sdt><w:sdtContent>{paragraph('filled in')}</w:sdtContent></w:sdt>"
    core = '<c xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title> A title </dc:title></c>'
    book = book_text(word(body, **{"docProps/core.xml": core}), ".docx")
    assert book.text == "## Rivers\n\n- water\n\nname | age\n\nkept\n\t山水\n\nfilled in"
    assert book.title == "A title"


def test_no_text_of_a_word_document_stands_twice() -> None:
    mc = 'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
    box = f"<w:txbxContent>{paragraph('in a box')}</w:txbxContent>"
    both = (
        f"<mc:AlternateContent {mc}><mc:Choice>{box}</mc:Choice><mc:Fallback>{box}</mc:Fallback></mc:AlternateContent>"
    )
    moved = "<w:moveFrom><w:r><w:t>here</w:t></w:r></w:moveFrom><w:moveTo><w:r><w:t>there</w:t></w:r></w:moveTo>"
    body = f"<w:p><w:r>{both}</w:r></w:p><w:p>{moved}</w:p>"
    inner = f"<w:tbl><w:tr><w:tc>{paragraph('deep')}</w:tc><w:tc>{paragraph('down')}</w:tc></w:tr></w:tbl>"
    cells = f"<w:tc>{paragraph('left')}{inner}</w:tc><w:tc><w:p><w:r>{both}</w:r></w:p></w:tc>"
    row = f"<w:sdt><w:sdtPr/><w:sdtContent><w:tr><w:tc>{paragraph('own')}</w:tc></w:tr></w:sdtContent></w:sdt>"
    cell = f"<w:tr><w:sdt><w:sdtContent><w:tc>{paragraph('cell')}</w:tc></w:sdtContent></w:sdt></w:tr>"
    body += f"<w:tbl><w:tr>{cells}</w:tr>{row}{cell}</w:tbl>"
    text = book_text(word(body), ".docx").text
    assert text == "in a box\n\nthere\n\nleft deep down | in a box\nown\ncell"


def test_a_book_is_read_in_the_order_of_its_spine() -> None:
    book = book_text(epub(), ".epub")
    assert book.title == "Two Rivers" and book.text.split("\n\n") == ["One", "The first chapter.", "第二章。"]


@pytest.mark.parametrize(
    ("data", "suffix", "reason"),
    [
        (b"no zip", ".docx", "archive"),
        (word("")[:-30], ".docx", "archive"),
        (archive({"a": ""}), ".docx", "document.xml is missing"),
        (archive({"word/document.xml": "<w"}), ".docx", "XML"),
        (archive({"word/document.xml": "<a/>"}), ".docx", "no body"),
        (epub(spine='<itemref idref="z"/>'), ".epub", "no part 'z'"),
        (epub(**{"META-INF/rights.xml": "<a/>"}), ".epub", "encrypted"),
        (word("", **{"word/styles.xml": " " * (MAX_PART + 1)}), ".docx", "more than"),
    ],
)
def test_what_cannot_be_read_says_why(data: bytes, suffix: str, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        book_text(data, suffix)


def test_pdf_pages_in_order() -> None:
    assert pdf_text(pdf("The first page.\nIts second line.", "The last page.")).text == (
        "The first page.\nIts second line.\n\nThe last page."
    )
    for damaged in (b"", b"%PDF-1.4 nothing", pdf("one")[:60]):
        with pytest.raises(Unreadable, match="PDF"):
            pdf_text(damaged)


def test_a_folder_of_all_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("A paper."))
    (tmp_path / "b.docx").write_bytes(word(paragraph("A letter.")))
    (tmp_path / "c.epub").write_bytes(epub())
    (tmp_path / "d.md").write_text("# Notes")
    (tmp_path / "e.html").write_text("<html><body><h1>Page</h1><p>A page of a few words.</p></body></html>")
    (tmp_path / "f.pdf").write_bytes(b"%PDF-1.4 torn")
    (tmp_path / "g.png").write_bytes(b"\x89PNG")
    documents, bad = read_all(tmp_path, kind="files")
    firsts = [document.text.split("\n")[0] for document in documents]
    assert firsts == ["A paper.", "A letter.", "One", "# Notes", "Page"]
    assert documents[2].metadata["title"] == "Two Rivers"
    assert [Path(record.path).name for record in bad] == ["f.pdf"] and "PDF" in bad[0].reason


def table(path: Path, rows: list[dict[str, Any]], *, group: int = 100) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)


def test_parquet_rows_and_rows_without_text(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"body": f"row {n}", "url": f"u{n}", "other": n} for n in range(1000)]
    rows[7]["body"] = None
    table(tmp_path / "a.parquet", rows)
    documents, bad = read_all(tmp_path, kind="parquet", text_field="body")
    assert len(documents) == 999 and documents[9].text == "row 10" and documents[9].metadata == {"url": "u10"}
    assert [(record.line, record.reason) for record in bad] == [(8, "record: no text in field 'body'")]
    with pytest.raises(InputError, match="text_field"):
        read_all(tmp_path, kind="parquet")


def test_a_string_that_is_no_utf8_costs_its_row(tmp_path: Path) -> None:
    columns = {
        "text": [f"row {n}".encode() if n != 300 else b"\xff\xfe" for n in range(600)],
        "url": [b"u" if n != 5 else b"\xc3" for n in range(600)],
    }
    made = {name: pa.array(values, pa.binary()).cast(pa.binary()).view(pa.string()) for name, values in columns.items()}
    parquet.write_table(pa.table(made), tmp_path / "a.parquet")
    documents, bad = read_all(tmp_path, kind="parquet")
    assert [record.line for record in bad] == [6, 301]
    assert all(record.reason.startswith("encoding: ") for record in bad)
    assert [document.text for document in documents] == [f"row {n}" for n in range(600) if n not in (5, 300)]


def test_a_damaged_row_group_costs_its_rows(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", [{"text": f"row {n} " + "x" * (n % 50)} for n in range(1000)])
    place = tmp_path / "a.parquet"
    start = parquet.ParquetFile(place).metadata.row_group(3).column(0).dictionary_page_offset
    data = bytearray(place.read_bytes())
    data[start : start + 20] = b"\xff" * 20
    place.write_bytes(data)
    documents, bad = read_all(place, kind="parquet")
    assert len(documents) == 900 and [record.line for record in bad] == [301] and "rows 301 to 400" in bad[0].reason
    place.write_bytes(data[:-10])
    documents, bad = read_all(place, kind="parquet")
    assert not documents and bad[0].reason.startswith("archive")


@given(st.binary(max_size=200), st.integers(0, 2000))
def test_any_damage_is_named(junk: bytes, at: int) -> None:
    """Text or a reason, whatever the bytes are."""
    for data, suffix in ((word(paragraph("a letter")), ".docx"), (epub(), ".epub")):
        place = at % len(data)
        with contextlib.suppress(Unreadable):
            book_text(data[:place] + junk + data[place + len(junk) :], suffix)
