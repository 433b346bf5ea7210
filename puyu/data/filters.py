"""Rules with their provenance: one policy of thresholds per language, over scores that are computed once.

    >>> drop = judge({"chars": 10.0}, ChinesePolicy())
    >>> drop.rule, drop.value, drop.threshold
    ('chars_min', 10.0, 40.0)

A field `NAME_min` or `NAME_max` bounds the score NAME of `puyu.data.measure`; null switches the rule off. Rules are
asked in the order of the fields and the first that fails is the reason. Thresholds are configuration, so that they can
be moved without computing a score again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from puyu.configure import Config
from puyu.data.measure import SCORES, measure_all, scores_of
from puyu.documents.document import Document
from puyu.documents.language import Guess, detect_all
from puyu.documents.stages import Drop, Scores, Verdict

Bound = float | None
_COLUMNS = {name: number for number, name in enumerate(SCORES)}


class WordPolicy(Config):
    """Languages with blanks between words (English)."""

    chars_min: Bound = 200
    """Characters, at least (short pages carry little; ours)."""
    words_min: Bound = 50
    """Words with a letter or digit, at least (Gopher)."""
    words_max: Bound = 100_000
    """Words, at most (Gopher)."""
    mean_word_min: Bound = 3
    """Mean length of a word, at least (Gopher)."""
    mean_word_max: Bound = 10
    """Mean length of a word, at most (Gopher)."""
    symbols_max: Bound = 0.1
    """Hash marks or ellipses per word, at most (Gopher)."""
    bullet_lines_max: Bound = 0.9
    """Share of lines that begin with a bullet, at most (Gopher)."""
    ellipsis_lines_max: Bound = 0.3
    """Share of lines that end with an ellipsis, at most (Gopher)."""
    alpha_words_min: Bound = 0.7
    """Share of words with a letter, at least (Gopher has 0.8; manuals with tables and code need 0.7)."""
    stop_words_min: Bound = 2
    """Different words of {the, be, to, of, and, that, have, with}, at least (Gopher)."""
    lorem_ipsum_max: Bound = 0
    """Times that `lorem ipsum` stands in the text, at most (C4)."""
    boilerplate_lines_max: Bound = 0.2
    """Share of lines about cookies, privacy, newsletters, carts, at most (C4's policy lines, as a share)."""
    ended_lines_min: Bound = 0.05
    """Share of lines that end with punctuation, at least (FineWeb has 0.12, without colons and brackets)."""
    punctuation_max: Bound = 0.3
    """Share of punctuation characters, at most (in the spirit of InternLM2; bound ours)."""
    digits_max: Bound = 0.25
    """Share of digits, at most (NeMo-Curator has 0.15; bound ours)."""
    odd_chars_max: Bound = 0.005
    """Share of replacement, private-use and control characters, at most (InternLM2; bound ours)."""
    char_runs_max: Bound = 0.2
    """Share of characters in runs of 20 and more of one character, at most (InternLM2; bound ours)."""
    mean_line_min: Bound = 8
    """Mean length of a line, at least: menus and link lists are shorter (InternLM2's line breaks; bound ours)."""
    dup_lines_max: Bound = 0.3
    """Share of lines that stood before, at most (Gopher)."""
    dup_line_chars_max: Bound = 0.2
    """Share of characters in such lines, at most (Gopher)."""
    dup_paragraphs_max: Bound = 0.3
    """Share of paragraphs that stood before, at most (Gopher)."""
    dup_paragraph_chars_max: Bound = 0.2
    """Share of characters in such paragraphs, at most (Gopher)."""
    top_2gram_max: Bound = 0.2
    """Share of characters in the most frequent 2-gram, at most (Gopher)."""
    top_3gram_max: Bound = 0.18
    """The same for 3-grams (Gopher)."""
    top_4gram_max: Bound = 0.16
    """The same for 4-grams (Gopher)."""
    dup_5gram_max: Bound = 0.15
    """Share of characters in 5-grams that stood before, at most (Gopher)."""
    dup_6gram_max: Bound = 0.14
    """The same for 6-grams (Gopher)."""
    dup_7gram_max: Bound = 0.13
    """The same for 7-grams (Gopher)."""
    dup_8gram_max: Bound = 0.12
    """The same for 8-grams (Gopher)."""
    dup_9gram_max: Bound = 0.11
    """The same for 9-grams (Gopher)."""
    dup_10gram_max: Bound = 0.1
    """The same for 10-grams (Gopher)."""


class ChinesePolicy(Config):
    """Chinese: characters instead of words, marks instead of stop words; all bounds ours."""

    chars_min: Bound = 40
    """Characters, at least."""
    han_min: Bound = 20
    """Han characters, at least."""
    han_share_min: Bound = 0.08
    """Han characters among all that are not blank, at least."""
    sentence_marks_min: Bound = 0.01
    """Commas, stops and the like per Han character, at least: lists of keywords have none."""
    lorem_ipsum_max: Bound = 0
    """Times that `lorem ipsum` stands in the text, at most (C4)."""
    boilerplate_lines_max: Bound = 0.2
    """Share of lines about rights, privacy, downloads, shops, at most (C4's policy lines, as a share)."""
    punctuation_max: Bound = 0.4
    """Share of punctuation characters, at most."""
    digits_max: Bound = 0.25
    """Share of digits, at most."""
    odd_chars_max: Bound = 0.005
    """Share of replacement, private-use and control characters, at most."""
    char_runs_max: Bound = 0.2
    """Share of characters in runs of 20 and more of one character, at most."""
    bullet_lines_max: Bound = 0.9
    """Share of lines that begin with a bullet, at most (Gopher)."""
    ellipsis_lines_max: Bound = 0.3
    """Share of lines that end with an ellipsis, at most (Gopher)."""
    mean_line_min: Bound = 6
    """Mean length of a line, at least: menus and link lists are shorter."""
    dup_lines_max: Bound = 0.3
    """Share of lines that stood before, at most (Gopher)."""
    dup_line_chars_max: Bound = 0.2
    """Share of characters in such lines, at most (Gopher)."""
    dup_paragraphs_max: Bound = 0.3
    """Share of paragraphs that stood before, at most (Gopher)."""
    dup_paragraph_chars_max: Bound = 0.2
    """Share of characters in such paragraphs, at most (Gopher)."""
    top_2gram_max: Bound = 0.2
    """Share of characters in the most frequent pair of characters or words, at most (Gopher)."""
    top_4gram_max: Bound = 0.16
    """The same for 4-grams (Gopher)."""
    dup_10gram_max: Bound = 0.3
    """Share of characters in 10-grams that stood before, at most (10 characters are about 6 words)."""


class CodePolicy(Config):
    """Source code: only what is surely no source is dropped."""

    chars_min: Bound = 50
    """Characters, at least."""
    lines_max: Bound = 20_000
    """Lines, at most (NeMo-Curator)."""
    mean_line_max: Bound = 100
    """Mean length of a line, at most: longer is generated or data (DeepSeek-Coder)."""
    longest_line_max: Bound = 1000
    """Longest line, at most (DeepSeek-Coder)."""
    letters_min: Bound = 0.25
    """Share of letters, at least (DeepSeek-Coder)."""
    odd_chars_max: Bound = 0.005
    """Share of replacement, private-use and control characters, at most."""


Policy = WordPolicy | ChinesePolicy | CodePolicy


class LanguagePolicies(Config):
    """Thresholds per language; languages without an own policy use `words`."""

    words: WordPolicy = WordPolicy()
    """English and every other language with blanks between words."""
    zh: ChinesePolicy = ChinesePolicy()
    """Chinese."""
    code: CodePolicy = CodePolicy()
    """Source code."""

    def named(self, name: str) -> Policy:
        """One of the fields."""
        found: Policy = getattr(self, name)
        return found


class Policies(LanguagePolicies):
    """Thresholds per language, and those of single domains."""

    domains: dict[str, LanguagePolicies] = {}
    """Thresholds of single domains, instead of those above; what is left out has its default."""

    def of(self, language: str, domain: str = "") -> Policy:
        """The thresholds for a document."""
        return self.domains.get(domain, self).named(policy_name(language))

    def of_group(self, group: str) -> Policy:
        """The thresholds for a group of documents (`group_of`)."""
        return self.of(group, domain_of(group))

    def group(self, language: str, domain: str) -> str:
        """The group of a document, by the name of its policy."""
        return group_of(policy_name(language), domain if domain in self.domains else "")


_IN = " in "
POLICY_NAMES = tuple(LanguagePolicies.model_fields)


def group_of(language: str, domain: str) -> str:
    """The name of documents of one language that one policy judges: `domain` is empty unless it has its own."""
    return f"{language}{_IN}{domain}" if domain else language


def domain_of(group: str) -> str:
    """The domain of a group; empty unless it has thresholds of its own."""
    return group.partition(_IN)[2]


def policy_name(language: str) -> str:
    """The field of `LanguagePolicies` for a language, or for a group of that language."""
    language = language.partition(_IN)[0]
    return language if language in ("zh", "code") else "words"


def bounds(policy: Config) -> Iterator[tuple[str, str, bool, float]]:
    """(rule, score, is a minimum, threshold) of the rules that are on, in their order."""
    for rule in type(policy).model_fields:
        threshold = getattr(policy, rule)
        if threshold is not None:
            score, _, side = rule.rpartition("_")
            yield rule, score, side == "min", float(threshold)


def judge(scores: Mapping[str, float], policy: Config) -> Drop | None:
    """The first rule that the scores break, or None."""
    for rule, score, is_minimum, threshold in bounds(policy):
        value = scores[score]
        if value < threshold if is_minimum else value > threshold:
            return Drop(rule, value, threshold)
    return None


def margins(scores: Mapping[str, float], policy: Policy) -> dict[str, float]:
    """How far each rule is from failing: 0 at its threshold, 1 far away. Rules with threshold 0 have no margin."""
    found = {}
    for rule, score, is_minimum, threshold in bounds(policy):
        value = scores[score]
        if threshold > 0:
            share = 1 - threshold / value if is_minimum and value > 0 else 1 - value / threshold
            found[rule] = round(min(max(share, 0.0), 1.0), 4)
    return found


def quality(scores: Mapping[str, float], policy: Policy) -> float:
    """The smallest margin: what dedup prefers to keep, and what stands near a threshold when it is small."""
    return min(margins(scores, policy).values(), default=1.0)


def judge_all(table: NDArray[np.float64], policy: Policy) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of each row of `measure_all`: the number of the first rule that it breaks or -1, and its quality (then 0)."""
    rules = list(bounds(policy))
    if not rules:
        return np.full(len(table), -1), np.ones(len(table))
    limits = np.array([threshold for _, _, _, threshold in rules])
    minimum = np.array([is_minimum for _, _, is_minimum, _ in rules])
    values = table[:, [_COLUMNS[score] for _, score, _, _ in rules]]
    fails = np.where(minimum, values < limits, values > limits)
    broken = np.where(fails.any(axis=1), fails.argmax(axis=1), -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        margin = np.where(minimum & (values > 0), 1 - limits / values, 1 - values / limits)
    margin = np.where(limits > 0, np.round(np.clip(margin, 0.0, 1.0), 4), 1.0)
    return broken, np.where(broken < 0, margin.min(axis=1), 0.0)


def judge_columns(columns: Mapping[str, NDArray[np.float64]], policy: Policy, *, size: int) -> NDArray[np.int64]:
    """`judge` of `size` documents whose scores are columns: the place of the rule among the policy's fields, or -1."""
    broken, fields = np.full(size, -1), list(type(policy).model_fields)
    for rule, score, is_minimum, threshold in reversed(list(bounds(policy))):
        values = columns[score]
        broken[values < threshold if is_minimum else values > threshold] = fields.index(rule)
    return broken


class LanguageFilter:
    """Map stage: sets the language (unless the source declares it) and drops those that are not wanted."""

    name = "language"

    def __init__(self, wanted: tuple[str, ...]) -> None:
        self.wanted = wanted

    def __call__(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[Verdict]:
        asked = [document for document in documents if not document.language]
        guesses = iter(detect_all([document.text for document in asked]))
        return [
            Verdict(document) if document.language else self._judge(document, next(guesses)) for document in documents
        ]

    def _judge(self, document: Document, guess: Guess) -> Verdict:
        d = document  # dataclasses.replace takes many times as long
        found = Document(d.id, d.text, d.source, d.domain, guess.language, d.metadata)
        wanted = not self.wanted or guess.language in self.wanted
        drop = None if wanted else Drop("language", guess.language, " ".join(self.wanted))
        return Verdict(found, {"language_confidence": round(guess.confidence, 4)}, drop)


class RuleFilter:
    """Map stage: measures, and judges by the policy of the document's language; `enforce` False only measures."""

    name = "rules"

    def __init__(self, policies: Policies, *, enforce: bool = True) -> None:
        self.policies, self.enforce = policies, enforce

    def __call__(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[Verdict]:
        table = measure_all([document.text for document in documents], [document.language for document in documents])
        broken, values = np.full(len(documents), -1), np.zeros(len(documents))
        by_policy: dict[str, list[int]] = defaultdict(list)
        groups = [self.policies.group(document.language, document.domain) for document in documents]
        for at, group in enumerate(groups):
            by_policy[group].append(at)
        policies = {group: self.policies.of_group(group) for group in by_policy}
        for group, rows in by_policy.items():
            broken[rows], values[rows] = judge_all(table[rows], policies[group])
        rules = {group: list(bounds(policy)) for group, policy in policies.items()}
        judged = zip(broken.tolist(), values.tolist(), strict=True)
        return [
            self._verdict(document, measured, rules[group], verdict)
            for document, measured, group, verdict in zip(documents, scores_of(table), groups, judged, strict=True)
        ]

    def _verdict(
        self,
        document: Document,
        measured: dict[str, float],
        rules: Sequence[tuple[str, str, bool, float]],
        judged: tuple[int, float],
    ) -> Verdict:
        number, measured["quality"] = judged
        if number < 0 or not self.enforce:
            return Verdict(document, measured)
        rule, score, _, threshold = rules[number]
        return Verdict(document, measured, Drop(rule, measured[score], threshold))
