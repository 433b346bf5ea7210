"""Duplicates as group stages: equal text, equal address, repeated paragraphs, and near copies by MinHash-LSH.

    >>> near = NearDedup(NearConfig())
    >>> text = " ".join(map(str, "abcdefghijklmnopqrstuvwxyz"))
    >>> near.estimate(near.signature(text), near.signature(text))
    1.0

Of copies the best stays, as the order says that the runner hands in: an order of contents, so that neither the order of
the input nor its cut into shards changes what is kept. Every document that goes names the one that stays and their
similarity. Keys are columns of numbers; what is held in memory is under a hundred bytes a document.

MinHash after Broder (1997); 128 hashes, 5-grams and 0.7 are InternLM2's (2024, section 3.1.1); 16 bands of 8 rows put
the steepest part of the LSH curve at (1/16)^(1/8) = 0.71. Candidates are verified on the whole signature, those whose
estimate is too near to the threshold on their shingles, so that the threshold means what it says.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from puyu.configure import Config
from puyu.data.measure import UNIT, Units, mix, ngram_hashes, unit_hashes
from puyu.data.substring import SubstringConfig, Substrings
from puyu.documents.characters import folded
from puyu.documents.document import Document
from puyu.documents.stages import Column, Copies, Drop, GroupStage, Ragged, Scores, best_first, first_equal, plain
from puyu.documents.texts import Compared, Found, MinHashes, Texts, load

Signature = NDArray[np.uint32]
Rows = NDArray[np.int64]
_DIGITS = re.compile(r"\d+")
_PARAGRAPH = re.compile(r"\n\s*\n")
_SHORT_PARAGRAPH = 24
_TRACKING = re.compile(r"utm_\w+|fbclid|gclid|msclkid|mc_[ce]id|ref|spm|from_source")
MOST = 256
"""Documents of a bucket that others are compared with, the best ones: pages of one template stay affordable."""
DOUBT = 3.0
"""Standard errors around the threshold within which an estimate is not believed."""


class NearConfig(Config):
    """MinHash-LSH."""

    threshold: float = 0.7
    """Documents whose Jaccard similarity is at least this are copies."""
    bands: int = 16
    """Bands of the signature; two documents meet when one band is equal."""
    rows: int = 8
    """Hashes in a band; bands x rows is the size of the signature."""
    ngram: int = 5
    """Shingle length, in words; in characters for Chinese."""
    sketch: int = Field(default=4096, ge=0)
    """Hashes of shingles that are kept of a document, at most (four bytes each), so that candidates near the threshold
    are compared by their shingles; 0: by signatures alone, whose standard error at 0.7 is 0.04."""
    seed: int = 20240326
    """Chooses the hash functions."""


class DedupConfig(Config):
    """Which kinds of duplicates go."""

    exact: bool = True
    """Drop texts that are equal apart from case and white space."""
    url: bool = False
    """Drop documents with an address that a better one has (host and path; without fragment and tracking)."""
    paragraphs: float | None = None
    """Drop a document when more than this share of its characters stands, paragraph by paragraph, in better ones."""
    near: NearConfig | None = NearConfig()
    """Drop near copies; null: keep them."""
    substrings: SubstringConfig | None = None
    """Cut stretches that stand in a better document, too; null: leave them."""
    prefer: Literal["best", "newest"] = "best"
    """Of copies keep the best by the rules, then the longer; or the newest by `date` in the metadata (InternLM2)."""
    against: list[Path] = []
    """Folders of earlier runs: what they kept counts as a copy, too (their `index`)."""
    against_keeps: Literal["older", "newer"] = "older"
    """Of copies across runs keep the older, so the new one is dropped; or the newer, so the older is listed in
    `superseded.jsonl`."""
    index: bool = False
    """Write an `index` of what is kept, for later runs to compare with."""

    def cutter(self) -> Substrings | None:
        """What cuts the documents that no stage drops."""
        return None if self.substrings is None else Substrings(self.substrings)

    def keyed(self) -> list[GroupStage | Substrings]:
        """All that has keys."""
        cutter = self.cutter()
        return [*self.stages(), *([cutter] if cutter else [])]

    def stages(self) -> list[GroupStage]:
        """The stages that drop, in their order."""
        found: list[GroupStage] = [ExactDedup()] if self.exact else []
        if self.url:
            found.append(UrlDedup())
        if self.paragraphs is not None:
            found.append(ParagraphDedup(self.paragraphs))
        if self.near is not None:
            found.append(NearDedup(self.near))
        return found


def copies_among(stage: GroupStage, documents: Sequence[Document], scores: Sequence[Scores]) -> Copies:
    """A group stage over documents in memory: which of them go, by place."""
    pairs = np.array([words_of(document.id) for document in documents], dtype=np.uint64).reshape(-1, 2)
    quality = np.array([row.get("quality", 0.0) for row in scores])
    size = np.array([len(document.text) for document in documents], dtype=np.int64)
    return stage.decide(stage.keys(documents), best_first(pairs, quality, size))


def drops_among(stage: GroupStage, documents: Sequence[Document], scores: Sequence[Scores]) -> dict[str, Drop]:
    """`copies_among` by id. Ids must be unique."""
    copies = copies_among(stage, documents, scores)
    rows = zip(copies.rows.tolist(), copies.of.tolist(), copies.values.tolist(), strict=True)
    return {documents[i].id: Drop(stage.rule, value, stage.threshold, documents[k].id) for i, k, value in rows}


def words_of(id: str) -> tuple[int, int]:
    """An id as two numbers, which sort as ids do."""
    return int(id[:16], 16), int(id[16:], 16)


def digests_of(texts: Sequence[str]) -> NDArray[np.uint64]:
    """[texts, 2]: 128 bits of each text, whatever its case and white space."""
    library = load()
    if library is not None:
        return library.digests(Texts(texts)).view(np.uint64)
    return np.frombuffer(b"".join(map(_digest, texts)), dtype=np.uint64).reshape(-1, 2)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(" ".join(folded(text).split()).encode("utf-8"), digest_size=16).digest()


# ---- equal


class _EqualDedup:
    """Of rows with the same 128 bits the first stays; all zero is no key."""

    name: str
    rule: str
    threshold = 1.0

    def decide(self, columns: Mapping[str, Column | Ragged], order: Rows) -> Copies:
        high, low = (plain(columns, part)[order] for part in ("high", "low"))
        named = np.flatnonzero((high != 0) | (low != 0))
        order, high, low = order[named], high[named], low[named]
        first = first_equal(high, low)
        goes = np.flatnonzero(first != np.arange(len(first)))
        return Copies(order[goes], order[first[goes]], np.ones(len(goes)))


class ExactDedup(_EqualDedup):
    """Group stage: of texts that are equal apart from case and white space, one stays."""

    name = "exact"
    rule = "exact_duplicate"

    def keys(self, documents: Sequence[Document]) -> dict[str, Column | Ragged]:
        digests = digests_of([document.text for document in documents])
        return {"high": digests[:, 0].copy(), "low": digests[:, 1].copy()}


class UrlDedup(_EqualDedup):
    """Group stage: of documents from one address (and, where a document was cut, one part of it) one stays."""

    name = "url"
    rule = "url_duplicate"

    def keys(self, documents: Sequence[Document]) -> dict[str, Column | Ragged]:
        table = np.zeros((len(documents), 2), dtype=np.uint64)
        for row, document in enumerate(documents):
            url = document.metadata.get("url")
            if isinstance(url, str) and url:
                key = f"{plain_url(url)} {document.metadata.get('part', 0)}".encode()
                table[row] = np.frombuffer(hashlib.blake2b(key, digest_size=16).digest(), dtype=np.uint64)
        return {"high": table[:, 0].copy(), "low": table[:, 1].copy()}


def plain_url(url: str) -> str:
    """Host, path and query of an address, without scheme, `www.`, fragment, tracking parameters and last slash.

    >>> plain_url("https://WWW.Example.org/a/?b=1&utm_source=x#top")
    'example.org/a?b=1'
    """
    try:
        parts = urlsplit(url.strip())
        host = (parts.hostname or "").removeprefix("www.") + (f":{parts.port}" if parts.port else "")
    except ValueError:  # brackets or a port that are none: the address as it stands
        return url.strip()
    query = [(key, value) for key, value in parse_qsl(parts.query) if not _TRACKING.fullmatch(key)]
    return host + parts.path.rstrip("/") + (f"?{urlencode(sorted(query))}" if query else "")


# ---- paragraphs


class ParagraphDedup:
    """Group stage: a document goes when most of it stands, paragraph by paragraph, in documents that stay."""

    name = "paragraphs"
    rule = "paragraphs_elsewhere"

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def keys(self, documents: Sequence[Document]) -> dict[str, Column | Ragged]:
        parts = [[p for p in _PARAGRAPH.split(d.text) if len(p) >= _SHORT_PARAGRAPH] for d in documents]
        flat = [paragraph for row in parts for paragraph in row]
        values = np.empty((len(flat), 3), dtype=np.uint64)
        values[:, :2] = digests_of(flat)
        values[:, 2] = [len(paragraph) for paragraph in flat]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in parts])]).astype(np.int64)
        size = np.array([len(document.text) for document in documents], dtype=np.int64)
        return {"size": size, "paragraphs": Ragged(values, starts)}

    def decide(self, columns: Mapping[str, Column | Ragged], order: Rows) -> Copies:
        paragraphs, sizes = columns["paragraphs"], plain(columns, "size")
        assert isinstance(paragraphs, Ragged)
        repeated = _repeated(paragraphs.values[:, 0])
        owner: dict[bytes, int] = {}
        goes: list[tuple[int, int, float]] = []
        for row in order.tolist():
            own = [(digest.tobytes(), int(size)) for digest, size in _paragraphs(paragraphs.row(row), repeated)]
            held: dict[int, int] = defaultdict(int)
            for digest, size in own:
                if digest in owner:
                    held[owner[digest]] += size
            share = round(sum(held.values()) / int(sizes[row]), 4) if sizes[row] else 0.0
            if share > self.threshold:
                goes.append((row, max(held, key=lambda at: held[at]), share))
            else:
                owner.update((digest, row) for digest, _ in own if digest not in owner)
        table = np.array(goes).reshape(-1, 3)
        return Copies(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2])


def _repeated(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Those that stand there twice and more, sorted."""
    found, counts = np.unique(hashes, return_counts=True)
    return found[counts > 1]


