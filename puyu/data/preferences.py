"""The usual forms of preference sets <-> Preference: two answers to one prompt, the better first.

    >>> pair = preference_of({"prompt": "Hi", "chosen": "Hello!", "rejected": "No."})
    >>> form_named("hh").write(pair)["rejected"]
    '\\n\\nHuman: Hi\\n\\nAssistant: No.'

`trl`          {"prompt", "chosen", "rejected"} as lists of messages (TRL, XTuner); both answers may repeat the prompt
               and `prompt` be a question of it (UltraFeedback)
`trl-text`     the same as texts: one question, two answers
`trl-implicit` {"chosen", "rejected"}: two dialogues of messages that differ in their last turn
`hh`           the same as texts with `\\n\\nHuman:` and `\\n\\nAssistant:` before each turn (Anthropic's HH)
`sharegpt`     {"conversations", "chosen", "rejected", "system"?, "tools"?}: each answer is one turn (LLaMA-Factory)
`alpaca`       {"instruction", "input"?, "chosen", "rejected", "system"?, "history"?}, or `output`: [chosen, rejected]
`openai`       {"input": {"messages", "tools"?}, "preferred_output", "non_preferred_output"}

All of them may have `domain`, the rubric of the reward model, `margin`, by how much the scores of the answers should
differ, and `metadata`. What is read and written again in the
same form is the same pair (tested as a property); what a form cannot say is an InputError that names it. Answers of
several turns are refused: a pair is two answers to one prompt. Scores beside the answers are not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puyu.data.formats import Record, plain_text, refuse, text_field
from puyu.data.formats import form_named as conversation_form
from puyu.errors import ConfigError, InputError
from puyu.types import Conversation, Message, Preference, Role, metadata_of

ANSWERS = ("chosen", "rejected")
_OPENAI = ("preferred_output", "non_preferred_output")
_SHAREGPT, _ALPACA = conversation_form("sharegpt"), conversation_form("alpaca")


@dataclass(frozen=True, slots=True)
class PreferenceForm:
    """One form: whether a pair has it, and both directions."""

    name: str
    tells: Callable[[Record], bool]
    read: Callable[[Record], Preference]
    write: Callable[[Preference], dict[str, Any]]


def is_preference(record: object) -> bool:
    """Whether a record is a pair by its fields (of whatever form), not a conversation."""
    if not isinstance(record, Mapping):
        return False
    has_two = set(ANSWERS) <= record.keys() or set(_OPENAI) <= record.keys()
    return has_two or ("instruction" in record and isinstance(record.get("output"), list))


def form_of(record: Record) -> PreferenceForm:
    """The form of a pair, told by its fields; InputError names the one that is missing."""
    if not is_preference(record):
        names = _OPENAI if set(_OPENAI) & record.keys() else ANSWERS
        missing = next(name for name in names if name not in record)
        remedy = "fields: prompt, chosen, rejected, domain; see docs/data.md for other forms"
        raise InputError(f"a preference needs the field {missing!r}", remedy=remedy)
    return next(form for form in PREFERENCE_FORMS if form.tells(record))


def form_named(name: str) -> PreferenceForm:
    """The form of that name (XTuner's is TRL's); ConfigError for another."""
    for form in PREFERENCE_FORMS:
        if form.name == ("trl" if name == "xtuner" else name):
            return form
    names = ", ".join(form.name for form in PREFERENCE_FORMS)
    raise ConfigError(f"no form {name!r} for preference pairs", remedy=f"one of: {names}")


def preference_of(record: Record) -> Preference:
    """One pair in whatever form it is."""
    return form_of(record).read(record)


def _pair(prompt: Conversation, answers: Sequence[Message], record: Record) -> Preference:
    """Put together; the prompt gets the record's metadata."""
    if not prompt.messages:
        raise InputError("a preference needs a prompt, and here is no turn before the answers")
    for name, answer in zip(ANSWERS, answers, strict=True):
        if answer.role != "assistant":
            raise InputError(f"field {name!r} must be text or an assistant message, not the turn of the {answer.role}")
    domain = record.get("domain") or "default"
    prompt = Conversation(prompt.messages, prompt.tools, metadata_of(record))
    return Preference(prompt, answers[0], answers[1], str(domain), _margin(record))


def _margin(record: Record) -> float:
    value = record.get("margin") or 0.0
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise InputError(f"field 'margin' must be a number from 0, not {value!r}")
    return float(value)


