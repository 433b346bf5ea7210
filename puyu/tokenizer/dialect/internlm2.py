r"""InternLM2's ChatML: markers for turns, for calls and for tools; nothing that a person writes can be one.

    <s><|im_start|>system\nYou are Puyu.<|im_end|>\n
    <|im_start|>system name=<|plugin|>\n[{"name": "calculator", ...}]<|im_end|>\n
    <|im_start|>user\n12*7=?<|im_end|>\n
    <|im_start|>assistant\n
    <|action_start|><|plugin|>\n{"name": "calculator", "parameters": {...}}<|action_end|><|im_end|>\n
    <|im_start|>environment name=<|plugin|>\n84<|im_end|>\n
    <|im_start|>assistant\n
    <|action_start|><|interpreter|>\n```python\nprint(12 * 7)\n```<|action_end|><|im_end|>\n
    <|im_start|>environment name=<|interpreter|>\n84<|im_end|>\n

A call of `interpreter` whose arguments are {"code": text} and no more is a block of code; all other calls are JSON. The
n-th result after a turn with calls is of its n-th call, and has that one's marker. Each piece between two markers is
encoded by itself, header and content apart. It expresses whatever has text only.
Source: InternLM2 technical report (arXiv 2403.17297), chat_format of the InternLM repository.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from puyu.errors import InputError
from puyu.tokenizer.dialect.calls import read_call
from puyu.tokenizer.dialect.format import (
    ChatFormat,
    Piece,
    Reader,
    plain,
    plain_tools,
    read_tools,
    text_of,
    to_json,
    unicode_of,
)
from puyu.types import Conversation, Message, Role, ToolCall, ToolSpec

INTERPRETER = "interpreter"  # the name of the tool that an <|interpreter|> block calls

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "environment"}
_READ: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "environment": "tool"}
_FENCE = re.compile(r"\s*```(?:python|py)?\n(.*?)\n?```\s*", re.DOTALL)

_BOS, _NEWLINE = Piece("<s>", True), Piece("\n")
_START, _END, _END_TRAINED = Piece("<|im_start|>", True), Piece("<|im_end|>", True), Piece("<|im_end|>", True, True)
_PLUGIN, _INTERPRETER = Piece("<|plugin|>", True), Piece("<|interpreter|>", True)
_ACTION, _ACTION_END = Piece("<|action_start|>", True), Piece("<|action_end|>", True)
_MARKERS = frozenset(piece.text for piece in (_BOS, _START, _END, _PLUGIN, _INTERPRETER, _ACTION, _ACTION_END))


@dataclass(frozen=True, slots=True)
class InternLM2(ChatFormat):
    """The only way to write it."""

    @property
    def markers(self) -> frozenset[str]:
        """Of the beginning, turns, calls and tools."""
        return _MARKERS

    def pieces(self, conversation: Conversation, *, prompt: bool = False) -> list[Piece]:
        """InputError for images, sound and text that is not Unicode; all else has its place."""
        found = [_BOS]
        messages = conversation.messages
        tools_after = 1 if messages and messages[0].role == "system" else 0
        asked: list[Piece] = []
        for index, message in enumerate(messages):
            if index == tools_after:
                found += _tool_turn(conversation.tools)
            found += _turn(message, index, asked.pop(0) if asked and message.role == "tool" else _PLUGIN)
            asked = [_kind(call) for call in message.tool_calls] or asked
        if len(messages) <= tools_after:
            found += _tool_turn(conversation.tools)
        return [*found, _START, Piece("assistant\n")] if prompt else found

    def normalize(self, conversation: Conversation) -> Conversation:
        """Metadata, names, ids of calls and of results are dropped; parts are joined to one text; arguments that are
        no text at all are `{}`, those with the code of `interpreter` are in one spelling; tools are as JSON keeps
        them. Torn arguments stay as they are, except where they close their object early and go on with more fields:
        then they are what `parse` makes of them."""
        messages = []
        for index, message in enumerate(conversation.messages):
            calls = [_read_block([_kind(call), Piece(_body(call, index))]) for call in message.tool_calls]
            messages.append(plain(message, text_of(message, index), calls))
        return Conversation(tuple(messages), plain_tools(conversation.tools))

    def read(self, pieces: Sequence[Piece]) -> Conversation:
        """The conversation; a turn without its end is read to the end."""
        reader = Reader(pieces)
        reader.marker(_BOS.text)
        messages: list[Message] = []
        tools: tuple[ToolSpec, ...] = ()
        while reader.more:
            reader.marker(_START.text)
            turn = reader.until(_END.text)
            reader.text()
            if turn[:2] == [Piece("system name="), _PLUGIN]:
                tools = read_tools("".join(piece.text for piece in turn[2:]))
            else:
                messages.append(_read_turn(turn))
        return Conversation(tuple(messages), tools)

    def answer(self, pieces: Sequence[Piece]) -> Message:
        """Text and calls. A block without its end counts as a call, so that the caller can show the model its torn
        JSON; an <|interpreter|> block is a call of `interpreter` with `{"code": ...}`."""
        reader = Reader(pieces)
        text: list[str] = []
        calls: list[ToolCall] = []
        while reader.more:
            text += [piece.text for piece in reader.until("<|action_start|>") if not piece.marker]
            if block := reader.until("<|action_end|>"):
                calls.append(_read_block(block))
        return Message("assistant", "".join(text), tool_calls=tuple(calls))

    def spelled(self) -> tuple[str, ...]:
        """Nothing: everything that counts is a marker."""
        return ()


def _tool_turn(tools: Sequence[ToolSpec]) -> Iterator[Piece]:
    if tools:
        specs = [{"name": t.name, "description": t.description, "parameters": dict(t.parameters)} for t in tools]
        text = unicode_of(to_json(specs), "tools")
        yield from (_START, Piece("system name="), _PLUGIN, Piece("\n"), Piece(text), _END, _NEWLINE)


def _turn(message: Message, index: int, kind: Piece) -> list[Piece]:
    """`kind`: the marker of the block that a tool's result answers."""
    role, trained = _ROLES[message.role], message.role == "assistant"
    header = [Piece(f"{role} name="), kind, _NEWLINE] if message.role == "tool" else [Piece(f"{role}\n")]
    found = [_START, *header, Piece(text_of(message, index), loss=trained)]
    for call in message.tool_calls:
        block = (_ACTION, _kind(call), Piece(_body(call, index)), _ACTION_END)
        found += (Piece(piece.text, piece.marker, trained) for piece in block)
    return [*found, _END_TRAINED if trained else _END, _NEWLINE]


