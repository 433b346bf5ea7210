"""What the published rule sets count, as their code counts it: Gopher's, FineWeb's and C4's statistics of a text.

    >>> gopher_quality("the cat sat on the mat", language="en")["mean_word"] == 17 / 6
    True
    >>> c4_page("Menu\\nThe cat sat on the mat.", LineRules())[0]
    'The cat sat on the mat.'

Other than the scores of `puyu.data.measure`, which are ours, these follow datatrove 0.10 (and for C4 also TensorFlow
Datasets) to the last character, so that a decision here is a decision there. Two things are given from outside in
theirs and are ours here: words are runs of non-blanks (for Chinese the units of `puyu.data.measure`), where they ask a
tokenizer of NLTK or spaCy; and sentences are counted by their end marks (`SENTENCE`), where they ask NLTK's Punkt.
Ratios are exact doubles, not rounded; what has nothing to be divided by is 0.

It knows no threshold and drops nothing. Each function for one text is the oracle of `measured` and `c4_pages`, which
take many at a time natively.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from puyu.data.measure import STOP_WORDS, UNIT
from puyu.documents.texts import Texts, load

Family = Literal["gopher_quality", "gopher_repetition", "fineweb"]
SCORES: dict[Family, tuple[str, ...]] = {
    "gopher_quality": (
        *("words", "mean_word", "hashes", "ellipses", "bullet_lines", "ellipsis_lines", "alpha_words", "stop_words"),
    ),
    "gopher_repetition": (
        *("chars", "dup_paragraphs", "dup_paragraph_chars", "dup_lines", "dup_line_chars"),
        *(f"top_{n}gram" for n in (2, 3, 4)),
        *(f"dup_{n}gram" for n in range(5, 11)),
    ),
    "fineweb": ("lines", "ended_lines", "short_lines", "dup_line_chars", "line_breaks"),
}
"""Names of the columns of `measured`."""
C4_SCORES = (
    *("lines", "lines_removed", "long_word_lines", "unended_lines", "short_lines", "javascript_lines", "policy_lines"),
    *("lorem_ipsum", "curly_brackets", "sentences"),
)
"""Names of the columns of `c4_pages`. Lines are those that are not blank; those of a reason have that reason first."""

SENTENCE = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|\Z)|[。！？]+[”’」』）]*")
"""The end of a sentence; what stands behind the last one is a sentence too."""
CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")

# Hexadecimal code points and ranges, as in datatrove's TERMINAL_PUNCTUATION and PUNCTUATION.
_TERMINAL = (
    "21 2e 3f 589 61d-61f 6d4 700-702 7f9 837 839 83d-83e 964-965 104a-104b 1362 1367-1368 166e 1735-1736 17d4-17d6 "
    "17d9-17da 1803 1809 1944-1945 1aa8-1aab 1b5a-1b5b 1b5e-1b5f 1b7d-1b7e 1c3b-1c3c 1c7e-1c7f 203c-203d 2047-2049 "
    "2e2e 2e3c 2e53-2e54 3002 a4ff a60e-a60f a6f3 a6f7 a876-a877 a8ce-a8cf a92f a9c8-a9c9 aa5d-aa5f aaf0-aaf1 abeb "
    "fe52 fe56-fe57 ff01 ff0e ff1f ff61 10a56-10a57 10f55-10f59 10f86-10f89 11047-11048 110be-110c1 11141-11143 "
    "111c5-111c6 111cd 111de-111df 11238-11239 1123b-1123c 112a9 1144b-1144c 115c2-115c3 115c9-115d7 11641-11642 "
    "1173c-1173e 11944 11946 11a42-11a43 11a9b-11a9c 11c41-11c42 11ef7-11ef8 11f43-11f44 16a6e-16a6f 16af5 "
    "16b37-16b38 16b44 16e98 1bc9f 1da88"
)
_OTHER_MARKS = (
    "0-8 b-1f 22-2d 2f 3a-3e 40 5b-60 7b-9f ab b4 bb 2013-2014 2019 201c-201e 2026 2236 2501 25ba 3001 3008-300d "
    "3010-3011 ff05 ff08-ff09 ff0c ff11 ff1a-ff1b ff5e"
)


def _points(ranges: str) -> Iterable[int]:
    for part in ranges.split():
        first, _, last = part.partition("-")
        yield from range(int(first, 16), int(last or first, 16) + 1)


TERMINAL = frozenset(map(chr, _points(_TERMINAL)))
"""What ends a line for FineWeb."""
MARKS = TERMINAL | frozenset(map(chr, _points(_OTHER_MARKS)))
"""What makes no word by itself for Gopher."""


@lru_cache(maxsize=1)
def _marks() -> NDArray[np.uint8]:
    """The same as bits of all code points (`Mark` in cpp/presets.h)."""
    table = np.zeros(0x110000, dtype=np.uint8)
    table[[ord(mark) for mark in MARKS]] = 1
    table[[ord(mark) for mark in TERMINAL]] |= 2
    return table


@dataclass(frozen=True, slots=True)
class LineRules:
    """What C4 does with a line; None and empty switch off."""

    longest_word: int | None = 1000
    citations: bool = True
    ends: str = ".?!\"'"
    line_words: int | None = 3
    words_after_citations: bool = False
    lorem_ipsum: int | None = 0
    javascript: bool = True
    curly_brackets: int | None = 0
    policy: bool = True


# ---- many texts


def measured(
    family: Family, texts: Sequence[str], languages: Sequence[str], *, short_line: int = 30
) -> NDArray[np.float64]:
    """Scores of each text -> [texts, SCORES[family]]; natively where that was built."""
    library, names = load(), SCORES[family]
    if library is not None:
        units = [language == "zh" for language in languages]
        number = list(SCORES).index(family)
        return library.published(Texts(texts), units, _marks(), family=number, short_line=short_line)
    pairs = zip(texts, languages, strict=True)
    rows = [twin(family, text, language=language, short_line=short_line) for text, language in pairs]
    return np.array([[row[name] for name in names] for row in rows]).reshape(-1, len(names))


def c4_pages(texts: Sequence[str], rules: LineRules) -> tuple[list[str], NDArray[np.float64]]:
    """`c4_page` of each text: (what is kept of it, scores [texts, C4_SCORES])."""
    library = load()
    if library is None:
        pages = [c4_page(text, rules) for text in texts]
        rows = [[scores[name] for name in C4_SCORES] for _, scores in pages]
        return [text for text, _ in pages], np.array(rows, dtype=np.float64).reshape(-1, len(C4_SCORES))
    numbers = {
        name: -1 if (value := getattr(rules, name)) is None else int(value)
        for name in LineRules.__slots__
        if name != "ends"
    }
    return library.c4(Texts(texts), numbers, rules.ends)


# ---- the twins


def twin(family: Family, text: str, *, language: str, short_line: int = 30) -> dict[str, float]:
    """The scores of one text, in plain Python."""
    if family == "fineweb":
        return fineweb(text, language=language, short_line=short_line)
    return (gopher_quality if family == "gopher_quality" else gopher_repetition)(text, language=language)


def words_of(text: str, language: str) -> list[str]:
    """Runs of non-blanks; the units of `puyu.data.measure` for Chinese."""
    return UNIT.findall(text) if language == "zh" else text.split()


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def gopher_quality(text: str, *, language: str) -> dict[str, float]:
    """What datatrove's GopherQualityFilter compares, in its order (Rae et al. 2021, A1.1)."""
    words, lines = words_of(text, language), text.splitlines()
    bare = [word for word in words if not MARKS.issuperset(word)]
    ends = [line.rstrip().endswith(("...", "…")) for line in lines]
    return {
        "words": len(bare),
        "mean_word": _share(sum(map(len, bare)), len(bare)),
        "hashes": _share(text.count("#"), len(words)),
        "ellipses": _share(text.count("...") + text.count("…"), len(words)),
        "bullet_lines": _share(sum(line.lstrip().startswith(("•", "-")) for line in lines), len(lines)),
        "ellipsis_lines": _share(sum(ends), len(lines)),
        "alpha_words": _share(sum(any(map(str.isalpha, word)) for word in words), len(words)),
        "stop_words": len(STOP_WORDS.intersection(words)),
    }


