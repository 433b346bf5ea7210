"""The ledger: every record that was read is kept, dropped by a rule, or quarantined. The sums must agree.

    >>> ledger = Ledger(("rules",))
    >>> ledger.read("web", 2); ledger.drop("web", "rules", "chars_min"); ledger.keep("web", 90)
    >>> ledger.check(); ledger.total().kept
    1

A disagreement is a bug of the program, so `check` asserts; it runs at the end of every pipeline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

BAR = 28


@dataclass
class Counts:
    """The numbers of one source (or of all)."""

    read: int = 0
    kept: int = 0
    kept_characters: int = 0
    files: int = 0
    files_not_selected: int = 0
    records_not_selected: Counter[str] = field(default_factory=Counter)
    """Records of archives that are no documents; they do not count as read."""
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)

    def merge(self, other: Counts) -> None:
        self.read += other.read
        self.kept += other.kept
        self.kept_characters += other.kept_characters
        self.files += other.files
        self.files_not_selected += other.files_not_selected
        self.records_not_selected.update(other.records_not_selected)
        self.dropped.update(other.dropped)
        self.quarantined.update(other.quarantined)

    def adds_up(self) -> bool:
        return self.read == self.kept + self.dropped.total() + self.quarantined.total()

    def dropped_at(self, stage: str) -> dict[str, int]:
        """Rule -> count of one stage, most frequent first."""
        rows = [(rule, count) for (at, rule), count in self.dropped.items() if at == stage]
        return dict(sorted(rows, key=lambda row: (-row[1], row[0])))

    def to_json(self, stages: Sequence[str]) -> dict[str, Any]:
        return {
            "read": self.read,
            "kept": self.kept,
            "kept_characters": self.kept_characters,
            "dropped": {stage: self.dropped_at(stage) for stage in stages},
            "quarantined": dict(sorted(self.quarantined.items())),
            "files": self.files,
            "files_not_selected": self.files_not_selected,
            "records_not_selected": dict(sorted(self.records_not_selected.items())),
        }


class Ledger:
    """Counts per source. `stages` gives the order of the funnel."""

    def __init__(self, stages: Sequence[str]) -> None:
        self.stages = tuple(stages)
        self.sources: dict[str, Counts] = {}
        self.masked: Counter[str] = Counter()

    def source(self, name: str) -> Counts:
        return self.sources.setdefault(name, Counts())

    def read(self, source: str, count: int = 1) -> None:
        self.source(source).read += count

    def keep(self, source: str, characters: int) -> None:
        counts = self.source(source)
        counts.kept += 1
        counts.kept_characters += characters

    def drop(self, source: str, stage: str, rule: str, count: int = 1) -> None:
        assert stage in self.stages, f"unknown stage {stage}"
        self.source(source).dropped[stage, rule] += count

    def quarantine(self, source: str, reason: str) -> None:
        self.source(source).quarantined[reason] += 1

    def total(self) -> Counts:
        total = Counts()
        for counts in self.sources.values():
            total.merge(counts)
        return total

    def check(self) -> None:
        """in = kept + dropped + quarantined, for each source and for all."""
        for name, counts in [*self.sources.items(), ("total", self.total())]:
            assert counts.adds_up(), f"the ledger of {name} does not add up: {counts}"

    def to_json(self) -> dict[str, Any]:
        return {
            "stages": list(self.stages),
            "total": self.total().to_json(self.stages),
            "masked": dict(sorted(self.masked.items())),
            "sources": {name: counts.to_json(self.stages) for name, counts in self.sources.items()},
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> Ledger:
        ledger = Ledger(value["stages"])
        ledger.masked.update(value["masked"])
        for name, row in value["sources"].items():
            counts = ledger.source(name)
            counts.read, counts.kept, counts.kept_characters = row["read"], row["kept"], row["kept_characters"]
            counts.files, counts.files_not_selected = row["files"], row["files_not_selected"]
            counts.quarantined.update(row["quarantined"])
            counts.records_not_selected.update(row.get("records_not_selected", {}))
            for stage, rules in row["dropped"].items():
                counts.dropped.update({(stage, rule): count for rule, count in rules.items()})
        return ledger


def funnel_steps(ledger: Ledger) -> list[tuple[str, int]]:
    """(label, records left) from `read` down to the last stage."""
    total = ledger.total()
    left = total.read - total.quarantined.total()
    steps = [("read", total.read), ("readable", left)]
    for stage in ledger.stages:
        left -= sum(total.dropped_at(stage).values())
        steps.append((f"after {stage}", left))
    return steps


def funnel_lines(ledger: Ledger, *, rules: int = 3) -> list[str]:
    """The funnel as text: what is left after each stage with a bar, and the rules that took most."""
    total = ledger.total()
    taken = [{}, dict(total.quarantined), *(total.dropped_at(stage) for stage in ledger.stages)]
    lines = [
        _bar_line(label, left, total.read, _taken(reasons, rules))
        for (label, left), reasons in zip(funnel_steps(ledger), taken, strict=True)
    ]
    quarantined = total.quarantined.total()
    numbers = (total.read, total.kept, total.dropped.total(), quarantined)
    read, kept, dropped, bad = (f"{number:,}".replace(",", " ") for number in numbers)
    return [*lines, f"  {read} read = {kept} kept + {dropped} dropped + {bad} quarantined"]


def _bar_line(label: str, left: int, read: int, note: str) -> str:
    share = left / read if read else 0.0
    bar = "█" * round(share * BAR)
    count = f"{left:,}".replace(",", " ")
    return f"  {label:<18}{count:>9}  {bar:<{BAR}} {share:>6.1%}  {note}".rstrip()


def _taken(taken: dict[str, int], limit: int) -> str:
    rows = sorted(taken.items(), key=lambda row: (-row[1], row[0]))
    shown = [f"{rule} -{count}" for rule, count in rows[:limit]]
    rest = sum(count for _, count in rows[limit:])
    return ", ".join([*shown, f"{len(rows) - limit} more -{rest}"] if rest else shown)
