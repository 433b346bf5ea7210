"""Seeds -> look-alikes from a corpus, by a hashed classifier or by embeddings.

    found = by_classifier(seeds, corpus, EnrichConfig(most=1000))        # corpus() gives the Documents anew each time
    found.picks[0].id, found.picks[0].score, found.report

InternLM2's second generation of cleaning (2024, section 3.1.1) mines corpora for texts like those of a good set; no
algorithm is published. `by_classifier` is that of DeepSeekMath (Shao et al. 2024, arXiv 2402.03300): linear classifiers
tell seeds from as many random documents of the corpus, the best-scored are taken and join the seeds, until a round
brings little that is new; hosts from which much was taken are listed for a person. Several classifiers with other
random documents each judge what they have not seen (bagging: Mordelet and Vert 2014): look-alikes are among these.
`by_embedding` takes the documents nearest to their nearest seeds, with any Embedder; `HashedTfIdf` is one that needs no
model. Texts that are equal or nearly equal to a seed or to a better pick are counted and left out. It holds scores of
the corpus, never its texts.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from puyu.configure import Config
from puyu.data.corpus import in_batches
from puyu.data.dedup import ExactDedup, NearConfig, NearDedup, drops_among
from puyu.data.hashed import Plan, Shape, Weights, features, margins, train
from puyu.data.safety import host_of
from puyu.documents.characters import folded
from puyu.documents.document import Document
from puyu.errors import InputError
from puyu.files import hash_json
from puyu.types import Embedder

Corpus = Callable[[], Iterator[Document]]
"""Walks over the corpus from its start each time it is called; the same documents in the same order."""


class EnrichConfig(Config):
    """How look-alikes are found."""

    most: int = Field(default=1000, ge=1)
    """Documents to take, at most."""
    share: float = Field(default=0.2, gt=0, le=1)
    """Share of the corpus to take, at most."""
    probability: float = Field(default=0.5, ge=0, lt=1)
    """What the classifiers must say in the mean, at least; each was trained on as many seeds as others."""
    similarity: float = Field(default=0.2, ge=-1, le=1)
    """Cosine to the nearest seeds, at least (embeddings)."""
    neighbors: int = Field(default=3, ge=1)
    """Nearest seeds whose mean similarity counts (embeddings)."""
    rounds: int = Field(default=3, ge=1)
    """Rounds of the classifier, at most."""
    stop: float = Field(default=0.98, gt=0, le=1)
    """Share of a round's picks that the round before had, from which on no other round follows (DeepSeekMath)."""
    bags: int = Field(default=4, ge=1)
    """Classifiers of a round, each with other random documents; a document is judged by those that did not have it."""
    negatives: int = Field(default=100_000, ge=1)
    """Random documents of a classifier, at most; as many as seeds where these are fewer."""
    rich: float = Field(default=0.1, gt=0, le=1)
    """Share of a host's documents that were taken, from which on the host is listed (DeepSeekMath)."""
    near: float = Field(default=0.7, gt=0, le=1)
    """Estimated Jaccard similarity of near copies."""
    shape: Shape = Shape()
    """Features of the classifier."""
    plan: Plan = Plan(epochs=3)
    """Training of the classifier."""
    seed: int = 0
    """Chooses the random documents."""


@dataclass(frozen=True, slots=True)
class Pick:
    """A document that was taken, and its score: a probability, or a cosine."""

    id: str
    score: float
    round: int


@dataclass(slots=True)
class Found:
    """The picks, the best first, and what was counted."""

    picks: list[Pick]
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Bag:
    """One classifier, and the ids of the documents that it took for others."""

    weights: Weights
    negatives: frozenset[str]


def by_classifier(seeds: Sequence[str], corpus: Corpus, config: EnrichConfig) -> Found:
    """Look-alikes by classifiers of rising knowledge. InputError without seeds or corpus."""
    _check(seeds)
    rounds, picks = [], list[Pick]()
    first: dict[str, int] = {}  # the round in which a document was taken first
    for number in range(1, config.rounds + 1):
        taken = {pick.id for pick in picks}
        positives = [*seeds, *_texts(corpus, [pick.id for pick in picks])]
        bags = _bags(positives, _candidates(corpus, {*first}, seeds), corpus, config, number)
        table = _table(corpus, partial(_bagged, bags, config))
        least = float(np.log(config.probability / (1 - config.probability))) if config.probability else -np.inf
        ranked = _ranked(table, least)
        chosen, counts = _choose(ranked, len(table), corpus, seeds, config)
        for id, _ in chosen:
            first.setdefault(id, number)
        picks = [Pick(id, round(float(1 / (1 + np.exp(-value))), 4), first[id]) for id, value in chosen]
        kept = len(taken & {pick.id for pick in picks}) / len(picks) if picks else 1.0
        rounds.append({"round": number, "positives": len(positives), **counts, "known_before": round(kept, 4)})
        if kept >= config.stop:
            break
    return Found(
        picks, {"method": "classifier", "seeds": len(seeds), "rounds": rounds, **_hosts(corpus, picks, config)}
    )


