"""Linear scorers of documents, one file each: toxicity, pornography, advertisement, fluency, whatever has labels.

    >>> scorer = load_scorer(Path("toxic_score.scorer"))                          # doctest: +SKIP
    >>> scorer.score(["some text"], ["en"])                                       # doctest: +SKIP
    array([0.0312])

InternLM2 (2024, section 3.1.1) filters by fine-tuned classifiers of toxicity, pornography, advertisement and fluency,
and WanJuan-CC (2024) ships their scores with each document; its code pipeline (section 3.1.2) trusts a scorer only in
languages where people agree with it. Here a scorer is a hashed linear classifier (`puyu.data.hashed`) with calibrated
probabilities and that gate: in a language that people did not validate it says nothing, and documents carry a flag.
The file is a line of magic, a line of JSON (everything known of the scorer), and the weights. It knows no labels: see
`puyu.data.train_scorer`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError, field_validator

from puyu.configure import Config, dump
from puyu.data.calibrate import Agreement, Array, Calibration
from puyu.data.hashed import Plan, Shape, Weights, margins
from puyu.documents.document import Document
from puyu.documents.stages import Drop, Scores, Verdict
from puyu.errors import InputError
from puyu.files import atomic_write, hash_bytes

MAGIC = b"puyu scorer 1\n"
ALL = "*"
"""In the header: all languages together."""


class Gate(Config):
    """What people must have agreed to in a language, before the scorer is used there."""

    labels: int = Field(default=100, ge=2)
    """Labels in the language, at least."""
    each: int = Field(default=20, ge=1)
    """Positive labels, and negative ones, at least."""
    auc: float = Field(default=0.8, ge=0, le=1)
    """Area under the ROC curve, at least."""
    agreement: float = Field(default=0.75, ge=0, le=1)
    """Share of labels that the scorer repeats, at least."""
    f1: float = Field(default=0.0, ge=0, le=1)
    """F1 of the positives, at least."""

    def refusal(self, found: Agreement) -> str:
        """Why the scorer is not to be used there; empty when it is."""
        few = min(found.positives, found.labels - found.positives)
        checks = [("labels", found.labels, self.labels), ("labels of one kind", few, self.each)]
        checks += [(name, getattr(found, name), getattr(self, name)) for name in ("auc", "agreement", "f1")]
        return next((f"{name} {value:g} < {least:g}" for name, value, least in checks if value < least), "")


class Round(Config):
    """One round of annotation."""

    round: int
    labels: int
    changed: int = 0
    """Labels that replaced an earlier one."""
    guessed: int = 0
    """Labels of texts that the scorer of the round before had guessed."""
    agreed: int = 0
    """Of those, guesses that the person confirmed."""


class Header(Config):
    """Everything known of a scorer but its weights."""

    name: str
    """The score's column: toxic_score, porn_score, fluency_score, not_ad_score."""
    positive: tuple[str, ...]
    """The label values that a high score means."""
    negative: tuple[str, ...]
    shape: Shape
    plan: Plan
    gate: Gate
    calibrations: dict[str, Calibration]
    """By language; `*` where a language had too few labels of its own."""
    agreement: dict[str, Agreement]
    """By language and `*`: against labels that the judging classifier had not seen."""
    refused: dict[str, str]
    """Languages with labels where the scorer is not used, and why."""
    validated_by: str
    """`folds`, or the name of the file of human labels."""
    rounds: tuple[Round, ...] = ()
    sources: dict[str, str] = Field(default_factory=dict)
    """File of labels -> its content hash."""
    disagreements: int = 0
    """Labels that classifiers trained without them contradict."""
    weights: str
    """Content hash."""

    @property
    def languages(self) -> tuple[str, ...]:
        """Where the scorer is used."""
        return tuple(sorted(name for name in self.agreement if name not in (ALL, *self.refused)))


@dataclass(frozen=True, eq=False)
class Scorer:
    """A classifier that is ready to score."""

    header: Header
    weights: Weights

    def score(self, texts: Sequence[str], languages: Sequence[str], *, validated: bool = True) -> Array:
        """[texts]: the probability of a positive label; NaN in a language that is not validated.

        `validated` False gives a probability everywhere: for choosing what to annotate, never for dropping.
        """
        found = np.full(len(texts), math.nan)
        trusted = self.header.languages
        asked = [at for at, language in enumerate(languages) if not validated or language in trusted]
        raw = margins([texts[at] for at in asked], self.weights, shape=self.header.shape)
        spoken = np.array([languages[at] for at in asked])
        for language in sorted(set(spoken.tolist())):
            inside = np.flatnonzero(spoken == language)
            line = self.header.calibrations.get(language) or self.header.calibrations[ALL]
            found[np.array(asked)[inside]] = line.of(raw[inside])
        return found

    @property
    def id(self) -> str:
        """Names this very scorer in what it chose."""
        return hash_bytes(_head(self.header))[:16]