def gopher_repetition(text: str, *, language: str) -> dict[str, float]:
    """What datatrove's GopherRepetitionFilter compares (Rae et al. 2021, table A1)."""
    words, size = words_of(text, language), len(text)
    paragraphs, lines = re.split(r"\n{2,}", text.strip()), re.split(r"\n+", text)
    scores: dict[str, float] = {"chars": size}
    for name, parts in (("paragraph", paragraphs), ("line", lines)):
        again = _repeated(parts)
        scores |= {f"dup_{name}s": _share(len(again), len(parts))}
        scores |= {f"dup_{name}_chars": _share(sum(map(len, again)), size)}
    scores |= {f"top_{n}gram": _share(_top(words, n), size) for n in (2, 3, 4)}
    return scores | {f"dup_{n}gram": _share(_duplicated(words, n), size) for n in range(5, 11)}


def _repeated(parts: Iterable[str]) -> list[str]:
    """Those that already stood before."""
    seen: set[str] = set()
    return [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]


def _top(words: Sequence[str], n: int) -> int:
    """Characters, blanks between words included, in the most frequent n-gram, be it that all stand once."""
    grams = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    return max(((len(gram) * count, count) for gram, count in grams.most_common(1)), default=(0, 0))[0]


def _duplicated(words: Sequence[str], n: int) -> int:
    """Characters in n-grams that stood before, without blanks; the next one is looked for behind one that did."""
    seen: set[str] = set()
    at = characters = 0
    while at + n <= len(words):
        gram = "".join(words[at : at + n])
        is_again = gram in seen
        seen.add(gram)
        characters += len(gram) if is_again else 0
        at += n if is_again else 1
    return characters


