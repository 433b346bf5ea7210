"""Readers: every kind of file, and every kind of damage, ends in documents or in quarantine."""

import gzip
import json
import zipfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from puyu.documents import raw
from puyu.documents.programming import BY_SUFFIX
from puyu.documents.readers import ReadReport, SourceConfig, input_files, json_of, read
from puyu.documents.sources import CODE
from puyu.errors import InputError
from puyu.files import BadRecord, read_jsonl


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


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "json"),
        (b'{"text": ' + b"[" * 100_000, "json"),
        (b'{"text": "x", "url": "http://a/\\ud800"}', "encoding: a lone surrogate in field 'url'"),
        (b'{"text": "x", "date": "\\udfff"}', "encoding: a lone surrogate in field 'date'"),
    ],
    ids=["digits", "depth", "url", "date"],
)
def test_a_hostile_line_costs_itself_alone(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(line + b'\n{"text": "fine", "note": "\\ud800"}\n')
    documents, bad, _ = read_all(path=str(tmp_path / "a.jsonl"), kind="jsonl")
    assert [d.text for d in documents] == ["fine"]
    assert [(b.line, b.reason.startswith(reason)) for b in bad] == [(1, True)]
    found: list[BadRecord] = []
    rows = list(read_jsonl(tmp_path / "a.jsonl", quarantine=found.append))
    assert len(rows) + len(found) == 2 and len(found) == (reason == "json")


def zipped(path, method=zipfile.ZIP_DEFLATED, **texts):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, text in texts.items():
            archive.writestr(f"{name}.txt", text)
    return path


def edited(path, *, flags=0, method=None):
    """The archive with other flags or another method in the headers of its first member."""
    data = bytearray(path.read_bytes())
    for head, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = data.index(head) + at
        data[start] |= flags
        if method is not None:
            data[start + 2 : start + 4] = method.to_bytes(2, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(
    "changes", [{"flags": 1}, {"method": 97}, {"method": 12}, {"method": 14}], ids=["password", "97", "bzip2", "lzma"]
)
def test_a_member_that_cannot_be_unpacked_costs_itself_alone(tmp_path, changes):
    edited(zipped(tmp_path / "a.zip", a="a secret", b="a plain text"), **changes)
    documents, bad, _ = read_all(path=str(tmp_path / "a.zip"), kind="text")
    assert [d.text for d in documents] == ["a plain text"]
    assert [b.path.rsplit("!")[-1] for b in bad] == ["a.txt"] and bad[0].reason.startswith("archive: ")


def test_names_that_are_no_utf8_cost_their_archive(tmp_path):
    path = zipped(tmp_path / "a.zip", é="text")
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xff"))
    documents, bad, _ = read_all(path=str(path), kind="text")
    assert not documents and [b.reason.partition(":")[0] for b in bad] == ["archive"]


def test_small_members_of_an_archive_fill_blocks_by_their_own_size(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "BLOCK_BYTES", 4000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(40):
            archive.writestr(f"{number:02}.html", f"<p>{number}</p>".ljust(200))
    source = SourceConfig(name="s", path=str(tmp_path / "a.zip"), kind="html")
    assert [len(block.raws) for block in raw.blocks(source, ReadReport())] == [20, 20]


def test_an_archive_is_opened_once_for_its_members_and_anew_when_it_changed(tmp_path, monkeypatch):
    opened, ZipFile = [], zipfile.ZipFile
    path = zipped(tmp_path / "a.zip", a="one", b="two", c="three")
    monkeypatch.setattr(zipfile, "ZipFile", lambda *args: opened.append(args) or ZipFile(*args))
    assert len(read_all(path=str(path), kind="text")[0]) == 3 and len(opened) == 2, "for its names, and for its texts"
    monkeypatch.undo()
    path.unlink()
    zipped(path, a="another one", b="two")
    assert [d.text for d in read_all(path=str(path), kind="text")[0]] == ["another one", "two"]


def test_languages_of_code_are_those_of_the_one_table(tmp_path):
    assert {BY_SUFFIX[suffix].kind for suffix in CODE} <= {"code", "data"}
    names = {".h": "c", ".ts": "typescript", ".r": "r", ".sh": "shell", ".cu": "cuda", ".yml": "yaml", ".pyi": "python"}
    assert {suffix: BY_SUFFIX[suffix].name for suffix in names} == names and set(names) < CODE
    (tmp_path / "notes.xyz").write_text("x")
    (tmp_path / "page.html").write_text("x")
    documents, _, _ = read_all(path=[str(tmp_path / "notes.xyz"), str(tmp_path / "page.html")], kind="code")
    assert [d.metadata["programming_language"] for d in documents] == ["", ""], "asked for by name"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
BREAKS = (
    b"NaN",
    b"\\ud800",
    b"\xed\xa0\x80",
    b"\xff",
    b"1e999",
    b"\x01",
    b'"a":1,"a":2,',
    b"\xef\xbb\xbf",
    b"{",
    b"9" * 5000,
)


@given(VALUES, st.booleans(), st.sampled_from(BREAKS), st.integers(0, 40), st.booleans())
def test_a_line_is_read_as_json_reads_it(value, ascii, broken, at, breaks):
    line = json.dumps(value, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    if breaks:
        line = line[:at] + broken + line[at:]
    found = []
    for read_line in (json_of, lambda line: json.loads(line.decode("utf-8"))):
        try:
            found.append(repr(read_line(line)))
        except (ValueError, RecursionError) as error:
            found.append(f"{type(error)} {error}")
    assert found[0] == found[1]