def by_embedding(seeds: Sequence[str], corpus: Corpus, config: EnrichConfig, *, embedder: Embedder) -> Found:
    """Look-alikes by the mean cosine to their nearest seeds."""
    _check(seeds)
    centers = asyncio.run(_vectors(embedder, seeds))
    count = min(config.neighbors, len(seeds))

    def near(documents: Sequence[Document]) -> NDArray[np.float64]:
        cosines = asyncio.run(_vectors(embedder, [document.text for document in documents])) @ centers.T
        return np.sort(cosines, axis=1)[:, -count:].mean(axis=1)

    table = _table(corpus, near)
    chosen, counts = _choose(_ranked(table, config.similarity), len(table), corpus, seeds, config)
    picks = [Pick(id, round(value, 4), 1) for id, value in chosen]
    head = {"method": "embedding", "seeds": len(seeds), "rounds": [{"round": 1, **counts}]}
    return Found(picks, {**head, **_hosts(corpus, picks, config)})


async def _vectors(embedder: Embedder, texts: Sequence[str]) -> NDArray[np.float64]:
    """[texts, size], each of length 1."""
    found = np.array(await embedder.embed(texts), dtype=np.float64)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def _check(seeds: Sequence[str]) -> None:
    if not any(seed.strip() for seed in seeds):
        raise InputError("there is no seed text", remedy="give a JSONL file of good examples with --seeds")


def _table(corpus: Corpus, score: Callable[[Sequence[Document]], NDArray[np.float64]]) -> list[tuple[str, float]]:
    """(id, score) of the whole corpus, in its order."""
    table: list[tuple[str, float]] = []
    for batch in in_batches(corpus()):
        values = score(batch).tolist()
        table += [(document.id, value) for document, value in zip(batch, values, strict=True)]
    if not table:
        raise InputError("the corpus has no document")
    return table


def _ranked(table: Sequence[tuple[str, float]], least: float) -> list[tuple[str, float]]:
    """Those with the least score and more, the best first; equal ones by their id."""
    best: dict[str, float] = {}
    for id, value in table:
        best[id] = max(value, best.get(id, -np.inf))
    return sorted(((id, value) for id, value in best.items() if value >= least), key=lambda row: (-row[1], row[0]))


def _choose(
    ranked: Sequence[tuple[str, float]], size: int, corpus: Corpus, seeds: Sequence[str], config: EnrichConfig
) -> tuple[list[tuple[str, float]], dict[str, int]]:
    """The best that are no copies of seeds or of better ones, and the counts of what became of all."""
    limit = min(config.most, max(1, int(size * config.share)))
    # candidates beyond the limit, so that copies can be replaced; texts of these alone are held
    window = dict(ranked[: 2 * limit + 64])
    held = {document.id: document for document in corpus() if document.id in window}
    drops = _copies(seeds, [held[id] for id in window], list(window.values()), config)
    counts = Counter(drops.values())
    alive = [(id, value) for id, value in window.items() if id not in drops]
    counts["taken"] = min(limit, len(alive))
    counts["beyond_the_limit"] = len(ranked) - counts.total()
    counts["too_low"] = size - len(ranked)
    return alive[:limit], {"documents": size, **dict(sorted(counts.items()))}


def _copies(
    seeds: Sequence[str], found: Sequence[Document], values: Sequence[float], config: EnrichConfig
) -> dict[str, str]:
    """Id -> what it is a copy of, equal or near: a seed, or a better one."""
    texts = [*seeds, *(document.text for document in found)]
    rows = [Document(f"{at:032x}", text, "", "") for at, text in enumerate(texts)]  # of equals the first stays
    scores = [{"quality": np.inf}] * len(seeds) + [{"quality": value} for value in values]
    drops: dict[str, str] = {}
    for stage in (ExactDedup(), NearDedup(NearConfig(threshold=config.near))):
        alive = [pair for pair in zip(rows, scores, strict=True) if pair[0].id not in drops]
        decided = drops_among(stage, [row for row, _ in alive], [value for _, value in alive])
        drops |= {
            id: "copy_of_seed" if int(drop.of, 16) < len(seeds) else "copy_of_better" for id, drop in decided.items()
        }
    own = {rows[len(seeds) + at].id: document.id for at, document in enumerate(found)}
    return {own[id]: why for id, why in drops.items() if id in own}


