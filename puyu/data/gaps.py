"""What a corpus lacks against a target: by domain, language and difficulty, and what another source would change.

    report = gaps(profile(seeds), profile(corpus))
    report["facets"]["language"][0]               # {"value": "zh", "target": 0.4, "corpus": 0.1, "gap": 0.3, ...}

The report of InternLM2 (2024, section 3.1.1) names targeted filling of gaps without a method; this one is ours. Shares
are of characters. Difficulty is a statistic of ours, not a person's judgment: the mean rarity of a document's distinct
words (of Han characters in Chinese), in bits, -log2 of the share of documents that hold the word, over the target and
the corpus together and by language; `easy`, `medium` and `hard` are split at the thirds of the target's documents. A
target may also be shares that a person wrote down. It judges nothing and changes no file.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puyu.data.corpus import in_batches, languages_of
from puyu.data.hashed import Shape, features
from puyu.documents.document import Document
from puyu.errors import ConfigError, InputError

FACETS = ("domain", "language", "difficulty")
LEVELS = ("easy", "medium", "hard")
_WORDS = Shape(bits=20, words=1, longest=0)


@dataclass(slots=True)
class Profile:
    """What is known of a corpus instead of its texts: a row a document, and in how many documents each word stands."""

    rows: list[tuple[str, str, int, NDArray[np.uint32]]] = field(default_factory=list)
    """(domain, language, characters, buckets of its words)."""
    words: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    documents: Counter[str] = field(default_factory=Counter)
    """By language."""


def profile(documents: Iterable[Document]) -> Profile:
    """One walk over the documents; InputError when there is none."""
    found = Profile()
    for batch in in_batches(iter(documents)):
        texts = [document.text for document in batch]
        languages = languages_of(texts, [document.language for document in batch])
        for document, language, buckets in zip(batch, languages, features(texts, shape=_WORDS), strict=True):
            counts = found.words.setdefault(language, np.zeros(1 << _WORDS.bits, dtype=np.int64))
            counts[buckets] += 1
            found.documents[language] += 1
            found.rows.append((document.domain or "none", language, len(document.text), buckets))
    if not found.rows:
        raise InputError("there is no document to look at")
    return found


Cell = tuple[str, str, str]
"""(domain, language, difficulty)."""


def gaps(
    target: Profile | Mapping[str, Mapping[str, float]], corpus: Profile, *, added: Mapping[str, Profile] | None = None
) -> dict[str, Any]:
    """Shares of target and corpus by facet, cells that are lacking most, and each added source's effect.

    `target` as shares: {facet: {value: share}}; shares of a facet are scaled to sum 1. `added`: name -> source.
    """
    sources = dict(added or {})
    reference = target if isinstance(target, Profile) else corpus
    scale = _Difficulty([reference, corpus], reference)
    sizes = _sizes(corpus, scale)
    wanted = _sizes(target, scale) if isinstance(target, Profile) else Counter[Cell]()
    if isinstance(target, Profile):
        shares = {name: _shares(wanted, at) for at, name in enumerate(FACETS)}
    else:
        shares = _written(target)
    report = {
        "documents": len(corpus.rows),
        "characters": sum(sizes.values()),
        "difficulty": scale.to_json(),
        "facets": {name: _facet(shares[name], _shares(sizes, FACETS.index(name)), sizes, name) for name in shares},
        "distance": _distances(shares, sizes),
        "cells": _cells(wanted, sizes),
    }
    report["added"] = {name: _simulated(shares, sizes, _sizes(source, scale)) for name, source in sources.items()}
    return report


class _Difficulty:
    """Rarity of words over some profiles; thresholds from one of them, by language."""

    def __init__(self, profiles: Sequence[Profile], reference: Profile) -> None:
        self._rarity: dict[str, NDArray[np.float64]] = {}
        different = [found for at, found in enumerate(profiles) if all(found is not other for other in profiles[:at])]
        for language in sorted({name for found in different for name in found.words}):
            held = [found for found in different if language in found.words]
            total = sum(found.documents[language] for found in held)
            counts = sum(found.words[language] for found in held)
            self._rarity[language] = np.log2((total + 1) / (np.asarray(counts) + 1))
        values: dict[str, list[float]] = defaultdict(list)
        for row in reference.rows:
            values[row[1]].append(self.of(row[1], row[3]))
        everything = [value for part in values.values() for value in part]
        self._other = tuple(np.quantile(everything, [1 / 3, 2 / 3]).tolist())
        self._edges = {name: tuple(np.quantile(part, [1 / 3, 2 / 3]).tolist()) for name, part in values.items()}

    def of(self, language: str, buckets: NDArray[np.uint32]) -> float:
        """Bits; 0 for a document without words, and where nothing is known of its language."""
        rarity = self._rarity.get(language)
        return float(rarity[buckets].mean()) if rarity is not None and len(buckets) else 0.0

    def level(self, language: str, buckets: NDArray[np.uint32]) -> str:
        low, high = self._edges.get(language, self._other)
        value = self.of(language, buckets)
        return LEVELS[(value > low) + (value > high)]

    def to_json(self) -> dict[str, list[float]]:
        """Language -> where medium and hard begin, in bits."""
        return {name: [round(edge, 4) for edge in edges] for name, edges in sorted(self._edges.items())}


def _sizes(found: Profile, scale: _Difficulty) -> Counter[Cell]:
    sizes: Counter[Cell] = Counter()
    for domain, language, characters, buckets in found.rows:
        sizes[domain, language, scale.level(language, buckets)] += characters
    return sizes


def _shares(sizes: Mapping[Cell, int], facet: int) -> dict[str, float]:
    total = sum(sizes.values()) or 1
    shares: dict[str, float] = defaultdict(float)
    for cell, size in sizes.items():
        shares[cell[facet]] += size / total
    return dict(shares)


def _written(target: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Shares as a person gave them; ConfigError for an unknown facet or shares that cannot be scaled."""
    for name, shares in target.items():
        if name not in FACETS:
            raise ConfigError(f"target: unknown facet {name!r}", remedy=f"one of: {', '.join(FACETS)}")
        if not isinstance(shares, Mapping) or not all(isinstance(v, int | float) and v >= 0 for v in shares.values()):
            raise ConfigError(f"target.{name}: shares must be numbers of at least 0 by value")
        if sum(shares.values()) <= 0:
            raise ConfigError(f"target.{name}: the shares sum to 0")
    if not target:
        raise ConfigError("the target has no facet", remedy=f"for example {FACETS[1]}: {{zh: 0.5, en: 0.5}}")
    return {name: {k: v / sum(shares.values()) for k, v in shares.items()} for name, shares in target.items()}


