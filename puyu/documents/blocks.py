"""Blocks of a page (paragraphs, headings, list items) -> those that belong to its main text.

    >>> [block.text for block in read_blocks("<h1>Cats</h1>\\n\\n<p>They <a href='/x'>sleep</a> a lot.</p>")]
    ['Cats', 'They sleep a lot.']

Input is the reduced HTML that resiliparse writes of what it takes for main content (headings, paragraphs, lists,
preformatted text, line breaks, links). Judged are the edges, where headlines, bylines, dates, shares, tags, related
links and rights stand, and blocks that are mostly links: by length, punctuation, share of links and a few words
(the shallow features of Kohlschütter et al., WSDM 2010). It knows nothing of encodings, trees and sites.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_TAG = re.compile(r"(</?(?:h[1-6]|p|ul|ol|li|pre|a|br)\b[^>]*>)")
_NAME = re.compile(r"</?(\w+)")
_TABS = re.compile(r"[ \t]*\t[ \t]*(?=\S)")
_WORD = re.compile(r"[^\W_]+")
_SHINGLE = 4
_SHORT_HEADING = 3
"""Words; longer ones under the title are standfirsts."""
_TOP = 40
"""The title is looked for among this many blocks."""
_HAN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_ENDED = re.compile(r"[.!?…。！？；;][\"'”’»」』）)\]\s\d]*$")
_MARKS = re.compile(r"[.!?。！？](?=[\s\"'”’」』）)]|$|[^\x00-\x7f])")
_MONTHS = (
    "jan[a-z]*|feb[a-z]*|mar[a-z]*|apr[a-z]*|may|jun[a-z]*|jul[a-z]*|aug[a-z]*|sep[a-z]*|oct[a-z]*|nov[a-z]*|dec[a-z]*"
    "|janvier|février|avril|mai|juin|juillet|août|enero|abril|mayo|agosto|januar|märz|oktober|dezember|janeiro|fevereiro"
    "|março|maio|junho|julho|setembro|outubro|dezembro"
)
_DATE = re.compile(
    rf"\b(?:\d{{1,2}}(?:st|nd|rd|th|\.)?\s+(?:de\s+)?(?:{_MONTHS})\b|(?:{_MONTHS})\.?\s+\d{{1,2}}\b"
    r"|\d{4}[-/.年]\s?\d{1,2}[-/.月]|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}"
    r"|\d+\s+(?:minutes?|hours?|days?|weeks?|months?|years?)\s+ago)",
    re.IGNORECASE,
)
_BYLINE = re.compile(
    r"^(?:(?:written|posted|published|updated|last updated|photographed)\b"
    r"|(?:photos?|images?|pictures?|story|words|source|credits?|text|author|date)(?:\s*:|\s+by\b|\s+credits?\b)"
    r"|by[ :]|by$|por[ :]|par[ :]|von[ :]"
    r"|作者|来源|來源|编辑|責任編輯|责任编辑|记者|發布|发布|发表|时间|日期|浏览|阅读|点击)",
    re.IGNORECASE,
)
_FURNITURE = re.compile(
    r"all rights reserved|copyright\s|©|\(c\)\s*\d{4}|terms (?:of|and) (?:use|service|conditions)|privacy policy"
    r"|cookie (?:policy|settings)|uses? cookies|sign ?up (?:for|to|now)|subscribe|newsletter|follow (?:us|me|@)"
    r"|like us on|share (?:this|on|via)|click here to|tweet this|e-?mail this|print this|log ?in to|sign ?in to"
    r"|register to|leave a (?:comment|reply)|post a comment|comments? (?:are )?closed|add a comment|^advertisement"
    r"|sponsored (?:by|links?|content)|filed under|posted in|^tagged|tagged (?:with|in|as)|tags?:|categor(?:y|ies):"
    r"|skip to|back to top|your e-?mail|download (?:our|the) app|read more (?:at|about|on)"
    r"|版权|版權|转载|轉載|免责|责任编辑|關注|关注我们|扫一扫|微信|上一篇|下一篇|相关阅读|相关新闻|関連記事|スポンサー|コメント",
    re.IGNORECASE,
)
_KINDS = (
    "articles?|stories|story|posts?|content|news|links?|topics?|reading|videos?|coverage|items?|products?|headlines?"
    "|comments?"
)
_MORE = re.compile(
    rf"^\W*(?:(?:related|recommended|popular|trending|latest|recent|similar|featured|sponsored|other|further)\W+(?:{_KINDS})"
    r"|(?:related|recommended|trending)\W*$|more (?:from|in|on|stories|news|articles|like|about|posts)|don'?t miss"
    r"|read (?:more|next|also)|see (?:more|also)|also (?:read|on|see)|you (?:may|might) (?:also|like)|what to read"
    r"|most (?:read|popular|viewed|shared|recent)|(?:\d+ )?(?:comments?|responses?)\b|leave a|about the author|about us"
    r"|share this|tags?\b|topics?\b|trackbacks|references$|external links|see all|next:|previous:|newsletter"
    r"|(?:next|previous) (?:post|article)|相关|相關|推荐|推薦|热门|熱門|関連|おすすめ|人気|评论|評論|コメント)",
    re.IGNORECASE,
)
_ADS = re.compile(
    r"advertisement|sponsored(?: links?)?|text size|loading|share|print|スポンサードリンク|广告|廣告", re.I
)


@dataclass(slots=True)
class Block:
    """One block: `kind` is h1 .. h6, p, li, pre or line (text outside of all); `gap`: an empty line before it."""

    kind: str
    text: str
    links: int = 0
    """Characters inside links."""
    lead: str = ""
    """What stands before the text: a bullet or a number."""
    gap: bool = True
    pictures: bool = False
    """Whether a mark of a picture stands in it."""
    words: int = field(init=False)
    """Words; two characters of Chinese, Japanese and Korean count as one."""

    def __post_init__(self) -> None:
        self.words = len(self.text.split())
        if not self.text.isascii():
            self.words += len(_HAN.findall(self.text)) // 2

    @property
    def linked(self) -> float:
        """Share of characters inside links."""
        return self.links / max(len(self.text), 1)

    @property
    def is_heading(self) -> bool:
        return self.kind[0] == "h"


# ---- reading


@dataclass(slots=True)
class _Reader:
    blocks: list[Block] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    kind: str = "line"
    links: int = 0
    in_link: bool = False
    lists: list[int] = field(default_factory=list)
    """For each open list the number of its next item; 0 for bullets."""
    new_item: bool = False
    """Whether nothing of the item that is open was written."""
    blank: bool = True

    def text(self, text: str) -> None:
        if self.kind != "line":
            self.parts.append(text)
            self.links += len(text) if self.in_link else 0
            return
        if not text.strip() and not self.parts:
            self.blank = self.blank or text.count("\n") > 1
            return
        for number, line in enumerate(text.split("\n")):
            if number:
                blank = not self.parts or not "".join(self.parts).strip()
                self.flush()
                self.blank = self.blank or blank
            self.parts.append(line)
            self.links += len(line) if self.in_link else 0

    def flush(self) -> None:
        """End the block that is open."""
        if not self.parts:
            self.kind = "line"
            return
        raw = html.unescape("".join(self.parts))
        text = raw.strip("\n") if self.kind == "pre" else _TABS.sub("\t", raw).strip(" \n\u200b\u00a0")
        if text.strip():
            gap = self.blank if self.kind in ("line", "li") else True
            self.blocks.append(Block(self.kind, text, self.links, self._lead() if self.kind == "li" else "", gap))
            self.blank = self.kind not in ("line", "li")
        self.parts, self.links, self.kind = [], 0, "line"

    def _lead(self) -> str:
        """A bullet or a number for the first block of an item, blanks for the others."""
        indent = "  " * max(len(self.lists), 1)
        if not self.new_item:
            return f"{indent}  "
        self.new_item = False
        if not self.lists or not self.lists[-1]:
            return f"{indent}• "
        self.lists[-1] += 1
        return f"{indent}{self.lists[-1] - 1}. "

    def tag(self, tag: str) -> None:
        found = _NAME.match(tag)
        assert found
        name, opens = found.group(1), tag[1] != "/"
        if name == "a":
            self.in_link = opens
        elif name != "br":
            self.flush()
            self.in_link = False  # some links are never closed
            self.kind = name if opens else "line"
            if name in ("ul", "ol"):
                self._list(name, opens)
            elif name == "li":
                self.new_item = opens
            elif name == "p" and opens and self.lists:
                self.kind = "li"

    def _list(self, name: str, opens: bool) -> None:
        self.blank, self.kind = True, "line"
        if opens:
            self.lists.append(int(name == "ol"))
        elif self.lists:
            self.lists.pop()


def read_blocks(page: str) -> list[Block]:
    """The blocks of reduced HTML, in order."""
    reader = _Reader()
    for number, part in enumerate(_TAG.split(page)):
        if number % 2:
            reader.tag(part)
        elif part:
            reader.text(part)
    reader.flush()
    return reader.blocks


def write_text(blocks: Sequence[Block]) -> str:
    """Plain text: an empty line between paragraphs, lines and items below each other."""
    out = []
    for block in blocks:
        out.append(("\n\n" if block.gap else "\n") + block.lead + block.text)
    return "".join(out).strip("\n")


# ---- choosing


def main_blocks(blocks: Sequence[Block], title: str = "") -> list[Block]:
    """The blocks between the title, byline and date above and the tags, links and rights below.

    A page without a sentence (a list, a table, code) keeps all of its blocks but the title.
    """
    found = after_title(blocks, title)
    if not any(map(_is_prose, found)):
        return found
    titled = len(found) < len(blocks)
    found = _before_more(found)
    start, end = 0, len(found)
    while start < end and _is_above(found[start]):
        start += 1
    while end > start and _is_below(found[end - 1]):
        end -= 1
    if titled and start and found[start - 1].is_heading and found[start - 1].words <= _SHORT_HEADING:
        start -= 1
    pictures = [block for block in found[:start] if block.pictures and titled]
    return [*pictures, *(block for block in found[start:end] if not _is_inside(block))]


def agreed_blocks(blocks: Sequence[Block], title: str, other: str) -> list[Block]:
    """The blocks that two extractors agree on: `main_blocks`, and the text `other` that another one found.

    What only one of them takes stays when it reads like prose and is set as a paragraph or an item.
    """
    words = _WORD.findall(other.lower())
    known = {shingle for size in range(1, _SHINGLE + 1) for shingle in _shingles(words, size)}
    ours = {id(block) for block in main_blocks(blocks, title)}
    body = {id(block) for block in after_title(blocks, title)}
    return [
        block
        for block in blocks
        if (id(block) in ours and (_stands_alone(block) or _is_in(block, known)))
        or (id(block) in body and _may_return(block) and _is_in(block, known))
    ]


def _stands_alone(block: Block) -> bool:
    """Whether a block of ours stays without the other's voice."""
    if block.kind == "pre" or block.is_heading or block.pictures:
        return True
    return block.kind != "line" and _is_prose(block)


