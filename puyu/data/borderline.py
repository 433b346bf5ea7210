"""What stands nearest to a threshold, on both sides: what a person reads to tune it.

    >>> rows = [{"id": str(i), "language": "en", "domain": "", "scores": {"splice": i / 10}} for i in range(10)]
    >>> [sample.value for sample in nearest(rows, Rule("splice_max", 0.45), count=2)]
    [0.3, 0.4, 0.5, 0.6]

InternLM2 (2024, section 3.1.3) tunes each threshold on a validation set by borderline samples alone. Rows are those of
`kept.jsonl` and `dropped.jsonl` of a data folder: whatever has the score counts, also what another rule dropped.
A threshold may differ by domain and language; it is taken from rows that this rule dropped, else from the config in
the ledger, else it must be given.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puyu.errors import ConfigError, InputError
from puyu.files import read_jsonl, read_object

Row = Mapping[str, Any]
HEAD = 400


@dataclass(frozen=True)
class Rule:
    """A rule with its threshold, by (domain, language) where they differ."""

    name: str
    threshold: float | None
    special: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def score(self) -> str:
        return self.name.rpartition("_")[0]

    @property
    def is_minimum(self) -> bool:
        return self.name.endswith("_min")

    def of(self, row: Row) -> float | None:
        return self.special.get((str(row.get("domain", "")), str(row.get("language", ""))), self.threshold)


@dataclass(frozen=True, slots=True)
class Sample:
    """One document near a threshold."""

    id: str
    value: float
    threshold: float
    passes: bool
    row: Row

    def to_json(self) -> dict[str, Any]:
        names = ("source", "domain", "language", "stage", "rule", "metadata")
        head = {"id": self.id, "value": self.value, "threshold": self.threshold, "passes": self.passes}
        return {**head, **{name: self.row[name] for name in names if name in self.row}, "text": excerpt(self.row)}


def sample(folder: Path, name: str, *, count: int, threshold: float | None = None, **only: str) -> list[Sample]:
    """The `count` samples on each side; `only` (domain, language, source) narrows them.

    ConfigError for a name that is no rule, or when no threshold is known; InputError when no row has the score.
    """
    if not name.endswith(("_min", "_max")):
        raise ConfigError(f"{name!r} is no rule", remedy="a rule is a score with _min or _max, such as splice_max")
    rule = Rule(name, threshold) if threshold is not None else _rule(folder, name)
    rows = (row for row in read(folder) if all(row.get(key) == value for key, value in only.items() if value))
    found = nearest(rows, rule, count=count)
    if not found:
        raise InputError(f"no document in {folder} has the score {rule.score!r}, or a threshold for it")
    return found


def read(folder: Path) -> Iterator[Row]:
    """All rows that have scores."""
    for name in ("kept.jsonl", "dropped.jsonl"):
        yield from read_jsonl(folder / name)


def nearest(rows: Iterable[Row], rule: Rule, *, count: int) -> list[Sample]:
    """In the order of their distance from the threshold, from the lowest to the highest; memory for 2 count rows."""
    sides: tuple[list[Any], list[Any]] = ([], [])
    for number, row in enumerate(rows):
        value, limit = row["scores"].get(rule.score), rule.of(row)
        if value is None or limit is None:
            continue
        passes = value >= limit if rule.is_minimum else value <= limit
        found = Sample(row["id"], value, limit, passes, row)
        # the heap gives up its smallest entry: the farthest, and of equals the one with the largest id
        item = (-abs(value - limit), _Descending(row["id"]), -number, found)
        side = sides[value > limit or (value == limit and rule.is_minimum)]
        (heapq.heappush if len(side) < count else heapq.heappushpop)(side, item)
    samples = [item[-1] for side in sides for item in side]
    return sorted(samples, key=lambda found: (found.value - found.threshold, found.id))


class _Descending(str):
    """Text that sorts the other way round."""

    __slots__ = ()

    def __lt__(self, other: str) -> bool:
        return str.__gt__(self, other)


def _rule(folder: Path, name: str) -> Rule:
    special: dict[tuple[str, str], float] = {}
    for row in read_jsonl(folder / "dropped.jsonl"):
        if row["rule"] == name:
            special[str(row.get("domain", "")), str(row.get("language", ""))] = float(row["threshold"])
    ledger = folder / "ledger.json"
    # the config alone: elsewhere a rule's name stands for how many it dropped
    known = sorted(set(_in(read_object(ledger).get("config"), name))) if ledger.is_file() else []
    known = known or sorted(set(special.values()))
    if len(known) == 1 or (special and not known):
        return Rule(name, known[0] if known else None, special)
    if not special:
        places = f"{len(known)} different ones in {ledger}" if known else f"none dropped a document in {folder}"
        raise ConfigError(f"{name}: the threshold is not clear: {places}", remedy="give it: --threshold VALUE")
    return Rule(name, None, special)


def _in(value: Any, name: str) -> Iterator[float]:
    """Every number under this name, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == name and isinstance(item, int | float) and not isinstance(item, bool):
                yield float(item)
            else:
                yield from _in(item, name)


def excerpt(row: Row) -> str:
    """What a person needs to see: the border that a rule found, else the text around it, else the beginning."""
    if border := row.get("metadata", {}).get("border"):
        return str(border)
    text, at = row.get("text", row.get("head", "")), int(row.get("scores", {}).get("splice_at", 0))
    if not 0 < at < len(text):
        return str(text[:HEAD])
    return f"{text[max(at - HEAD // 2, 0) : at]} | {text[at : at + HEAD // 2]}"


def markdown(samples: Iterable[Sample], rule: str) -> str:
    """The samples as a page to read."""
    lines = [f"# {rule}", ""]
    for found in samples:
        side = "passes" if found.passes else "fails"
        place = " ".join(str(found.row[name]) for name in ("source", "domain", "language") if found.row.get(name))
        quoted = "\n".join(f"> {line}" for line in excerpt(found.row).splitlines())
        lines += [f"## {found.value} against {found.threshold}: {side}", "", f"{found.id} ({place})", "", quoted, ""]
    return "\n".join(lines)
