"""Published rule sets by name: thresholds with their provenance, over scores that are computed once.

    >>> from puyu.documents.document import make_document
    >>> config = PresetConfig.model_validate(["gopher-quality", "c4-paper"])
    >>> verdict = PresetFilter(config)([make_document("Too short.", source="a", language="en")], [{}])[0]
    >>> verdict.drop.rule, verdict.drop.value, verdict.drop.threshold
    ('gopher_quality.words_min', 2.0, 50.0)

A preset's fields `NAME_min` and `NAME_max` bound its score NAME, in the order in which the published code asks; null
switches a rule off, and an override moves one threshold of one preset. Where two versions of a set were published, each
has a name. The scores (`puyu.data.published`, `puyu.data.measure`) stand under `PRESET.SCORE` for every document of the
preset's languages, also for those that another preset drops.

C4 removes lines, so the document that goes on has another text. It keeps its id, which is that of the text as it was
read: the place where `why` and `dropped.jsonl` find it. What a dropped document keeps is its own text.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from puyu.configure import Config
from puyu.data import measure, published
from puyu.data.filters import Bound, ChinesePolicy
from puyu.documents.document import Document
from puyu.documents.stages import Drop, Scores, Verdict

Name = Literal[
    "gopher-quality",
    "gopher-repetition",
    "c4-paper",
    "c4-tfds",
    "fineweb-paper",
    "fineweb-datatrove",
    "internlm2",
    "zh",
]


@dataclass(frozen=True, slots=True)
class Measured:
    """Scores [texts, names] of texts, and the texts where a preset changes them."""

    names: tuple[str, ...]
    table: NDArray[np.float64]
    texts: list[str] | None = None


class Preset(Config):
    """A rule set: its thresholds and what they are compared with."""

    languages: tuple[str, ...] = ("en",)
    """Languages that it judges, by ISO 639; empty: all but code."""

    @abstractmethod
    def measure(self, texts: Sequence[str], languages: Sequence[str]) -> Measured:
        """The scores of texts."""

    def judges(self, language: str) -> bool:
        return language in self.languages if self.languages else language != "code"

    def fails(self, values: NDArray[np.float64], limits: NDArray[np.float64], *, at_least: bool) -> NDArray[np.bool_]:
        """Whether values break a threshold; what equals it passes."""
        return values < limits if at_least else values > limits


# ---- Gopher


class GopherQuality(Preset):
    """Gopher's quality rules: Rae et al. 2021 (arXiv 2112.11446), A1.1; datatrove's GopherQualityFilter."""

    words_min: Bound = 50
    """Words with a character that is no punctuation, at least."""
    words_max: Bound = 100_000
    """The same, at most."""
    mean_word_min: Bound = 3
    """Mean length of such words, at least."""
    mean_word_max: Bound = 10
    """The same, at most."""
    hashes_max: Bound = 0.1
    """Hash marks per word, at most."""
    ellipses_max: Bound = 0.1
    """Ellipses per word, at most."""
    bullet_lines_max: Bound = 0.9
    """Share of lines, blank ones included, that begin with • or -, at most."""
    ellipsis_lines_max: Bound = 0.3
    """Share of lines that end with an ellipsis, at most."""
    alpha_words_min: Bound = 0.8
    """Share of words with a letter, at least."""
    stop_words_min: Bound = 2
    """Different words of {the, be, to, of, and, that, have, with}, as they stand, at least."""

    def measure(self, texts: Sequence[str], languages: Sequence[str]) -> Measured:
        return _measured("gopher_quality", texts, languages)


class GopherRepetition(Preset):
    """Gopher's repetition rules: Rae et al. 2021, table A1; datatrove's GopherRepetitionFilter.

    All characters are shares of the whole text; n-grams of n >= 5 are counted from left to right without overlap.
    """

    chars_min: Bound = 1
    """Characters, at least: an empty text goes."""
    dup_paragraphs_max: Bound = 0.3
    """Share of paragraphs that stood before, at most."""
    dup_paragraph_chars_max: Bound = 0.2
    """Share of characters in such paragraphs, at most."""
    dup_lines_max: Bound = 0.3
    """Share of lines that stood before, at most."""
    dup_line_chars_max: Bound = 0.2
    """Share of characters in such lines, at most."""
    top_2gram_max: Bound = 0.2
    """Share of characters in the most frequent 2-gram, at most."""
    top_3gram_max: Bound = 0.18
    """The same for 3-grams."""
    top_4gram_max: Bound = 0.16
    """The same for 4-grams."""
    dup_5gram_max: Bound = 0.15
    """Share of characters in 5-grams that stood before, at most."""
    dup_6gram_max: Bound = 0.14
    """The same for 6-grams."""
    dup_7gram_max: Bound = 0.13
    """The same for 7-grams."""
    dup_8gram_max: Bound = 0.12
    """The same for 8-grams."""
    dup_9gram_max: Bound = 0.11
    """The same for 9-grams."""
    dup_10gram_max: Bound = 0.1
    """The same for 10-grams."""

    def measure(self, texts: Sequence[str], languages: Sequence[str]) -> Measured:
        return _measured("gopher_repetition", texts, languages)


def _measured(
    family: published.Family, texts: Sequence[str], languages: Sequence[str], short_line: int = 30
) -> Measured:
    table = published.measured(family, texts, languages, short_line=short_line)
    return Measured(published.SCORES[family], table)


# ---- C4


class C4Paper(Preset):
    """C4 as its paper has it and datatrove's C4QualityFilter by default: Raffel et al. 2020, section 2.2.

    Lines go first, and what is left is the text; then the page is judged. Without the list of bad words, the search
    for sentences that stand on many pages, and langdetect, which are other stages.
    """

    longest_word: int | None = 1000
    """Lines with a longer word go (only in the code)."""
    citations: bool = True
    """Remove [1], [edit] and [citation needed] (only in the code)."""
    ends: str = ".?!\"'"
    """Lines that end with none of these, or with three dots, go; empty: no such rule."""
    line_words: int | None = 3
    """Lines with fewer words go."""
    words_after_citations: bool = False
    """Whether words are counted when citations are gone."""
    javascript: bool = True
    """Lines that mention JavaScript go."""
    policy: bool = True
    """Lines about cookies, privacy and terms of use go (only in the code)."""
    lorem_ipsum_max: int | None = 0
    """Lines with `lorem ipsum`, at most."""
    curly_brackets_max: int | None = 0
    """Lines with `{`, at most."""
    sentences_min: Bound = 5
    """Sentences that are left, at least."""

    def measure(self, texts: Sequence[str], languages: Sequence[str]) -> Measured:
        rules = published.LineRules(
            longest_word=self.longest_word,
            citations=self.citations,
            ends=self.ends,
            line_words=self.line_words,
            words_after_citations=self.words_after_citations,
            lorem_ipsum=self.lorem_ipsum_max,
            javascript=self.javascript,
            curly_brackets=self.curly_brackets_max,
            policy=self.policy,
        )
        kept, table = published.c4_pages(texts, rules)
        return Measured(published.C4_SCORES, table, kept)


class C4Tfds(C4Paper):
    """C4 as it was made: `clean_page` in tensorflow_datasets/text/c4_utils.py, which has 5 words and 3 sentences."""

    ends: str = '.?!"'
    """Lines that end with none of these, or with three dots, go; empty: no such rule."""
    line_words: int | None = 5
    """Lines with fewer words go."""
    words_after_citations: bool = True
    """Whether words are counted when citations are gone."""
    sentences_min: Bound = 3
    """Sentences that are left, at least."""


# ---- FineWeb


class FineWebDatatrove(Preset):
    """FineWeb's own rules as its code has them: datatrove's FineWebQualityFilter by default."""

    short_line: int = 30
    """Characters of a short line, at most."""
    lines_min: Bound = 1
    """Lines that are not blank, at least."""
    ended_lines_min: Bound = 0.12
    """Share of lines whose last character ends a sentence in some script, at least."""
    short_lines_max: Bound = 0.67
    """Share of short lines, at most."""
    dup_line_chars_max: Bound = 0.01
    """Share of characters, without line breaks, in lines that stood before, at most."""
    line_breaks_max: Bound = 0.3
    """Line breaks per word, at most (`list_ratio`; not in the paper)."""

    def measure(self, texts: Sequence[str], languages: Sequence[str]) -> Measured:
        return _measured("fineweb", texts, languages, self.short_line)


class FineWebPaper(FineWebDatatrove):
    """FineWeb's own rules as its paper has them: Penedo et al. 2024 (arXiv 2406.17557), section 3.6.

    There what equals a threshold goes ("<= 0.12", ">= 0.1", ">= 0.67"), and short lines are shorter than 30 characters.
    """

    short_line: int = 29
    """Characters of a short line, at most."""
    lines_min: Bound = None
    """Lines that are not blank, at least."""
    dup_line_chars_max: Bound = 0.1
    """Share of characters, without line breaks, in lines that stood before, at most."""
    line_breaks_max: Bound = None
    """Line breaks per word, at most (`list_ratio`; not in the paper)."""

    def fails(self, values: NDArray[np.float64], limits: NDArray[np.float64], *, at_least: bool) -> NDArray[np.bool_]:
        """Whether values break a threshold; what equals it does."""
        return values <= limits if at_least else values >= limits


# ---- InternLM2 and Chinese


class InternLM2(Preset):
    """What InternLM2 (2024, arXiv 2403.17297, 3.1.1) names: separators, line breaks, odd characters, punctuation.

    Its thresholds are not published; all bounds are ours, those of `policies.words`.
    """

    mean_line_min: Bound = 8
    """Line breaks: mean length of a line, at least."""
    dup_lines_max: Bound = 0.3
    """Line breaks: share of lines that stood before, at most."""
    char_runs_max: Bound = 0.2
    """Separators: share of characters in runs of 20 and more of one character, at most."""
    bullet_lines_max: Bound = 0.9
    """Separators: share of lines that begin with a bullet, at most."""
    odd_chars_max: Bound = 0.005
    """Odd characters: share of replacement, private-use and control characters, at most."""
    punctuation_max: Bound = 0.3
    """Punctuation: share of all characters, at most."""
    ended_lines_min: Bound = 0.05
    """Punctuation: share of lines that end with some, at least."""

    def measure(self, texts: Sequence[str], languages: Sequence[str]) -> Measured:
        return _ours(self, texts, ["" if language == "code" else language for language in languages])


class Zh(ChinesePolicy, Preset):
    """Chinese: characters instead of words, marks instead of stop words; `policies.zh` as a preset, all bounds ours."""

    languages: tuple[str, ...] = ("zh",)
    """Languages that it judges, by ISO 639; empty: all but code."""

    def measure(self, texts: Sequence[str], languages: Sequence[str]) -> Measured:
        return _ours(self, texts, ["zh"] * len(texts))


def _ours(preset: Preset, texts: Sequence[str], languages: Sequence[str]) -> Measured:
    """The scores of `puyu.data.measure` that the preset has rules for."""
    names = tuple(dict.fromkeys(rule[:-4] for rule in _rules(preset)))
    table = measure.measure_all(texts, languages)
    return Measured(names, table[:, [measure.SCORES.index(name) for name in names]])


# ---- the stage


class PresetConfig(Config):
    """Which presets judge the documents, and what is changed in them; a list of names is enough."""

    use: tuple[Name, ...]
    """Presets, in the order in which they are asked."""
    alone: bool = False
    """Presets alone judge; the rules of `policies` only measure."""
    gopher_quality: GopherQuality = GopherQuality()
    """Gopher's quality rules."""
    gopher_repetition: GopherRepetition = GopherRepetition()
    """Gopher's repetition rules."""
    c4_paper: C4Paper = C4Paper()
    """C4 with 3 words in a line and 5 sentences on a page."""
    c4_tfds: C4Tfds = C4Tfds()
    """C4 with 5 words in a line and 3 sentences on a page."""
    fineweb_paper: FineWebPaper = FineWebPaper()
    """FineWeb, paper."""
    fineweb_datatrove: FineWebDatatrove = FineWebDatatrove()
    """FineWeb, code."""
    internlm2: InternLM2 = InternLM2()
    """InternLM2's kinds of rules."""
    zh: Zh = Zh()
    """Chinese."""

    @model_validator(mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        return {"use": given} if isinstance(given, list | tuple) else given

    @model_validator(mode="after")
    def _once(self) -> PresetConfig:
        twice = sorted({name for name in self.use if self.use.count(name) > 1})
        if twice:
            raise ValueError(f"use: {twice[0]} is named twice")
        return self

    def presets(self) -> Iterator[tuple[str, Preset]]:
        """(prefix of its scores, preset) of those in use."""
        for name in self.use:
            field = name.replace("-", "_")
            yield field, getattr(self, field)


def _rules(preset: Preset) -> list[str]:
    """Fields that bound a score."""
    return [field for field in type(preset).model_fields if field.endswith(("_min", "_max"))]


def _bounds(preset: Preset, names: Sequence[str]) -> list[tuple[str, int, bool, float]]:
    """(rule, column, is a minimum, threshold) of the rules that are on, in their order."""
    limits = {rule: getattr(preset, rule) for rule in _rules(preset)}
    return [
        (rule, names.index(rule[:-4]), rule.endswith("_min"), float(limit))
        for rule, limit in limits.items()
        if limit is not None
    ]


def _first_broken(preset: Preset, found: Measured) -> list[Drop | None]:
    """The first rule that each text breaks."""
    rules = _bounds(preset, found.names)
    if not rules:
        return [None] * len(found.table)
    limits = np.array([limit for _, _, _, limit in rules])
    minimum = np.array([is_minimum for _, _, is_minimum, _ in rules])
    values = found.table[:, [column for _, column, _, _ in rules]]
    low, high = (preset.fails(values, limits, at_least=at_least) for at_least in (True, False))
    broken = np.where(minimum, low, high)
    first = np.where(broken.any(axis=1), broken.argmax(axis=1), -1).tolist()
    return [
        None if rule < 0 else Drop(rules[rule][0], float(values[row, rule]), rules[rule][3])
        for row, rule in enumerate(first)
    ]


class PresetFilter:
    """Map stage: each preset measures and judges the documents of its languages; the first that fails one drops it.

    A preset sees the texts as those before it left them. `enforce` False only measures, and changes no text.
    """

    name = "presets"

    def __init__(self, config: PresetConfig, *, enforce: bool = True) -> None:
        self.presets, self.enforce = list(config.presets()), enforce

    def __call__(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[Verdict]:
        texts = [document.text for document in documents]
        found: list[dict[str, float]] = [{} for _ in documents]
        drops: list[Drop | None] = [None] * len(documents)
        for prefix, preset in self.presets:
            rows = [row for row, document in enumerate(documents) if preset.judges(document.language)]
            measured = preset.measure([texts[row] for row in rows], [documents[row].language for row in rows])
            verdicts = _first_broken(preset, measured)
            names = [f"{prefix}.{name}" for name in measured.names]
            for at, (row, values, drop) in enumerate(zip(rows, measured.table.tolist(), verdicts, strict=True)):
                found[row].update(zip(names, values, strict=True))
                if drop is not None:
                    drops[row] = drops[row] or replace(drop, rule=f"{prefix}.{drop.rule}")
                elif measured.texts is not None:
                    texts[row] = measured.texts[at]
        if not self.enforce:
            return [Verdict(document, values) for document, values in zip(documents, found, strict=True)]
        return [
            Verdict(document if drop or text == document.text else replace(document, text=text), values, drop)
            for document, text, values, drop in zip(documents, texts, found, drops, strict=True)
        ]
