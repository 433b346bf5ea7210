"""What a person looks at to trust a cleaned corpus: histograms with thresholds, samples, and who stands at the border.

    >>> facts = explore(Path("runs/nano/data"))                                          # doctest: +SKIP
    >>> [len(border.passing) for border in facts.borders]                                # doctest: +SKIP

Samples are spread evenly over the order of the input, so that the same folder gives the same ones. Texts are looked up
by id; of what was dropped only the head is kept. It draws nothing: `puyu.chain.explore` makes the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puyu.data.evidence import first_evidence
from puyu.data.filters import bounds
from puyu.data.scores import Labels, ScoreTable, exact, open_scores
from puyu.data.stats import Stats, largest, stats
from puyu.data.why import find
from puyu.errors import InputError

BINS = 40
COUNTS = frozenset({"chars", "words", "han", "lines", "mean_line", "longest_line"})
"""Scores whose sizes differ by powers of ten: their bins are even in log10(1 + score)."""
SHOWN, DOMAINS = 420, 12
_HEAD, _AROUND = 160, 120

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Documents of a language by a score, in bins [edges[i], edges[i + 1]); both bounds are edges.

    `passed`, `here`, `elsewhere`: kept by the rules, dropped by a rule of this score, by another one. The last bin
    also holds what lies above it.
    """

    language: str
    score: str
    minimum: float | None
    maximum: float | None
    edges: tuple[float, ...]
    passed: tuple[int, ...]
    here: tuple[int, ...]
    elsewhere: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One document: what was decided, and an excerpt in three parts, of which the middle is what the rule counted."""

    id: str
    source: str
    domain: str
    language: str
    place: str
    stage: str
    rule: str
    value: Any
    threshold: Any
    excerpt: tuple[str, str, str]
    is_whole: bool
    copy_of: str = ""
    original: str = ""


@dataclass(frozen=True, slots=True)
class Dropped:
    """Some of the documents that a rule dropped."""

    stage: str
    rule: str
    count: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Border:
    """The documents of a language nearest to the threshold of a rule: kept by all rules, and dropped by this one."""

    language: str
    rule: str
    is_minimum: bool
    threshold: float
    count: int
    passing: tuple[Sample, ...]
    failing: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the page shows. `left_out`: languages that were judged and are not drawn, and their documents."""

    stats: Stats
    histograms: tuple[Histogram, ...]
    kept: tuple[Sample, ...]
    dropped: tuple[Dropped, ...]
    borders: tuple[Border, ...]
    left_out: tuple[int, int]


def explore(out: Path, *, samples: int = 4) -> Facts:
    """The facts about a data folder, with up to `samples` documents of each sort."""
    view = _view(out)
    histograms, borders = [], []
    limits = {name: list(bounds(view.table.policies.of_group(name))) for name in view.languages}
    for score in dict.fromkeys(score for rules in limits.values() for _, score, _, _ in rules):
        column = view.table.scores([score])[score]
        for name, rows in view.languages.items():
            mine = [rule for rule in limits[name] if rule[1] == score]
            values = exact(column[rows])
            if mine and not np.isnan(values).all():
                histograms.append(_histogram(view, name, mine, values))
                borders += [_border(view, name, rule, values, samples) for rule in mine]
    names = list(view.languages)
    judged = np.bincount(view.language.codes[view.judged], minlength=len(view.language.names))
    other = [int(n) for n, name in zip(judged, view.language.names, strict=True) if n and name not in names]
    return Facts(
        stats(out),
        tuple(sorted(histograms, key=lambda h: (names.index(h.language), -sum(h.here)))),
        tuple(_kept(view, samples)),
        tuple(_dropped(view, samples)),
        tuple(sorted((b for b in borders if b.passing or b.failing), key=lambda b: -b.count)),
        (len(other), sum(other)),
    )


@dataclass(frozen=True)
class _View:
    """The columns that every question needs. `language`: apart where a domain has thresholds of its own; `languages`:
    the rows of the largest ones that were judged."""

    table: ScoreTable
    language: Labels
    domain: Labels
    stage: Labels
    rule: Labels
    judged: Mask
    languages: dict[str, NDArray[np.int64]] = field(default_factory=dict)


