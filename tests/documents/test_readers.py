"""Readers: every kind of file, and every kind of damage, ends in documents or in quarantine."""

import gzip
import json
import zipfile
from pathlib import Path

import pytest
import zstandard

from puyu.documents.readers import ReadReport, SourceConfig, input_files, read
from puyu.errors import InputError


def read_all(**values):
    bad, report = [], ReadReport()
    documents = list(read(SourceConfig(name="s", **values), bad.append, report=report))
    return documents, bad, report


def lines(*rows):
    return b"".join(
        (row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()) + b"\n" for row in rows
    )


def test_jsonl_torn_lines_are_quarantined_with_line_and_offset(tmp_path):
    rows = [{"text": "one"}, b'{"text": "two', {"body": 1}, b'{"text": "\xff"}', b"", {"text": "三"}, b"[1]"]
    data = lines(*rows)
    (tmp_path / "a.jsonl").write_bytes(data)
    documents, bad, _ = read_all(path=str(tmp_path / "a.jsonl"), kind="jsonl")
    assert [d.text for d in documents] == ["one", "三"]
    assert [b.line for b in bad] == [2, 3, 4, 7]
    assert [b.reason.split(":")[0] for b in bad] == ["json", "record", "encoding", "record"]
    for record in bad:
        assert data[record.offset :].startswith((b'{"text": "two', b'{"body"', b'{"text": "\xff', b"[1]"))
        assert record.path.endswith("a.jsonl")


def test_lone_surrogate_is_quarantined(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud800"}\n{"text": "fine"}\n')
    documents, bad, _ = read_all(path=str(tmp_path / "a.jsonl"), kind="jsonl")
    assert [d.text for d in documents] == ["fine"] and len(bad) == 1 and "surrogate" in bad[0].reason


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_and_truncated_streams(tmp_path, suffix):
    pack = gzip.compress if suffix == "gz" else zstandard.ZstdCompressor().compress
    data = lines(*({"text": f"row {i} {i * 7919 % 10007}"} for i in range(5000)))
    whole, torn = tmp_path / f"whole.jsonl.{suffix}", tmp_path / f"torn.jsonl.{suffix}"
    whole.write_bytes(pack(data))
    torn.write_bytes(pack(data)[: len(pack(data)) // 2])
    documents, bad, _ = read_all(path=str(whole), kind="jsonl")
    assert len(documents) == 5000 and not bad
    documents, bad, _ = read_all(path=str(torn), kind="jsonl")
    assert len(documents) < 5000 and bad, "a truncated stream must not end in silence"


def test_two_zst_frames_are_both_read(tmp_path):
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(pack(lines({"text": "a"})) + pack(lines({"text": "b"})))
    documents, bad, _ = read_all(path=str(tmp_path / "a.jsonl.zst"), kind="jsonl")
    assert [d.text for d in documents] == ["a", "b"] and not bad


def test_text_with_bad_bytes_loses_only_their_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes("第一行\n".encode() + b"bad \xff line\n" + b"third\n")
    documents, bad, _ = read_all(path=str(tmp_path), kind="text")
    assert documents[0].text == "第一行\nthird"
    assert (bad[0].line, bad[0].offset) == (2, len("第一行\n".encode()) + 4)


def test_long_text_is_cut_into_numbered_parts(tmp_path):
    book = "\n\n".join(f"CHAPTER {i}\n\n" + f"Sentence {i} of this chapter. " * 60 for i in range(30))
    (tmp_path / "book.txt").write_text(book)
    documents, _, _ = read_all(path=str(tmp_path), kind="text", max_characters=4000)
    assert [d.metadata["part"] for d in documents] == list(range(len(documents)))
    assert all(len(d.text) <= 4000 for d in documents)
    assert all(d.text.startswith("CHAPTER") for d in documents)
    assert "".join("".join(d.text for d in documents).split()) == "".join(book.split())


def test_code_tree_keeps_path_language_and_indentation(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "a.py").write_text("def f():\n    return 1\n")
    (tmp_path / "pkg" / "b.rs").write_text("fn main() {}\n")
    (tmp_path / "pkg" / "bad.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "logo.png").write_bytes(b"\x89PNG")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.py").write_text("hidden")
    documents, bad, report = read_all(path=str(tmp_path), kind="code")
    assert [(d.metadata["path"], d.metadata["programming_language"]) for d in documents] == [
        ("pkg/a.py", "python"),
        ("pkg/b.rs", "rust"),
    ]
    assert documents[0].text == "def f():\n    return 1" and documents[0].language == "code"
    assert bad[0].path.endswith("bad.py") and bad[0].offset == 5
    assert [Path(p).name for p in report.not_selected] == ["logo.png"] and report.files == 3


def test_html_pages_in_files_records_and_archives(tmp_path):
    page = "<html><head><title>T</title></head><body><main><p>A paragraph of text.</p></main></body></html>"
    (tmp_path / "a.html").write_text(page)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("in/b.html", page.replace("paragraph", "sentence"))
        archive.writestr("in/style.css", "p {}")
    (tmp_path / "c.jsonl").write_bytes(lines({"url": "http://x/y", "html": page.replace("paragraph", "line")}))
    documents, bad, report = read_all(path=str(tmp_path), kind="html", text_field="html")
    assert [d.metadata.get("path", d.metadata.get("url")) for d in documents] == ["a.html", "in/b.html", "http://x/y"]
    assert "A line of text." in documents[2].text and not bad and len(report.not_selected) == 1


def test_broken_page_and_broken_archive_are_quarantined(tmp_path):
    (tmp_path / "a.html").write_bytes(b'<meta charset="utf-8">\n<p>ok</p>\n<p>\xff\xfe\x80</p>')
    (tmp_path / "b.zip").write_bytes(b"PK not a zip")
    documents, bad, _ = read_all(path=str(tmp_path), kind="html")
    assert not documents
    assert sorted((Path(b.path).name, b.line) for b in bad) == [("a.html", 3), ("b.zip", 0)]


def test_missing_path_is_an_error_with_a_remedy():
    with pytest.raises(InputError, match=r"source 's': no such file, folder or glob: nowhere/\*.txt(.|\n)*remedy"):
        read_all(path="nowhere/*.txt", kind="text")


def test_max_documents_and_input_files(tmp_path):
    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(name)
    source = SourceConfig(name="s", path=str(tmp_path / "*.txt"), max_documents=2)
    assert [d.text for d in read(source, print)] == ["a", "b"]
    assert [p.name for p in input_files(source)] == ["a.txt", "b.txt", "c.txt"]


def test_ids_come_from_content_and_source_not_from_position(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "x"}, {"text": "y"}))
    (tmp_path / "b.jsonl").write_bytes(lines({"text": "y"}, {"text": "x"}))
    first, _, _ = read_all(path=str(tmp_path / "a.jsonl"), kind="jsonl")
    second, _, _ = read_all(path=str(tmp_path / "b.jsonl"), kind="jsonl")
    assert {d.id for d in first} == {d.id for d in second} and len({d.id for d in first}) == 2
