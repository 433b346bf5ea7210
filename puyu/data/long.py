"""The long-context subset: long enough, a text and no noise, and of one piece; a map stage with thresholds by domain.

    config = LongConfig(models={"en": "en.ngram"}, domains={"book": {"words": {"splice_max": 0.15}}})
    verdicts = LongFilter(config)(documents, scores)

The three steps of InternLM2 (2024, section 3.1.3): documents over 32 KB; statistical filters that remove nonsense
(`puyu.data.discourse`); borders where one part makes the other harder to predict (`puyu.data.splice`). The subset is
part of the normal corpus, so that long texts are seen at least twice.

Scores: `bytes`, those of `discourse`, `splice`, `insert`, `mixed` with `splice_at`, `splice_end`, `insert_at`,
`insert_end` (characters) and `splice_gain`, `context`, and those of `puyu.data.perplexity`. A drop by `splice_max` or
`insert_max` leaves `span` (begin, end) and `border` (the text around it) in the metadata of the document.

`coherence`, as score and in the metadata, names the classes of LongWanjuan (Lv et al., 2024): 0 `chaotic`, what a
statistical or a splice rule drops; 1 `aggregated`, whose parts differ by `aggregated` of a threshold or more; 2
`holistic`, all others. The classes are LongWanjuan's, how they are told is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from puyu.configure import Config
from puyu.data.discourse import discourse
from puyu.data.filters import Bound, judge
from puyu.data.perplexity import Models, perplexity_scores, places_by_language
from puyu.data.splice import SpliceConfig, Splices, splices
from puyu.documents.document import Document
from puyu.documents.stages import Drop, Scores, Verdict

CLASSES = ("chaotic", "aggregated", "holistic")
_CUTS = ("splice", "insert", "mixed")
_OF_A_MODEL = (*(f"{cut}_max" for cut in _CUTS), "splice_gain_min", "bits_per_byte_max")
_AROUND = 60


class LongCodePolicy(Config):
    """Source code: length alone, unless `splice_max` is set and there is a model for `code`."""

    bytes_min: Bound = 32_768
    """Bytes, at least (InternLM2)."""
    splice_max: Bound = None
    """Bits per unit by which parts are explained better by themselves than by each other, at most."""


class LongPolicy(Config):
    """Languages with blanks between words (English); all bounds but `bytes_min` ours."""

    bytes_min: Bound = 32_768
    """Bytes, at least (InternLM2)."""
    connectives_min: Bound = 0.01
    """Connectives and discourse words per word, at least: tables and lists have none."""
    pronouns_min: Bound = None
    """Pronouns per word, at least."""
    cohesion_min: Bound = 0.02
    """Content words shared by neighboring passages, at least: shuffled and generated text shares none."""
    type_token_min: Bound = 0.2
    """Different words in a window of 500, at least: less is repetition."""
    type_token_max: Bound = 0.85
    """The same, at most: more is a list of words."""
    line_words_min: Bound = 3
    """Words in a line, at least."""
    sentence_words_max: Bound = 150
    """Words for each end of a sentence, at most."""
    nonsense_max: Bound = 0.3
    """Share of characters in lines that are no text, at most."""
    splice_max: Bound = 0.12
    """Bits per unit by which two sides of a border are explained better by themselves than by each other, at most."""
    insert_max: Bound = 0.12
    """The same for a piece in the middle and what stands around it."""
    mixed_max: Bound = 0.15
    """The same for two groups of segments anywhere: texts in turns."""
    splice_gain_min: Bound = None
    """Bits per unit that two sides of a border do for each other, at least; 0: as the report, harder is dropped."""
    bits_per_byte_max: Bound = None
    """Bits per byte under the model, at most."""


class LongChinesePolicy(LongPolicy):
    """Chinese: the same rules in their order, where a Han character is a word; bounds ours."""

    connectives_min: Bound = 0.003
    """Connectives and discourse words per word, at least."""
    cohesion_min: Bound = 0.02
    """Pairs of Han characters shared by neighboring passages, at least."""
    splice_max: Bound = 0.25
    """Bits per unit by which two sides of a border are explained better by themselves than by each other, at most."""
    insert_max: Bound = 0.25
    """The same for a piece in the middle and what stands around it."""
    mixed_max: Bound = 0.3
    """The same for two groups of segments anywhere: texts in turns."""


class LongPolicies(Config):
    """Thresholds per language; languages without an own policy use `words`."""

    words: LongPolicy = LongPolicy()
    """English and every other language with blanks between words."""
    zh: LongChinesePolicy = LongChinesePolicy()
    """Chinese."""
    code: LongCodePolicy = LongCodePolicy()
    """Source code."""

    def of(self, language: str) -> LongPolicy | LongCodePolicy:
        if language == "zh":
            return self.zh
        return self.code if language == "code" else self.words


class LongConfig(Config):
    """The long-context subset."""

    models: dict[str, Path] = {}
    """Language -> n-gram model (`puyu data train-ngram`); `*` for all others."""
    policies: LongPolicies = LongPolicies()
    """Thresholds per language."""
    domains: dict[str, LongPolicies] = {}
    """Thresholds of single domains, instead of `policies`."""
    splice: SpliceConfig = SpliceConfig()
    """How borders are looked for."""
    aggregated: float = 0.6
    """Share of the threshold of a cut from which on a text is an aggregate."""

    def policy(self, document: Document) -> LongPolicy | LongCodePolicy:
        return self.domains.get(document.domain, self.policies).of(document.language)


class LongFilter:
    """Map stage: measures long documents and judges them; `enforce` False only measures."""

    name = "long"

    def __init__(self, config: LongConfig, *, enforce: bool = True) -> None:
        self.config, self.enforce = config, enforce
        self.models = Models(config.models)

    def __call__(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[Verdict]:
        verdicts = [self._by_length(document) for document in documents]
        long = [at for at, verdict in enumerate(verdicts) if not _is_short(verdict)]
        for places in places_by_language(documents, long).values():
            judged = self._measured([documents[at] for at in places])
            for at, verdict in zip(places, judged, strict=True):
                verdicts[at] = replace(verdict, scores={**verdicts[at].scores, **verdict.scores})
        return [verdict if self.enforce else replace(verdict, drop=None) for verdict in verdicts]

    def _by_length(self, document: Document) -> Verdict:
        size, least = len(document.text.encode("utf-8")), self.config.policy(document).bytes_min
        drop = None if least is None or size >= least else Drop("bytes_min", size, least)
        return Verdict(document, {"bytes": size}, drop)

    def _measured(self, documents: Sequence[Document]) -> list[Verdict]:
        """Documents of one language."""
        language, texts = documents[0].language, [document.text for document in documents]
        policies = [self.config.policy(document) for document in documents]
        needed = any(policy.model_dump().get(rule) is not None for policy in policies for rule in _OF_A_MODEL)
        rows = [{} if language == "code" else _discourse_scores(found) for found in discourse(texts)]
        model = self.models.need(language, field="long.models") if needed else self.models.of(language)
        if model is None:
            return [self._judge(*row, None) for row in zip(documents, policies, rows, strict=True)]
        cuts = splices(texts, model, self.config.splice)
        for row, cut, more in zip(rows, cuts, perplexity_scores(model, texts), strict=True):
            row |= {**_cut_scores(cut), **more}
        return [self._judge(*row) for row in zip(documents, policies, rows, cuts, strict=True)]

    def _judge(self, document: Document, policy: Config, scores: dict[str, float], cuts: Splices | None) -> Verdict:
        drop = judge({**scores, "bytes": float("inf")}, policy)
        metadata: dict[str, Any] = dict(document.metadata)
        if cuts is not None:
            coherence = 0 if drop else 1 if self._is_aggregate(scores, policy) else 2
            scores |= {"coherence": coherence}
            metadata |= {"coherence": CLASSES[coherence]}
            if drop:
                metadata |= _span(document.text, drop, cuts)
        return Verdict(replace(document, metadata=metadata), scores, drop)

    def _is_aggregate(self, scores: Mapping[str, float], policy: Config) -> bool:
        bounds = policy.model_dump()
        limits = [(scores[cut], bounds.get(f"{cut}_max")) for cut in _CUTS]
        return any(limit is not None and value >= self.config.aggregated * limit for value, limit in limits)


def _is_short(verdict: Verdict) -> bool:
    return verdict.drop is not None


def _discourse_scores(found: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if name != "words"}


def _cut_scores(cuts: Splices) -> dict[str, float]:
    return {
        "splice": cuts.splice.value,
        "insert": cuts.insert.value,
        "mixed": cuts.mixed.value,
        "splice_at": cuts.splice.begin,
        "splice_end": cuts.splice.end,
        "splice_gain": cuts.splice.gain,
        "insert_at": cuts.insert.begin,
        "insert_end": cuts.insert.end,
        "context": cuts.context,
    }


def _span(text: str, drop: Drop, cuts: Splices) -> dict[str, Any]:
    """Where the rule looked, for rules that look at a place."""
    cut = {"splice_max": cuts.splice, "splice_gain_min": cuts.splice, "insert_max": cuts.insert}.get(drop.rule)
    if cut is None:
        return {}
    border = text[max(cut.begin - _AROUND, 0) : cut.begin] + " | " + text[cut.begin : cut.begin + _AROUND]
    return {"span": [cut.begin, cut.end], "border": border}
