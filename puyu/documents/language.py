"""Which language a text is in: `zh`, `en`, another ISO 639 code, or `und`; offline.

    >>> detect("今天天气很好，我们去公园散步吧。").language
    'zh'

Scripts are counted first: Chinese pages about software are full of English words, which misleads a byte n-gram
classifier, and kana or hangul settle Japanese and Korean. Latin and other scripts go to py3langid (Lui and Baldwin,
ACL 2012), whose tables are inside the package. `code` is never guessed: a source declares it.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from puyu.errors import DependencyError

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_HAN = re.compile(f"[{HAN}]")
_KANA = re.compile("[\u3040-\u30ff]")
_HANGUL = re.compile("[\uac00-\ud7af]")
_LATIN_WORD = re.compile(r"[A-Za-zÀ-ÿ]{2,}")
# Enough to be sure, and bounded: the classifier walks every byte in Python.
_SAMPLE = 2400
HAN_SHARE = 0.15
"""Han characters over Han characters plus Latin words, from which on a text is Chinese."""


@dataclass(frozen=True, slots=True)
class Guess:
    """The language and how sure the guess is, 0 to 1."""

    language: str
    confidence: float


def detect(text: str) -> Guess:
    """Guess from three places of the text, so that one table or listing does not decide."""
    sample = _sample(text)
    han, kana, hangul = (len(pattern.findall(sample)) for pattern in (_HAN, _KANA, _HANGUL))
    words = len(_LATIN_WORD.findall(sample))
    total = han + kana + hangul + words
    if total == 0:
        return Guess("und", 0.0) if not any(c.isalpha() for c in sample) else _classify(sample)
    if kana > 0.1 * (han + kana) and kana + han > words:
        return Guess("ja", (han + kana) / total)
    if hangul > max(han, words):
        return Guess("ko", hangul / total)
    if han / total >= HAN_SHARE:
        return Guess("zh", han / total)
    return _classify(sample)


def _sample(text: str) -> str:
    if len(text) <= _SAMPLE:
        return text
    third = _SAMPLE // 3
    starts = (0, (len(text) - third) // 2, len(text) - third)
    return "\n".join(text[start : start + third] for start in starts)


def _classify(sample: str) -> Guess:
    language, confidence = _identifier().classify(sample)
    return Guess(str(language), float(confidence))


@functools.lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DependencyError(
            "telling languages apart needs py3langid", remedy="pip install 'puyu-llm[data]'"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
