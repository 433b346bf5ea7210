"""What a person should label next: the annotate -> train -> verify loop of InternLM2 (2024, section 3.1.2).

    puyu data annotate runs/mine/data --with toxic.scorer -n 50 --out round2.jsonl
    # a person fills in "label" of each row
    puyu data train-scorer round1.jsonl round2.jsonl --out toxic.scorer

As in the report, people check predictions of which the scorer is sure, high and low alike; a share of uncertain ones
can be added. Rows are drawn by a hash among all that are sure, so that one kind of page does not fill the list, with
the same number from each language as far as there are such. Earlier labels that the new scorer contradicts (the file
`MODEL.disagreements.jsonl` of its training) come back as rows with `why: recheck`. Each row says which scorer and which
round it is from, and what the scorer guesses; training counts how many guesses people confirmed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from puyu.configure import Config
from puyu.data.corpus import in_batches, languages_of
from puyu.data.scorers import Scorer
from puyu.documents.document import Document
from puyu.errors import InputError
from puyu.files import hash_bytes, hash_json, read_jsonl

HIGH, LOW, UNCERTAIN, RECHECK = "high", "low", "uncertain", "recheck"


class AnnotateConfig(Config):
    """How many rows of which kind."""

    rows: int = Field(default=50, ge=1)
    """Rows to label."""
    uncertain: float = Field(default=0.0, ge=0, le=1)
    """Share of them with probabilities in the middle."""
    recheck: int = Field(default=10, ge=0)
    """Earlier labels, besides, that the scorer contradicts."""
    sure: float = Field(default=0.9, gt=0.5, le=1)
    """Probability from which on (or 1 minus it, below which) a prediction is sure."""
    characters: int = Field(default=4000, ge=100)
    """Longer texts are cut for the person; training takes what the person saw."""
    seed: int = 0
    """Chooses among rows that are as good."""


@dataclass(slots=True)
class _Pile:
    """The rows of one language and kind with the smallest keys, no more than are needed."""

    size: int
    rows: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)

    def add(self, key: float, tie: str, row: dict[str, Any]) -> None:
        self.rows.append((key, tie, row))
        if len(self.rows) >= 4 * self.size + 64:
            self.trim()

    def trim(self) -> list[dict[str, Any]]:
        self.rows = sorted(self.rows, key=lambda item: item[:2])[: self.size]
        return [row for _, _, row in self.rows]


def annotate(
    documents: Iterable[Document], scorer: Scorer, config: AnnotateConfig, *, known: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Rows with an empty `label`; `known` are texts that have one. InputError where nothing is left to label."""
    skip = {_key(text) for text in known}
    piles: dict[tuple[str, str], _Pile] = defaultdict(lambda: _Pile(config.rows))
    for row in _scored(documents, scorer, config):
        key = _key(row["text"])
        if key in skip:
            continue
        skip.add(key)
        tie = hash_json([config.seed, scorer.id, key])
        for why, distance in _reasons(row["score"], config):
            piles[why, row["language"]].add(distance, tie, {**row, "why": why})
    wanted = {UNCERTAIN: round(config.rows * config.uncertain)}
    wanted[HIGH] = (config.rows - wanted[UNCERTAIN] + 1) // 2
    wanted[LOW] = config.rows - wanted[UNCERTAIN] - wanted[HIGH]
    chosen = {row["text"]: row for why in (UNCERTAIN, LOW, HIGH) for row in _even(why, wanted[why], piles)}
    if not chosen:
        raise InputError("no document is left to label", remedy="give a larger corpus, or other --labels")
    return list(chosen.values())[::-1]


def _key(text: str) -> str:
    return hash_bytes(text.encode("utf-8", "surrogatepass"))


def _scored(documents: Iterable[Document], scorer: Scorer, config: AnnotateConfig) -> Iterator[dict[str, Any]]:
    """Each document as a row of the list, scored as the person will see it."""
    labels = scorer.header.positive[0], scorer.header.negative[0]
    next_round = max((item.round for item in scorer.header.rounds), default=0) + 1
    for batch in in_batches(iter(documents)):
        texts = [document.text[: config.characters] for document in batch]
        languages = languages_of(texts, [document.language for document in batch])
        values = scorer.score(texts, languages, validated=False).tolist()
        for document, text, language, value in zip(batch, texts, languages, values, strict=True):
            yield {
                "id": document.id,
                "source": document.source,
                "domain": document.domain,
                "language": language,
                "text": text,
                "score": round(value, 4),
                "guess": labels[0] if value >= 0.5 else labels[1],
                "scorer": scorer.id,
                "round": next_round,
                "label": None,
            }


def _reasons(score: float, config: AnnotateConfig) -> Iterator[tuple[str, float]]:
    """(pile, how far from what is wanted): all that are sure are as good."""
    if score >= 0.5:
        yield HIGH, max(config.sure - score, 0.0)
    else:
        yield LOW, max(score - (1 - config.sure), 0.0)
    yield UNCERTAIN, abs(score - 0.5)


def _even(why: str, count: int, piles: Mapping[tuple[str, str], _Pile]) -> list[dict[str, Any]]:
    """One of each language in turn, until there are enough."""
    queues = [pile.trim() for (kind, _), pile in sorted(piles.items()) if kind == why]
    turns = [queue[turn] for turn in range(count) for queue in queues if turn < len(queue)]
    return turns[:count]


def disagreements_path(model: Path) -> Path:
    """Where training puts the labels that look wrong."""
    return model.with_name(f"{model.name}.disagreements.jsonl")


def recheck(model: Path, scorer: Scorer, config: AnnotateConfig) -> list[dict[str, Any]]:
    """The labels that look most wrong, to be looked at again; `was` is the earlier label."""
    path = disagreements_path(model)
    rows: Sequence[dict[str, Any]] = list(read_jsonl(path))[: config.recheck] if path.is_file() else []
    positive, negative = scorer.header.positive[0], scorer.header.negative[0]
    next_round = max((item.round for item in scorer.header.rounds), default=0) + 1
    return [
        {
            "id": _key(row["text"]),
            "language": row["language"],
            "text": row["text"],
            "score": row["score"],
            "guess": positive if row["score"] >= 0.5 else negative,
            "was": row["was"],
            "scorer": scorer.id,
            "round": next_round,
            "label": None,
            "why": RECHECK,
        }
        for row in rows
    ]