def _facet(
    target: Mapping[str, float], shares: Mapping[str, float], sizes: Mapping[Cell, int], name: str
) -> list[dict[str, Any]]:
    """What lacks most first; `add` is how many characters of it alone would close the gap."""
    total = sum(sizes.values())
    rows = [
        {
            "value": value,
            "target": round(target.get(value, 0.0), 4),
            "corpus": round(shares.get(value, 0.0), 4),
            "gap": round(target.get(value, 0.0) - shares.get(value, 0.0), 4),
            "add": _needed(target.get(value, 0.0), shares.get(value, 0.0) * total, total),
        }
        for value in {**target, **shares}
    ]
    return sorted(rows, key=lambda row: (-row["gap"], str(row["value"])))


def _needed(target: float, size: float, total: float) -> int | None:
    """Characters x with (size + x) / (total + x) = target; None where no amount is enough."""
    if target >= 1.0:
        return 0 if size >= total else None
    return max(0, round((target * total - size) / (1 - target)))


def _distances(shares: Mapping[str, Mapping[str, float]], sizes: Mapping[Cell, int]) -> dict[str, float]:
    """Total variation by facet: the share of characters that would have to be something else."""
    return {name: round(_variation(part, _shares(sizes, FACETS.index(name))), 4) for name, part in shares.items()}


def _variation(a: Mapping[Any, float], b: Mapping[Any, float]) -> float:
    return sum(abs(a.get(key, 0.0) - b.get(key, 0.0)) for key in {**a, **b}) / 2


def _cells(target: Mapping[Cell, int], sizes: Mapping[Cell, int], *, most: int = 20) -> list[dict[str, Any]]:
    """Combinations that lack most."""
    wanted, total = sum(target.values()) or 1, sum(sizes.values()) or 1
    lacking = {cell: target[cell] / wanted - sizes.get(cell, 0) / total for cell in target}
    order = sorted((cell for cell, gap in lacking.items() if gap > 0), key=lambda cell: (-lacking[cell], cell))
    return [dict(zip(FACETS, cell, strict=True)) | {"gap": round(lacking[cell], 4)} for cell in order[:most]]


def _simulated(
    shares: Mapping[str, Mapping[str, float]], sizes: Counter[Cell], more: Counter[Cell]
) -> dict[str, dict[str, float] | int]:
    """The distances with a source added whole."""
    return {"characters": sum(more.values()), "distance": _distances(shares, sizes + more)}


def lines_of(report: Mapping[str, Any], *, rows: int = 6) -> list[str]:
    """The report as text."""
    lines = [f"{report['documents']} documents, {report['characters']} characters"]
    for name, facet in report["facets"].items():
        lines.append(f"  {name:<12}{'target':>8}{'corpus':>8}{'gap':>8}  distance {report['distance'][name]:.3f}")
        for row in facet[:rows]:
            needed = f"  +{row['add']} characters close it" if row["gap"] > 0 and row["add"] else ""
            lines.append(f"    {row['value']:<10}{row['target']:>8.1%}{row['corpus']:>8.1%}{row['gap']:>+8.1%}{needed}")
    for name, found in report["added"].items():
        change = ", ".join(f"{k} {report['distance'][k]:.3f} -> {v:.3f}" for k, v in found["distance"].items())
        lines.append(f"  with {name} ({found['characters']} characters): {change}")
    return lines
