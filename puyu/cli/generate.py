"""`puyu generate IN.jsonl OUT.jsonl --model DIR`: answer every record of a file, and go on after any interruption.

A record has `prompt` (plain text) or `messages` (OpenAI's), and may have `id`, `tools`, `params` (fields of
SamplingParams), `adapter`, `priority` and `timeout`. Each finished record is appended at once, so a run that was
killed goes on where it stood: nothing is repeated but what was under way, nothing is lost. At the end the lines are
put into the order of the input. A line that cannot be used is named, counted, and answered with an `error`.

    {"line": 1, "id": "a", "text": "4", "finish_reason": "stop", "usage": {...}, "input": "5f1c..."}
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from puyu.cli.local import add_flags, open_llm
from puyu.errors import ConfigError, InputError, RequestError
from puyu.files import disk_errors, hash_bytes, open_bytes, write_jsonl
from puyu.log import Progress, say
from puyu.types import Completion, Conversation, GenerateRequest, Guide, SamplingParams

if TYPE_CHECKING:
    from puyu.engine.llm import LLM

KNOWN = ("id", "prompt", "messages", "tools", "params", "adapter", "priority", "timeout", "metadata")
_TUPLES = ("stop", "stop_token_ids", "bad_words")


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the input; `key` is the hash of its bytes."""

    line: int
    key: str
    content: bytes


def main(argv: Sequence[str]) -> int:
    """The verb; returns 3 when some lines could not be used, else 0."""
    options = argparse.ArgumentParser(prog="puyu generate", description="Answer every record of a file; resumable.")
    options.add_argument("input", type=Path, help="records, one JSON object a line (.gz and .zst too)")
    options.add_argument("output", type=Path, help="answers, one a line; an unfinished file is gone on with")
    options.add_argument("--model", required=True, help="model folder or hub id (owner/name, ms:owner/name)")
    options.add_argument("--params", default="{}", help="SamplingParams of records that give none, as JSON [{}]")
    options.add_argument("--window", type=int, default=256, help="records under way at the same time [256]")
    options.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR", help="LoRA adapter; repeatable")
    add_flags(options)
    given = options.parse_args(list(argv))
    adapters = dict(_named_folder(text) for text in given.adapter)
    defaults = read_params(_as_object(given.params, "--params"), SamplingParams())
    done = _finished(given.output, given.input)
    total = sum(1 for _ in records(given.input))
    if done:
        say(f"{len(done)} of {total} records are there already")
    if len(done) < total:
        with open_llm(given.model, given, adapters=adapters) as llm, open(given.output, "ab") as stream:
            progress = Progress("generate", total, unit="tok", start=len(done))
            todo = (record for record in records(given.input) if record.line not in done)
            _Run(llm, defaults, stream, progress).all(todo, window=max(given.window, 1))
            progress.close()
    return _close(given.output)