def _paragraphs(values: Column, repeated: NDArray[np.uint64]) -> Iterator[tuple[Column, int]]:
    """(digest, size) of the paragraphs of one document that stand anywhere twice."""
    places = np.searchsorted(repeated, values[:, 0])
    known = places < len(repeated)
    known[known] = repeated[places[known]] == values[known, 0]
    for row in values[known]:
        yield row[:2], int(row[2])


# ---- near copies


class NearDedup:
    """Group stage: near copies found by MinHash-LSH and verified on the whole signature."""

    name = "near"
    rule = "near_duplicate"

    def __init__(self, config: NearConfig) -> None:
        self.config = config
        self.threshold = config.threshold
        random = np.random.Generator(np.random.PCG64(config.seed))
        size = config.bands * config.rows
        self._factors = random.integers(0, 2**63, size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._offsets = random.integers(0, 2**63, size, dtype=np.uint64)

    def keys(self, documents: Sequence[Document]) -> dict[str, Column | Ragged]:
        found = self.minhashes([document.text for document in documents])
        bands = self._bands(found.signatures)
        named = {f"band{i:02d}": bands[:, i].copy() for i in range(self.config.bands)}
        sketches = {"sketch": Ragged(found.sketches, found.starts)} if self.config.sketch else {}
        return {"signature": found.signatures, "shingles": found.counts, **named, **sketches}

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

    def minhashes(self, texts: Sequence[str]) -> MinHashes:
        """Signature, number of shingles and sketch of each text, natively where that was built."""
        library = load()
        if library is not None and len(self._factors) % 32 == 0:
            functions = self._factors, self._offsets
            return library.minhash(Texts(texts), functions, ngram=self.config.ngram, sketch=self.config.sketch)
        none = np.full(len(self._factors), np.iinfo(np.uint32).max, dtype=np.uint32)
        found, shingles = [self.signature(text) for text in texts], [self.shingles(text) for text in texts]
        rows = np.array([none if row is None else row for row in found], dtype=np.uint32).reshape(-1, len(none))
        sketches = [self._sketch(each) for each in shingles]
        starts = np.cumsum([0, *map(len, sketches)], dtype=np.int64)
        values = np.concatenate([np.empty(0, dtype=np.uint32), *sketches])
        return MinHashes(rows, np.array([len(each) for each in shingles], dtype=np.int64), values, starts)

    def _sketch(self, shingles: Units) -> Signature:
        """The smallest hashes, each once."""
        return np.unique(np.sort((shingles >> np.uint64(32)).astype(np.uint32))[: self.config.sketch])

    @staticmethod
    def estimate(a: Signature, b: Signature) -> float:
        """Estimated Jaccard similarity: the share of equal minima; its standard error is sqrt(j (1 - j) / 128)."""
        return float(np.mean(a == b))

    def _bands(self, signatures: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """[documents, bands]: one number for the rows of a band."""
        rows = signatures.reshape(-1, self.config.bands, self.config.rows).astype(np.uint64)
        total = np.zeros(rows.shape[:2], dtype=np.uint64)
        for i in range(self.config.rows):
            total = total * np.uint64(0x9E3779B97F4A7C15) + rows[:, :, i]
        return mix(total)

    def decide(self, columns: Mapping[str, Column | Ragged], order: Rows) -> Copies:
        """Best first: a document goes when it is a verified near copy of one that stays."""
        order = order[plain(columns, "shingles")[order] > 0]
        buckets = np.zeros((self.config.bands, len(order)), dtype=np.uint32)
        used = 0
        for band in range(self.config.bands):
            used = _number_buckets(plain(columns, f"band{band:02d}")[order], buckets[band], used)
        together = np.flatnonzero(buckets.any(axis=0))
        order, buckets = order[together], buckets[:, together]
        compared = self._compared(columns, order, buckets)
        size, library = compared.signatures.shape[1], load()
        doubt = DOUBT * math.sqrt(self.threshold * (1 - self.threshold) / size)
        if library is not None:
            of, value = library.near_copies(compared, threshold=self.threshold, doubt=doubt, most=MOST)
        else:
            of, value = self._near_copies(compared, doubt)
        goes = np.flatnonzero(of >= 0)
        return Copies(order[goes], order[of[goes]], np.round(value[goes], 4))

    def _compared(self, columns: Mapping[str, Column | Ragged], order: Rows, buckets: NDArray[np.uint32]) -> Compared:
        signatures, shingles = plain(columns, "signature"), plain(columns, "shingles")
        sketch = (
            columns["sketch"] if self.config.sketch else Ragged(np.empty(0, "u4"), np.zeros(len(shingles) + 1, "i8"))
        )
        assert isinstance(sketch, Ragged)
        return Compared(order, buckets, signatures, shingles, sketch.values, sketch.starts, self.config.sketch)

    def _near_copies(self, compared: Compared, doubt: float) -> Found:
        """What the library does: the most similar of the kept in its buckets (the best of equals), or -1."""
        order, buckets, signatures = compared.order, compared.buckets, compared.signatures
        kept: dict[int, list[int]] = defaultdict(list)
        of, value = np.full(len(order), -1, dtype=np.int64), np.zeros(len(order))
        for place, row in enumerate(order.tolist()):
            own = [bucket for bucket in buckets[:, place].tolist() if bucket]
            others = sorted({other for bucket in own for other in kept[bucket]})
            equal = (signatures[order[others]] == signatures[row]).mean(axis=1)
            for i in np.argsort(-equal, kind="stable").tolist():
                alike = float(equal[i])
                if self.config.sketch and self.threshold - doubt <= alike < self.threshold + doubt:
                    alike = _similarity(compared, row, int(order[others[i]]))
                if alike >= self.threshold:
                    of[place], value[place] = others[i], alike
                    break
            else:
                for bucket in own:
                    if len(kept[bucket]) < MOST:
                        kept[bucket].append(place)
        return of, value


def _similarity(compared: Compared, a: int, b: int) -> float:
    """Jaccard similarity by sketches: of what is below the end of each that does not hold all shingles."""
    sets, limit = [], np.iinfo(np.uint32).max
    for row in (a, b):
        sets.append(compared.sketches[compared.starts[row] : compared.starts[row + 1]])
        if compared.shingles[row] > compared.sketch:
            limit = min(limit, int(sets[-1][-1]))
    first, second = (set(values[values <= limit].tolist()) for values in sets)
    return len(first & second) / len(first | second)


def _number_buckets(hashes: NDArray[np.uint64], into: NDArray[np.uint32], used: int) -> int:
    """Number the values that occur twice and more from `used` + 1 on; returns the last number."""
    places = np.argsort(hashes, kind="stable")
    values = hashes[places]
    begins = np.ones(len(values), dtype=bool)
    begins[1:] = values[1:] != values[:-1]
    group = np.cumsum(begins) - 1
    sizes = np.bincount(group) if len(group) else group
    numbers = np.where(sizes > 1, used + np.cumsum(sizes > 1), 0).astype(np.uint32)
    into[places] = numbers[group]
    return used + int((sizes > 1).sum())
