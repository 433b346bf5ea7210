"""The usual forms of fine-tuning sets <-> Conversation: OpenAI, ShareGPT, Alpaca, XTuner, plain text.

    >>> form = form_of({"instruction": "Add.", "input": "1 2", "output": "3"})
    >>> form.name, form.read({"instruction": "Add.", "input": "1 2", "output": "3"}).messages[0].text
    ('alpaca', 'Add.\\n1 2')

`openai`    {"messages": [{"role", "content", "tool_calls"?, "weight"?}], "tools"?}, InternLM's role `environment`
            included; a turn of the assistant with weight 0 (or `loss` or `train` false) is not learned
`sharegpt`  {"conversations": [{"from", "value"}], "system"?, "tools"?} with human, gpt, function_call, observation
`alpaca`    {"instruction", "input"?, "output", "system"?, "history"?}; instruction and input are joined by a line end
`xtuner`    {"conversation": [{"system"?, "input", "output", "output_with_loss"?}]}
`text`      {"text"}: one assistant turn, all of it learned

What is read and written again in the same form is the same conversation (tested as a property). What a form cannot say
is an InputError that names it; nothing is left out in silence. Metadata stay where the form has a place for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from puyu.errors import ConfigError, InputError
from puyu.types import Conversation, Message, ToolCall, ToolSpec, metadata_of

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Form:
    """One form: the field that tells it, and both directions."""

    name: str
    field: str
    read: Callable[[Record], Conversation]
    write: Callable[[Conversation], dict[str, Any]]


def form_of(record: Record) -> Form:
    """The form of a record, told by its fields."""
    found = [form for form in FORMS if form.field in record]
    if not found:
        fields = ", ".join(sorted(map(str, record))) or "none"
        expected = ", ".join(f"{form.field} ({form.name})" for form in FORMS)
        raise InputError(f"no known form has the fields {fields}", remedy=f"one of these tells the form: {expected}")
    return found[0]


def form_named(name: str) -> Form:
    """The form of that name; ConfigError for another."""
    for form in FORMS:
        if form.name == name:
            return form
    raise ConfigError(f"unknown form {name!r}", remedy=f"one of: {', '.join(form.name for form in FORMS)}")


def text_field(record: Record, name: str, *, default: str | None = None) -> str:
    """A field that must be text; InputError names it."""
    value = record.get(name, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise InputError(f"field {name!r} must be text, not {type(value).__name__}")
    return value


def _items(record: Record, name: str) -> list[Record]:
    value = record.get(name)
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise InputError(f"field {name!r} must be a list of objects")
    return value


# ---- OpenAI


_LEARNED = ("weight", "loss", "train")
"""How a message says whether it is learned: OpenAI's 0 or 1, XTuner's and axolotl's true or false."""


def _read_openai(record: Record) -> Conversation:
    found = Conversation.from_openai(record)
    learned = [_learned(value, f"messages[{index}]") for index, value in enumerate(record["messages"])]
    messages = [replace(m, learned=flag) for m, flag in zip(found.messages, learned, strict=True)]
    return replace(found, messages=tuple(messages)) if not all(learned) else found


def _learned(value: Record, place: str) -> bool:
    for name in _LEARNED:
        if value.get(name) is None:
            continue
        if not isinstance(value[name], int | float) or value[name] not in (0, 1):
            raise InputError(f"{place}.{name} must be true or false (1 or 0), not {value[name]!r}")
        is_answer = value.get("role") == "assistant"
        if value[name] and not is_answer:
            raise InputError(f"{place}.{name}: only what the assistant says is learned, not a turn of {value['role']}")
        return bool(value[name]) or not is_answer
    return True


def _write_openai(conversation: Conversation) -> dict[str, Any]:
    record = conversation.to_openai()
    for message, value in zip(conversation.messages, record["messages"], strict=True):
        if not message.learned:
            value["weight"] = 0
    return record


# ---- ShareGPT

_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
    "function_call": "call",
}
_NAMES = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


