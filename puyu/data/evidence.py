"""Where in a text a rule found what it counts: the span that a person wants to see.

    >>> first_evidence("Menu\\nLorem ipsum dolor", "lorem_ipsum_max", language="en")
    (5, 16)

A rule about the whole text (its length, its share of digits) has no span.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from puyu.data.measure import BOILERPLATE, UNIT
from puyu.documents.characters import ODD

Span = tuple[int, int]

_LINE = re.compile(r"[^\n]*\S[^\n]*")
_PARAGRAPH = re.compile(r"(?:(?!\n[^\S\n]*\n)[\s\S])*\S(?:(?!\n[^\S\n]*\n)[\s\S])*")
_NGRAM = re.compile(r"(top|dup)_(\d+)gram")
_PATTERNS = {
    "lorem_ipsum": re.compile(r"lorem ipsum", re.IGNORECASE | re.ASCII),
    "boilerplate_lines": re.compile("|".join(BOILERPLATE), re.IGNORECASE | re.ASCII),
    "odd_chars": re.compile(f"[{ODD}]+"),
    "char_runs": re.compile(r"(\S)\1{19,}"),
    "bullet_lines": re.compile(r"^\s*[•\-*●·▪◦].*", re.MULTILINE),
    "ellipsis_lines": re.compile(r"^.*(?:\.\.\.|…)\s*$", re.MULTILINE),
    "symbols": re.compile(r"#|\.\.\.|…"),
}


def first_evidence(text: str, rule: str, *, language: str) -> Span | None:
    """(first character, character behind) of the first place that the rule counts; None where it has none."""
    score = rule.rpartition(".")[2].rpartition("_")[0]  # a preset stands before its rules
    if score in _PATTERNS:
        found = _PATTERNS[score].search(text)
        return found.span() if found else None
    if match := _NGRAM.fullmatch(score):
        return _ngram(text, int(match[2]), language)
    if score in ("dup_lines", "dup_line_chars"):
        return _first_repeated(_spans(_LINE, text), lambda a, b: text[a:b].strip())
    if score in ("dup_paragraphs", "dup_paragraph_chars"):
        return _first_repeated(_spans(_PARAGRAPH, text), lambda a, b: text[a:b].strip())
    if score == "longest_line":
        lines = list(_spans(_LINE, text))
        return max(lines, key=lambda span: span[1] - span[0]) if lines else None
    return None


def _spans(pattern: re.Pattern[str], text: str) -> Iterator[Span]:
    return (match.span() for match in pattern.finditer(text))


def _first_repeated(spans: Iterator[Span], key: Callable[[int, int], str]) -> Span | None:
    seen: set[str] = set()
    for begin, end in spans:
        value = key(begin, end)
        if value in seen:
            return begin, end
        seen.add(value)
    return None


def _ngram(text: str, n: int, language: str) -> Span | None:
    """The first n-gram that stood before."""
    units = list(_spans(UNIT if language == "zh" else re.compile(r"\S+"), text))
    words: Sequence[str] = [text[a:b] for a, b in units]
    seen: set[tuple[str, ...]] = set()
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            return units[i][0], units[i + n - 1][1]
        seen.add(gram)
    return None