def _view(out: Path) -> _View:
    table = open_scores(out)
    domain, stage, rule = table.labels("domain", "stage", "rule")
    judged = table.reached_rules(stage) & ~table.curated()
    groups = table.groups(table.policies.domains)
    rows = {name: np.flatnonzero(judged & groups.of([name])) for name in largest(groups, judged)}
    return _View(table, groups, domain, stage, rule, judged, rows)


# ---- histograms


def _histogram(
    view: _View, language: str, rules: Sequence[tuple[str, str, bool, float]], values: NDArray[np.float64]
) -> Histogram:
    """One score of one language, with every rule that bounds it."""
    rows = view.languages[language]
    dropped = view.stage.of(["rules"])[rows]
    here = dropped & view.rule.of([rule for rule, _, _, _ in rules])[rows]
    score = rules[0][1]
    minimum = next((threshold for _, _, is_minimum, threshold in rules if is_minimum), None)
    maximum = next((threshold for _, _, is_minimum, threshold in rules if not is_minimum), None)
    edges = bin_edges(values[~np.isnan(values)], minimum, maximum, is_count=score in COUNTS)
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    there = ~np.isnan(values)
    passed, fell, elsewhere = (
        tuple(np.bincount(places[mask & there], minlength=len(edges) - 1).tolist())
        for mask in (~dropped, here, dropped & ~here)
    )
    return Histogram(language, score, minimum, maximum, tuple(edges.tolist()), passed, fell, elsewhere)


def bin_edges(
    values: NDArray[np.float64], minimum: float | None, maximum: float | None, *, is_count: bool
) -> NDArray[np.float64]:
    """Even bins over almost all values (of a count, even in its logarithm); the bounds are moved onto edges.

    What equals a maximum passes, so that its edge lies a hair above it.
    """
    limits = [bound for bound in (minimum, maximum) if bound is not None]
    low = min([0.0, *limits]) if not is_count else min([float(np.quantile(values, 0.002)), *limits])
    high = max([float(np.quantile(values, 0.995)), *(1.05 * bound for bound in limits)])
    low, high = scaled(low, is_count), scaled(high, is_count)
    if high <= low:
        high = low + 1.0
    width = (high - low) / BINS
    if any(scaled(bound, is_count) <= low for bound in limits if bound == maximum or is_count):
        low -= width  # room for what lies on the other side
    edges = np.linspace(low, high, BINS + 1)
    places = np.array([scaled(bound, is_count) for bound in limits])
    far = (np.abs(edges[:, None] - places) > width / 2).all(axis=1)
    far[[0, -1]] = True
    edges = edges[far]
    exactly = [float(np.nextafter(bound, np.inf)) if bound == maximum else bound for bound in limits]
    return np.unique(np.concatenate([10.0**edges - 1.0 if is_count else edges, exactly]))


def scaled(value: float, is_count: bool) -> float:
    """A score on its axis."""
    return float(np.log10(max(1.0 + value, 1e-9))) if is_count else value


# ---- samples


def _kept(view: _View, samples: int) -> Iterator[Sample]:
    """Some of each of the largest domains."""
    counts = np.bincount(view.domain.codes, minlength=len(view.domain.names))
    names = [name for _, name in sorted(zip(-counts, view.domain.names, strict=True))][:DOMAINS]
    for name in names:
        yield from _samples(view, _spread(np.flatnonzero(view.domain.of([name]) & view.stage.of([""])), samples))


