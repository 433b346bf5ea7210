"""Answers that were judged one by one, for KTO: a record -> Judged.

    >>> judged_of({"prompt": "Hi", "completion": "Hello!", "label": True})[0].good
    True

TRL's {"prompt", "completion", "label"}, as texts or messages; any form of conversations (`puyu.data.formats`) with
`label` or, as LLaMA-Factory writes it, `kto_tag`: its last turn is what was judged. A preference pair is two judged
answers: the chosen one is wanted, the rejected one is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puyu.data.formats import form_of
from puyu.data.preferences import is_preference, preference_of
from puyu.errors import InputError
from puyu.types import Conversation, Judged, Message

LABELS = ("label", "kto_tag")


def is_judged(record: object) -> bool:
    """Whether a record says of one answer that it is wanted, or not."""
    return isinstance(record, Mapping) and not is_preference(record) and any(name in record for name in LABELS)


def judged_of(record: Mapping[str, Any]) -> list[Judged]:
    """One answer, or the two of a pair. InputError names the field that is missing or wrong."""
    if is_preference(record):
        pair = preference_of(record)
        return [Judged(pair.prompt, pair.chosen, True), Judged(pair.prompt, pair.rejected, False)]
    good = _label(record)
    if "completion" in record:
        messages = (*_turns(record, "prompt"), *_turns(record, "completion"))
        tools = Conversation.from_openai({"messages": [], "tools": record.get("tools")}).tools
        return [_judged(Conversation(messages, tools), good)]
    return [_judged(form_of(record).read(record), good)]


def _label(record: Mapping[str, Any]) -> bool:
    name = next((name for name in LABELS if name in record), None)
    if name is None:
        remedy = "fields: prompt, completion, label; or a conversation with label; or a preference pair"
        raise InputError("a judged answer needs the field 'label'", remedy=remedy)
    if not isinstance(record[name], bool):
        raise InputError(f"field {name!r} must be true (wanted) or false, not {record[name]!r}")
    return bool(record[name])


def _turns(record: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    value = record.get(name)
    if isinstance(value, str):
        return (Message("user" if name == "prompt" else "assistant", value),)
    found = [value] if isinstance(value, Mapping) else value
    if not isinstance(found, list) or not found or not all(isinstance(turn, Mapping) for turn in found):
        raise InputError(f"field {name!r} must be text or a list of messages")
    return tuple(Message.from_openai(turn) for turn in found)


def _judged(conversation: Conversation, good: bool) -> Judged:
    *asked, answer = conversation.messages or (None,)
    if answer is None or answer.role != "assistant":
        said = "there is none" if answer is None else f"the last turn is of the {answer.role}"
        raise InputError(f"a judged answer is the assistant's last turn, and {said}")
    if not asked:
        raise InputError("a judged answer needs a prompt before it")
    return Judged(Conversation(tuple(asked), conversation.tools, conversation.metadata), answer, good)
