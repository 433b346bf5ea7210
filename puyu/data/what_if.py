"""Thresholds moved over the score columns: who would be kept by the rules, without reading a text again.

    >>> policies = moved(open_scores(folder), overrides=[("words.chars_min", 100)])     # doctest: +SKIP
    >>> print("\\n".join(lines_of(what_if(folder, policies))))                           # doctest: +SKIP

It judges the stage `rules` alone. Who left before stays away, `curated` sources are measured but not judged, and
duplicates are not decided again: whoever newly passes may yet be one. A policy whose thresholds stay keeps its recorded
decisions, and so does each document of which old and new thresholds say the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from puyu.configure import apply_overrides, build, dump, load_yaml
from puyu.data.filters import (
    POLICY_NAMES,
    LanguagePolicies,
    Policies,
    Policy,
    bounds,
    domain_of,
    group_of,
    judge_columns,
    policy_name,
)
from puyu.data.scores import Amount, Labels, ScoreTable, amount, amounts, exact, open_scores, share, text_table

PASSES, UNKNOWN = -1, -2
"""Beside the places of rules: no rule is broken; one is that the policy does not have."""


@dataclass(frozen=True, slots=True)
class Change:
    """A group of documents that reached the rules: kept by the old and the new ones, and who changes sides."""

    name: str
    reached: Amount
    before: Amount
    after: Amount
    gained: Amount
    lost: Amount


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What other thresholds do. `gained` and `lost` hold ids, `lost_copies` documents that are dropped as duplicates
    anyway."""

    thresholds: tuple[tuple[str, float | None, float | None], ...]
    total: Change
    by_domain: tuple[Change, ...]
    by_language: tuple[Change, ...]
    by_rule: tuple[tuple[str, Amount, Amount], ...]
    lost_copies: int
    gained: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def moved(table: ScoreTable, *, policy: Path | None = None, overrides: Iterable[tuple[str, Any]] = ()) -> Policies:
    """The thresholds to try: those of the folder, or of a policy file (as `policies:` of the data stage), then changed.

    ConfigError for a rule that does not exist.
    """
    values = dump(table.policies) if policy is None else dump(build(Policies, load_yaml(policy), where=str(policy)))
    return build(Policies, apply_overrides(values, overrides))


def what_if(out: Path, policies: Policies, *, samples: int = 0) -> WhatIf:
    """Judge the documents of a data folder by other thresholds; `samples` ids of each side."""
    table = open_scores(out)
    language, domain, stage, rule = table.labels("language", "domain", "stage", "rule")
    characters, reached = table.characters(), table.reached_rules(stage)
    judges = judges_of(table, policies)
    old = recorded(judges, stage, rule)
    new = rejudge(judges, table, judged=reached & ~table.curated(), old=old)
    before, after = reached & (old == PASSES), reached & (new == PASSES)
    sides = _Sides(reached, before, after, characters)
    gained, lost = ~before & after, before & ~after
    return WhatIf(
        tuple(_thresholds(judges)),
        sides.change("all"),
        sides.changes(domain),
        sides.changes(language),
        tuple(_by_rule(judges, (old, new), reached, characters)),
        int(np.count_nonzero(lost & stage.of(table.copy_stages))),
        tuple(table.ids(np.flatnonzero(gained)[:samples].tolist())) if samples else (),
        tuple(table.ids(np.flatnonzero(lost)[:samples].tolist())) if samples else (),
    )


@dataclass(frozen=True)
class Judges:
    """All policies, old and new, under one name each, and the number of the one that judges each document."""

    names: tuple[str, ...]
    old: tuple[Policy, ...]
    new: tuple[Policy, ...]
    of: NDArray[np.int64]


def judges_of(table: ScoreTable, policies: Policies) -> Judges:
    """The general policies, and those of each domain that has its own before or after."""
    domains = sorted({*table.policies.domains, *policies.domains})
    places = [(domain, name) for domain in ("", *domains) for name in POLICY_NAMES]
    numbers = {group_of(name, domain): number for number, (domain, name) in enumerate(places)}
    groups = table.groups(domains)
    found = [numbers[group_of(policy_name(group), domain_of(group))] for group in groups.names]
    old, new = (tuple(every.of(name, domain) for domain, name in places) for every in (table.policies, policies))
    names = tuple(f"domains.{domain}.{name}" if domain else name for domain, name in places)
    return Judges(names, old, new, np.array(found or [0])[groups.codes])


