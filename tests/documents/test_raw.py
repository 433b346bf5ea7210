"""Raw records: nothing is lost or torn where files are cut, and what is too large is named."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.documents import raw
from puyu.documents.raw import blocks, walk
from puyu.documents.readers import ReadReport, SourceConfig, read
from puyu.documents.sources import Member
from puyu.files import BadRecord


def source_of(path: Path, kind: str = "text", **more: object) -> SourceConfig:
    return SourceConfig.model_validate({"name": "s", "path": str(path), "kind": kind, **more})


def stretches(path: Path) -> list[raw.Raw]:
    return list(walk(source_of(path), Member(path, path.name), pytest.fail))


@settings(max_examples=200)
@given(st.text(alphabet=st.sampled_from(["a", "é", "人", "😀", "\n", " "]), max_size=200), st.integers(8, 40))
def test_stretches_are_the_file(tmp_path_factory, text, size):
    path = tmp_path_factory.mktemp("raw") / "a.txt"
    path.write_text(text, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw, "STRETCH", size)
        found = stretches(path)
    assert b"".join(item.payload for item in found) == path.read_bytes()
    assert [item.ends for item in found] == [False] * (len(found) - 1) + [True]
    for item in found:
        item.payload.decode("utf-8")
        assert path.read_bytes()[item.offset : item.offset + item.size] == item.payload
        assert item.number == path.read_bytes()[: item.offset].count(b"\n") + 1
        assert item.size <= 2 * size


def test_a_text_of_any_size_becomes_documents_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "STRETCH", 1000)
    lines = [f"Line {i} of a very long document." for i in range(500)]
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    found = list(read(source_of(path, max_characters=300), pytest.fail))
    assert all(len(document.text) <= 300 for document in found)
    assert "\n".join(document.text for document in found).split("\n") == lines
    places = [document.metadata["line"] for document in found]
    assert places == sorted(places) and places[0] == 1 and len(set(places)) > 5


def test_bad_bytes_in_a_later_stretch_keep_line_and_offset(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "STRETCH", 400)
    data = b"".join(b"good line %d\n" % i for i in range(100))
    at = data.index(b"line 70")
    path = tmp_path / "a.txt"
    path.write_bytes(data[:at] + b"\xff" + data[at:])
    bad: list[BadRecord] = []
    texts = [document.text for document in read(source_of(path), bad.append)]
    assert [(record.line, record.offset) for record in bad] == [(71, at)]
    assert "\n".join(texts).split("\n") == [f"good line {i}" for i in range(100) if i != 70]


def test_a_line_that_is_too_long_is_named_and_reading_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "MAX_RECORD", 2000)
    rows = [b'{"text": "one"}', b'{"text": "' + b"a" * 5_000_000 + b'"}', b'{"text": "two"}', b"a" * 2001]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(rows))
    bad: list[BadRecord] = []
    assert [document.text for document in read(source_of(path, "jsonl"), bad.append)] == ["one", "two"]
    assert [(record.line, record.offset) for record in bad] == [(2, 16), (4, 16 + 5_000_013 + 16)]
    assert all(record.reason == "record: a line of more than 2000 bytes" for record in bad)


@pytest.mark.parametrize("kind", ["html", "code"])
def test_a_file_that_is_too_large_is_named(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(raw, "MAX_RECORD", 100)
    path = tmp_path / ("a.html" if kind == "html" else "a.py")
    path.write_bytes(b"x" * 101)
    bad: list[BadRecord] = []
    assert list(read(source_of(path, kind), bad.append)) == []
    assert [record.reason for record in bad] == ["record: a file of more than 100 bytes"]


@pytest.mark.parametrize("records", [1, 3, 100])
def test_blocks_hold_every_record_once_in_order(tmp_path, monkeypatch, records):
    monkeypatch.setattr(raw, "BLOCK_RECORDS", records)
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name}{i}"}}\n' for i in range(7)))
    report = ReadReport()
    found = list(blocks(source_of(tmp_path, "jsonl"), report))
    assert [block.number for block in found] == list(range(len(found))) and report.files == 3
    assert max(len(block.raws) for block in found) <= records
    lines = [item.payload.decode().strip() for block in found for item in block.raws]
    assert lines == [f'{{"text": "{name}{i}"}}' for name in "abc" for i in range(7)]


def test_a_torn_end_belongs_to_the_last_block(tmp_path):
    data = gzip.compress(b'{"text": "one"}\n' * 50)
    (tmp_path / "a.jsonl.gz").write_bytes(data[:-20])
    found = list(blocks(source_of(tmp_path, "jsonl"), ReadReport()))
    assert len(found) == 1 and found[0].bad[0].reason.startswith("archive: ")