def fineweb(text: str, *, language: str, short_line: int = 30) -> dict[str, float]:
    """What datatrove's FineWebQualityFilter compares (Penedo et al. 2024, section 3.6)."""
    lines = [line for line in text.split("\n") if line.strip()]
    breaks = text.count("\n")
    return {
        "lines": len(lines),
        "ended_lines": _share(sum(line[-1] in TERMINAL for line in lines), len(lines)),
        "short_lines": _share(sum(len(line) <= short_line for line in lines), len(lines)),
        "dup_line_chars": _share(sum(map(len, _repeated(lines))), len(text) - breaks),
        "line_breaks": breaks / max(len(words_of(text, language)), 1),
    }


# ---- C4


def c4_page(text: str, rules: LineRules) -> tuple[str, dict[str, float]]:
    """(what is kept of the text, its scores), as `clean_page` of TensorFlow Datasets and datatrove's C4QualityFilter.

    A page with more lines about lorem ipsum, or with a curly bracket, than the rules allow ends there: what stands
    behind is not looked at, and exactly one of the two scores is beyond its limit.
    """
    scores = dict.fromkeys(C4_SCORES, 0.0)
    kept: list[str] = []
    for given in text.splitlines():
        line, reason = _c4_line(given.strip(), rules, scores)
        scores["lines"] += bool(given.strip())
        if reason == "page":
            break
        if reason:
            scores["lines_removed"] += bool(given.strip())
            scores[reason] += bool(given.strip())
            continue
        scores["sentences"] += sentences(line)
        kept.append(line)
    return "\n".join(kept).strip(), scores


def _c4_line(line: str, rules: LineRules, scores: dict[str, float]) -> tuple[str, str]:
    """(the line without citations, why it goes: a score, `page` where the whole page does, or nothing)."""
    words = line.split()
    if rules.longest_word is not None and any(len(word) > rules.longest_word for word in words):
        return line, "long_word_lines"
    line = CITATION.sub("", line) if rules.citations else line
    words = line.split() if rules.words_after_citations else words
    if rules.ends and (not line.endswith(tuple(rules.ends)) or line.endswith("...")):
        return line, "unended_lines"
    if rules.line_words is not None and len(words) < rules.line_words:
        return line, "short_lines"
    small = line.lower()
    if _is_beyond(scores, "lorem_ipsum", rules.lorem_ipsum, lambda: "lorem ipsum" in small):
        return line, "page"
    if rules.javascript and "javascript" in small:
        return line, "javascript_lines"
    if _is_beyond(scores, "curly_brackets", rules.curly_brackets, lambda: "{" in line):
        return line, "page"
    return line, "policy_lines" if rules.policy and any(phrase in small for phrase in POLICY) else ""


def _is_beyond(scores: dict[str, float], name: str, limit: int | None, holds: Callable[[], bool]) -> bool:
    """Count a line that holds it, and say whether there are too many now."""
    if limit is None or not holds():
        return False
    scores[name] += 1
    return scores[name] > limit


def sentences(line: str) -> int:
    """How many sentences a line holds, at least one."""
    ends = [match.end() for match in SENTENCE.finditer(line)]
    rest = line[ends[-1] if ends else 0 :].strip()
    return max(len(ends) + bool(rest), 1)
