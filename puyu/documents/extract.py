"""HTML bytes -> title and main text, without navigation, banners, scripts, advertising or footers.

    >>> page(b"<html><head><title>A</title></head><body><p>Some text.</p></body></html>").title
    'A'

Two ways. `fast`: the tree and the main content are resiliparse's (Bevendorff et al., ECIR 2018), the blocks at its
edges are judged by `blocks.main_blocks`. `precise`: the same, weighed block by block against what trafilatura finds
(Barbaresi, ACL 2021), which runs in a child process that may be killed (`killable`): Failed tells why there is no text.
Nothing is rendered and nothing is fetched. Bytes that do not fit their declared encoding are refused: the reader
quarantines the page.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from puyu.documents.blocks import Block, agreed_blocks, main_blocks, read_blocks, write_text
from puyu.documents.killable import Killable, Limits
from puyu.documents.pictures import Pictures, mark_pictures
from puyu.errors import DependencyError, PuyuError

Extract = Literal["fast", "precise"]

_META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?([\w-]{2,20})", re.IGNORECASE)
# Web pages say gb2312 and gbk and mean the superset; latin-1 means windows-1252 (WHATWG encoding standard).
_WIDER = {"gb2312": "gb18030", "gbk": "gb18030", "iso-8859-1": "cp1252", "latin-1": "cp1252", "ascii": "cp1252"}
# Who could read the declaration of a page as ASCII has no UTF-16 before them (the same standard).
_WIDER_META = _WIDER | {"utf-16": "utf-8", "utf-16le": "utf-8", "utf-16be": "utf-8"}
# Codecs of Python's that are no encodings of pages; some of them give halves of characters, which cannot be written.
_NO_ENCODINGS = frozenset({"idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape", "utf-7"})
_SKIP = ["[aria-hidden=true]", "[role=navigation]", "[role=banner]", "button", ".headerlink"]
_SKIP += [".cookie-banner", ".social-share", ".comments", ".related", ".newsletter"]
_SKIP += ["figcaption", "[class*=caption]", "[class*=byline]", "[class*=copyright]"]
# A quoted post is text; resiliparse takes everything of this class for a share button.
_QUOTED = ("twitter-tweet", "quoted-post")
_MANY_TAGS = 4000
_DEEP = 1000
_ENOUGH = 0.3
"""Less than this share of the other extractor's text means that the tree was misread: its text is taken."""


@dataclass(frozen=True, slots=True)
class Page:
    """What a reader of the page would read."""

    title: str
    text: str
    """Without the title."""
    images: tuple[Mapping[str, str], ...] = ()
    """Pictures that the text links to, as entries of an `img_list`."""

    def full_text(self) -> str:
        """The title above the text, unless the text begins with it."""
        first = self.text.partition("\n")[0].strip()
        if not self.title or first.lower() == self.title.lower():
            return self.text
        return f"{self.title}\n\n{self.text}" if self.text else ""


def decode_html(data: bytes, *, charset: str = "") -> str:
    """Text of a page: byte-order mark, charset declared by the server or the page, UTF-8, then a guess. Raises
    UnicodeDecodeError."""
    for mark, name in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return data.decode(name)
    declared = _META_CHARSET.search(data[:4096])
    stated = declared.group(1).decode("ascii").lower() if declared else ""
    for name in (_WIDER.get(charset.lower(), charset), _WIDER_META.get(stated, stated)):
        if (text := _decode(data, name)) is not None:
            return text
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        guess = str(_resiliparse().detect_encoding(data)).lower()
        text = None if guess in ("utf-8", "utf8") else _decode(data, _WIDER.get(guess, guess))
        if text is None:
            raise
        return text


def _decode(data: bytes, name: str) -> str | None:
    """The text; None for a name that says nothing, which is as if there were none. Raises UnicodeDecodeError."""
    try:
        return None if codecs.lookup(name).name in _NO_ENCODINGS else data.decode(name)
    except UnicodeDecodeError:
        raise
    except (LookupError, ValueError):
        return None


