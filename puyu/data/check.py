"""What is wrong with a fine-tuning or preference set, record by record; and one form written as another.

    >>> report = check(Path("sft.jsonl"))                                     # doctest: +SKIP
    >>> [(problem.line, problem.text) for problem in report.problems]         # doctest: +SKIP
    [(7, 'messages[1]: unknown role')]

A file is JSONL (also .gz and .zst), a JSON array, or CSV whose columns are named as usual (`instruction`, `prompt` or
`question`; `output`, `response`, `answer` or `completion`, or `chosen` and `rejected`; `input`, `system`). Errors make
a record useless; warnings are what is rarely meant. It changes nothing. `openai`, `sharegpt`, `alpaca` and `xtuner` are
names of a form of conversations and of one of preference pairs: the fields of a record tell which.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from puyu.data import preferences
from puyu.data.formats import FORMS, Form, form_named, form_of
from puyu.data.judged import is_judged, judged_of
from puyu.data.preferences import PREFERENCE_FORMS, PreferenceForm, is_preference
from puyu.errors import ConfigError, InputError
from puyu.files import (
    BadRecord,
    hash_json,
    open_bytes,
    read_json,
    read_jsonl_lines,
    write_json,
    write_jsonl,
    write_text,
)
from puyu.types import Conversation, Message, Preference

MARKERS = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|endoftext|>", "<|action_start|>")
FORM_NAMES = tuple(dict.fromkeys(form.name for form in (*FORMS, *PREFERENCE_FORMS)))
"""Of conversations and of pairs."""
_OF_PAIRS = {"xtuner", *(form.name for form in PREFERENCE_FORMS)}
_OF_BOTH = _OF_PAIRS & {form.name for form in FORMS}
_COLUMNS = {
    **dict.fromkeys(("instruction", "prompt", "question", "query"), "instruction"),
    **dict.fromkeys(("output", "response", "answer", "completion"), "output"),
    **dict.fromkeys(("input", "context"), "input"),
    "system": "system",
}
_LEAST = ({"instruction", "output"}, {"instruction", "chosen", "rejected"})
"""Columns that a CSV file must have."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding. `line` counts lines of JSONL and CSV and records of JSON, from 1."""

    line: int
    level: Literal["error", "warning"]
    text: str


@dataclass
class Report:
    """What a file holds."""

    path: Path
    records: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    @property
    def errors(self) -> int:
        return sum(problem.level == "error" for problem in self.problems)


Row = tuple[int, Any]


def rows_of(path: Path, bad: list[BadRecord]) -> Iterator[Row]:
    """(line, record) of every record that can be read; others go to `bad`."""
    kind = Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix
    if kind == ".csv":
        yield from _csv_rows(path)
    elif kind == ".json":
        values = read_json(path)
        if not isinstance(values, list):
            raise InputError(f"{path} must hold a list of records, not {type(values).__name__}")
        yield from enumerate(values, 1)
    else:
        yield from read_jsonl_lines(path, quarantine=bad.append)


def _csv_rows(path: Path) -> Iterator[Row]:
    with open_bytes(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        names = {name: _COLUMNS.get(name.strip().lower(), name) for name in reader.fieldnames or ()}
        if not any(wanted <= set(names.values()) for wanted in _LEAST):
            found = ", ".join(names) or "none"
            raise InputError(f"{path} has the columns {found}", remedy="name two of them instruction and output")
        try:
            for row in reader:
                if None in row or None in row.values():
                    yield reader.line_num, None
                    continue
                yield reader.line_num, {names[name]: value for name, value in row.items()}
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path}, line {reader.line_num}: {error}") from error


R = TypeVar("R")
_Reader = Callable[[Any], R]


def _records(path: Path, read: _Reader[R]) -> Iterator[tuple[int, R]]:
    """All records of a file; InputError names the first line that is none."""
    bad: list[BadRecord] = []
    for line, record in rows_of(path, bad):
        _refuse_torn(path, bad)
        try:
            yield line, read(record)
        except InputError as error:
            raise InputError(f"{path}, line {line}: {error.message}", remedy=error.remedy) from error
    _refuse_torn(path, bad)


