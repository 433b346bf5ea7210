"""Rules of quality for source files, by language, and classes of quality with their epochs.

    >>> policy = CodeRules()
    >>> policy.judge({"mean_line": 400.0}, "javascript").rule
    'mean_line_max'

A field `NAME_min` or `NAME_max` bounds the score NAME; the first rule that fails is the reason; null switches a rule
off; a rule is asked where its score means something. Languages that are low on resources (their
names, or a share of the corpus below which every language is) are measured and never dropped, as in InternLM2 (2024,
section 3.1.2): every file of them is needed. Style is no signal of quality there, so no rule here looks at it.

Sources: StarCoder (Li et al. 2023), DeepSeek-Coder (Guo et al. 2024), NeMo-Curator's code filters (26.x).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import field_validator

from puyu.configure import Config
from puyu.data.code.lexer import blank, comments_of
from puyu.data.filters import Bound
from puyu.documents.characters import ODD
from puyu.documents.document import Document
from puyu.documents.programming import BY_NAME
from puyu.documents.stages import Drop, Scores, Verdict

Class = Literal["high", "moderate", "low", "unscored"]
CLASSES: tuple[Class, ...] = ("high", "moderate", "low", "unscored")

_OPENER = re.compile(r"<(?:(script|style)\b|(!--))?", re.A | re.I)
_CLOSERS = {
    "script": re.compile(r"</script\s*>", re.A | re.I),
    "style": re.compile(r"</style\s*>", re.A | re.I),
    "!--": re.compile("-->"),
    "": re.compile(">"),
}
_ODD = re.compile(f"[{ODD}]")
_XML = re.compile(r"<\?xml\s+version=", re.I)


class CodeRules(Config):
    """Thresholds, in the order in which they are asked."""

    lines_min: Bound = None
    """Lines, at least (NeMo-Curator has 10; a package's `__init__.py` and a small header are shorter, so off here)."""
    lines_max: Bound = 20_000
    """Lines, at most (NeMo-Curator)."""
    mean_line_max: Bound = 100
    """Mean length of a line, at most: longer is generated or data (StarCoder, DeepSeek-Coder)."""
    longest_line_max: Bound = 1000
    """Longest line, at most (StarCoder, DeepSeek-Coder)."""
    letters_min: Bound = 0.25
    """Share of letters, at least (StarCoder, DeepSeek-Coder, NeMo-Curator)."""
    odd_chars_max: Bound = 0.005
    """Share of replacement, private-use and control characters, at most (InternLM2; bound ours)."""
    xml_header_max: Bound = 0
    """Whether `<?xml version=` stands in the first 100 characters of what is no XML (StarCoder, NeMo-Curator)."""
    comments_min: Bound = 0.01
    """Share of comments among characters, at least, from `comment_lines` lines on (NeMo-Curator)."""
    comments_max: Bound = 0.85
    """Share of comments among characters, at most (NeMo-Curator has it; a docstring is a comment)."""
    visible_min: Bound = 100
    """HTML: characters of visible text, at least (StarCoder, DeepSeek-Coder)."""
    visible_share_min: Bound = 0.2
    """HTML: visible text among all characters, at least (StarCoder, DeepSeek-Coder)."""
    data_chars_min: Bound = 50
    """JSON and YAML: characters, at least (DeepSeek-Coder)."""
    data_chars_max: Bound = 5000
    """JSON and YAML: characters, at most (DeepSeek-Coder)."""
    comment_lines: int = 100
    """Files of fewer lines may be without comments (ours: NeMo-Curator asks of every file)."""
    low_resource: tuple[str, ...] = ("zig", "nim", "crystal", "elm", "coq", "ada", "cobol", "fsharp", "rebol", "v", "d")
    """Languages that are measured and never dropped."""
    low_resource_share: float = 0.0
    """Every language with less than this share of the documents is low on resources, too."""

    @field_validator("low_resource")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in BY_NAME]
        if unknown:
            raise ValueError(f"unknown languages: {', '.join(unknown)}")
        return names

    def judge(self, scores: Mapping[str, float], language: str) -> Drop | None:
        """The first rule that the scores break; a score that is not there breaks none."""
        if language in self.low_resource:
            return None
        for rule in type(self).model_fields:
            score, _, side = rule.rpartition("_")
            threshold = getattr(self, rule)
            if side not in ("min", "max") or threshold is None or score not in scores:
                continue
            if rule == "comments_min" and scores.get("lines", 0) < self.comment_lines:
                continue
            value = scores[score]
            if value < threshold if side == "min" else value > threshold:
                return Drop(rule, value, threshold)
        return None


def measure(text: str, language: str) -> dict[str, float]:
    """The scores of a file that mean something for its language; shares lie between 0 and 1."""
    row = BY_NAME.get(language)
    kind = row.kind if row else "code"
    size, lines = len(text), text.split("\n")
    longest = max(map(len, lines))
    scores: dict[str, float] = {"chars": size, "lines": len(lines), "odd_chars": _share(len(_ODD.findall(text)), size)}
    if size and kind != "prose":
        scores |= {"mean_line": size / len(lines), "longest_line": longest}
        scores["letters"] = _share(sum(map(str.isalpha, text)), size)
    if kind == "code":
        scores["xml_header"] = float(_XML.search(text[:100]) is not None)
        scores |= _comments(text, language)
    if language == "html":
        visible = len(" ".join(visible_text(text).split()))
        scores |= {"visible": visible, "visible_share": _share(visible, size)}
    if language in ("json", "yaml"):
        scores["data_chars"] = size
    return {name: round(value, 4) for name, value in scores.items()}


