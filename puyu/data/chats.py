"""Files of conversations and preferences -> Conversation, Preference: JSONL, JSON, CSV. Torch-free.

A conversation line is OpenAI's form, `{"messages": [...], "tools": [...]?}`, or another one of `puyu.data.formats`
(ShareGPT, Alpaca, XTuner, text), told by its fields. A preference line has `prompt`, `chosen`, `rejected` and
`domain`?, or another form of `puyu.data.preferences`; judged answers are those of `puyu.data.judged`. A torn line is
quarantined and counted; a line that is valid JSON but no record is an error that names file, line and field.

    >>> records, torn = read_conversations(Path("sft.jsonl"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from puyu.data.check import rows_of
from puyu.data.formats import form_of
from puyu.data.judged import judged_of
from puyu.data.preferences import preference_of
from puyu.errors import InputError
from puyu.files import BadRecord
from puyu.types import Conversation, Judged, Preference

R = TypeVar("R")


def read_conversations(path: Path) -> tuple[list[Conversation], list[BadRecord]]:
    """All conversations of a file, and its torn lines."""
    return _read(path, conversation_of)


def read_preferences(path: Path) -> tuple[list[Preference], list[BadRecord]]:
    """All preference pairs of a file, and its torn lines."""
    return _read(path, preference_of)


def read_judged(path: Path) -> tuple[list[Judged], list[BadRecord]]:
    """All judged answers of a file (see `puyu.data.judged`), and its torn lines."""
    found, torn = _read(path, judged_of)
    return [answer for record in found for answer in record], torn


def _read(path: Path, build: Callable[[Mapping[str, Any]], R]) -> tuple[list[R], list[BadRecord]]:
    torn: list[BadRecord] = []
    records = []
    for number, value in rows_of(path, torn):
        try:
            if not isinstance(value, Mapping):
                raise InputError(f"a record must be a JSON object, not {type(value).__name__}")
            records.append(build(value))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error.message}", remedy=error.remedy) from error
    if not records:
        raise InputError(f"{path} holds no record ({len(torn)} torn lines)", remedy="check the path and the format")
    return records, torn


def conversation_of(value: Mapping[str, Any]) -> Conversation:
    """One record; it needs at least one assistant turn."""
    conversation = form_of(value).read(value)
    if not any(message.role == "assistant" for message in conversation.messages):
        raise InputError("the record has no assistant turn, so there is nothing to learn")
    return conversation