def _may_return(block: Block) -> bool:
    """Whether a block that we would cut off stays when the other takes it."""
    if block.is_heading or block.kind == "line":
        return False
    marks = (_BYLINE, _FURNITURE, _DATE, _MORE)
    return _is_prose(block) or not any(mark.search(block.text) for mark in marks)


def _shingles(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[at : at + size]) for at in range(max(1, len(words) - size + 1))] if words else []


def _is_in(block: Block, known: set[tuple[str, ...]]) -> bool:
    """Whether most of a block stands in a text of these shingles."""
    found = _shingles(_WORD.findall(block.text.lower()), _SHINGLE)
    return sum(shingle in known for shingle in found) > 0.5 * len(found) if found else False


def _is_prose(block: Block) -> bool:
    if block.is_heading or block.linked > 0.5:
        return False
    return block.words >= 6 and _MARKS.search(block.text) is not None


def _is_above(block: Block) -> bool:
    """Whether it is no beginning: a standfirst, a byline, a date, a menu."""
    if block.kind == "pre" or "\t" in block.text:
        return False
    if block.is_heading or block.linked > 0.5:
        return True
    if block.words < 40 and (_FURNITURE.search(block.text) or (_BYLINE.search(block.text) and not _is_prose(block))):
        return True
    if block.words < 20 and _DATE.search(block.text) and not _ENDED.search(block.text):
        return True
    return block.words < 5 and not _is_prose(block) and block.kind != "li"