def _candidates(corpus: Corpus, taken: set[str], seeds: Sequence[str]) -> list[str]:
    """Ids of the documents that may stand for all others: neither seeds nor picks. InputError without any."""
    lines = {_line(seed) for seed in seeds}
    found = [d.id for d in corpus() if d.id not in taken and _line(d.text) not in lines]
    if not found:
        raise InputError("the corpus holds nothing but seeds and look-alikes", remedy="give a larger corpus")
    return list(dict.fromkeys(found))


def _bags(
    positives: Sequence[str], candidates: Sequence[str], corpus: Corpus, config: EnrichConfig, number: int
) -> list[_Bag]:
    """Classifiers of the positives against as many random documents, other ones for each (at most half of all)."""
    size = min(len(positives), config.negatives, max(1, len(candidates) // 2))
    bags = []
    for bag in range(config.bags):
        ranks = sorted((hash_json([config.seed, number, bag, id]), id) for id in candidates)
        ids = [id for _, id in ranks[:size]]
        texts, flags = [*positives, *_texts(corpus, ids)], [True] * len(positives) + [False] * len(ids)
        bags.append(_Bag(train(texts, flags, shape=config.shape, plan=config.plan), frozenset(ids)))
    return bags


def _bagged(bags: Sequence[_Bag], config: EnrichConfig, documents: Sequence[Document]) -> NDArray[np.float64]:
    """The mean margin of the classifiers that have not seen the document as a negative; of all, where all have."""
    texts = [document.text for document in documents]
    table = np.stack([margins(texts, bag.weights, shape=config.shape) for bag in bags])
    seen = np.array([[document.id in bag.negatives for document in documents] for bag in bags])
    weights = np.where(seen.all(axis=0), True, ~seen)
    means: NDArray[np.float64] = (table * weights).sum(axis=0) / weights.sum(axis=0)
    return means


def _texts(corpus: Corpus, ids: Sequence[str]) -> list[str]:
    """The texts of these documents, in the order of the ids."""
    wanted = set(ids)
    held = {document.id: document.text for document in corpus() if document.id in wanted}
    return [held[id] for id in dict.fromkeys(ids)]


def _line(text: str) -> str:
    return " ".join(folded(text).split())


def _hosts(corpus: Corpus, picks: Sequence[Pick], config: EnrichConfig) -> dict[str, Any]:
    """Hosts (or sources, where there is no address) of which much was taken, with their counts."""
    taken = {pick.id for pick in picks}
    counts: dict[str, list[int]] = {}
    for document in corpus():
        row = counts.setdefault(_site(document), [0, 0])
        row[0] += 1
        row[1] += document.id in taken
    rich = {name: row for name, row in sorted(counts.items()) if row[1] / row[0] >= config.rich}
    return {"rich": {name: {"documents": row[0], "taken": row[1]} for name, row in rich.items()}}


def _site(document: Document) -> str:
    """The host of its address, or its source."""
    url = document.metadata.get("url")
    return (isinstance(url, str) and host_of(url)) or document.source


class HashedTfIdf:
    """An Embedder without a model: hashed n-grams, weighted by their rarity in some texts (Salton and Buckley 1988).

    >>> asyncio.run(HashedTfIdf.fitted(["a cat", "a dog"], bits=8).embed(["a cat"]))[0][:0]
    []
    """

    def __init__(self, rarity: NDArray[np.float64], shape: Shape) -> None:
        self._rarity, self._shape = rarity, shape

    @classmethod
    def fitted(cls, texts: Iterable[str], *, bits: int = 12) -> HashedTfIdf:
        """The rarities of the features of these texts; 2^bits is the size of the vectors."""
        shape, count = Shape(bits=bits, words=1, longest=0), 0
        documents = np.zeros(1 << bits)
        for batch in in_batches(iter(texts)):
            for buckets in features(batch, shape=shape):
                documents[buckets] += 1
                count += 1
        return cls(np.log((1 + count) / (1 + documents)), shape)

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """[texts, 2^bits]: each of length 1; all 0 for a text without words but those that stand everywhere."""
        found = np.zeros((len(texts), len(self._rarity)))
        for row, buckets in zip(found, features(texts, shape=self._shape), strict=True):
            row[buckets] = self._rarity[buckets]
            row /= max(float(np.linalg.norm(row)), 1e-12)
        rows: list[list[float]] = found.tolist()
        return rows
