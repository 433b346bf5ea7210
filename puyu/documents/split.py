"""Cut a long text into pieces of bounded size at chapters, paragraphs, lines, sentences; nothing is lost.

    >>> pieces = split("one\\n\\ntwo\\n\\nthree", 6)
    >>> "".join(pieces)
    'one\\n\\ntwo\\n\\nthree'

The pieces joined give the text back exactly, and none is longer than the limit (tested as a property).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

CHAPTER = re.compile(
    r"\s*(第[零〇一二三四五六七八九十百千\d]{1,7}[章回节卷折]|楔子|(chapter|book|part|act)\s+([ivxlcdm]+|\d+|the\s+\w+)\b)",
    re.IGNORECASE,
)
# Ever finer cuts: after a blank line, a line, a sentence end, a blank.
_CUTS = (
    re.compile(r"(?<=\n)(?:[ \t\u3000]*\r?\n)+"),
    re.compile(r"\n"),
    re.compile(r"[。！？!?.;；][”’\"')】」]*"),
    re.compile(r"\s"),
)


def split(text: str, limit: int) -> list[str]:
    """Pieces of at most `limit` characters, filled greedily; a chapter heading starts a new piece."""
    assert limit > 0
    if len(text) <= limit:
        return [text] if text else []
    pieces: list[str] = []
    current: list[str] = []
    size = 0
    for unit in _units(text, limit, 0):
        heading = size >= limit // 4 and CHAPTER.match(unit) is not None
        if current and (size + len(unit) > limit or heading):
            pieces.append("".join(current))
            current, size = [], 0
        current.append(unit)
        size += len(unit)
    return [*pieces, "".join(current)]


def _units(text: str, limit: int, level: int) -> Iterator[str]:
    """Runs that end at a cut of this level; what is still too long is cut at the next level."""
    if level == len(_CUTS):
        yield from (text[i : i + limit] for i in range(0, len(text), limit))
        return
    for unit in _cut_after(text, _CUTS[level]):
        if len(unit) <= limit:
            yield unit
        else:
            yield from _units(unit, limit, level + 1)


def _cut_after(text: str, pattern: re.Pattern[str]) -> Iterator[str]:
    start = 0
    for match in pattern.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    if start < len(text):
        yield text[start:]