def _record(pair: Preference, fields: Mapping[str, Any], form: str) -> dict[str, Any]:
    """The fields of a form, and what all of them may have; what no form can say is refused."""
    refuse(not pair.prompt.messages, "a pair without a prompt", form)
    refuse(any(answer.role != "assistant" for answer in (pair.chosen, pair.rejected)), "answers of others", form)
    refuse(not pair.domain, "an empty domain", form)
    more: dict[str, Any] = {} if pair.domain == "default" else {"domain": pair.domain}
    if pair.margin:
        more["margin"] = pair.margin
    if pair.prompt.metadata:
        more["metadata"] = dict(pair.prompt.metadata)
    return {**fields, **more}


def _with_tools(fields: dict[str, Any], pair: Preference) -> dict[str, Any]:
    tools = [tool.to_openai() for tool in pair.prompt.tools]
    return fields | ({"tools": tools} if tools else {})


# ---- TRL, XTuner, UltraFeedback


def _messages(value: Any, name: str) -> list[Message]:
    """Text is one turn; else messages in OpenAI's form. A prompt is the user's, an answer the assistant's."""
    role: Role = "user" if name == "prompt" else "assistant"
    if isinstance(value, str):
        return [Message(role, value)]
    found = [value] if isinstance(value, Mapping) and name != "prompt" else value
    if not isinstance(found, list) or not all(isinstance(turn, Mapping) for turn in found):
        what = "a list of messages" if name == "prompt" else "an assistant message"
        raise InputError(f"field {name!r} must be text or {what}")
    if not found:
        raise InputError(f"field {name!r} must hold exactly one message, or the dialogue with it; here is none")
    return [Message.from_openai({"role": role, **turn}) for turn in found]


def _read_trl(record: Record) -> Preference:
    dialogues = [_messages(record.get(name), name) for name in ANSWERS]
    prompt = _messages(record["prompt"], "prompt") if "prompt" in record else []
    if not prompt or any(len(dialogue) > 1 for dialogue in dialogues):
        prompt = _shared(dialogues, prompt)
    asked = Conversation.from_openai({"messages": [], "tools": record.get("tools")})
    return _pair(Conversation(tuple(prompt), asked.tools), [dialogue[-1] for dialogue in dialogues], record)


def _shared(dialogues: Sequence[list[Message]], prompt: list[Message]) -> list[Message]:
    """What stands before the last turn of both dialogues; a prompt that is given must stand in it."""
    first, second = (dialogue[:-1] for dialogue in dialogues)
    if first != second:
        raise InputError("chosen and rejected differ before their last turn: they are no answers to one prompt")
    if prompt and first != prompt and not (len(prompt) == 1 and prompt[0] in first):
        raise InputError("field 'prompt' is not what stands before the last turn of chosen and rejected")
    return first


def _write_trl(pair: Preference) -> dict[str, Any]:
    answers = {name: [getattr(pair, name).to_openai()] for name in ANSWERS}
    prompt = [message.to_openai() for message in pair.prompt.messages]
    return _record(pair, _with_tools({"prompt": prompt, **answers}, pair), "trl")


def _write_text(pair: Preference) -> dict[str, Any]:
    roles = [message.role for message in pair.prompt.messages]
    refuse(roles != ["user"], f"a prompt of the turns {', '.join(roles)}", "trl-text")
    texts = _texts(pair, "trl-text")
    return _record(pair, dict(zip(("prompt", *ANSWERS), texts, strict=True)), "trl-text")


def _texts(pair: Preference, form: str) -> list[str]:
    """The texts of all turns and of both answers, where there is nothing else."""
    refuse(bool(pair.prompt.tools), "tools", form)
    messages = [*pair.prompt.messages, pair.chosen, pair.rejected]
    refuse(any(message.tool_calls or message.tool_call_id for message in messages), "calls of tools", form)
    refuse(any(message.name for message in messages), "names of messages", form)
    return [plain_text(message, form) for message in messages]


def _write_implicit(pair: Preference) -> dict[str, Any]:
    prompt = [message.to_openai() for message in pair.prompt.messages]
    answers = {name: [*prompt, getattr(pair, name).to_openai()] for name in ANSWERS}
    return _record(pair, _with_tools(answers, pair), "trl-implicit")


# ---- Anthropic's HH

_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")
_HUMAN = {"user": "Human", "assistant": "Assistant"}


def _read_hh(record: Record) -> Preference:
    dialogues = [_spoken(text_field(record, name), name) for name in ANSWERS]
    return _pair(Conversation(tuple(_shared(dialogues, []))), [dialogue[-1] for dialogue in dialogues], record)


