"""Where comments and strings stand in a source file, by the comment style of its language.

    >>> blank('x = "import a"  # import b', "python").code
    'x = "        "            '

`blank` gives the text with the same length and the same lines, in which nothing but code is left: comments are blanks,
strings keep their delimiters. Offsets into it are offsets into the file, so that a path that is a string is found in
the one and read in the other. It knows no grammar; a string that is not closed on its line is no string.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from puyu.documents.programming import BY_NAME, NONE, Comments

_NOT_END = re.compile(r"[^\n]")


@dataclass(frozen=True, slots=True)
class Blank:
    """A file and its twin in which only code is left."""

    text: str
    code: str
    comment_characters: int
    """Characters in comments, without blanks; a Python docstring is a comment."""


def comments_of(language: str) -> Comments:
    """The comment style of a language of the table; none for another."""
    row = BY_NAME.get(language)
    return row.comments if row else NONE


def blank(text: str, language: str) -> Blank:
    """The twin of a text."""
    style = comments_of(language)
    if not (style.line or style.blocks or style.strings):
        return Blank(text, text, 0)
    pattern, ends = _pattern(style), dict(style.blocks)
    pieces: list[str] = []
    at = comments = 0
    while found := pattern.search(text, at):
        start, end, kind = found.start(), found.end(), found.lastgroup
        pieces.append(text[at:start])
        if kind == "block":
            end = _block_end(text, end, (found.group(), ends[found.group()]), nested=style.nested)
            pieces.append(_hidden(text[start:end]))
            comments += _size(text[start:end])
        elif kind == "line":
            pieces.append(_hidden(text[start:end]))
            comments += _size(text[start:end])
        else:
            pieces.append(_inside(found.group()))
            comments += _size(found.group()) if language == "python" and _is_docstring(text, start, end) else 0
        at = end
    return Blank(text, "".join([*pieces, text[at:]]), comments)


@lru_cache(maxsize=64)
def _pattern(style: Comments) -> re.Pattern[str]:
    """Block openers before line openers (Lua's `--[[`), triple strings before plain ones (by their order)."""
    parts = []
    if style.blocks:
        openers = "|".join(re.escape(begin) for begin, _ in sorted(style.blocks, key=lambda pair: -len(pair[0])))
        parts.append(f"(?P<block>{openers})")
    if style.line:
        openers = "|".join(re.escape(begin.rstrip("\n")) for begin in style.line)
        before = r"(?<![^\s;&|()])" if style.at_word else ""
        parts.append(f"(?P<line>{before}(?:{openers})[^\n]*)")
    if style.strings:
        parts.append(f"(?P<string>{'|'.join(style.strings)})")
    return re.compile("|".join(parts))


def _block_end(text: str, at: int, marks: tuple[str, str], *, nested: bool) -> int:
    begin, end = marks
    if not nested:
        found = text.find(end, at)
        return len(text) if found < 0 else found + len(end)
    depth = 1
    for mark in re.compile(f"{re.escape(begin)}|{re.escape(end)}").finditer(text, at):
        depth += 1 if mark.group() == begin else -1
        if depth == 0:
            return mark.end()
    return len(text)


def _hidden(part: str) -> str:
    return _NOT_END.sub(" ", part)


def _inside(string: str) -> str:
    """A string with its first and last delimiter; what stands before the first (`r`, `(` of a regex) stays too."""
    first = min((at for at in map(string.find, "\"'`/") if at >= 0), default=0) + 1
    return string[:first] + _hidden(string[first:-1]) + string[-1:]


def _size(part: str) -> int:
    return len("".join(part.split()))


def _is_docstring(text: str, start: int, end: int) -> bool:
    """A triple-quoted string that is a statement of its own."""
    if text[start : start + 3] not in ('"""', "'''"):
        return False
    before = text[text.rfind("\n", 0, start) + 1 : start]
    return not before.strip(" \trRuUbB") and text[end : end + 1] in ("", "\n", "\r")