def page(
    html: bytes | str,
    *,
    charset: str = "",
    extract: Extract = "fast",
    images: bool = False,
    url: str = "",
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> Page:
    """Title and main text; `charset` is what the server declared.

    `images`: pictures stay in their place as markdown links; their addresses are made absolute with `url`, the page's.
    Raises UnicodeDecodeError for bytes that fit no encoding, and Failed (precise only).
    """
    text = html if isinstance(html, str) else decode_html(html, charset=charset)
    title, blocks, pictures = _read(text, images=images, url=url)
    if extract == "fast":
        return _page(title, write_text(main_blocks(blocks, title)), pictures)
    other = _other_extractor(limits)(text)
    found = write_text(agreed_blocks(blocks, title, other) if other else main_blocks(blocks, title))
    if len(found) < _ENOUGH * len(other):
        return Page(title, other.strip())
    return _page(title, found, pictures)


def _read(html: str, *, images: bool, url: str) -> tuple[str, list[Block], Pictures]:
    """Title, blocks and pictures. The tree ends here: it must be freed by the thread that made it, and what a later
    error keeps of a caller's frame may be freed by any."""
    tree = _resiliparse().HTMLTree.parse(html.replace(*_QUOTED))
    title = _title(tree)
    pictures = mark_pictures(tree, html, url) if images else Pictures()
    blocks = _blocks(tree, deep=_is_deep(html, tree))
    for block in blocks:
        block.pictures = pictures.stand_in(block.text)
    return title, blocks, pictures


def _page(title: str, text: str, pictures: Pictures) -> Page:
    linked, entries = pictures.link(text)
    return Page(title, linked, entries)


def _is_deep(html: str, tree: Any) -> bool:
    """Whether elements stand in each other as no page's do: the search for the main content is quadratic in depth."""
    if html.count("<") <= _MANY_TAGS or tree.document is None:
        return False
    return tree.document.query_selector(" > ".join(["*"] * _DEEP)) is not None


def _blocks(tree: Any, *, deep: bool) -> list[Block]:
    """What resiliparse takes for the main content, and all of a page that is too deep for that."""
    main = _resiliparse().extract_plain_text(
        tree,
        main_content=not deep,
        preserve_formatting="minimal_html",
        alt_texts=False,
        links=True,
        form_fields=False,
        noscript=False,
        comments=False,
        skip_elements=_SKIP,
    )
    return read_blocks(main)


def whole_page(html: bytes) -> str:
    """All text of a page that has no navigation, such as a chapter of a book."""
    extractor = _resiliparse()
    tree = extractor.HTMLTree.parse(decode_html(html))
    text = extractor.extract_plain_text(
        tree, main_content=False, preserve_formatting=True, alt_texts=False, links=False
    )
    return str(text).strip()


def _title(tree: Any) -> str:
    """The first `h1` that the `title` element repeats, else the first, else the `title` without the site's name."""
    document = tree.document
    found = document.query_selector_all("h1")[:] if document else []  # its iterator is quadratic
    headings = [text for text in (" ".join(h.text.replace("¶", "").split()) for h in found) if text]
    stated = " ".join((tree.title or "").split())
    repeated = [text for text in headings if len(text) > 3 and text.lower() in stated.lower()]
    if headings:
        return (repeated or headings)[0]
    return re.split(r"\s[|–—]\s", stated)[0]


# ---- the other extractor, in a child


@lru_cache(maxsize=1)
def _other_extractor(limits: Limits) -> Killable[str, str]:
    """One child for all pages, as long as the limits stay."""
    return Killable(_trafilatura_text, limits, prepare=_trafilatura, passes=(PuyuError,))


def _trafilatura_text(html: str) -> str:
    return str(_trafilatura().extract(html, include_comments=False) or "")


def _trafilatura() -> Any:
    try:
        import trafilatura
    except ImportError as error:
        raise DependencyError("extract: precise needs trafilatura", remedy="pip install 'puyu-llm[data]'") from error
    return trafilatura


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
