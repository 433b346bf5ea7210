"""Main text of pages: content stays, chrome goes; encodings as pages declare them."""

import json
import sys
import threading
from dataclasses import replace

import pytest

from puyu.documents import extract
from puyu.documents.extract import _other_extractor, _resiliparse, decode_html, page
from puyu.documents.interleaved import Image, write_interleaved
from puyu.documents.readers import SourceConfig, read
from puyu.errors import DependencyError, PuyuError
from puyu.files import BadRecord

PAGE = """<!DOCTYPE html><html><head><meta charset="{charset}"><title>{title} | Some Site</title>
<script>var tracking = 1;</script><style>.x{{color:red}}</style></head><body>
<div class="cookie-banner"><p>We use cookies to improve things.</p></div>
<header><nav role="navigation"><ul><li><a href="/">Home</a></li><li><a href="/b">Blog</a></li></ul></nav></header>
<main><article><h1>{title}</h1><p>{first}</p><ul><li>point</li></ul><pre><code>x = 1
y = 2</code></pre><p>{last}</p></article></main>
<aside class="ad advertisement"><p>Buy GPUs by the hour.</p></aside>
<footer><p>All rights reserved.</p></footer></body></html>"""
EN = {
    "title": "How it works",
    "first": "The first paragraph tells what the page is about and goes on for a while.",
    "last": "The last paragraph ends the page with a sentence.",
}
ZH = {
    "title": "工作原理",
    "first": "第一段说明本页的主题，并且继续写了一些内容，以便看起来像正文。",
    "last": "最后一段用一句话结束全文。",
}


@pytest.mark.parametrize(
    ("words", "charset", "codec"), [(EN, "utf-8", "utf-8"), (ZH, "utf-8", "utf-8"), (ZH, "gb2312", "gb18030")]
)
def test_main_text_without_chrome(words, charset, codec):
    found = page(PAGE.format(charset=charset, **words).encode(codec))
    assert found.title == words["title"]
    assert words["first"] in found.text and words["last"] in found.text and "x = 1\ny = 2" in found.text
    for chrome in ("cookies", "Blog", "GPUs", "rights reserved", "tracking", "color"):
        assert chrome not in found.text
    assert found.full_text().count(words["title"]) == 1


def test_bytes_that_fit_no_declared_encoding_are_refused():
    with pytest.raises(UnicodeDecodeError):
        decode_html(b'<meta charset="utf-8"><p>\xff\xfe\x80</p>')


def test_encodings_that_are_not_declared():
    assert decode_html("<p>é</p>".encode("utf-16")) == "<p>é</p>"
    assert decode_html(b"\xef\xbb\xbf<p>\xc3\xa9</p>") == "<p>é</p>"
    assert "工作原理" in decode_html(
        ("<p>" + "工作原理说明，这是一个没有声明编码的网页。" * 10 + "</p>").encode("gb18030")
    )
    assert decode_html(b'<meta charset="no-such-thing"><p>plain</p>').endswith("<p>plain</p>")


@pytest.mark.parametrize(
    "name", ["undefined", "idna", "punycode", "hex", "unicode_escape", "raw_unicode_escape", "utf-7", "u7", "no-such"]
)
@pytest.mark.parametrize("server", [False, True])
def test_names_that_are_no_encodings_of_pages_say_nothing(name, server):
    text = r"<p>é +2AA- \ud800</p>"
    declared = "" if server else f'<meta charset="{name}">'
    assert decode_html((declared + text).encode(), charset=name if server else "") == declared + text


def test_a_declaration_that_can_be_read_does_not_stand_in_utf16():
    for name in ("utf-16", "UTF-16LE", "utf-16be"):
        assert decode_html(f'<meta charset="{name}"><p>é</p>'.encode()).endswith("<p>é</p>")
    assert decode_html("<p>é</p>".encode("utf-16-le"), charset="utf-16le") == "<p>é</p>", "a server may say so"


def test_a_guess_that_python_has_no_codec_for_is_a_refusal(monkeypatch):
    guess = replace(_resiliparse(), detect_encoding=lambda data: "windows-874")
    monkeypatch.setattr(extract, "_resiliparse", lambda: guess)
    with pytest.raises(UnicodeDecodeError):
        decode_html(b"<p>\xa1\xff</p>")


def test_a_page_without_text_is_empty_not_an_error():
    assert page(b"").full_text() == "" and page(b"<html></html>").full_text() == ""


def test_the_title_is_the_heading_that_the_page_repeats():
    html = "<title>How it works - Site</title><h1>Games</h1><h1>How it works</h1><p>Text of the page.</p>"
    assert page(html).title == "How it works"
    assert page("<title>Elsewhere</title><h1>Games</h1>").title == "Games"
    assert page("<title>A page | Site</title><p>Text.</p>").title == "A page"


def test_pages_that_are_built_to_take_for_ever_do_not():
    deep = "<div>" * 30_000 + "Down here." + "</div>" * 30_000
    assert page(deep).text == "Down here."
    many = "<main>" + "<p>Some words stand here. <img src='a.jpg'></p>" * 2_000
    assert page(many, images=True).text.count("![](a.jpg)") == 2_000
    assert page("<h1>x</h1>" * 2_000).title == "x"


def test_quoted_posts_are_text():
    html = f"<main><p>{EN['first']}</p><blockquote class='twitter-tweet'><p>{EN['last']}</p></blockquote></main>"
    assert EN["last"] in page(html).text


# ---- pictures