def _refuse_torn(path: Path, bad: list[BadRecord]) -> None:
    if bad:
        raise InputError(f"{path}, line {bad[0].line} (byte {bad[0].offset}): {bad[0].reason}")


def _object(record: Any) -> Mapping[str, Any]:
    if record is None:
        raise InputError("the row has not as many cells as the header")
    if not isinstance(record, Mapping):
        raise InputError(f"a record must be an object, not {type(record).__name__}")
    return record


def _conversation_form(record: Mapping[str, Any], form: str) -> Form:
    if not form and is_preference(record):
        raise InputError("a preference pair among conversations", remedy="keep pairs in a file of their own")
    return form_named(form) if form else form_of(record)


def _pair_form(record: Mapping[str, Any], form: str) -> PreferenceForm:
    found = preferences.form_of(record)  # also where the form is given: it names a field that is missing
    return preferences.form_named(form) if form else found


def holds_pairs(record: Any, form: str = "") -> bool:
    """Whether a record is read as a preference pair: as the form says, else as its fields do."""
    return is_preference(record) if not form or form in _OF_BOTH else form in _OF_PAIRS


def check(path: Path, *, form: str = "") -> Report:
    """Look at every record, in that form or in the one that its fields tell. A file that cannot be read at all is an
    InputError."""
    report, bad = Report(path), []  # type: tuple[Report, list[BadRecord]]
    seen: dict[str, int] = {}
    for line, record in rows_of(path, bad):
        report.records += 1
        try:
            for level, text in _look(record, form, report):
                report.problems.append(Problem(line, level, text))
        except InputError as error:
            report.problems.append(Problem(line, "error", error.message))
            continue
        first = seen.setdefault(hash_json(record), line)
        if first != line:
            report.problems.append(Problem(line, "warning", f"the same as line {first}"))
    report.records += len(bad)
    report.problems += [Problem(item.line, "error", item.reason) for item in bad]
    report.problems.sort(key=lambda problem: problem.line)
    return report


Finding = tuple[Literal["error", "warning"], str]


def _look(record: Any, form: str, report: Report) -> list[Finding]:
    record = _object(record)
    if holds_pairs(record, form):
        told = _pair_form(record, form)
        pair = told.read(record)
        report.forms[f"{told.name} pairs"] += 1
        return list(_pair_findings(pair))
    if not form and is_judged(record):
        [one] = judged_of(record)
        report.forms["judged answers"] += 1
        return [*_doubts(one.prompt.messages, answered=False), *_text_doubts(one.answer, "the answer")]
    single = _conversation_form(record, form)
    conversation = single.read(record)
    report.forms[single.name] += 1
    report.turns.update(message.role for message in conversation.messages)
    if not any(message.role == "assistant" for message in conversation.messages):
        return [("error", "no assistant turn, so there is nothing to learn")]
    return [*_doubts(conversation.messages, answered=True), *_calls(conversation)]


def _pair_findings(pair: Preference) -> Iterator[Finding]:
    if pair.chosen == pair.rejected:
        yield "error", "chosen and rejected are the same"
    yield from _doubts(pair.prompt.messages, answered=False)
    if pair.prompt.messages[-1].role == "assistant":
        yield "warning", "the prompt ends with a turn of the assistant"
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        yield from _text_doubts(answer, name)
        yield from _call_findings(answer, name, offered={tool.name for tool in pair.prompt.tools})


def _doubts(messages: tuple[Message, ...], *, answered: bool) -> Iterator[Finding]:
    roles = [message.role for message in messages]
    if answered and roles[-1] != "assistant":
        yield "warning", f"the last turn is of the {roles[-1]}: it is not learned"
    for index, message in enumerate(messages):
        place = f"turn {index + 1} ({message.role})"
        if message.role == "system" and index:
            yield "warning", f"{place}: a system prompt that is not the first turn"
        if index and message.role == roles[index - 1] and message.role != "tool":
            yield "warning", f"{place}: two turns of one role in a row"
        yield from _text_doubts(message, place)


