"""Web archives: whole, packed, older, and damaged in every way; nothing is lost that is not named."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.documents.readers import ReadReport, SourceConfig, read
from puyu.documents.warc import Damaged, Record, http_answer, records
from puyu.files import BadRecord

PAGE = (
    "<html><head><title>{0}</title></head><body><h1>{0}</h1><p>A page about {0}, long enough to read.</p></body></html>"
)


def warc(kind: str, body: bytes, *, url: str = "http://example.com/", media: str = "application/http") -> bytes:
    rows = ("WARC/1.0", f"WARC-Type: {kind}", f"WARC-Target-URI: {url}", "WARC-Date: 2026-01-02T03:04:05Z")
    head = "\r\n".join((*rows, f"Content-Type: {media}; msgtype=response", f"Content-Length: {len(body)}"))
    return f"{head}\r\n\r\n".encode() + body + b"\r\n\r\n"


def http(body: bytes, *headers: str, status: str = "200 OK", media: str = "text/html") -> bytes:
    return "\r\n".join((f"HTTP/1.1 {status}", f"Content-Type: {media}", *headers, "", "")).encode() + body


def crawl() -> list[bytes]:
    return [
        warc("warcinfo", b"software: none", media="application/warc-fields"),
        warc("request", b"GET / HTTP/1.1\r\n\r\n"),
        warc("response", http(PAGE.format("rivers").encode()), url="http://example.com/rivers"),
        warc("response", http(b"gone", status="404 Not Found")),
        warc("response", http(b"\x89PNG", media="image/png")),
        warc("conversion", "plain text of 山水".encode(), media="text/plain"),
    ]


def found_in(data: bytes) -> tuple[list[Record], list[BadRecord]]:
    bad: list[BadRecord] = []
    return list(records(io.BytesIO(data), "a.warc", quarantine=bad.append)), bad


def packed(parts: Sequence[bytes]) -> bytes:
    return b"".join(gzip.compress(part) for part in parts)


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "one.warc.gz"])
def test_pages_and_texts_become_documents_the_rest_is_counted(tmp_path: Path, name: str) -> None:
    parts = crawl()
    whole = {"a.warc": b"".join(parts), "a.warc.gz": packed(parts), "one.warc.gz": gzip.compress(b"".join(parts))}
    (tmp_path / name).write_bytes(whole[name])
    bad: list[BadRecord] = []
    report = ReadReport()
    documents = list(read(SourceConfig(name="s", path=str(tmp_path), kind="warc"), bad.append, report=report))
    assert [d.text.splitlines()[0] for d in documents] == ["rivers", "plain text of 山水"]
    assert documents[0].metadata["url"] == "http://example.com/rivers" and not bad
    assert documents[0].metadata["date"] == "2026-01-02T03:04:05Z"
    assert report.records_not_selected == {"warcinfo": 1, "request": 1, "status 404": 1, "image/png": 1}


def test_offsets_lead_to_the_records() -> None:
    parts = crawl()
    data = packed(parts)
    for record, part in zip(found_in(data)[0], parts, strict=True):
        assert zlib.decompressobj(31).decompress(data[record.offset :]) == part
    plain = b"".join(parts)
    assert all(plain[record.offset :].startswith(b"WARC/1.0") for record in found_in(plain)[0])


def test_a_damaged_member_costs_itself_alone() -> None:
    members = [gzip.compress(part) for part in crawl()]
    broken = bytearray(members[2])
    broken[len(broken) // 2] ^= 0xFF
    data = b"".join([*members[:2], bytes(broken), *members[3:]])
    found, bad = found_in(data)
    assert [r.kind for r in found if r.kind != "response"] == ["warcinfo", "request", "conversion"]
    assert bad[0].offset == len(members[0]) + len(members[1]) and bad[0].reason.startswith("archive")


@pytest.mark.parametrize("cut", [1, 5, 40, 200])
def test_an_archive_that_ends_early_says_so(cut: int) -> None:
    for data in (b"".join(crawl())[: -4 - cut], packed(crawl())[:-cut]):
        found, bad = found_in(data)
        assert bad and len(found) >= 4


def test_junk_between_records_is_named_and_passed() -> None:
    parts = crawl()
    found, bad = found_in(b"".join([*parts[:2], b"junk junk\n", *parts[2:]]))
    assert len(found) == 6 and [b.reason for b in bad] == ["record: no header of a record"]
    found, bad = found_in(packed(parts[:3]) + b"junk" + packed(parts[3:]))
    assert len(found) == 6 and [b.reason for b in bad] == ["archive: bytes between two members"]


@pytest.mark.parametrize("length", ["-1", "", "x", "99999999", "9" * 30])
def test_a_length_that_is_none_costs_one_record(length: str) -> None:
    parts = crawl()
    size = str(len(http(PAGE.format("rivers").encode()))).encode()
    parts[2] = parts[2].replace(b"Content-Length: " + size, b"Content-Length: " + length.encode())
    found, bad = found_in(b"".join(parts))
    assert len(found) == 5 and bad


def test_arc_files() -> None:
    info, page = b"1 0 Old Archive\n", http(PAGE.format("hills").encode())
    lines = [f"filedesc://a.arc 127.0.0.1 20260101000000 text/plain {len(info)}\n".encode(), info, b"\n"]
    lines += [f"http://example.com/a b 10.0.0.1 20260101000000 text/html {len(page)}\n".encode(), page, b"\n"]
    found, bad = found_in(b"".join(lines))
    assert [(r.kind, r.url) for r in found] == [("arcinfo", "filedesc://a.arc"), ("response", "http://example.com/a b")]
    assert not bad and http_answer(found[1].body).status == 200


def test_answers_in_chunks_packed_and_both() -> None:
    text = b"some words in a page " * 20
    chunks = b"10\r\n" + text[:16] + b"\r\n%x;x=1\r\n" % (len(text) - 16) + text[16:] + b"\r\n0\r\n\r\n"
    assert http_answer(http(chunks, "Transfer-Encoding: chunked")).body == text
    assert http_answer(http(text, "Transfer-Encoding: chunked")).body == text, "joined already"
    assert http_answer(http(gzip.compress(text), "Content-Encoding: gzip")).body == text
    assert http_answer(http(zlib.compress(text), "Content-Encoding: deflate")).body == text
    assert http_answer(http(zlib.compress(text)[2:-4], "Content-Encoding: deflate")).body == text
    assert http_answer(http(text, "Content-Encoding: gzip")).body == text, "unpacked already"
    for damaged in (gzip.compress(text)[:-20], b"\x1f\x8b\x08" + b"x" * 50):
        with pytest.raises(Damaged):
            http_answer(http(damaged, "Content-Encoding: gzip"))
    with pytest.raises(Damaged, match="br"):
        http_answer(http(text, "Content-Encoding: br"))
    with pytest.raises(Damaged, match="no HTTP"):
        http_answer(b"<html>")


def test_the_charset_of_the_server_is_heard(tmp_path: Path) -> None:
    page = "<html><body><p>今天天气很好，我们去公园散步，看看花和树。</p></body></html>".encode("gb18030")
    body = http(page, media="text/html; charset=GBK")
    (tmp_path / "a.warc").write_bytes(warc("response", body))
    bad: list[BadRecord] = []
    [document] = read(SourceConfig(name="s", path=str(tmp_path), kind="warc"), bad.append)
    assert "公园" in document.text and not bad


@given(st.binary(max_size=300), st.integers(0, 5), st.booleans())
def test_whatever_is_put_between_no_record_of_the_others_is_lost_in_silence(junk: bytes, at: int, plain: bool) -> None:
    parts = crawl()
    whole = [*parts[:at], junk, *parts[at:]]
    if plain:
        found, bad = found_in(b"".join(whole))
    else:
        found, bad = found_in(b"".join(gzip.compress(p) if p in parts else p for p in whole))
    assert len(found) == 6 or bad
