"""The ledger of serve_harness.py: what each case was owed and got, and which of it must not be.

Kinds of failure: `death` (the process was gone), `hang` (no answer in time), `lost` (the connection closed, or ended
within an answer, though one was owed), `500` (an answer 500, or an error in a stream, that no fault on purpose
explains), `leak` (found at the end, see fuzz_target.py), `open` (a request that never became whole, kept for ever),
`form` (an answer that is none).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fuzz_cases import Case
from fuzz_client import Answer, Outcome
from fuzz_forms import complaint, has_failed

COUNTED = ("death", "hang", "lost", "leak", "500")
"""What the bar counts; `lost` answers count as hangs: nobody was told anything."""
KINDS = (*COUNTED, "open", "form")
BUSY = (429, 503, 504)
MAX_WIRE = 4000


@dataclass(frozen=True, slots=True)
class Failure:
    """One thing that must not be. `case` is -1 for what no case alone has done."""

    kind: str
    case: int
    note: str
    is_excusable: bool = False
    """Whether a fault on purpose explains it."""


@dataclass(slots=True)
class Entry:
    """One case and how it went; what was sent and what came back are not kept."""

    case: Case
    status: str
    seconds: float
    is_answered: bool
    has_failed: bool
    failures: list[Failure]
    wire: bytes = b""
    """The beginning of what was sent, where something went wrong."""


@dataclass(slots=True)
class Ledger:
    """Entries as they come; failures are judged at the end, when the faults are known."""

    entries: list[Entry] = field(default_factory=list)
    deaths: list[Failure] = field(default_factory=list)
    leaks: list[Failure] = field(default_factory=list)
    excused: set[int] = field(default_factory=set)
    """Cases that were under way when the server died: the death counts, not they."""

    def add(self, case: Case, outcome: Outcome) -> None:
        """Judge a case and keep the verdict."""
        found = judge(case, outcome)
        entry = Entry(
            replace(case, steps=()),
            status_of(outcome),
            outcome.seconds,
            outcome.ended == "answered",
            any(has_failed(answer) for answer in outcome.answers),
            found,
            case.wire[:MAX_WIRE] if found else b"",
        )
        self.entries.append(entry)

    def failures(self, hits: Collection[str] = ()) -> list[Failure]:
        """Everything that must not be. `hits`: ids of cases that a fault on purpose has struck."""
        found = [*self.deaths, *self.leaks]
        for entry in self.entries:
            if entry.case.id not in self.excused:
                struck = str(entry.case.id) in hits
                found += [failure for failure in entry.failures if not (struck and failure.is_excusable)]
        return found

    def explained(self, hits: Collection[str]) -> int:
        """Cases that got a 500, or an error in their stream, because of a fault on purpose."""
        return sum(entry.has_failed and str(entry.case.id) in hits for entry in self.entries)


def status_of(outcome: Outcome) -> str:
    """The status of the first answer, or how it ended without one."""
    if outcome.answers and outcome.ended != "hang":
        return str(outcome.answers[0].status)
    return outcome.ended


def judge(case: Case, outcome: Outcome) -> list[Failure]:
    """What is wrong with one outcome."""
    found = [Failure(kind, case.id, f"{case.label}: {note}") for kind, note in _ended(case, outcome)]
    for at, answer in enumerate(outcome.answers):
        if has_failed(answer):
            found.append(Failure("500", case.id, f"{case.label}: {_tail(answer)}", is_excusable=True))
        is_odd = at >= max(case.owed, 1) and answer.status == 0  # rubbish after rubbish
        if wrong := "" if is_odd else complaint(answer, form=case.form, wants=case.wants):
            found.append(Failure("form", case.id, f"{case.label}: {wrong}"))
        elif case.wants.get("ok") and answer.status not in (200, *BUSY):
            found.append(Failure("form", case.id, f"{case.label}: {answer.status} {_tail(answer)}", is_excusable=True))
    return found


def _tail(answer: Answer) -> str:
    return answer.body[-300:].decode("utf-8", "replace")


def _ended(case: Case, outcome: Outcome) -> Iterable[tuple[str, str]]:
    if outcome.ended == "hang":
        if case.owed == 0:
            yield "open", f"still open after {outcome.seconds:.1f} s"
        else:
            yield "hang", f"{len(outcome.answers)} of {case.owed} answers after {outcome.seconds:.1f} s"
    elif outcome.ended == "refused":
        yield "lost", "no connection"
    elif outcome.ended == "closed" and len(outcome.answers) < case.owed and not case.may_close and case.wire:
        how = "within an answer" if outcome.torn else "without an answer"
        yield "lost", f"closed {how} ({len(outcome.answers)} of {case.owed})"


# -- tables ----------------------------------------------------------------------------------------------------


def counts(failures: Iterable[Failure]) -> dict[str, int]:
    """How many of each kind."""
    found = Counter(failure.kind for failure in failures)
    return {kind: found[kind] for kind in KINDS}


def by_status(entries: Sequence[Entry]) -> dict[str, dict[str, int]]:
    """Source -> status -> how many."""
    found: dict[str, Counter[str]] = {}
    for entry in entries:
        found.setdefault(entry.case.source, Counter())[entry.status] += 1
    return {source: dict(sorted(found[source].items())) for source in sorted(found)}


def table(statuses: dict[str, dict[str, int]]) -> str:
    """The same as markdown."""
    columns = sorted({status for row in statuses.values() for status in row})
    lines = [f"| source | {' | '.join(columns)} | all |", "| --- |" + " --- |" * (len(columns) + 1)]
    for source, row in statuses.items():
        cells = [str(row.get(status, "")) for status in columns]
        lines.append(f"| {source} | {' | '.join(cells)} | {sum(row.values())} |")
    return "\n".join(lines)


def slowest(entries: Sequence[Entry], *, count: int = 5) -> list[dict[str, Any]]:
    """Whole answers that took longest; cases that are slow by themselves are left out."""
    quick = [entry for entry in entries if not entry.case.is_slow and entry.is_answered]
    quick.sort(key=lambda entry: -entry.seconds)
    return [
        {"case": entry.case.id, "label": entry.case.label, "status": entry.status, "seconds": round(entry.seconds, 2)}
        for entry in quick[:count]
    ]