def _read_sharegpt(record: Record) -> Conversation:
    messages = [Message("system", text)] if (text := text_field(record, "system", default="")) else []
    for index, turn in enumerate(_items(record, "conversations")):
        speaker = turn.get("from", turn.get("role"))
        role = _SPEAKERS.get(str(speaker).lower())
        place = f"conversations[{index}]"
        if role is None:
            raise InputError(f"{place}: unknown speaker {speaker!r}", remedy=f"one of: {', '.join(_SPEAKERS)}")
        value = text_field(turn, "value" if "value" in turn else "content")
        if role == "call":
            messages.append(Message("assistant", tool_calls=tuple(_calls(value, place))))
        else:
            messages.append(Message(role, value))  # type: ignore[arg-type]
    return Conversation(tuple(messages), _tools(record.get("tools")), metadata_of(record))


def _calls(value: str, place: str) -> Iterator[ToolCall]:
    calls = _json(value, place)
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise InputError(f"{place}: a function_call is JSON with name and arguments")
        arguments = call.get("arguments", {})
        yield ToolCall(call["name"], arguments if isinstance(arguments, str) else _dump(arguments))


def _tools(value: Any) -> tuple[ToolSpec, ...]:
    found = _json(value, "tools") if isinstance(value, str) and value.strip() else value or []
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise InputError("field 'tools' must be a list of tools, or JSON of one")
    return tuple(ToolSpec.from_openai(tool) for tool in found)