def _dropped(view: _View, samples: int) -> Iterator[Dropped]:
    """Some of what each rule dropped, in the order of the stages, most documents first."""
    shape = (max(len(view.stage.names), 1), max(len(view.rule.names), 1))
    counts = np.bincount(view.stage.codes * shape[1] + view.rule.codes, minlength=shape[0] * shape[1])
    order = list(view.table.ledger["stages"])
    found = [
        (view.stage.names[at // shape[1]], view.rule.names[at % shape[1]], int(counts[at]))
        for at in counts.nonzero()[0]
    ]
    found = [row for row in found if row[0]]
    for stage, rule, count in sorted(found, key=lambda row: (order.index(row[0]), -row[2], row[1])):
        rows = np.flatnonzero(view.stage.of([stage]) & view.rule.of([rule]))
        yield Dropped(stage, rule, count, tuple(_samples(view, _spread(rows, samples))))


def _border(
    view: _View, language: str, bound: tuple[str, str, bool, float], values: NDArray[np.float64], samples: int
) -> Border:
    """Who passes by less than half of the threshold, and who fails, nearest first."""
    rule, score, is_minimum, threshold = bound
    rows = view.languages[language]
    fails = (view.stage.of(["rules"]) & view.rule.of([rule]))[rows]
    near = (values < 2 * threshold) if is_minimum else (values > threshold / 2)
    passes = ~view.stage.of(["rules"])[rows] & near & (threshold > 0)
    found = [_nearest(rows, values, threshold, mask, samples) for mask in (passes, fails)]
    passing, failing = (tuple(_samples(view, at, measured=(rule, score, threshold))) for at in found)
    return Border(language, rule, is_minimum, threshold, int(np.count_nonzero(fails)), passing, failing)


def _nearest(
    rows: NDArray[np.int64], values: NDArray[np.float64], threshold: float, mask: Mask, samples: int
) -> NDArray[np.int64]:
    at = np.flatnonzero(mask)
    return rows[at[np.argsort(np.abs(values[at] - threshold), kind="stable")[:samples]]]


def _spread(rows: NDArray[np.int64], samples: int) -> NDArray[np.int64]:
    """Some of the rows at even distances; all of them when they are few."""
    if len(rows) <= samples:
        return rows
    return rows[np.linspace(0, len(rows) - 1, samples).round().astype(np.int64)]


def _samples(
    view: _View, rows: NDArray[np.int64], *, measured: tuple[str, str, float] | None = None
) -> Iterator[Sample]:
    """The documents of rows; `measured`: the (rule, score, threshold) that a kept one is shown for."""
    for row, id in zip(rows.tolist(), view.table.ids(rows.tolist()), strict=True):
        stage = view.stage.names[view.stage.codes[row]]
        yield _sample(view.table.path, _row_of(view.table.path, id, stage), measured)


def _row_of(out: Path, id: str, stage: str) -> dict[str, Any]:
    """Copies of one source share an id: the one that left at this stage."""
    for name, row in find(out, id):
        if (name == "kept" and not stage) or (name == "dropped" and row["stage"] == stage):
            return row
    raise InputError(f"{out}: document {id} is not where ids.bin says", remedy="run the data stage again")


def _sample(out: Path, row: Mapping[str, Any], measured: tuple[str, str, float] | None) -> Sample:
    text, is_kept = row.get("text", row.get("head", "")), "text" in row
    rule, score, threshold = measured or (row.get("rule", ""), "", row.get("threshold", ""))
    value = row["scores"].get(score, "") if measured else row.get("value", "")
    metadata = row["metadata"]
    is_whole = len(text) <= SHOWN if is_kept else len(text) < _HEAD
    original = _text_of(out, row["of"]) if "of" in row else ""
    return Sample(
        row["id"],
        row["source"],
        row["domain"],
        row["language"],
        str(metadata.get("path") or metadata.get("url") or metadata.get("title") or ""),
        row.get("stage", ""),
        rule,
        value,
        threshold,
        _excerpt(text, rule, row["language"]),
        is_whole,
        row.get("of", ""),
        original[:_HEAD],
    )


def _text_of(out: Path, id: str) -> str:
    """The text of a kept document, or nothing: it may stand in the index of another corpus."""
    return next((row["text"] for name, row in find(out, id) if name == "kept"), "")


def _excerpt(text: str, rule: str, language: str) -> tuple[str, str, str]:
    """The beginning, or what stands around the first place that the rule counts."""
    span = first_evidence(text, rule, language=language) if rule else None
    if span is None:
        return text[:SHOWN], "", ""
    begin, end = span[0], min(span[1], span[0] + SHOWN // 2)
    start = 0 if begin < 2 * _AROUND else begin - _AROUND
    before = f"… {text[start:begin].lstrip()}" if start else text[:begin]
    return before, text[begin:end], text[end : start + SHOWN]
