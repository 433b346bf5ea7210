"""HTML bytes -> title and main text, without navigation, banners, scripts, advertising or footers.

    >>> page(b"<html><head><title>A</title></head><body><p>Some text.</p></body></html>").title
    'A'

The tree and the main-content heuristics are resiliparse's (Bevendorff et al., ECIR 2018); nothing is rendered and
nothing is fetched. Bytes that do not fit their declared encoding are refused: the reader quarantines the page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from puyu.errors import DependencyError

_META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?([\w-]{2,20})", re.IGNORECASE)
# Web pages say gb2312 and gbk and mean the superset; latin-1 means windows-1252 (WHATWG encoding standard).
_WIDER = {"gb2312": "gb18030", "gbk": "gb18030", "iso-8859-1": "cp1252", "latin-1": "cp1252", "ascii": "cp1252"}
_TABS = re.compile(r"[ \t]*\t[ \t]*(?=\S)")
_SKIP = ["[aria-hidden=true]", "[role=navigation]", "[role=banner]", "button", ".headerlink"]
_SKIP += [".cookie-banner", ".social-share", ".comments", ".related", ".newsletter"]


@dataclass(frozen=True, slots=True)
class Page:
    """What a reader of the page would read."""

    title: str
    text: str

    def full_text(self) -> str:
        """The title above the text, unless the text begins with it."""
        head = self.text[: len(self.title) + 40].lower()
        if not self.title or self.title.lower() in head:
            return self.text
        return f"{self.title}\n\n{self.text}" if self.text else ""


def decode_html(data: bytes, *, charset: str = "") -> str:
    """Text of a page: byte-order mark, charset declared by the server or the page, UTF-8, then a guess. Raises
    UnicodeDecodeError."""
    for mark, name in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return data.decode(name)
    declared = _META_CHARSET.search(data[:4096])
    for name in filter(None, (charset, declared.group(1).decode("ascii").lower() if declared else "")):
        try:
            return data.decode(_WIDER.get(name, name))
        except LookupError:
            pass  # an unknown name says nothing: go on as if there were none
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        guess = str(_resiliparse().detect_encoding(data))
        if guess.lower() in ("utf-8", "utf8"):
            raise
        return data.decode(_WIDER.get(guess.lower(), guess))


def page(html: bytes | str, *, charset: str = "") -> Page:
    """Title and main text; `charset` is what the server declared. Raises UnicodeDecodeError for bytes that fit no
    encoding."""
    text = html if isinstance(html, str) else decode_html(html, charset=charset)
    extractor = _resiliparse()
    tree = extractor.HTMLTree.parse(text)
    main = extractor.extract_plain_text(
        tree,
        main_content=True,
        preserve_formatting=True,
        alt_texts=False,
        links=False,
        form_fields=False,
        noscript=False,
        comments=False,
        skip_elements=_SKIP,
    )
    return Page(_title(tree), _TABS.sub("\t", main).strip())


def whole_page(html: bytes) -> str:
    """All text of a page that has no navigation, such as a chapter of a book."""
    extractor = _resiliparse()
    tree = extractor.HTMLTree.parse(decode_html(html))
    text = extractor.extract_plain_text(
        tree, main_content=False, preserve_formatting=True, alt_texts=False, links=False
    )
    return str(text).strip()


def _title(tree: Any) -> str:
    """The first `h1`, else the `title` element without the site's name after a bar."""
    heading = tree.document.query_selector("h1") if tree.document else None
    if heading is not None and heading.text.strip():
        return " ".join(heading.text.replace("¶", "").split())
    return " ".join(re.split(r"\s[|–—]\s", tree.title or "")[0].split())


@dataclass(frozen=True, slots=True)
class _Extractor:
    HTMLTree: Any
    extract_plain_text: Any
    detect_encoding: Any


def _resiliparse() -> _Extractor:
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import detect_encoding
        from resiliparse.parse.html import HTMLTree
    except ImportError as error:
        raise DependencyError("reading HTML needs resiliparse", remedy="pip install 'puyu-llm[data]'") from error
    return _Extractor(HTMLTree, extract_plain_text, detect_encoding)