def _json(value: str, place: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not JSON: {error}") from error


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _write_sharegpt(conversation: Conversation) -> dict[str, Any]:
    turns = [turn for message in conversation.messages for turn in _turns(message)]
    record: dict[str, Any] = {"conversations": turns}
    if conversation.tools:
        record["tools"] = _dump([tool.to_openai() for tool in conversation.tools])
    return _with_metadata(record, conversation)


def _turns(message: Message) -> Iterator[dict[str, str]]:
    refuse(bool(message.tool_call_id or any(call.id for call in message.tool_calls)), "ids of tool calls", "sharegpt")
    refuse(bool(message.name), "names of messages", "sharegpt")
    refuse(not message.learned, "turns that are not learned", "sharegpt")
    refuse(bool(message.tool_calls and message.content), "a call beside a text in one turn", "sharegpt")
    if message.tool_calls:
        calls = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
        yield {"from": "function_call", "value": _dump(calls[0] if len(calls) == 1 else calls)}
    else:
        yield {"from": _NAMES[message.role], "value": plain_text(message, "sharegpt")}


def refuse(is_there: bool, what: str, form: str) -> None:
    """InputError for what a form has no place for."""
    if is_there:
        raise InputError(f"the form {form!r} cannot express {what}", remedy="choose the form 'openai'")


def plain_text(message: Message, form: str) -> str:
    """The content, where it is nothing but text."""
    refuse(not isinstance(message.content, str), "pictures and sounds", form)
    return message.text


# ---- Alpaca and XTuner: pairs of a question and an answer


def _read_alpaca(record: Record) -> Conversation:
    history = record.get("history") or []
    if not isinstance(history, list) or not all(_is_pair(pair) for pair in history):
        raise InputError("field 'history' must be a list of [question, answer]")
    asked = text_field(record, "instruction")
    more = text_field(record, "input", default="")
    last = (f"{asked}\n{more}" if more else asked, text_field(record, "output"))
    return _paired(text_field(record, "system", default=""), [*history, last], record)


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _paired(system: str, pairs: Sequence[Sequence[str]], record: Record) -> Conversation:
    messages = [Message("system", system)] if system else []
    for question, answer in pairs:
        messages += [Message("user", question), Message("assistant", answer)]
    return Conversation(tuple(messages), metadata=metadata_of(record))


def _rows(conversation: Conversation, form: str) -> list[tuple[str, str]]:
    """(role, text) of all turns, where there is nothing else."""
    refuse(bool(conversation.tools), "tools", form)
    for message in conversation.messages:
        refuse(not message.learned and form != "xtuner", "turns that are not learned", form)
        refuse(bool(message.tool_calls or message.role == "tool"), "calls of tools", form)
        refuse(bool(message.name), "names of messages", form)
    return [(message.role, plain_text(message, form)) for message in conversation.messages]


def _pairs(conversation: Conversation, form: str) -> tuple[str, list[tuple[str, str]]]:
    """(system prompt, questions and answers)."""
    rows = _rows(conversation, form)
    refuse(rows[:1] == [("system", "")], "an empty system prompt", form)
    system = rows.pop(0)[1] if rows and rows[0][0] == "system" else ""
    roles = [role for role, _ in rows]
    orderly = roles == ["user", "assistant"] * (len(rows) // 2) and bool(rows)
    refuse(not orderly, f"turns in the order {', '.join(roles) or 'none'}", form)
    texts = [text for _, text in rows]
    return system, list(zip(texts[::2], texts[1::2], strict=True))


def _with_metadata(record: dict[str, Any], conversation: Conversation) -> dict[str, Any]:
    return record | ({"metadata": dict(conversation.metadata)} if conversation.metadata else {})


def _write_alpaca(conversation: Conversation) -> dict[str, Any]:
    system, pairs = _pairs(conversation, "alpaca")
    record: dict[str, Any] = {"instruction": pairs[-1][0], "input": "", "output": pairs[-1][1]}
    if system:
        record["system"] = system
    if len(pairs) > 1:
        record["history"] = [list(pair) for pair in pairs[:-1]]
    return _with_metadata(record, conversation)


def _read_xtuner(record: Record) -> Conversation:
    turns = _items(record, "conversation")
    for index, turn in enumerate(turns):
        place = f"conversation[{index}]"
        if not isinstance(turn.get("output_with_loss", True), bool):
            raise InputError(f"{place}: output_with_loss must be true or false")
        if index and turn.get("system"):
            raise InputError(f"{place}: only the first turn may have a system prompt")
    system = text_field(turns[0], "system", default="") if turns else ""
    pairs = [(text_field(turn, "input", default=""), text_field(turn, "output")) for turn in turns]
    found = _paired(system, pairs, record)
    flags = iter(turn.get("output_with_loss", True) for turn in turns)
    marked = [replace(m, learned=next(flags)) if m.role == "assistant" else m for m in found.messages]
    # a turn without a question is text alone, as in pretraining
    return Conversation(tuple(m for m in marked if m.role != "user" or m.content), (), found.metadata)


def _write_xtuner(conversation: Conversation) -> dict[str, Any]:
    flags = [{} if m.learned else {"output_with_loss": False} for m in conversation.messages if m.role == "assistant"]
    if [message.role for message in conversation.messages] == ["assistant"]:
        [(_, text)] = _rows(conversation, "xtuner")
        return _with_metadata({"conversation": [{"input": "", "output": text, **flags[0]}]}, conversation)
    system, pairs = _pairs(conversation, "xtuner")
    refuse(any(not question for question, _ in pairs), "an empty question", "xtuner")
    turns: list[dict[str, Any]] = [
        {"input": question, "output": answer, **flag} for (question, answer), flag in zip(pairs, flags, strict=True)
    ]
    if system:
        turns[0] = {"system": system} | turns[0]
    return _with_metadata({"conversation": turns}, conversation)


# ---- plain text


def _read_text(record: Record) -> Conversation:
    return Conversation((Message("assistant", text_field(record, "text")),), (), metadata_of(record))


def _write_text(conversation: Conversation) -> dict[str, Any]:
    rows = _rows(conversation, "text")
    roles = [role for role, _ in rows]
    refuse(roles != ["assistant"], f"turns of {', '.join(roles) or 'nobody'}", "text")
    return _with_metadata({"text": rows[0][1]}, conversation)


FORMS = (
    Form("openai", "messages", _read_openai, _write_openai),
    Form("sharegpt", "conversations", _read_sharegpt, _write_sharegpt),
    Form("xtuner", "conversation", _read_xtuner, _write_xtuner),
    Form("alpaca", "instruction", _read_alpaca, _write_alpaca),
    Form("text", "text", _read_text, _write_text),
)
