"""How a language model sees a text, as score columns; a map stage with bounds per language.

    stage = PerplexityFilter(PerplexityConfig(models={"en": "en.ngram", "zh": "zh.ngram"}))

Scores: `perplexity` (of a unit), `bits_per_byte` (comparable between models of other units), `unknown_units` (share).
Both ends tell: very high is noise or another language, very low is boilerplate and repetition. Bounds are off until
they are set, since they belong to a model: look at both sides of one with `puyu data borderline`.
InternLM's first corpus was filtered by a small language model trained on good texts (InternLM, 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from puyu.configure import Config
from puyu.data.filters import Bound, judge
from puyu.data.ngram import NgramModel
from puyu.documents.document import Document
from puyu.documents.stages import Scores, Verdict
from puyu.errors import ConfigError

T = TypeVar("T")
OTHERS = "*"
"""The key of what holds for every language that has no own entry."""


class PerplexityPolicy(Config):
    """Bounds for one language."""

    bits_per_byte_min: Bound = None
    """Bits per byte, at least: lower is repetition and boilerplate."""
    bits_per_byte_max: Bound = None
    """Bits per byte, at most: higher is noise."""
    perplexity_max: Bound = None
    """Perplexity of a unit, at most."""
    unknown_units_max: Bound = None
    """Share of units that the model does not know, at most."""


class PerplexityConfig(Config):
    """Models and bounds by language; `*` is for all languages without an own one."""

    models: dict[str, Path] = {}
    """Language -> a file that `puyu data train-ngram` wrote."""
    policies: dict[str, PerplexityPolicy] = {}
    """Language -> bounds."""


def of_language(table: Mapping[str, T], language: str) -> T | None:
    """The entry of a language, or the one for all others."""
    return table.get(language, table.get(OTHERS))


class Models:
    """n-gram models by language, mapped when they are first needed."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = paths
        self._loaded: dict[Path, NgramModel] = {}

    def of(self, language: str) -> NgramModel | None:
        """The model of a language; None where none is configured."""
        path = of_language(self._paths, language)
        if path is not None and path not in self._loaded:
            self._loaded[path] = NgramModel.load(path)
        return None if path is None else self._loaded[path]

    def need(self, language: str, *, field: str) -> NgramModel:
        """The same; ConfigError where none is configured."""
        model = self.of(language)
        if model is None:
            remedy = f"puyu data train-ngram FILES --out {language}.ngram, and name it in {field}; or the model of '*'"
            raise ConfigError(f"{field}: no n-gram model for language {language!r}", remedy=remedy)
        return model


def places_by_language(documents: Sequence[Document], places: Sequence[int]) -> dict[str, list[int]]:
    """Language -> places of its documents, in order."""
    found: dict[str, list[int]] = {}
    for at in places:
        found.setdefault(documents[at].language, []).append(at)
    return found


def perplexity_scores(model: NgramModel, texts: Sequence[str]) -> list[dict[str, float]]:
    """The score columns of each text."""
    scored = model.logprob(texts)
    columns = (scored.perplexity, scored.bits_per_byte, scored.unknown / scored.units.clip(1))
    names = ("perplexity", "bits_per_byte", "unknown_units")
    return [
        {name: round(float(value), 4) for name, value in zip(names, row, strict=True)}
        for row in zip(*columns, strict=True)
    ]


class PerplexityFilter:
    """Map stage: scores by the model of the document's language; `enforce` False only measures.

    A document whose language has no model raises ConfigError: it is not passed in silence.
    """

    name = "perplexity"

    def __init__(self, config: PerplexityConfig, *, enforce: bool = True) -> None:
        self.config, self.enforce = config, enforce
        self.models = Models(config.models)

    def __call__(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[Verdict]:
        found: dict[int, dict[str, float]] = {}
        for language, places in places_by_language(documents, range(len(documents))).items():
            model = self.models.need(language, field="perplexity.models")
            rows = perplexity_scores(model, [documents[at].text for at in places])
            found.update(zip(places, rows, strict=True))
        return [self._judge(document, found[at]) for at, document in enumerate(documents)]

    def _judge(self, document: Document, found: dict[str, float]) -> Verdict:
        policy = of_language(self.config.policies, document.language)
        drop = judge(found, policy) if policy is not None and self.enforce else None
        return Verdict(document, found, drop)
