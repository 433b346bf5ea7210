"""What became of the documents, as numbers: funnel, retention, rules, duplicates, quarantine, quantiles of scores.

    >>> print("\\n".join(lines_of(stats(Path("runs/nano/data")))))                       # doctest: +SKIP

Counts of the funnel and of what could not be read are those of `ledger.json`; all others are counted over
`scores.parquet`, where characters are those before masking. It reads no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puyu.data.filters import Policies, bounds
from puyu.data.scores import Amount, Labels, ScoreTable, amounts, exact, open_scores, share, text_table
from puyu.documents.ledger import Ledger, funnel_lines, funnel_steps

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
LARGEST = 4
"""Languages of which scores are shown; of a crawl there may be a hundred."""


@dataclass(frozen=True, slots=True)
class Retention:
    """A group of documents: all that could be read, those kept, and those dropped at each stage."""

    name: str
    read: Amount
    kept: Amount
    dropped: dict[str, Amount]


@dataclass(frozen=True, slots=True)
class RuleCount:
    """Documents of a language that a rule dropped first."""

    stage: str
    rule: str
    language: str
    dropped: Amount


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """Quantiles of a score over the documents of a language that reached the rules; the bounds of its policy."""

    language: str
    score: str
    documents: int
    quantiles: tuple[float, ...]
    minimum: float | None
    maximum: float | None


@dataclass(frozen=True, slots=True)
class Stats:
    """All numbers of a data folder. `quarantined`: source -> reason -> records; `curated`: documents not judged."""

    funnel: tuple[tuple[str, int], ...]
    funnel_text: tuple[str, ...]
    stages: tuple[str, ...]
    by_source: tuple[Retention, ...]
    by_domain: tuple[Retention, ...]
    by_language: tuple[Retention, ...]
    rules: tuple[RuleCount, ...]
    duplicates: dict[str, Amount]
    reached_duplicates: int
    quarantined: dict[str, dict[str, int]]
    masked: dict[str, int]
    curated: int
    quantiles: tuple[float, ...]
    scores: tuple[ScoreSummary, ...]


def stats(out: Path) -> Stats:
    """The numbers of the folder that the data stage wrote. InputError where it did not."""
    table = open_scores(out)
    ledger = Ledger.from_json(table.ledger)
    source, domain, language, stage, rule = table.labels("source", "domain", "language", "stage", "rule")
    characters, reached = table.characters(), table.reached_rules(stage)
    by_source, by_domain, by_language = (
        retention(labels, stage, characters, stages=ledger.stages) for labels in (source, domain, language)
    )
    by_stage = dict(zip(stage.names, amounts(stage.codes, characters, groups=len(stage.names)), strict=True))
    return Stats(
        tuple(funnel_steps(ledger)),
        tuple(funnel_lines(ledger)),
        ledger.stages,
        by_source,
        by_domain,
        by_language,
        tuple(_rules(language, stage, rule, characters)),
        {name: by_stage.get(name, Amount(0, 0)) for name in table.copy_stages},
        int(np.count_nonzero(stage.of(["", *table.copy_stages]))),
        {name: dict(counts.quarantined) for name, counts in ledger.sources.items() if counts.quarantined},
        dict(sorted(ledger.masked.items())),
        int(np.count_nonzero(reached & table.curated())),
        QUANTILES,
        tuple(summaries(table, reached)),
    )


def retention(
    labels: Labels, stage: Labels, characters: NDArray[np.int64], *, stages: Sequence[str]
) -> tuple[Retention, ...]:
    """What is kept and dropped of each label, the largest first."""
    groups, stops = len(labels.names), len(stage.names)
    cells = amounts(labels.codes * max(stops, 1) + stage.codes, characters, groups=groups * stops)
    found = []
    for code, name in enumerate(labels.names):
        row = dict(zip(stage.names, cells[code * stops : (code + 1) * stops], strict=True))
        read = Amount(sum(a.documents for a in row.values()), sum(a.characters for a in row.values()))
        dropped = {at: row[at] for at in stages if at in row and row[at].documents}
        found.append(Retention(name, read, row.get("", Amount(0, 0)), dropped))
    return tuple(sorted(found, key=lambda group: (-group.read.documents, group.name)))


def _rules(language: Labels, stage: Labels, rule: Labels, characters: NDArray[np.int64]) -> Iterator[RuleCount]:
    """Most documents first."""
    shape = (len(stage.names), len(rule.names), len(language.names))
    if 0 in shape:
        return
    codes = np.ravel_multi_index((stage.codes, rule.codes, language.codes), shape)
    found = [
        RuleCount(stage.names[at[0]], rule.names[at[1]], language.names[at[2]], amount)
        for at, amount in zip(np.ndindex(shape), amounts(codes, characters, groups=int(np.prod(shape))), strict=True)
        if amount.documents and stage.names[at[0]]
    ]
    yield from sorted(found, key=lambda row: (-row.dropped.documents, row.stage, row.rule, row.language))


def largest(language: Labels, reached: NDArray[np.bool_]) -> list[str]:
    """The few languages with most of the documents that were measured, the largest first."""
    counts = np.bincount(language.codes[reached], minlength=len(language.names))
    names = sorted(zip(-counts, language.names, strict=True))
    return [name for count, name in names[:LARGEST] if count < 0]


def summaries(table: ScoreTable, reached: NDArray[np.bool_]) -> Iterator[ScoreSummary]:
    """Scores that the policy of a language bounds, in its order; apart those of domains with policies of their own."""
    groups = table.groups(table.policies.domains)
    rows_of = {name: np.flatnonzero(reached & groups.of([name])) for name in largest(groups, reached)}
    limits = {name: score_bounds(table.policies, name) for name in rows_of}
    stored = table.scores(sorted({score for scores in limits.values() for score in scores}))
    for name, rows in rows_of.items():
        for score, (minimum, maximum) in limits[name].items():
            values = exact(stored[score][rows])
            values = values[~np.isnan(values)]
            if len(values):
                quantiles = np.quantile(values, QUANTILES, method="nearest").tolist()
                yield ScoreSummary(name, score, len(values), tuple(quantiles), minimum, maximum)


def score_bounds(policies: Policies, group: str) -> dict[str, tuple[float | None, float | None]]:
    """Score -> (at least, at most) of the policy of a group, in its order."""
    found: dict[str, tuple[float | None, float | None]] = {}
    for _, score, is_minimum, threshold in bounds(policies.of_group(group)):
        low, high = found.get(score, (None, None))
        found[score] = (threshold, high) if is_minimum else (low, threshold)
    return found


def to_json(found: Stats) -> dict[str, Any]:
    """The numbers as JSON."""
    return {name: value for name, value in asdict(found).items() if name != "funnel_text"}


# ---- as text


def lines_of(found: Stats) -> list[str]:
    """What a person reads."""
    lines = ["funnel", *found.funnel_text]
    for title, groups in (("source", found.by_source), ("domain", found.by_domain), ("language", found.by_language)):
        lines += ["", f"kept by {title}, of what could be read", *_retention_lines(groups, found.stages)]
    lines += ["", "dropped by rule (the first that fails)", *_rule_lines(found)]
    lines += ["", f"duplicates, of {found.reached_duplicates:,} documents that passed all before"]
    lines += text_table(
        ("", "documents", "share", "characters"),
        [[name, f"{a.documents:,}", share(a.documents, found.reached_duplicates), f"{a.characters:,}"]
         for name, a in found.duplicates.items()],
    )  # fmt: skip
    lines += ["", "quarantined", *(_reason_lines(found) or ["  nothing"])]
    masked = ", ".join(f"{count:,} {kind}" for kind, count in found.masked.items())
    lines += ["", f"masked in what is kept: {masked or 'nothing'}"]
    if found.curated:
        lines.append(f"curated: {found.curated:,} documents are measured and not judged")
    return [*lines, *_score_lines(found)]


def _retention_lines(groups: Sequence[Retention], order: Sequence[str]) -> list[str]:
    stages = [stage for stage in order if any(stage in group.dropped for group in groups)]
    head = ("", "documents", "kept", "share", *(f"-{stage}" for stage in stages), "characters", "kept", "share")
    return text_table(head, [_retention_row(group, stages) for group in groups])


def _retention_row(group: Retention, stages: Sequence[str]) -> list[str]:
    read, kept = group.read, group.kept
    dropped = [f"{group.dropped[stage].documents:,}" if stage in group.dropped else "" for stage in stages]
    left = [f"{read.documents:,}", f"{kept.documents:,}", share(kept.documents, read.documents)]
    right = [f"{read.characters:,}", f"{kept.characters:,}", share(kept.characters, read.characters)]
    return [group.name or "(none)", *left, *dropped, *right]


def _rule_lines(found: Stats) -> list[str]:
    rows = [[f"{r.rule} ({r.language or '?'})", r.stage, f"{r.dropped.documents:,}", f"{r.dropped.characters:,}"]
            for r in found.rules]  # fmt: skip
    return text_table(("", "stage", "documents", "characters"), rows)


def _reason_lines(found: Stats) -> list[str]:
    return [f"  {source}: {', '.join(f'{reason} {count:,}' for reason, count in sorted(reasons.items()))}"
            for source, reasons in found.quarantined.items()]  # fmt: skip


def _score_lines(found: Stats) -> list[str]:
    lines: list[str] = []
    head = ("", "documents", *(f"p{q * 100:g}" for q in found.quantiles), "at least", "at most")
    for language in dict.fromkeys(score.language for score in found.scores):
        rows = [[s.score, f"{s.documents:,}", *(f"{q:g}" for q in s.quantiles), _limit(s.minimum), _limit(s.maximum)]
                for s in found.scores if s.language == language]  # fmt: skip
        lines += [
            "",
            f"scores of {language or 'no language'}, over all that reached the rules",
            *text_table(head, rows),
        ]
    shown = {score.language for score in found.scores}
    others = [group for group in found.by_language if group.name not in shown and set(group.dropped) != {"language"}]
    if others:
        count = sum(group.read.documents for group in others)
        lines += ["", f"{len(others)} smaller languages with {count:,} documents are not shown"]
    return lines


def _limit(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
