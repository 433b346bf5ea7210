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
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puyu.documents.characters import HAN, KANA
from puyu.documents.texts import Bayes, Texts, load
from puyu.errors import DependencyError
from puyu.files import atomic_write, read_object, write_json
from puyu.native import native_folder

_MISSING, _REMEDY = "telling languages apart needs py3langid", "pip install 'puyu-llm[data]'"
_HAN = re.compile(f"[{HAN}]")
_KANA = re.compile(f"[{KANA}]")
_HANGUL = re.compile("[\uac00-\ud7af]")
_LATIN_WORD = re.compile(r"[A-Za-zÀ-ÿ]{2,}")
# Enough to be sure, and bounded.
_SAMPLE = 1200
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
    guess = _by_script(sample)
    return _classify(sample) if guess is None else guess


def detect_all(texts: Sequence[str]) -> list[Guess]:
    """`detect` of each, natively where that was built."""
    library = load()
    if library is None:
        return [detect(text) for text in texts]
    samples = [_sample(text) for text in texts]
    guesses = [_judge(*counts) for counts in library.scripts(Texts(samples)).tolist()]
    left = [at for at, guess in enumerate(guesses) if guess is None]
    if not left:
        return [guess for guess in guesses if guess is not None]
    tables, names, pairs = _tables()
    scores = library.languages(Texts([_encodable(samples[at]) for at in left]), tables)
    likely = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-np.inf))
    likely /= likely.sum(axis=1, keepdims=True)
    for first, second in pairs:  # two scripts of one language
        likely[:, first] += likely[:, second]
        likely[:, second] = 0.0
    for at, row in zip(left, likely, strict=True):
        best = int(row.argmax())
        guesses[at] = Guess(names[best], float(row[best]))
    return [guess for guess in guesses if guess is not None]


def _by_script(sample: str) -> Guess | None:
    """What the scripts alone say; None where the classifier must be asked."""
    han, kana, hangul = (len(pattern.findall(sample)) for pattern in (_HAN, _KANA, _HANGUL))
    letters = any(map(str.isalpha, sample))
    return _judge(han, kana, hangul, len(_LATIN_WORD.findall(sample)), letters)


def _judge(han: int, kana: int, hangul: int, words: int, letters: int) -> Guess | None:
    total = han + kana + hangul + words
    if total == 0:
        return None if letters else Guess("und", 0.0)
    if kana > 0.1 * (han + kana) and kana + han > words:
        return Guess("ja", (han + kana) / total)
    if hangul > max(han, words):
        return Guess("ko", hangul / total)
    return Guess("zh", han / total) if han / total >= HAN_SHARE else None


def _sample(text: str) -> str:
    if len(text) <= _SAMPLE:
        return text
    third = _SAMPLE // 3
    starts = (0, (len(text) - third) // 2, len(text) - third)
    return "\n".join(text[start : start + third] for start in starts)


def _classify(sample: str) -> Guess:
    language, confidence = _identifier().classify(sample)
    return Guess(str(language), float(confidence))


def _encodable(sample: str) -> str:
    """As the classifier was trained: capitals alone say nothing, accents are part of their letters."""
    return unicodedata.normalize("NFC", sample.lower() if sample.isupper() else sample)


@functools.lru_cache(maxsize=1)
def _tables() -> tuple[Bayes, list[str], list[tuple[int, int]]]:
    """What the classifier knows, as the native library reads it; its languages; pairs that are one language.

    Unpacking py3langid's model is slow, so its tables are kept beside the library, and mapped.
    """
    folder = native_folder() / f"language-{_LAYOUT}-{_version()}"
    if not (folder / "names.json").is_file():
        found = _identifier()
        for name, values in zip(_ARRAYS, _arrays(found), strict=True):
            with atomic_write(folder / f"{name}.npy", "wb") as stream:
                np.save(stream, values)
        pairs = [[int(first), int(second)] for first, second in found._alias_pairs]
        write_json(folder / "names.json", {"languages": list(map(str, found.nb_classes)), "pairs": pairs})
    names = read_object(folder / "names.json")
    tables = Bayes(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS))
    return tables, names["languages"], [(first, second) for first, second in names["pairs"]]


_LAYOUT = 2
"""Raised by hand when the files below change."""
_ARRAYS = ("moves", "weights", "priors")


def _arrays(found: Any) -> list[NDArray[Any]]:
    """One table for a step of the automaton instead of three: what it waits for is memory. It begins in row 0."""
    states = np.asarray(found.tk_nextmove, dtype=np.int64).reshape(-1, 256)
    rows, outputs = np.asarray(found.tk_row, dtype=np.int64), np.asarray(found.tk_output, dtype=np.int64)
    numbers, features = (rows - rows[0]) % len(states), outputs + 1
    moves = np.roll((numbers | features << 32)[states], -rows[0], axis=0).astype(np.uint64)
    weights, priors = (np.ascontiguousarray(part, dtype=np.float32) for part in (found.nb_ptc, found.nb_pc))
    return [moves, weights, priors]


def _version() -> str:
    try:
        return version("py3langid")
    except PackageNotFoundError as error:
        raise DependencyError(_MISSING, remedy=_REMEDY) from error


@functools.lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DependencyError(_MISSING, remedy=_REMEDY) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
