"""The value of a text in three columns: text quality, information quality, information density.

    stage = ValueScorer(ValueConfig(models={"en": "en.ngram"}))

InternLM2's data slogan names the three and publishes no algorithm; these definitions are ours, each from 0 to 1, from
the rules and an n-gram model, without a network and without labels:

`text_quality`          is it written well: the geometric mean of the smallest margin to a rule (`quality`, where the
                        rules were asked) and fluency, which is the bits per byte of good text (`fluent`, by language)
                        over those of this text, at most 1
`information_quality`   does it say something that can be read: the share of its information (bits under the model)
                        that known words carry, times the share of its characters that stand in lines of text
`information_density`   how much is said in the space: the share of its bytes that deflate leaves, in pieces of 64 KB,
                        so that repetition counts and length does not, times information quality, since noise is dense

They rank texts of one language and one domain; between languages and domains they do not compare.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

from puyu.configure import Config
from puyu.data.discourse import discourse
from puyu.data.filters import Bound, judge
from puyu.data.ngram import NgramModel
from puyu.data.perplexity import Models, of_language, places_by_language
from puyu.documents.document import Document
from puyu.documents.stages import Scores, Verdict

_PIECE = 65_536


class ValuePolicy(Config):
    """Bounds; all off, since what is worth a place depends on how much there is."""

    text_quality_min: Bound = None
    """At least."""
    information_quality_min: Bound = None
    """At least."""
    information_density_min: Bound = None
    """At least."""


class ValueConfig(Config):
    """Models and bounds of the value columns."""

    models: dict[str, Path] = {}
    """Language -> n-gram model (`puyu data train-ngram`); `*` for all others."""
    fluent: dict[str, float] = {"*": 2.2}
    """Language -> bits per byte of good text under its model."""
    policy: ValuePolicy = ValuePolicy()
    """Bounds."""


class ValueScorer:
    """Map stage: the three columns; drops only by the bounds that are set."""

    name = "value"

    def __init__(self, config: ValueConfig) -> None:
        self.config = config
        self.models = Models(config.models)

    def __call__(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[Verdict]:
        found: dict[int, dict[str, float]] = {}
        for language, places in places_by_language(documents, range(len(documents))).items():
            model = self.models.need(language, field="value.models")
            fluent = of_language(self.config.fluent, language) or 0.0
            texts = [documents[at].text for at in places]
            rows = values(texts, model, fluent=fluent, margins=[scores[at].get("quality") for at in places])
            found.update(zip(places, rows, strict=True))
        return [
            Verdict(document, found[at], judge(found[at], self.config.policy)) for at, document in enumerate(documents)
        ]


def values(
    texts: Sequence[str], model: NgramModel, *, fluent: float, margins: Sequence[float | None]
) -> list[dict[str, float]]:
    """The columns of each text; `margins`: the smallest margin to a rule, or None."""
    scored = model.logprob(texts)
    columns = (scored.bits_per_byte, scored.unknown_bits / scored.bits.clip(1e-9), discourse(texts), texts, margins)
    rows = []
    for bits, unknown, found, text, margin in zip(*columns, strict=True):
        fluency = min(1.0, fluent / bits) if bits > 0 else 0.0
        quality = (1.0 - float(unknown)) * (1.0 - found["nonsense"]) if bits > 0 else 0.0
        row = {
            "text_quality": fluency if margin is None else math.sqrt(margin * fluency),
            "information_quality": quality,
            "information_density": quality * compressed_share(text),
        }
        rows.append({name: round(float(value), 4) for name, value in row.items()})
    return rows


def compressed_share(text: str) -> float:
    """Bytes after deflate over bytes before, in pieces; 0 for an empty text, at most 1."""
    data = text.encode("utf-8")
    sizes = [len(zlib.compress(data[at : at + _PIECE], 6)) for at in range(0, len(data), _PIECE)]
    return min(sum(sizes) / len(data), 1.0) if data else 0.0