def _head(header: Header) -> bytes:
    return json.dumps(dump(header), ensure_ascii=False, sort_keys=True).encode()


def save_scorer(path: Path, scorer: Scorer) -> None:
    """Write one file; equal scorers give equal bytes."""
    with atomic_write(path, "wb") as stream:
        stream.write(MAGIC + _head(scorer.header) + b"\n")
        stream.write(scorer.weights.astype("<f4").tobytes())


def weights_hash(weights: Weights) -> str:
    """What the header says of its weights."""
    return hash_bytes(weights.astype("<f4").tobytes())


def load_scorer(path: Path) -> Scorer:
    """Read one file; InputError when it is none, torn, or of another version."""
    try:
        magic, _, rest = path.read_bytes().partition(b"\n")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"no scorer at {path}", remedy="make one: puyu data train-scorer") from error
    if magic + b"\n" != MAGIC:
        raise InputError(f"{path} is not a scorer of this version", remedy="train it again: puyu data train-scorer")
    head, _, body = rest.partition(b"\n")
    try:
        header = Header.model_validate_json(head)
    except ValidationError as error:
        raise InputError(f"{path}: the header cannot be read: {error.errors()[0]['msg']}") from error
    if hash_bytes(body) != header.weights:
        raise InputError(f"{path} is torn: its weights are not those of its header", remedy="copy or train it again")
    return Scorer(header, np.frombuffer(body, dtype="<f4").astype(np.float32))


# ---- the stage


class ScorerConfig(Config):
    """One scorer of the data stage: which file, and from which score on a document goes."""

    model: Path
    """File that `puyu data train-scorer` wrote."""
    name: str = ""
    """The score's column; the scorer's own name when empty."""
    keep: Literal["below", "above"] = "below"
    """Which side of the threshold stays: below (toxic_score, porn_score) or above (fluency_score, not_ad_score)."""
    threshold: float | None = Field(default=0.5, ge=0, le=1)
    """Documents beyond it go; null: the score is only computed."""
    thresholds: dict[str, float | None] = Field(default_factory=dict)
    """Other thresholds by `domain/language`, with `*` for any: `web/zh`, `web/*`, `*/zh`; the nearest one counts."""

    @field_validator("thresholds")
    @classmethod
    def _known(cls, value: dict[str, float | None]) -> dict[str, float | None]:
        for key, threshold in value.items():
            if key.count("/") != 1:
                raise ValueError(f"{key!r} is no `domain/language`: write for example web/zh, web/* or */zh")
            if threshold is not None and not 0 <= threshold <= 1:
                raise ValueError(f"threshold {threshold} of {key!r} is no probability")
        return value

    def threshold_of(self, domain: str, language: str) -> float | None:
        """The threshold for such a document."""
        for key in (f"{domain}/{language}", f"{domain}/*", f"*/{language}"):
            if key in self.thresholds:
                return self.thresholds[key]
        return self.threshold


class ScorerFilter:
    """Map stage: adds the score column and drops beyond the threshold.

    A document in a language that is not validated passes, without the column and with `NAME_unvalidated` = 1 instead.
    """

    def __init__(self, config: ScorerConfig, *, enforce: bool = True) -> None:
        self.config, self.enforce = config, enforce
        self.scorer = load_scorer(config.model)
        self.name = config.name or self.scorer.header.name

    def __call__(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[Verdict]:
        found = self.scorer.score([document.text for document in documents], [d.language for d in documents])
        return [self._judge(document, value) for document, value in zip(documents, found.tolist(), strict=True)]

    def _judge(self, document: Document, value: float) -> Verdict:
        if math.isnan(value):
            return Verdict(document, {f"{self.name}_unvalidated": 1.0})
        value = round(value, 4)
        drop = self._drop(value, self.config.threshold_of(document.domain, document.language))
        return Verdict(document, {self.name: value}, drop if self.enforce else None)

    def _drop(self, value: float, threshold: float | None) -> Drop | None:
        if threshold is None:
            return None
        if self.config.keep == "below":
            return Drop(f"{self.name}_max", value, threshold) if value > threshold else None
        return Drop(f"{self.name}_min", value, threshold) if value < threshold else None
