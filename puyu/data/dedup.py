"""Duplicates as group stages: exact text, repeated paragraphs, and near copies by MinHash-LSH.

    >>> near = NearDedup(NearConfig())
    >>> text = " ".join(map(str, "abcdefghijklmnopqrstuvwxyz"))
    >>> near.estimate(near.signature(text), near.signature(text))
    1.0

Among copies the one of best quality stays, then the longer, then the smaller id: an order of contents, so that neither
the order of the input nor its cut into shards changes what is kept. Every document that goes names the one that stays
and their similarity. Ids must be unique among the keys.

MinHash after Broder (1997); 128 hashes, 5-grams and 0.7 are InternLM2's (2024, section 3.1.1); 16 bands of 8 rows put
the steepest part of the LSH curve at (1/16)^(1/8) = 0.71.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from puyu.configure import Config
from puyu.data.measure import UNIT, Units, ngram_hashes, unit_hashes
from puyu.documents.characters import folded
from puyu.documents.document import Document
from puyu.documents.stages import Drop, Scores, rank
from puyu.documents.texts import Texts, load

Signature = NDArray[np.uint32]
_DIGITS = re.compile(r"\d+")
_PARAGRAPH = re.compile(r"\n\s*\n")
_SHORT_PARAGRAPH = 24


class NearConfig(Config):
    """MinHash-LSH."""

    threshold: float = 0.7
    """Documents whose estimated Jaccard similarity is at least this are copies."""
    bands: int = 16
    """Bands of the signature; two documents meet when one band is equal."""
    rows: int = 8
    """Hashes in a band; bands x rows is the size of the signature."""
    ngram: int = 5
    """Shingle length, in words; in characters for Chinese."""
    seed: int = 20240326
    """Chooses the hash functions."""


class DedupConfig(Config):
    """Which kinds of duplicates go."""

    exact: bool = True
    """Drop texts that are equal apart from case and white space."""
    paragraphs: float | None = None
    """Drop a document when more than this share of its characters stands, paragraph by paragraph, in better ones."""
    near: NearConfig | None = NearConfig()
    """Drop near copies; null: keep them."""


@dataclass(frozen=True, slots=True)
class _Key:
    """What dedup knows of a document instead of its text."""

    id: str
    quality: float
    size: int
    digest: bytes = b""
    paragraphs: tuple[tuple[bytes, int], ...] = ()
    signature: Signature | None = field(default=None, compare=False)


def best_first(keys: Iterable[_Key]) -> list[_Key]:
    return sorted(keys, key=lambda key: rank(key.quality, key.size, key.id))


def _key(document: Document, scores: Scores, **parts: object) -> _Key:
    return _Key(document.id, scores.get("quality", 0.0), len(document.text), **parts)  # type: ignore[arg-type]


def _digests(texts: Sequence[str]) -> list[bytes]:
    library = load()
    if library is None:
        return [_digest(text) for text in texts]
    return [row.tobytes() for row in library.digests(Texts(texts))]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(" ".join(folded(text).split()).encode("utf-8"), digest_size=16).digest()


class ExactDedup:
    """Group stage: of texts that are equal apart from case and white space, one stays."""

    name = "exact"

    def keys(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[_Key]:
        digests = _digests([document.text for document in documents])
        rows = zip(documents, scores, digests, strict=True)
        return [_key(document, row, digest=digest) for document, row, digest in rows]

    def decide(self, keys: Sequence[_Key]) -> dict[str, Drop]:
        owner: dict[bytes, str] = {}
        drops: dict[str, Drop] = {}
        for key in best_first(keys):
            first = owner.setdefault(key.digest, key.id)
            if first != key.id:
                drops[key.id] = Drop("exact_duplicate", 1.0, 1.0, first)
        return drops


class ParagraphDedup:
    """Group stage: a document goes when most of it stands, paragraph by paragraph, in documents that stay."""

    name = "paragraphs"

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def keys(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[_Key]:
        return [_key(*row, paragraphs=self._paragraphs(row[0].text)) for row in zip(documents, scores, strict=True)]

    def _paragraphs(self, text: str) -> tuple[tuple[bytes, int], ...]:
        long = [part for part in _PARAGRAPH.split(text) if len(part) >= _SHORT_PARAGRAPH]
        return tuple(zip(_digests(long), map(len, long), strict=True))

    def decide(self, keys: Sequence[_Key]) -> dict[str, Drop]:
        owner: dict[bytes, str] = {}
        drops: dict[str, Drop] = {}
        for key in best_first(keys):
            held: dict[str, int] = defaultdict(int)
            for digest, size in key.paragraphs:
                if digest in owner:
                    held[owner[digest]] += size
            share = round(sum(held.values()) / key.size, 4) if key.size else 0.0
            if share > self.threshold:
                most = min(held, key=lambda id: (-held[id], id))
                drops[key.id] = Drop("paragraphs_elsewhere", share, self.threshold, most)
            else:
                owner.update((digest, key.id) for digest, _ in key.paragraphs if digest not in owner)
        return drops


class NearDedup:
    """Group stage: near copies found by MinHash-LSH and verified on the whole signature."""

    name = "near"

    def __init__(self, config: NearConfig) -> None:
        self.config = config
        random = np.random.Generator(np.random.PCG64(config.seed))
        size = config.bands * config.rows
        self._factors = random.integers(0, 2**63, size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._offsets = random.integers(0, 2**63, size, dtype=np.uint64)

    def keys(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[_Key]:
        signatures, counts = self.signatures([document.text for document in documents])
        return [
            _key(document, row, signature=signature if count else None)
            for document, row, signature, count in zip(documents, scores, signatures, counts.tolist(), strict=True)
        ]

    def shingles(self, text: str) -> Units:
        """Hashes of n-grams of words (characters for Chinese), without case, punctuation and the value of numbers."""
        hashes = unit_hashes(UNIT.findall(_DIGITS.sub("0", folded(text))))
        return ngram_hashes(hashes, min(self.config.ngram, len(hashes))) if len(hashes) else hashes

    def signature(self, text: str) -> Signature | None:
        """The smallest value of each hash function over the shingles; None for a text without any unit."""
        shingles = self.shingles(text)
        if len(shingles) == 0:
            return None
        smallest = np.full(len(self._factors), np.iinfo(np.uint64).max, dtype=np.uint64)
        for start in range(0, len(shingles), 2048):
            # Multiply-shift hashing modulo 2^64: the high bits are the hash, so the minimum needs no shift.
            hashed = np.multiply.outer(self._factors, shingles[start : start + 2048])
            hashed += self._offsets[:, None]
            np.minimum(smallest, hashed.min(axis=1), out=smallest)
        return (smallest >> np.uint64(32)).astype(np.uint32)

    def signatures(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """`signature` of each text [texts, bands * rows], natively where that was built; and how many shingles each
        has: with none there is no signature."""
        library = load()
        if library is not None and len(self._factors) % 32 == 0:
            functions = self._factors, self._offsets
            return library.minhash(Texts(texts), functions, ngram=self.config.ngram)
        found = [self.signature(text) for text in texts]
        none = np.full(len(self._factors), np.iinfo(np.uint32).max, dtype=np.uint32)
        rows = np.array([none if row is None else row for row in found], dtype=np.uint32)
        counts = np.array([len(self.shingles(text)) for text in texts], dtype=np.int64)
        return rows.reshape(-1, len(none)), counts

    @staticmethod
    def estimate(a: Signature, b: Signature) -> float:
        """Estimated Jaccard similarity: the share of equal minima; its standard error is sqrt(j (1 - j) / 128)."""
        return float(np.mean(a == b))

    def decide(self, keys: Sequence[_Key]) -> dict[str, Drop]:
        """Best first: a document goes when it is a verified near copy of one that stays."""
        buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        kept: list[_Key] = []
        drops: dict[str, Drop] = {}
        for key in best_first(keys):
            if key.signature is None:
                continue
            bands = self._bands(key.signature)
            twin = self._twin(key.signature, sorted({i for band in bands for i in buckets.get(band, ())}), kept)
            if twin is not None:
                drops[key.id] = Drop("near_duplicate", round(twin[0], 4), self.config.threshold, twin[1])
                continue
            for band in bands:
                buckets[band].append(len(kept))
            kept.append(key)
        return drops

    def _bands(self, signature: Signature) -> list[tuple[int, bytes]]:
        return [(i, row.tobytes()) for i, row in enumerate(signature.reshape(self.config.bands, self.config.rows))]

    def _twin(self, signature: Signature, candidates: Sequence[int], kept: Sequence[_Key]) -> tuple[float, str] | None:
        """The most similar candidate at or above the threshold (the earliest, so the best, of equals)."""
        if not candidates:
            return None
        similar = np.mean(np.stack([kept[i].signature for i in candidates]) == signature, axis=1)  # type: ignore[misc]
        best = int(np.argmax(similar))
        return (float(similar[best]), kept[candidates[best]].id) if similar[best] >= self.config.threshold else None
