"""Main text of pages: content stays, chrome goes; encodings as pages declare them."""

import pytest

from puyu.documents.extract import decode_html, page

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


def test_a_page_without_text_is_empty_not_an_error():
    assert page(b"").full_text() == "" and page(b"<html></html>").full_text() == ""
