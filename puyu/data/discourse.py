"""Statistics of long texts: discourse words, pronouns, cohesion, complexity, and lines without sense.

    >>> found = discourse(["However, it rained.\\nTherefore we stayed at home."])[0]
    >>> found["connectives"], found["pronouns"]
    (0.25, 0.25)

InternLM2 (2024, section 3.1.3) filters long texts by features of this kind, to remove what is no text rather than to
pick the best: they become reliable at this length only. LongWanjuan (Lv et al., 2024) names coherence, cohesion
(connectives, pronouns) and complexity (type-token ratio, length of paragraphs); formulas and word lists are ours.

`connectives`, `pronouns`   phrases of the lists below, per word (a Han character is a word)
`cohesion`                  mean over neighboring passages (sentences and lines, 60 words together): words of
                            five letters and more, or pairs of Han characters, in both over those in the smaller one
`type_token`                different words in a window of 500, mean over the windows
`line_words`                words in a line; `sentence_words`: words for each end of a sentence
`nonsense`                  characters in lines of which less than half are letters, or with a word of more than 80
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puyu.data.measure import UNIT
from puyu.data.ngram import spans, unit_hashes
from puyu.data.ngram_native import load
from puyu.data.ngram_train import table_of
from puyu.documents.characters import HAN, KANA, folded

NAMES = ("words", "connectives", "pronouns", "cohesion", "type_token", "line_words", "sentence_words", "nonsense")
WINDOW = 500
PASSAGE = 60

CONNECTIVES = (
    *("and", "but", "or", "nor", "yet", "so", "because", "although", "though", "unless", "until", "while", "whereas"),
    *("if", "since", "whether", "when", "whenever", "before", "after", "as soon as", "as long as", "as well as"),
    *("however", "therefore", "thus", "hence", "moreover", "furthermore", "nevertheless", "nonetheless", "otherwise"),
    *("instead", "meanwhile", "consequently", "accordingly", "besides", "likewise", "similarly", "indeed", "finally"),
    *("then", "still", "also", "even though", "even if", "in addition", "in contrast", "in fact", "in particular"),
    *("in other words", "in short", "in conclusion", "in order to", "as a result", "as if", "as though", "rather than"),
    *("on the other hand", "on the contrary", "for example", "for instance", "at last", "at first", "of course"),
    *("especially", "formally", "specifically", "generally", "namely", "that is", "such as", "due to", "so that"),
    *(
        "因为",
        "所以",
        "因此",
        "因而",
        "于是",
        "从而",
        "由于",
        "既然",
        "但是",
        "但",
        "可是",
        "然而",
        "不过",
        "却",
        "而是",
    ),
    *("虽然", "尽管", "即使", "即便", "如果", "假如", "若是", "只要", "只有", "除非", "否则", "无论", "不论", "不管"),
    *("而且", "并且", "并", "况且", "何况", "甚至", "以及", "同时", "此外", "另外", "首先", "其次", "然后", "最后"),
    *("总之", "例如", "比如", "换句话说", "也就是说", "事实上", "尤其", "特别是", "具体来说", "一般来说", "反之"),
    *("相反", "与此同时", "综上", "由此可见", "接着", "随后", "便", "遂", "乃", "故", "且", "若", "倘", "虽", "岂"),
    *("只见", "却说", "且说", "话说", "不想", "谁知", "不题", "正是", "只得", "方才", "又", "也", "就", "才"),
)
"""What joins clauses and sentences, English and Chinese, modern and classical."""
PRONOUNS = (
    *("i", "me", "my", "mine", "myself", "you", "your", "yours", "yourself", "he", "him", "his", "himself", "she"),
    *("her", "hers", "herself", "it", "its", "itself", "we", "us", "our", "ours", "ourselves", "they", "them"),
    *("their", "theirs", "themselves", "this", "that", "these", "those", "who", "whom", "whose", "which"),
    *("我", "我们", "你", "你们", "您", "他", "他们", "她", "她们", "它", "它们", "自己", "咱", "咱们", "俺", "谁"),
    *("这", "这些", "这个", "那", "那些", "那个", "此", "其", "之", "吾", "汝", "尔", "彼"),
)
"""What refers to somebody or something named elsewhere."""
_CLASSES = {1: CONNECTIVES, 2: PRONOUNS}
_PRIME = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_HAN = re.compile(f"[{HAN}{KANA}]")
_ENDS = frozenset(".!?。！？")


def discourse(texts: Sequence[str]) -> list[dict[str, float]]:
    """The scores `NAMES` of each text, to four places."""
    library = load()
    if library is None:
        return [_discourse(text) for text in texts]
    keys, classes, longest = _phrases()
    rows = library.discourse(texts, (keys, classes, longest), sizes=(WINDOW, PASSAGE))
    return [dict(zip(NAMES, row, strict=True)) for row in rows.tolist()]


@lru_cache(maxsize=1)
def _phrases() -> tuple[NDArray[np.uint64], NDArray[np.uint8], int]:
    """(hashes in slots, class of each, units of the longest)."""
    rows = {_phrase(phrase): kind for kind, phrases in _CLASSES.items() for phrase in phrases}
    keys = np.array(sorted(rows), dtype=np.uint64)
    classes = np.array([rows[key] for key in sorted(rows)], dtype=np.uint8)
    longest = max(len(unit_hashes([phrase])) for phrases in _CLASSES.values() for phrase in phrases)
    slots, placed = table_of(keys, (classes, 0))
    return slots, placed, longest


def _phrase(phrase: str) -> int:
    return _mixed(unit_hashes([phrase]).tolist())


def _mixed(hashes: Sequence[int]) -> int:
    total = 0
    for value in hashes:
        total = (total * _PRIME + value) & _MASK
    total = ((total ^ (total >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    total = ((total ^ (total >> 27)) * 0x94D049BB133111EB) & _MASK
    return total ^ (total >> 31)


# ---- the slow twin of cpp/discourse.h


def _discourse(text: str) -> dict[str, float]:
    units = [unit for _, unit in spans(text)]
    words = [unit for unit in units if _is_word(unit)]
    counts = _count_phrases(units)
    lines = sum(any(map(_is_word, line)) for line in _split(units))
    ends = sum(unit in _ENDS for unit in units)
    found = {
        "words": len(words),
        "connectives": counts[1] / max(len(words), 1),
        "pronouns": counts[2] / max(len(words), 1),
        "cohesion": _cohesion(text),
        "type_token": _type_token(words),
        "line_words": len(words) / lines if lines else 0.0,
        "sentence_words": len(words) / max(ends, 1),
        "nonsense": _nonsense(text),
    }
    return {name: float(np.floor(value * 1e4 + 0.5) / 1e4) for name, value in found.items()}


def _is_word(unit: str) -> bool:
    return UNIT.match(unit) is not None


def _is_han(unit: str) -> bool:
    return _HAN.match(unit) is not None


def _split(units: Sequence[str]) -> list[list[str]]:
    lines: list[list[str]] = [[]]
    for unit in units:
        if unit == "\n":
            lines.append([])
        else:
            lines[-1].append(unit)
    return lines


def _count_phrases(units: Sequence[str]) -> list[int]:
    known = {tuple(unit for _, unit in spans(phrase)): kind for kind, all in _CLASSES.items() for phrase in all}
    longest, counts, at = max(map(len, known)), [0, 0, 0], 0
    while at < len(units):
        sizes = [n for n in range(1, longest + 1) if tuple(units[at : at + n]) in known and at + n <= len(units)]
        size = max(sizes, default=1)
        counts[known[tuple(units[at : at + size])] if sizes else 0] += 1
        at += size
    return counts


def _cohesion(text: str) -> float:
    passages = _passages(text)
    shares = [len(a & b) / min(len(a), len(b)) if a and b else 0.0 for a, b in itertools.pairwise(passages)]
    return sum(shares) / len(shares) if shares else 0.0


def _passages(text: str) -> list[set[Any]]:
    """Content words of each passage."""
    whole = folded(text)
    rows: list[set[Any]] = [set()]
    since, before, end = 0, "", -1
    for begin, unit in spans(text):
        if _is_word(unit):
            since += 1
            size = _size(whole, begin)
            if not _is_han(unit) and size >= 5:
                rows[-1].add(unit)
            if _is_han(unit) and before and end == begin:
                rows[-1].add((before, unit))
            before, end = unit if _is_han(unit) else "", begin + size
        elif (unit == "\n" or unit in _ENDS) and since >= PASSAGE:
            rows.append(set())
            since = 0
    return rows if since >= PASSAGE or len(rows) == 1 else rows[:-1]


def _size(text: str, begin: int) -> int:
    """Characters of the word there, before numbers became 0."""
    match = UNIT.match(text, begin)
    return len(match.group()) if match else 1


def _type_token(words: Sequence[str]) -> float:
    window = min(WINDOW, len(words))
    if not window:
        return 0.0
    shares = [len(set(words[at : at + window])) / window for at in range(0, len(words) - window + 1, window)]
    return sum(shares) / len(shares)


def _nonsense(text: str) -> float:
    total = bad = 0
    for line in text.split("\n"):
        size = sum(not character.isspace() for character in line)
        longest = max((len(word) for word in UNIT.findall(line) if not _is_han(word)), default=0)
        total += size
        bad += size if 2 * sum(map(str.isalpha, line)) < size or longest > 80 else 0
    return bad / total if total else 0.0