def _text_doubts(message: Message, place: str) -> Iterator[Finding]:
    if not message.content and not message.tool_calls:
        yield "warning", f"{place}: empty"
    if marker := next((marker for marker in MARKERS if marker in message.text), None):
        yield "warning", f"{place}: {marker} stands in the text; it will be learned as plain text"
    if "\ufffd" in message.text:
        yield "warning", f"{place}: a character was lost when the text was decoded (U+FFFD)"


def _calls(conversation: Conversation) -> Iterator[Finding]:
    offered = {tool.name for tool in conversation.tools}
    for index, message in enumerate(conversation.messages):
        place = f"turn {index + 1} ({message.role})"
        yield from _call_findings(message, place, offered=offered)
        asked = any(before.tool_calls for before in conversation.messages[:index])
        if message.role == "tool" and not asked:
            yield "warning", f"{place}: an answer to no call"


def _call_findings(message: Message, place: str, *, offered: set[str]) -> Iterator[Finding]:
    for call in message.tool_calls:
        try:
            call.parsed()
        except InputError as error:
            yield "error", f"{place}: {error.message}"
        if offered and call.name not in offered:
            yield "warning", f"{place}: calls {call.name!r}, which is not on offer"


def convert(source: Path, target: Path, *, to: str, form: str = "") -> int:
    """Write `source` as `target` in another form; returns how many. The first record says whether the file holds
    conversations or preference pairs. InputError names the line and what cannot be said; then nothing is written.
    """
    first = next((record for _, record in rows_of(source, [])), None)
    if holds_pairs(first, form):
        pairs = _records(source, lambda record: _pair_form(_object(record), form).read(record))
        records = _written(source, pairs, preferences.form_named(to).write)
    else:
        if to not in {one.name for one in FORMS}:
            raise ConfigError(f"{source} holds conversations, and {to!r} is a form of preference pairs")
        singles = _records(source, lambda record: _conversation_form(_object(record), form).read(record))
        records = _written(source, singles, form_named(to).write)
    if target.suffix == ".csv":
        write_text(target, _as_csv(records))
    elif target.suffix == ".json":
        write_json(target, records)
    else:
        write_jsonl(target, records)
    return len(records)


def _written(
    source: Path, records: Iterator[tuple[int, R]], write: Callable[[R], dict[str, Any]]
) -> list[dict[str, Any]]:
    found = []
    for line, record in records:
        try:
            found.append(write(record))
        except InputError as error:
            raise InputError(f"{source}, line {line}: {error.message}", remedy=error.remedy) from error
    return found


def _as_csv(records: list[dict[str, Any]]) -> str:
    has_pairs = bool(records) and "chosen" in records[0]
    names = ["system", "instruction", "input", *(("chosen", "rejected") if has_pairs else ("output",))]
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, names, restval="", lineterminator="\n")
    writer.writeheader()
    for number, record in enumerate(records, 1):
        if record.keys() - set(names):
            more = ", ".join(sorted(record.keys() - set(names)))
            raise InputError(f"record {number}: CSV has no place for {more}", remedy="write .jsonl, or use --to alpaca")
        writer.writerow(record)
    return stream.getvalue()


def lines_of(report: Report, *, limit: int = 20) -> list[str]:
    """The report as a person reads it."""
    forms = ", ".join(f"{name} {count}" for name, count in report.forms.most_common()) or "no form that is known"
    turns = ", ".join(f"{role} {count}" for role, count in report.turns.most_common())
    lines = [f"{report.path}: {report.records} records ({forms})", *([f"  turns: {turns}"] if turns else [])]
    lines += [f"  line {problem.line}: {problem.level}: {problem.text}" for problem in report.problems[:limit]]
    if len(report.problems) > limit:
        lines.append(f"  and {len(report.problems) - limit} more (--limit {len(report.problems)} shows all)")
    warnings = len(report.problems) - report.errors
    return [*lines, f"  {report.errors} errors, {warnings} warnings" if report.problems else "  nothing is wrong"]