def recorded(judges: Judges, stage: Labels, rule: Labels) -> NDArray[np.int64]:
    """What the data stage decided: the place of the rule among the fields of its policy, or PASSES -> [documents]."""
    places = np.full((len(judges.names), max(len(rule.names), 1)), PASSES)
    for number, policy in enumerate(judges.old):
        fields = list(type(policy).model_fields)
        for code, name in enumerate(rule.names):
            places[number, code] = fields.index(name) if name in fields else UNKNOWN
    return np.where(stage.of(["rules"]), places[judges.of, rule.codes], PASSES)


def rejudge(
    judges: Judges, table: ScoreTable, *, judged: NDArray[np.bool_], old: NDArray[np.int64]
) -> NDArray[np.int64]:
    """`recorded`, had the rules been these."""
    result, pairs = old.copy(), list(zip(judges.old, judges.new, strict=True))
    changed = [number for number, (was, now) in enumerate(pairs) if was != now]
    names = {score for number in changed for policy in pairs[number] for _, score, _, _ in bounds(policy)}
    stored = table.scores(sorted(names))
    for number in changed:
        rows = np.flatnonzero(judged & (judges.of == number))
        was, now = pairs[number]
        wanted = {score for policy in (was, now) for _, score, _, _ in bounds(policy)}
        columns = {score: exact(stored[score][rows]) for score in wanted}
        first, second = (judge_columns(columns, policy, size=len(rows)) for policy in (was, now))
        # What both say alike stays as it was recorded, also where float32 cannot tell a value from its threshold.
        result[rows] = np.where(first == second, old[rows], second)
    return result


@dataclass(frozen=True, slots=True)
class _Sides:
    """Masks over all documents."""

    reached: NDArray[np.bool_]
    before: NDArray[np.bool_]
    after: NDArray[np.bool_]
    characters: NDArray[np.int64]

    def _masks(self) -> tuple[NDArray[np.bool_], ...]:
        return self.reached, self.before, self.after, self.after & ~self.before, self.before & ~self.after

    def change(self, name: str) -> Change:
        return Change(name, *(amount(mask, self.characters) for mask in self._masks()))

    def changes(self, labels: Labels) -> tuple[Change, ...]:
        """A change for each label that reached the rules, the largest first."""
        columns = [
            amounts(labels.codes, self.characters, groups=len(labels.names), mask=mask) for mask in self._masks()
        ]
        found = [Change(name, *row) for name, *row in zip(labels.names, *columns, strict=True)]
        found = [change for change in found if change.reached.documents]
        return tuple(sorted(found, key=lambda change: (-change.reached.documents, change.name)))


def _by_rule(
    judges: Judges,
    verdicts: tuple[NDArray[np.int64], NDArray[np.int64]],
    reached: NDArray[np.bool_],
    characters: NDArray[np.int64],
) -> list[tuple[str, Amount, Amount]]:
    """(policy.rule, dropped before, dropped after), in the order of the policies."""
    found = []
    for number, (name, policy) in enumerate(zip(judges.names, judges.old, strict=True)):
        fields, mine = list(type(policy).model_fields), reached & (judges.of == number)
        sides = [amounts(verdict, characters, groups=len(fields), mask=mine & (verdict >= 0)) for verdict in verdicts]
        rows = [(f"{name}.{rule}", was, now) for rule, was, now in zip(fields, *sides, strict=True)]
        found += [row for row in rows if row[1].documents or row[2].documents]
    return found


def _thresholds(judges: Judges) -> Iterable[tuple[str, float | None, float | None]]:
    for name, was, now in zip(judges.names, judges.old, judges.new, strict=True):
        for rule in type(was).model_fields:
            if getattr(was, rule) != getattr(now, rule):
                yield f"{name}.{rule}", getattr(was, rule), getattr(now, rule)