PICTURES = """<html><head><base href="/b/"></head><body><img src="logo.png"><main><article><h1>How it works</h1>
<figure><a href="/large"><img src="a b.jpg" alt="A [first] one" width="640" height="480px"></a>
<figcaption>Below it</figcaption></figure>
<p>The first paragraph tells what the page is about.
<img data-src="//cdn.org/c.png" src="data:image/gif;base64,R0"> It goes on.</p>
<p>The second paragraph has a counter. <img src="count.gif" width="1" height="1"> It goes on too.</p>
<p>The last paragraph has the first picture again. <img src="a b.jpg"> And then it ends.</p>
</article></main></body></html>"""


def test_pictures_stay_in_their_place():
    found = page(PICTURES, images=True, url="https://a.org/x/y.html")
    first = "https://a.org/b/a%20b.jpg"
    assert found.text == (
        f"![A \\[first\\] one]({first})\n\n"
        "The first paragraph tells what the page is about. ![](https://cdn.org/c.png) It goes on.\n\n"
        "The second paragraph has a counter. It goes on too.\n\n"
        f"The last paragraph has the first picture again. ![]({first}) And then it ends."
    )
    assert [image["url"] for image in found.images] == [first, "https://cdn.org/c.png"]
    assert found.images[0] == Image(first, "A [first] one").entry(width="640", height="480")


def test_pictures_are_left_out_unless_wanted():
    found = page(PICTURES, url="https://a.org/x/y.html")
    assert not found.images and "![" not in found.text and "picture" in found.text


def test_marks_of_pictures_are_no_words_of_the_page():
    html = "<main><p>The word picture0n0z stands here as it is. <img src='a.jpg'> Nobody knows why.</p></main>"
    assert page(html, images=True).text == ("The word picture0n0z stands here as it is. ![](a.jpg) Nobody knows why.")


def test_pages_with_pictures_become_records(tmp_path):
    rows = [{"html": PICTURES, "url": "https://a.org/x/y.html"}, {"html": "<p>No picture is here.</p>"}]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"kind": "html", "text_field": "html", "images": True}
    source = SourceConfig(name="web", path=str(tmp_path / "pages.jsonl"), **options)
    bad: list[BadRecord] = []
    documents = list(read(source, bad.append))
    assert write_interleaved(tmp_path / "out.jsonl", documents, quarantine=bad.append) == 2
    again = SourceConfig(name="web", path=str(tmp_path / "out.jsonl"), kind="wanjuan")
    assert [document.text for document in read(again, bad.append)] == [document.text for document in documents]
    assert not bad and len(documents[0].metadata["images"]) == 2 and documents[1].metadata["images"] == []


# ---- precise

DOUBLE = """
import os, re, time
def extract(html, include_comments):
    if "HANG" in html: time.sleep(1000)
    if "CRASH" in html: os.abort()
    if "EAT" in html: bytearray(2**34)
    if "NOTHING" in html: return None
    if "OTHER" in html: return "The other one. " * 40
    return re.sub("<[^>]*>", "\\n", html)
"""


@pytest.fixture
def double(tmp_path, monkeypatch):
    """A stand-in for trafilatura that fails as real pages make it fail; the child and its end are real."""
    (tmp_path / "trafilatura.py").write_text(DOUBLE)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    _other_extractor.cache_clear()
    yield tmp_path
    _other_extractor.cache_clear()


def test_a_page_that_fails_is_quarantined_and_others_go_on(double):
    words = ["fine", "HANG", "fine", "CRASH", "fine", "EAT", "NOTHING"]
    html = [f"<main><p>{EN['first']} It is {word}.</p></main>" for word in words]
    (double / "pages.jsonl").write_text("".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in html))
    options = {"kind": "html", "extract": "precise", "page_seconds": 1.5, "page_memory_mib": 512}
    source = SourceConfig(name="web", path=str(double / "pages.jsonl"), **options)
    bad: list[BadRecord] = []
    documents = list(read(source, bad.append))
    assert [document.text.rpartition(" ")[2] for document in documents] == ["fine.", "fine.", "fine.", "NOTHING."]
    assert [(row.line, row.reason) for row in bad] == [
        (2, "timeout: no answer within 1.5 s"),
        (4, "crashed: SIGABRT"),
        (6, "memory: more than its limit"),
    ]


def test_what_the_tree_lacks_is_taken_from_the_other(double):
    assert page("<main><p>OTHER</p></main>", extract="precise").text.startswith("The other one. The other")


def test_precise_needs_trafilatura(monkeypatch, tmp_path):
    (tmp_path / "trafilatura.py").write_text("raise ImportError('not there')")
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    _other_extractor.cache_clear()
    with pytest.raises(DependencyError, match=r"puyu-llm\[data\]"):
        page("<p>x</p>", extract="precise")
    _other_extractor.cache_clear()


def test_what_an_error_keeps_of_a_page_may_be_freed_by_any_thread(monkeypatch):
    """The tree of resiliparse may not: a collection of garbage in a server's thread would tell of it, and leak it."""

    def failing(_limits):
        raise PuyuError("no other extractor")

    monkeypatch.setattr(extract, "_other_extractor", failing)
    kept = []
    try:
        page(PAGE.format(charset="utf-8", **EN), extract="precise")
    except PuyuError as error:
        kept.append(error)
    assert len(kept) == 1
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join()
    assert not told


def test_precise_with_trafilatura():
    pytest.importorskip("trafilatura")
    found = page(PAGE.format(charset="utf-8", **EN), extract="precise")
    assert found.title == EN["title"] and EN["first"] in found.text and EN["last"] in found.text
    assert "GPUs" not in found.text and "rights" not in found.text
