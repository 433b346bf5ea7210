"""What is wrong with a fine-tuning set, record by record; and one form written as another.

    >>> report = check(Path("sft.jsonl"))                                     # doctest: +SKIP
    >>> [(problem.line, problem.text) for problem in report.problems]         # doctest: +SKIP
    [(7, 'messages[1]: unknown role')]

A file is JSONL (also .gz and .zst), a JSON array, or CSV whose columns are named as usual (`instruction`, `prompt` or
`question`; `output`, `response`, `answer` or `completion`; `input`, `system`). Errors make a record useless;
warnings are what is rarely meant. It changes nothing.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from puyu.data.chats import preference_of
from puyu.data.formats import Form, form_of
from puyu.errors import InputError
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
from puyu.types import Conversation, Message

MARKERS = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|endoftext|>", "<|action_start|>")
_COLUMNS = {
    **dict.fromkeys(("instruction", "prompt", "question", "query"), "instruction"),
    **dict.fromkeys(("output", "response", "answer", "completion"), "output"),
    **dict.fromkeys(("input", "context"), "input"),
    "system": "system",
}


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
        if not {"instruction", "output"} <= set(names.values()):
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


def conversations(path: Path, *, form: Form | None = None) -> Iterator[tuple[int, Conversation]]:
    """All conversations of a file; InputError names the first line that is none."""
    bad: list[BadRecord] = []
    for line, record in rows_of(path, bad):
        _refuse_torn(path, bad)
        try:
            yield line, _conversation(record, form)
        except InputError as error:
            raise InputError(f"{path}, line {line}: {error.message}", remedy=error.remedy) from error
    _refuse_torn(path, bad)


def _refuse_torn(path: Path, bad: list[BadRecord]) -> None:
    if bad:
        raise InputError(f"{path}, line {bad[0].line} (byte {bad[0].offset}): {bad[0].reason}")


def _conversation(record: Any, form: Form | None) -> Conversation:
    if record is None:
        raise InputError("the row has not as many cells as the header")
    if not isinstance(record, Mapping):
        raise InputError(f"a record must be an object, not {type(record).__name__}")
    return (form or form_of(record)).read(record)


def check(path: Path, *, form: Form | None = None) -> Report:
    """Look at every record. A file that cannot be read at all is an InputError."""
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


def _look(record: Any, form: Form | None, report: Report) -> list[Finding]:
    if isinstance(record, Mapping) and {"chosen", "rejected"} <= record.keys():
        pair = preference_of(record)
        report.forms["preference"] += 1
        same = [] if pair.chosen != pair.rejected else ["chosen and rejected are the same"]
        return [("error", text) for text in same] + [*_doubts(pair.prompt.messages, answered=False)]
    conversation = _conversation(record, form)
    report.forms[(form or form_of(record)).name] += 1
    report.turns.update(message.role for message in conversation.messages)
    if not any(message.role == "assistant" for message in conversation.messages):
        return [("error", "no assistant turn, so there is nothing to learn")]
    return [*_doubts(conversation.messages, answered=True), *_calls(conversation)]


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
        for call in message.tool_calls:
            try:
                call.parsed()
            except InputError as error:
                yield "error", f"{place}: {error.message}"
            if offered and call.name not in offered:
                yield "warning", f"{place}: calls {call.name!r}, which is not on offer"
        asked = any(before.tool_calls for before in conversation.messages[:index])
        if message.role == "tool" and not asked:
            yield "warning", f"{place}: an answer to no call"


def convert(source: Path, target: Path, *, to: Form, form: Form | None = None) -> int:
    """Write `source` as `target` in another form; returns how many. InputError names the line and what cannot be said;
    then nothing is written."""
    records = [_written(source, line, conversation, to) for line, conversation in conversations(source, form=form)]
    if target.suffix == ".csv":
        write_text(target, _as_csv(records))
    elif target.suffix == ".json":
        write_json(target, records)
    else:
        write_jsonl(target, records)
    return len(records)


def _written(source: Path, line: int, conversation: Conversation, to: Form) -> dict[str, Any]:
    try:
        return to.write(conversation)
    except InputError as error:
        raise InputError(f"{source}, line {line}: {error.message}", remedy=error.remedy) from error


def _as_csv(records: list[dict[str, Any]]) -> str:
    names = ["system", "instruction", "input", "output"]
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