# ---- as text


def lines_of(found: WhatIf) -> list[str]:
    """What a person reads."""
    rules = [f"  {rule}: {_bound(was)} -> {_bound(now)}" for rule, was, now in found.thresholds]
    lines = ["thresholds", *(rules or ["  no threshold is moved"]), "", "kept by the rules, of what reached them"]
    lines += text_table(_HEAD, [_row(found.total)])
    for title, changes in (("by domain", found.by_domain), ("by language", found.by_language)):
        lines += ["", title, *text_table(_HEAD, map(_row, changes))]
    lines += ["", "dropped by rule (the first that fails)", *_rule_lines(found)]
    total = found.total
    gained, lost = (
        f"{side.documents:,} documents, {side.characters:,} characters" for side in (total.gained, total.lost)
    )
    lines += ["", f"newly kept: {gained}", *_ids(found.gained), f"newly dropped: {lost}", *_ids(found.lost)]
    return [*lines, "", *_limits(found)]


_HEAD = ("", "reached", "kept before", "share", "kept after", "share", "newly kept", "newly dropped", "characters")


def _row(change: Change) -> list[str]:
    reached, before, after = (side.documents for side in (change.reached, change.before, change.after))
    difference = change.after.characters - change.before.characters
    shares = [f"{before:,}", share(before, reached), f"{after:,}", share(after, reached)]
    sides = [f"{change.gained.documents:,}", f"{change.lost.documents:,}"]
    return [change.name or "(none)", f"{reached:,}", *shares, *sides, f"{difference:+,}"]


def _rule_lines(found: WhatIf) -> list[str]:
    rows = [
        [rule, f"{was.documents:,}", f"{now.documents:,}", f"{now.documents - was.documents:+,}"]
        for rule, was, now in found.by_rule
    ]
    return text_table(("", "before", "after", "change"), rows)


def _ids(ids: Sequence[str]) -> list[str]:
    return [f"  {id}" for id in ids]


def _bound(value: float | None) -> str:
    return "off" if value is None else f"{value:.10g}"


def _limits(found: WhatIf) -> list[str]:
    copies = (
        f" {found.lost_copies:,} of the newly dropped are dropped as duplicates in any case."
        if found.lost_copies
        else ""
    )
    return [
        "Duplicates are not decided again: some of the newly kept may be copies, and a copy of what is newly dropped "
        f"may stay in its place.{copies} To apply: set `policies` in the config and run the data stage again."
    ]


# ---- policy files


def policy_text(policies: Policies) -> str:
    """A policy file: every rule with its threshold, what it bounds and where it is from, as comments."""
    lines = ["# A policy: thresholds of the rules of `puyu data`. NAME_min and NAME_max bound the score NAME;"]
    lines += ["# the first rule that fails is the reason; null switches a rule off; what is left out has its default."]
    lines += _policy_lines(policies, "")
    if policies.domains:
        lines += ["", f"domains:  # {Policies.model_fields['domains'].description}"]
    for domain, own in policies.domains.items():
        lines += ["", f"  {json.dumps(domain, ensure_ascii=False)}:", *_policy_lines(own, "    ")]
    return "\n".join(lines) + "\n"


def _policy_lines(policies: LanguagePolicies, indent: str) -> list[str]:
    lines = []
    for name in POLICY_NAMES:
        policy = policies.named(name)
        lines += ["", f"{indent}{name}:  # {LanguagePolicies.model_fields[name].description}"]
        rules = _entries(policy, dump(policy))
        width = max(len(entry) for entry, _ in rules)
        lines += [f"{indent}  {entry:<{width}}  # {text}" for entry, text in rules]
    return lines


def _entries(policy: Policy, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    fields = type(policy).model_fields
    return [
        (yaml.safe_dump({rule: _short(values[rule])}).strip(), (info.description or "").replace("\n", " "))
        for rule, info in fields.items()
    ]


def _short(value: float | None) -> float | int | None:
    return int(value) if value is not None and value == int(value) else value