def _named_folder(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise ConfigError(f"--adapter {text!r} must be NAME=DIR", remedy="for example: --adapter poet=runs/poet")
    return name, folder


@dataclass(eq=False, slots=True)
class _Run:
    """Records through an engine, a window of them at a time."""

    llm: LLM
    defaults: SamplingParams
    stream: IO[bytes]
    progress: Progress
    num_open: int = 0

    def all(self, todo: Iterator[Record], *, window: int) -> None:
        more = True
        while more or self.num_open:
            while more and self.num_open < window:
                record = next(todo, None)
                more = record is not None
                if record is not None:
                    self._submit(record)
            if self.num_open:
                self.llm.driver.pump()

    def _submit(self, record: Record) -> None:
        head = {"line": record.line, "id": record.line}
        try:
            value = _as_object(record.content, f"line {record.line}")
            head["id"] = value.get("id", record.line)
            request = read_request(value, self.defaults)
            self.llm.driver.submit(request, done=lambda answer: self._done(record, head, answer))
            self.num_open += 1
        except (InputError, RequestError) as error:
            self._write({**head, "error": error.message, "input": record.key})
            self.progress.update(work=0)

    def _done(self, record: Record, head: Mapping[str, Any], answer: Completion) -> None:
        self.num_open -= 1
        self._write({**head, **answer_json(answer), "input": record.key})
        self.progress.update(work=answer.usage.completion_tokens)

    def _write(self, row: Mapping[str, Any]) -> None:
        with disk_errors(Path(self.stream.name)):
            self.stream.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            self.stream.flush()


def records(path: Path) -> Iterator[Record]:
    """The lines of the input that are not empty."""
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    with open_bytes(path) as stream:
        for line, content in enumerate(stream, 1):
            if content.strip():
                yield Record(line, hash_bytes(content.strip())[:16], content)


def read_request(value: Mapping[str, Any], defaults: SamplingParams) -> GenerateRequest:
    """A record as a request; errors name the field."""
    unknown = [key for key in value if key not in KNOWN]
    if unknown:
        raise RequestError(f"unknown field {unknown[0]!r}", param=unknown[0], remedy=f"known: {', '.join(KNOWN)}")
    if ("prompt" in value) == ("messages" in value):
        raise RequestError("a record has either prompt or messages", param="prompt")
    params = value.get("params", {})
    if not isinstance(params, Mapping):
        raise RequestError("params must be an object", param="params")
    limits = {key: value[key] for key in ("adapter", "priority", "timeout") if key in value}
    if "messages" in value:
        talk = Conversation.from_openai(value)
        return GenerateRequest(talk.messages, read_params(params, defaults), talk.tools, **limits)
    if not isinstance(value["prompt"], str):
        raise RequestError("prompt must be text", param="prompt")
    return GenerateRequest(value["prompt"], read_params(params, defaults), **limits)


def read_params(value: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    """JSON -> SamplingParams over `defaults`; ranges are the engine's to check."""
    known = {field.name for field in fields(SamplingParams)}
    changes: dict[str, Any] = {}
    for name, item in value.items():
        if name not in known:
            raise RequestError(
                f"unknown field params.{name}", param="params", remedy=f"known: {', '.join(sorted(known))}"
            )
        try:
            changes[name] = _read_field(name, item)
        except (TypeError, ValueError, KeyError) as error:
            raise RequestError(f"params.{name} cannot be read: {error!r}", param=name) from error
    return replace(defaults, **changes)


def _read_field(name: str, item: Any) -> Any:
    if name in _TUPLES:
        return (item,) if isinstance(item, str) else tuple(item)
    if name == "logit_bias":
        return {int(id): bias for id, bias in item.items()}
    if name == "guide" and item is not None:
        value = item["value"]
        return Guide(item["kind"], tuple(value) if isinstance(value, list) else value)
    return item


def answer_json(answer: Completion) -> dict[str, Any]:
    """What one record is answered with; fields that were not asked for are left out."""
    usage = {name: getattr(answer.usage, name) for name in ("prompt_tokens", "completion_tokens", "cached_tokens")}
    row: dict[str, Any] = {"text": answer.text, "finish_reason": answer.finish_reason, "usage": usage}
    if answer.message.tool_calls:
        row["tool_calls"] = answer.message.to_openai()["tool_calls"]
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        if getattr(answer, name):
            row[name] = getattr(answer, name)
    if answer.alternatives:
        row["alternatives"] = [answer_json(other) for other in answer.alternatives]
    return row


def _as_object(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} is not a JSON object")
    return value


def _finished(output: Path, source: Path) -> set[int]:
    """Lines that are answered; the torn end of a killed run is cut off. InputError when the input has changed."""
    if not output.is_file():
        output.parent.mkdir(parents=True, exist_ok=True)
        return set()
    _cut_torn_line(output)
    known = {row["line"]: row["input"] for row in _rows(output)}
    for record in records(source):
        if known.pop(record.line, record.key) != record.key:
            raise InputError(f"{source}, line {record.line} has changed since {output} was begun", remedy=_REMEDY)
    if known:
        raise InputError(f"{output} answers line {min(known)}, which {source} does not have", remedy=_REMEDY)
    return {row["line"] for row in _rows(output)}


_REMEDY = "restore the input, or write to another file"


def _rows(output: Path) -> Iterator[dict[str, Any]]:
    with open(output, "rb") as stream:
        for number, line in enumerate(stream, 1):
            row = _as_object(line, f"{output}, line {number}")
            if not {"line", "input"} <= set(row):
                raise InputError(f"{output}, line {number} was not written by this command", remedy=_REMEDY)
            yield row


def _cut_torn_line(path: Path) -> None:
    with open(path, "rb+") as stream:
        content = stream.read()
        if content and not content.endswith(b"\n"):
            stream.truncate(content.rfind(b"\n") + 1)
            os.fsync(stream.fileno())


def _close(output: Path) -> int:
    """Put the answers into the order of the input, and say what could not be used."""
    rows = sorted(_rows(output), key=lambda row: row["line"]) if output.is_file() else []
    write_jsonl(output, rows)
    bad = [row for row in rows if "error" in row]
    for row in bad:
        say(f"line {row['line']} (id {row['id']}): {row['error']}")
    print(f"{len(rows) - len(bad)} records answered, {len(bad)} could not be used: {output}")
    return InputError.exit_code if bad else 0