def _spoken(text: str, name: str) -> list[Message]:
    before, *turns = _SPEAKER.split(text)
    if before or not turns:
        raise InputError(f"field {name!r} must begin with two line ends and 'Human:'", remedy="or give a prompt")
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [Message("user" if speaker == "Human" else "assistant", said) for speaker, said in pairs]


def _write_hh(pair: Preference) -> dict[str, Any]:
    roles = [message.role for message in pair.prompt.messages]
    refuse(not set(roles) <= _HUMAN.keys(), f"a prompt of the turns {', '.join(roles)}", "hh")
    *asked, chosen, rejected = _texts(pair, "hh")
    refuse(any(_SPEAKER.search(text) for text in (*asked, chosen, rejected)), "a text that begins a turn", "hh")
    prompt = "".join(f"\n\n{_HUMAN[role]}: {text}" for role, text in zip(roles, asked, strict=True))
    answers = {"chosen": f"{prompt}\n\nAssistant: {chosen}", "rejected": f"{prompt}\n\nAssistant: {rejected}"}
    return _record(pair, answers, "hh")


# ---- LLaMA-Factory: ShareGPT and Alpaca


def _read_sharegpt(record: Record) -> Preference:
    found: list[Message] = []
    for name in ANSWERS:
        if not isinstance(turn := record.get(name), Mapping):
            raise InputError(f"field {name!r} must be one turn: an object with from and value")
        found += _SHAREGPT.read({"conversations": [turn]}).messages
    return _pair(_SHAREGPT.read(record), found, record)


def _write_sharegpt(pair: Preference) -> dict[str, Any]:
    fields = _SHAREGPT.write(Conversation(pair.prompt.messages, pair.prompt.tools))
    for name in ANSWERS:
        [fields[name]] = _SHAREGPT.write(Conversation((getattr(pair, name),)))["conversations"]
    return _record(pair, fields, "sharegpt")


def _read_alpaca(record: Record) -> Preference:
    answers = [record.get(name) for name in ANSWERS]
    if isinstance(record.get("output"), list) and not set(ANSWERS) <= record.keys():
        answers = record["output"]
        if len(answers) != 2:
            raise InputError(f"field 'output' must hold two answers, the better first, not {len(answers)}")
    found: list[tuple[Message, ...]] = []
    for name, answer in zip(ANSWERS, answers, strict=True):
        if not isinstance(answer, str):
            raise InputError(f"field {name!r} must be text, not {type(answer).__name__}")
        found.append(_ALPACA.read({**record, "output": answer}).messages)
    return _pair(Conversation(found[0][:-1]), [messages[-1] for messages in found], record)


def _write_alpaca(pair: Preference) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name in ANSWERS:
        whole = Conversation((*pair.prompt.messages, getattr(pair, name)), pair.prompt.tools)
        fields |= _ALPACA.write(whole)
        fields[name] = fields.pop("output")
    return _record(pair, fields, "alpaca")


# ---- OpenAI


def _read_openai(record: Record) -> Preference:
    asked = record.get("input")
    if not isinstance(asked, Mapping):
        raise InputError("field 'input' must be an object with messages")
    answers = []
    for name in _OPENAI:
        turns = _messages(record.get(name), name)
        if len(turns) != 1:
            raise InputError(f"field {name!r} must hold exactly one message, not {len(turns)}")
        answers += turns
    return _pair(Conversation.from_openai(asked), answers, record)


def _write_openai(pair: Preference) -> dict[str, Any]:
    asked = _with_tools({"messages": [message.to_openai() for message in pair.prompt.messages]}, pair)
    answers = {name: [getattr(pair, own).to_openai()] for name, own in zip(_OPENAI, ANSWERS, strict=True)}
    return _record(pair, {"input": asked, **answers}, "openai")


def _is_text(record: Record) -> bool:
    return all(isinstance(record[name], str) for name in ANSWERS)


PREFERENCE_FORMS = (
    PreferenceForm("openai", lambda record: _OPENAI[0] in record, _read_openai, _write_openai),
    PreferenceForm("sharegpt", lambda record: "conversations" in record, _read_sharegpt, _write_sharegpt),
    PreferenceForm("alpaca", lambda record: "instruction" in record, _read_alpaca, _write_alpaca),
    PreferenceForm(
        "trl-text",
        lambda record: isinstance(record.get("prompt"), str) and _is_text(record),
        _read_trl,
        _write_text,
    ),
    PreferenceForm("trl", lambda record: "prompt" in record, _read_trl, _write_trl),
    PreferenceForm("hh", lambda record: isinstance(record["chosen"], str), _read_hh, _write_hh),
    PreferenceForm("trl-implicit", lambda record: True, _read_trl, _write_implicit),
)
