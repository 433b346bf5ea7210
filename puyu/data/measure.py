"""A text -> its scores: the numbers that every rule looks at, computed once and kept with the document.

    >>> round(measure("the cat sat. the cat sat. the cat sat.", language="en")["dup_5gram"], 2)
    0.67

Words are runs of non-blanks for languages with blanks; for Chinese each Han character is a unit and each run of
letters or digits another, because word rules have no meaning there. It knows no threshold and drops nothing.
The statistics are those of Gopher (Rae et al. 2021, table A1), C4 (Raffel et al. 2020), FineWeb (Penedo et al. 2024)
and, for odd characters, punctuation and line breaks, of the rules that InternLM2 (2024, section 3.1.1) names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from puyu.documents.characters import HAN, KANA, ODD, PUNCTUATION
from puyu.documents.texts import Automaton, TextLibrary, Texts, load

Units = NDArray[np.uint64]

UNIT = re.compile(rf"[{HAN}{KANA}]|[^\W{HAN}{KANA}]+")
STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_PUNCTUATION = re.compile(f"[{PUNCTUATION}]")
_SENTENCE_MARK = re.compile(r"[，。！？；：、,.!?;:]")
_HAN = re.compile(f"[{HAN}]")
_DIGIT = re.compile(r"\d")
_SPACE = re.compile(r"\s")
_ODD = re.compile(f"[{ODD}]")
_RUN = re.compile(r"(\S)\1{19,}")
_PARAGRAPH = re.compile(r"\n\s*\n")
_BULLETS = ("•", "-", "*", "●", "·", "▪", "◦")
_ENDS = (".", "!", "?", '"', "”", "。", "！", "？", "…", "；", "：", ":", "」", "』", ")", "）")
BOILERPLATE = (
    *("cookie policy", "privacy policy", "terms of use", "terms of service", "use cookies", "uses cookies"),
    *("use of cookies", "uses of cookies", "enable javascript", "all rights reserved", "sign up for our newsletter"),
    *("click here to", "subscribe now", "buy now", "add to cart", "free shipping", "advertisement"),
    *(
        "版权所有",
        "隐私政策",
        "使用条款",
        "用户协议",
        "icp备",
        "点击下载",
        "扫码关注",
        "立即购买",
        "免费领取",
        "加微信",
    ),
    *("广告合作", "启用javascript", "启用 javascript"),
)
"""Phrases of pages about themselves; in any case of ASCII letters."""
_BOILERPLATE = re.compile("|".join(BOILERPLATE), re.IGNORECASE | re.ASCII)
_LOREM = re.compile(r"lorem ipsum", re.IGNORECASE | re.ASCII)
_P = np.uint64(0x9E3779B97F4A7C15)


SCORES = (
    *("chars", "punctuation", "digits", "whitespace", "odd_chars", "char_runs", "lorem_ipsum"),
    *("lines", "mean_line", "bullet_lines", "ellipsis_lines", "ended_lines", "boilerplate_lines"),
    *("dup_lines", "dup_line_chars", "dup_paragraphs", "dup_paragraph_chars"),
    *("top_2gram", "top_3gram", "top_4gram"),
    *("dup_5gram", "dup_6gram", "dup_7gram", "dup_8gram", "dup_9gram", "dup_10gram"),
    *("words", "mean_word", "alpha_words", "symbols", "stop_words"),
    *("han", "han_share", "sentence_marks"),
    *("longest_line", "letters"),
)
"""Names of the columns of `measure_all`; a text has those that mean something for its language."""


def measure_all(texts: Sequence[str], languages: Sequence[str]) -> NDArray[np.float64]:
    """`measure` of each text -> [texts, SCORES], NaN where a score has no meaning; natively where that was built."""
    library = load()
    if library is None:
        rows = [measure(text, language=language) for text, language in zip(texts, languages, strict=True)]
        return np.array([[row.get(name, math.nan) for name in SCORES] for row in rows]).reshape(-1, len(SCORES))
    hows = [_HOWS.get(language, 0) for language in languages]
    return library.measure(Texts(texts), hows, _automaton(library))


def scores_of(table: NDArray[np.float64]) -> list[dict[str, float]]:
    """Rows of `measure_all` as `measure` gives them."""
    there = ~np.isnan(table)
    _, first, which = np.unique(there @ (1 << np.arange(len(SCORES))), return_index=True, return_inverse=True)
    shapes = there[first]
    names = [[name for name, has in zip(SCORES, shape, strict=True) if has] for shape in shapes]
    rows = [iter(table[which == i][:, shape].tolist()) for i, shape in enumerate(shapes)]
    return [dict(zip(names[i], next(rows[i]), strict=True)) for i in which.tolist()]


_HOWS = {"zh": 1, "code": 2}


@lru_cache(maxsize=1)
def _automaton(library: TextLibrary) -> Automaton:
    return library.automaton(BOILERPLATE)


def measure(text: str, *, language: str) -> dict[str, float]:
    """All scores of a text; `language` chooses the units (`zh`, `code`, or words)."""
    if language == "code":
        return _rounded({**_characters(text), **_lines_of_code(text)})
    units = UNIT.findall(text) if language == "zh" else text.split()
    scores = {**_characters(text), **_line_scores(text), **_paragraph_scores(text), **_repetition(units)}
    scores |= _chinese(text) if language == "zh" else _words(units, text)
    return _rounded(scores)


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    """Four places, so that what a rule judges is what a person reads."""
    return {name: math.floor(value * 1e4 + 0.5) / 1e4 for name, value in scores.items()}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _characters(text: str) -> dict[str, float]:
    size = len(text)
    return {
        "chars": size,
        "punctuation": _share(len(_PUNCTUATION.findall(text)), size),
        "digits": _share(len(_DIGIT.findall(text)), size),
        "whitespace": _share(len(_SPACE.findall(text)), size),
        "odd_chars": _share(len(_ODD.findall(text)), size),
        "char_runs": _share(sum(len(m.group()) for m in _RUN.finditer(text)), size),
        "lorem_ipsum": len(_LOREM.findall(text)),
    }


def _line_scores(text: str) -> dict[str, float]:
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    total, characters = len(lines), sum(map(len, lines))
    # A line without a letter (a fence, a brace, a rule of a table) may stand twice in any good text.
    repeated = _repeated([line for line in lines if any(map(str.isalpha, line))])
    return {
        "lines": total,
        "mean_line": _share(characters, total),
        "bullet_lines": _share(sum(line.startswith(_BULLETS) for line in lines), total),
        "ellipsis_lines": _share(sum(line.endswith(("...", "…")) for line in lines), total),
        # One or two lines are one paragraph, perhaps cut: how they end says nothing.
        "ended_lines": _share(sum(line.endswith(_ENDS) for line in lines), total) if total > 2 else 1.0,
        "boilerplate_lines": _share(sum(map(_is_boilerplate, lines)), total),
        "dup_lines": _share(len(repeated), total),
        "dup_line_chars": _share(sum(map(len, repeated)), characters),
    }


def _is_boilerplate(line: str) -> bool:
    """A short line about cookies or shopping; in a long one the words may be what the text is about."""
    return len(line) <= 200 and _BOILERPLATE.search(line) is not None


def _paragraph_scores(text: str) -> dict[str, float]:
    paragraphs = [p for p in _PARAGRAPH.split(text) if p]
    repeated = _repeated(paragraphs)
    return {
        "dup_paragraphs": _share(len(repeated), len(paragraphs)),
        "dup_paragraph_chars": _share(sum(map(len, repeated)), len(text)),
    }


def _repeated(items: list[str]) -> list[str]:
    """The items that already stood before."""
    seen: set[str] = set()
    return [item for item in items if item in seen or seen.add(item)]  # type: ignore[func-returns-value]


def _words(words: Sequence[str], text: str) -> dict[str, float]:
    bare = [word for word in words if any(map(str.isalnum, word))]
    return {
        "words": len(bare),
        "mean_word": _share(sum(map(len, bare)), len(bare)),
        "alpha_words": _share(sum(any(map(str.isalpha, word)) for word in words), len(words)),
        "symbols": _share(max(text.count("#"), text.count("...") + text.count("…")), len(words)),
        "stop_words": len(STOP_WORDS & {word.lower().strip(".,;:!?\"'()") for word in words}),
    }


def _chinese(text: str) -> dict[str, float]:
    han = len(_HAN.findall(text))
    return {
        "han": han,
        "han_share": _share(han, len(text) - len(_SPACE.findall(text))),
        "sentence_marks": _share(len(_SENTENCE_MARK.findall(text)), han),
    }


def _lines_of_code(text: str) -> dict[str, float]:
    lines = text.split("\n")
    return {
        "lines": len(lines),
        "mean_line": _share(sum(map(len, lines)), len(lines)),
        "longest_line": max(map(len, lines)),
        "letters": _share(sum(map(str.isalpha, text)), len(text)),
    }


# ---- repetition: Gopher's n-gram rules over hashed units


def unit_hashes(units: Sequence[str]) -> Units:
    """One 64-bit number a unit, the same on every machine and in every run."""
    table = {unit: crc32(unit.encode("utf-8")) for unit in set(units)}
    values = np.fromiter((table[unit] for unit in units), dtype=np.uint64, count=len(units))
    return mix(values)


def mix(values: Units) -> Units:
    """The finalizer of splitmix64: spreads every input bit over all output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ngram_hashes(hashes: Units, n: int) -> Units:
    """Hashes of the n-grams of a sequence of unit hashes; empty when it is shorter than n."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        total = total * _P + hashes[i : i + count]
    return mix(total)


def _repetition(units: Sequence[str]) -> dict[str, float]:
    """Share of the characters (of units) in the most frequent 2-4-gram and in repeated 5-10-grams."""
    hashes = unit_hashes(units)
    lengths = np.fromiter(map(len, units), dtype=np.int64, count=len(units))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    scores = {f"top_{n}gram": _top_ngram(ngram_hashes(hashes, n), ends, n) for n in (2, 3, 4)}
    return scores | {f"dup_{n}gram": _duplicate_ngrams(ngram_hashes(hashes, n), lengths, n) for n in range(5, 11)}


def _top_ngram(grams: Units, ends: NDArray[np.int64], n: int) -> float:
    if len(grams) == 0:
        return 0.0
    _, first, counts = np.unique(grams, return_index=True, return_counts=True)
    best = counts.max()
    if best < 2:
        return 0.0
    start = first[counts == best]
    return _share(float((ends[start + n] - ends[start]).max() * best), float(ends[-1]))


def _duplicate_ngrams(grams: Units, lengths: NDArray[np.int64], n: int) -> float:
    """Characters inside an n-gram that stood before, each counted once, over all characters."""
    if len(grams) < 2:
        return 0.0
    _, first = np.unique(grams, return_index=True)
    repeated = np.ones(len(grams), dtype=bool)
    repeated[first] = False
    if not repeated.any():
        return 0.0
    steps = np.zeros(len(lengths) + 1, dtype=np.int64)
    steps[: len(grams)] += repeated
    steps[n : n + len(grams)] -= repeated
    covered = np.cumsum(steps[:-1]) > 0
    return _share(float(lengths[covered].sum()), float(lengths.sum()))