def _kind(call: ToolCall) -> Piece:
    return _PLUGIN if _code_of(call) is None else _INTERPRETER


def _code_of(call: ToolCall) -> str | None:
    """The code that a call of the interpreter runs; None for other calls, and for what is no text to run."""
    if call.name != INTERPRETER:
        return None
    try:
        arguments = call.parsed()
    except InputError:
        return None
    code = arguments.get("code")
    if len(arguments) != 1 or not isinstance(code, str):
        return None
    # half a surrogate pair, which JSON can spell and a block of code cannot
    return None if any("\ud800" <= letter <= "\udfff" for letter in code) else code


def _body(call: ToolCall, index: int) -> str:
    code = _code_of(call)
    if code is not None:
        return f"\n```python\n{code}\n```"
    name = to_json(call.name)
    body = f'\n{{"name": {name}, "parameters": {call.arguments or "{}"}}}'
    return body if body.isascii() else unicode_of(body, f"message {index}: call of {call.name!r}")


def _read_turn(turn: list[Piece]) -> Message:
    first = turn[0].text if turn and not turn[0].marker else ""
    header, newline, text = first.partition("\n")
    rest = turn[1:]
    if header == "environment name=" and rest[:1] in ([_PLUGIN], [_INTERPRETER]):
        header = "environment"
        newline, text = "\n", rest[1].text[1:] if len(rest) > 1 else ""
        rest = rest[2:]
    if header not in _READ or not newline:
        raise InputError(f"a written conversation has a turn of {first[:40]!r}")
    read = InternLM2().answer([Piece(text), *rest])
    return Message(_READ[header], read.text, tool_calls=read.tool_calls)


def _read_block(block: list[Piece]) -> ToolCall:
    kind, body = block[0] if block else Piece(""), "".join(piece.text for piece in block if not piece.marker)
    if kind == _INTERPRETER:
        fenced = _FENCE.fullmatch(body)
        code = fenced[1] if fenced else body.strip("\n")
        return ToolCall(INTERPRETER, json.dumps({"code": code}, ensure_ascii=False))
    return read_call(body)