def visible_text(html: str) -> str:
    """The text of a page, with a blank for each tag, comment, script and style sheet.

    What is not closed is looked for once: no later one of its kind is closed either. So the time is linear.
    """
    closers, pieces, begin, at = dict(_CLOSERS), list[str](), 0, 0
    while found := _OPENER.search(html, at):
        kind = (found[1] or found[2] or "").lower()
        ends = (_closed(html, where, name, closers) for name, where in ((kind, found.end()), ("", found.start() + 1)))
        end = next(filter(None, ends), 0)
        if end:
            pieces.append(html[begin : found.start()])
            begin = end
        at = end or found.start() + 1
    return " ".join([*pieces, html[begin:]])


def _closed(html: str, at: int, kind: str, closers: dict[str, re.Pattern[str]]) -> int:
    """Where what is open ends; 0 where it does not, and then its kind is asked for no more."""
    if kind not in closers:
        return 0
    if found := closers[kind].search(html, at):
        return found.end()
    del closers[kind]
    return 0


def _comments(text: str, language: str) -> dict[str, float]:
    """The share of comments; not there for a language without any."""
    style = comments_of(language)
    if not (style.line or style.blocks):
        return {}
    return {"comments": _share(blank(text, language).comment_characters, len("".join(text.split())))}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


class CodeFilter:
    """Map stage: measures source files and judges them by the rules; `enforce` False only measures.

    `rare` are the languages below `low_resource_share`, which only a look at the whole corpus tells (`rare_languages`).
    """

    name = "code rules"

    def __init__(self, rules: CodeRules, *, rare: frozenset[str] = frozenset(), enforce: bool = True) -> None:
        names = tuple(sorted({*rules.low_resource, *rare}))
        self.rules, self.enforce = rules.model_copy(update={"low_resource": names}), enforce

    def __call__(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[Verdict]:
        return [self._judge(document) for document in documents]

    def _judge(self, document: Document) -> Verdict:
        language = str(document.metadata.get("programming_language", ""))
        found = measure(document.text, language)
        drop = self.rules.judge(found, language) if self.enforce else None
        return Verdict(document, found, drop)


def rare_languages(counts: Counter[str], share: float) -> frozenset[str]:
    """Languages with less than this share of all documents."""
    total = counts.total()
    return frozenset(name for name, count in counts.items() if count < share * total)


class QualityPolicy(Config):
    """Classes of quality by a score that another stage or another tool gave, and how often each is learned."""

    score: str = ""
    """Name of the score among a document's scores or metadata; empty: nothing has a class but `unscored`."""
    high_min: float = 0.8
    """`high` from this score on."""
    moderate_min: float = 0.4
    """`moderate` from this score on; `low` below."""
    languages: tuple[str, ...] = ()
    """Programming languages in which the scorer agrees with people on a validation set; empty: all. Others are
    `unscored`: InternLM2 (2024, section 3.1.2) uses its scorer only where that is so."""
    epochs: dict[Class, int] = {"high": 2, "moderate": 1, "low": 0, "unscored": 1}
    """How often a class is learned; 0 drops it (InternLM2: high several times, moderate once, low not at all)."""

    def class_of(self, document: Document, scores: Scores) -> Class:
        """The class of a document."""
        language = document.metadata.get("programming_language", "")
        value = scores.get(self.score, document.metadata.get(self.score))
        asked = not self.languages or language in self.languages
        if not self.score or not asked or not isinstance(value, int | float):
            return "unscored"
        if value >= self.high_min:
            return "high"
        return "moderate" if value >= self.moderate_min else "low"


class QualityClass:
    """Map stage: writes `quality_class` and `epochs` into the metadata, and drops what is learned no times."""

    name = "quality class"

    def __init__(self, policy: QualityPolicy, *, exempt: Sequence[str] = ()) -> None:
        self.policy, self.exempt = policy, frozenset(exempt)

    def __call__(self, documents: Sequence[Document], scores: Sequence[Scores]) -> list[Verdict]:
        return [self._judge(*pair) for pair in zip(documents, scores, strict=True)]

    def _judge(self, document: Document, scores: Scores) -> Verdict:
        found = self.policy.class_of(document, scores)
        epochs = self.policy.epochs.get(found, 1)
        spared = epochs == 0 and document.metadata.get("programming_language") in self.exempt
        marked = {**document.metadata, "quality_class": found, "epochs": 1 if spared else epochs}
        value = scores.get(self.policy.score, document.metadata.get(self.policy.score, found))
        drop = Drop(f"quality_{found}", value, self.policy.moderate_min) if epochs == 0 and not spared else None
        return Verdict(replace(document, metadata=marked), {}, drop)