def _is_below(block: Block) -> bool:
    """Whether it is no end: tags, links, rights."""
    if block.kind == "pre" or "\t" in block.text:
        return False
    if block.is_heading or block.linked > 0.5:
        return True
    if block.words < 50 and _FURNITURE.search(block.text):
        return True
    if block.words < 12 and not _is_prose(block) and (_BYLINE.search(block.text) or _MORE.search(block.text)):
        return True
    return block.words < 3 and block.kind != "li" and not _ENDED.search(block.text)


def _is_inside(block: Block) -> bool:
    """Chrome between paragraphs: links to other pages, advertisements."""
    if block.kind in ("pre", "li") or block.is_heading or block.pictures:
        return False
    return (block.linked > 0.8 and block.words < 30) or _ADS.fullmatch(block.text) is not None


def _plain(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))


def after_title(blocks: Sequence[Block], title: str) -> list[Block]:
    """What follows the title, when little stands before it; else all but the title."""
    wanted, before = _plain(title), 0
    for at, block in enumerate(blocks[:_TOP]):
        if wanted and _is_title(block, wanted):
            total = sum(block.words for block in blocks)
            return [*(() if before <= 0.2 * total else blocks[:at]), *blocks[at + 1 :]]
        before += block.words
    return list(blocks)


def _is_title(block: Block, wanted: str) -> bool:
    text = _plain(block.text)
    part = block.is_heading and min(len(text), len(wanted)) > 20 and (text in wanted or wanted in text)
    return text == wanted or part


def _before_more(blocks: list[Block]) -> list[Block]:
    """What stands before 'related articles' and the like, when little prose stands behind."""
    prose = [block.words if _is_prose(block) else 0 for block in blocks]
    total, seen = sum(prose), 0
    for at, block in enumerate(blocks):
        if seen > 0.85 * total and block.words < 10 and block.kind != "li" and _MORE.search(block.text):
            return blocks[:at]
        seen += prose[at]
    return blocks
