"""Block lists: domains, and words of 28 languages, as map stages.

    >>> config = SafetyConfig(words_max=2)
    >>> stage = WordFilter(config)
    >>> stage.entries("en")[:2]
    ('2g1c', '2 girls 1 cup')

InternLM2 (2024, section 3.1.1) blocks about 13 million domains and 36,289 words, and words with caution, since a word
alone says little: here a document goes when it holds more than a few *different* entries of the list of its language.
Languages with blanks are searched for whole words, others for the characters. Its lists are not public; a domain list
is a file of the user's, the word lists are LDNOOBW's, which come with this package (CC-BY 4.0, `puyu/data/ldnoobw`).
"""

from __future__ import annotations

import gzip
import hashlib
import re
from array import array
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from puyu.configure import Config
from puyu.documents.characters import HAN, KANA
from puyu.documents.document import Document
from puyu.documents.stages import Drop, Scores, Verdict
from puyu.documents.texts import Automaton, Texts, load
from puyu.errors import InputError

_LISTS = Path(__file__).parent / "ldnoobw"
_HOST = re.compile(r"[^\s#|^/]+\.[^\s#|^/]+")


class SafetyConfig(Config):
    """Block lists; what is not given is not asked."""

    domains: list[Path] = []
    """Files of domains, one a line (plain, hosts-file or `||domain^` form, also .gz): a document from one of them or
    from one of their subdomains goes, by its `url`."""
    words: bool = True
    """Whether the word lists that come with the package are used."""
    more_words: dict[str, Path] = {}
    """More words by language, one entry a line; `any`: for every language."""
    words_max: int = 2
    """Different listed words that a document may hold."""


class DomainFilter:
    """Map stage: drops documents from a listed domain."""

    name = "domains"

    def __init__(self, files: Sequence[Path]) -> None:
        self._blocked = _domains(_stamped(files))

    def __call__(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[Verdict]:
        return [Verdict(document, {}, self._drop(document)) for document in documents]

    def _drop(self, document: Document) -> Drop | None:
        url = document.metadata.get("url")
        if not isinstance(url, str):
            return None
        labels = host_of(url).split(".")
        for start in range(len(labels) - 1):
            domain = ".".join(labels[start:])
            key = np.uint64(_hash(domain))
            at = np.searchsorted(self._blocked, key)
            if at < len(self._blocked) and self._blocked[at] == key:
                return Drop("blocked_domain", ".".join(labels), domain)
        return None


def host_of(url: str) -> str:
    """The host of an address in lower case; empty where it has none."""
    try:
        return (urlsplit(url if "//" in url else f"//{url}").hostname or "").rstrip(".").lower()
    except ValueError:  # brackets that are no address
        return ""


def _stamped(paths: Sequence[Path]) -> tuple[tuple[Path, int, int], ...]:
    """Files with what changes when they do, so that what was made of them can be kept."""
    try:
        return tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    except FileNotFoundError as error:
        raise InputError(f"no such list: {error.filename}", remedy="check `safety`") from error


@lru_cache(maxsize=2)
def _domains(files: tuple[tuple[Path, int, int], ...]) -> NDArray[np.uint64]:
    """64 bits of each domain, sorted: 13 million take 104 MB."""
    found = array("Q")
    for path, _, _ in files:
        for line in _lines(path):
            # The last word that looks like a host: hosts files begin with an address, filter lists with `||`.
            hosts = _HOST.findall(line.partition("#")[0])
            if hosts:
                found.append(_hash(hosts[-1].lower().removeprefix("*.").strip(".")))
    return np.unique(np.frombuffer(found, dtype=np.uint64)) if found else np.empty(0, dtype=np.uint64)


def _hash(domain: str) -> int:
    return int.from_bytes(hashlib.blake2b(domain.encode(), digest_size=8).digest(), "little")


def _lines(path: Path) -> list[str]:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8-sig").splitlines()
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{path} is not a list of UTF-8 lines: {error}") from error


class WordFilter:
    """Map stage: drops documents with more than a few different entries of the list of their language."""

    name = "words"

    def __init__(self, config: SafetyConfig) -> None:
        self._config = config

    def entries(self, language: str) -> tuple[str, ...]:
        """What is looked for in a text of a language."""
        files = [_LISTS / f"{language}.txt"] if self._config.words and language.isalpha() else []
        more = [path for name, path in sorted(self._config.more_words.items()) if name in (language, "any")]
        return _entries(_stamped([path for path in files if path.is_file()] + more))

    def __call__(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[Verdict]:
        by_language: dict[str, list[int]] = defaultdict(list)
        for at, document in enumerate(documents):
            by_language[document.language].append(at)
        counts = np.zeros((len(documents), 2), dtype=np.int64)
        for language, rows in by_language.items():
            entries = self.entries(language)
            if entries:
                counts[rows] = count_entries([documents[at].text for at in rows], entries)
        pairs = zip(documents, counts.tolist(), strict=True)
        return [self._verdict(document, different, places) for document, (different, places) in pairs]

    def _verdict(self, document: Document, different: int, places: int) -> Verdict:
        limit = self._config.words_max
        drop = Drop("listed_words", different, limit) if different > limit else None
        return Verdict(document, {"listed_words": different, "listed_word_places": places}, drop)


@lru_cache(maxsize=64)
def _entries(files: tuple[tuple[Path, int, int], ...]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for path, _, _ in files:
        found.update((word, None) for line in _lines(path) if (word := line.strip()))
    return tuple(found)


def count_entries(texts: Sequence[str], entries: tuple[str, ...]) -> NDArray[np.int64]:
    """[texts, 2]: different entries and places of entries in each text. ASCII in any case."""
    library = load()
    if library is None:
        return np.array([_count(text, entries) for text in texts], dtype=np.int64).reshape(-1, 2)
    automaton, whole = _search(entries)
    return library.count_words(Texts(texts), automaton, whole)


@lru_cache(maxsize=64)
def _search(entries: tuple[str, ...]) -> tuple[Automaton, NDArray[np.uint8]]:
    library = load()
    assert library is not None
    return library.automaton(entries), np.array([_is_whole(entry) for entry in entries], dtype=np.uint8)


def _is_whole(entry: str) -> bool:
    """Whether letters may not touch an entry: not where words stand without blanks."""
    return re.search(f"[{HAN}{KANA}\u0e00-\u0e7f]", entry) is None


def _count(text: str, entries: Sequence[str]) -> tuple[int, int]:
    """What the library counts: all places, overlapping ones too."""
    different = places = 0
    lowered = text.translate(_ASCII_LOWER)
    for entry in dict.fromkeys(entry.translate(_ASCII_LOWER) for entry in entries):
        at = lowered.find(entry)
        count = 0
        while at >= 0:
            end = at + len(entry)
            count += not (_is_whole(entry) and (_touches(text[at - 1 : at]) or _touches(text[end : end + 1])))
            at = lowered.find(entry, at + 1)
        different, places = different + (count > 0), places + count
    return different, places


_ASCII_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}


def _touches(character: str) -> bool:
    return character.isalnum() and re.match(f"[{HAN}{KANA}]", character) is None
