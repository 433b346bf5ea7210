r"""Llama 3 and 3.1 to 3.3: a header of its own for each turn; a call is a turn of JSON and nothing else.

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>
    <|start_header_id|>assistant<|end_header_id|>\n\n{"name": "f", "parameters": {...}}<|eot_id|>
    <|start_header_id|>ipython<|end_header_id|>\n\n"84"<|eot_id|>

From 3.1 on a system turn with a date always stands first, tools stand in the first turn of the user, and results are
JSON texts. White space at the ends of what people and assistants say is cut. Its own tools (<|python_tag|>) are not
written. Source: the chat templates of Meta-Llama-3-8B-Instruct and Llama-3.1-8B-Instruct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from puyu.errors import InputError
from puyu.tokenizer.dialect.calls import json_or_none, read_call
from puyu.tokenizer.dialect.format import (
    REMEDY,
    ChatFormat,
    Piece,
    Reader,
    arguments_of,
    check_spelling,
    check_turns,
    indented,
    name_of,
    plain,
    plain_call,
    plain_tools,
    refuse_tools,
    text_of,
    to_json,
    unicode_of,
)
from puyu.types import ROLES, Conversation, Message, Role, ToolSpec

DATE = "26 Jul 2024"
"""What templates say where no date is given. Training takes it instead of the day's, so that it can be repeated."""

_START, _HEADER_END = Piece("<|start_header_id|>", True), Piece("<|end_header_id|>", True)
_END, _END_TRAINED = Piece("<|eot_id|>", True), Piece("<|eot_id|>", True, True)
_GAP = "\n\n"
_ENVIRONMENT = "Environment: ipython\n"
_BEFORE_TOOLS = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument '
    "name and its value}.Do not use variables.\n\n"
)
_TOOL = '{\n    "type": "function",'
_CALL = '{"name": "'


@dataclass(frozen=True, slots=True)
class Llama3(ChatFormat):
    """`bos`: the token before everything. `date`: that of the system turn from 3.1 on; None is Llama 3, which has
    neither such a turn nor tools."""

    bos: str = "<|begin_of_text|>"
    date: str | None = None

    @property
    def markers(self) -> frozenset[str]:
        """Of turns, and the first token."""
        return frozenset({_START.text, _HEADER_END.text, _END.text} | ({self.bos} if self.bos else set()))

    def pieces(self, conversation: Conversation, *, prompt: bool = False) -> list[Piece]:
        """InputError for images and sound; several calls in a turn; a call beside text; arguments that are no JSON
        object; names with quotes; tools without a user's turn to stand in; answers that would be read as calls. Llama 3
        itself: for all tools."""
        check_turns(conversation)
        if self.date is None:
            refuse_tools(conversation, "Llama 3")
        messages, found, at = conversation.messages, [Piece(self.bos, True)] if self.bos else [], 0
        if self.date is not None:
            at = 1 if messages[0].role == "system" else 0
            found += _turn("system", self._before(conversation) + (text_of(messages[0], 0).strip() if at else ""))
        before_user = _tools_text(conversation, at)
        for index in range(at, len(messages)):
            found += _written(messages[index], index, before=before_user if index == at else "")
        if self.date is not None:
            check_spelling(self, conversation, found)
        return [*found, _START, Piece("assistant"), _HEADER_END, Piece(_GAP)] if prompt else found

    def _before(self, conversation: Conversation) -> str:
        environment = _ENVIRONMENT if conversation.tools else ""
        return f"{environment}Cutting Knowledge Date: December 2023\nToday Date: {self.date}\n\n"

    def normalize(self, conversation: Conversation) -> Conversation:
        """Metadata, names, ids of calls and of results are dropped; parts are joined to one text; white space is cut
        from both ends of a text, except a result's; arguments are spelled in one way; tools are as JSON keeps them;
        from 3.1 on, an empty system turn at the beginning is dropped."""
        messages = []
        for index, message in enumerate(conversation.messages):
            text = text_of(message, index)
            calls = [plain_call(call, index) for call in message.tool_calls]
            messages.append(plain(message, text if message.role == "tool" else text.strip(), calls))
        if self.date is not None and messages and messages[0] == Message("system", ""):
            messages = messages[1:]
        return Conversation(tuple(messages), plain_tools(conversation.tools))

    def read(self, pieces: Sequence[Piece]) -> Conversation:
        """The conversation; a turn without its end is read to the end."""
        reader = Reader(pieces)
        if self.bos:
            reader.marker(self.bos)
        messages: list[Message] = []
        tools: tuple[ToolSpec, ...] = ()
        first = True
        while reader.more:
            role, text = _read_turn(reader)
            if first and self.date is not None:
                text = text.removeprefix(_ENVIRONMENT).partition("\nToday Date: ")[2].partition(_GAP)[2]
                messages += [Message("system", text)] if text else []
            elif role == "user" and not tools and text.startswith(_BEFORE_TOOLS) and self.date is not None:
                tools, text = _read_tools(text)
                messages.append(Message("user", text))
            else:
                messages.append(self.answer([Piece(text)]) if role == "assistant" else Message(role, text))
            first = False
        return Conversation(tuple(messages), tools)

    def answer(self, pieces: Sequence[Piece]) -> Message:
        """One call, where the answer is the JSON of one; else text."""
        text = "".join(piece.text for piece in pieces if not piece.marker)
        if self.date is not None and text.startswith(_CALL):
            value = json_or_none(text)
            if isinstance(value, dict) and set(value) == {"name", "parameters"}:
                return Message("assistant", "", tool_calls=(read_call(text),))
        return Message("assistant", text)

    def spelled(self) -> tuple[str, ...]:
        """The beginning of a call, and tools."""
        return (_CALL, _BEFORE_TOOLS[:40], _TOOL) if self.date is not None else ()


def _turn(role: str, text: str, *, loss: bool = False) -> tuple[Piece, ...]:
    body = Piece(_GAP + text, False, loss, len(_GAP) if loss else 0)
    return (_START, Piece(role), _HEADER_END, body, _END_TRAINED if loss else _END)


def _written(message: Message, index: int, *, before: str) -> tuple[Piece, ...]:
    text = text_of(message, index)
    if message.role == "tool":
        return _turn("ipython", to_json(text))
    if not message.tool_calls:
        return _turn(message.role, before + text.strip(), loss=message.role == "assistant")
    if len(message.tool_calls) != 1:
        raise InputError(f"message {index} (assistant): Llama 3.1 has one call in a turn, not several", remedy=REMEDY)
    if text.strip():
        problem = f"message {index} (assistant): Llama 3.1 has no place for text beside a call"
        raise InputError(problem, remedy="say it in a turn of its own, or leave it out")
    call = message.tool_calls[0]
    body = f'{_CALL}{name_of(call, index)}", "parameters": {arguments_of(call, index)}}}'
    return _turn("assistant", body, loss=True)


def _tools_text(conversation: Conversation, at: int) -> str:
    if not conversation.tools:
        return ""
    if at >= len(conversation.messages) or conversation.messages[at].role != "user":
        problem = "Llama 3.1 writes tools into the first turn after the system's, which must be the user's"
        raise InputError(problem, remedy="let the conversation begin with a question")
    specs = (indented(tool.to_openai()) + _GAP for tool in conversation.tools)
    return _BEFORE_TOOLS + unicode_of("".join(specs), "tools")


def _read_turn(reader: Reader) -> tuple[Role, str]:
    reader.marker(_START.text)
    name = reader.text()
    reader.marker(_HEADER_END.text)
    text = "".join(piece.text for piece in reader.until(_END.text) if not piece.marker)
    if name == "ipython":
        result = json_or_none(text.removeprefix(_GAP))
        return "tool", result if isinstance(result, str) else text.removeprefix(_GAP)
    role = next((role for role in ROLES if role == name), None)
    if role is None or not text.startswith(_GAP):
        raise InputError(f"a written conversation has a turn of {name[:40]!r}")
    return role, text.removeprefix(_GAP)


def _read_tools(text: str) -> tuple[tuple[ToolSpec, ...], str]:
    """Tools at the beginning of the user's turn, and what the user says after them."""
    rest, tools = text.removeprefix(_BEFORE_TOOLS), []
    while rest.startswith(_TOOL):
        end = rest.find("\n}" + _GAP)
        value = json_or_none(rest[: end + 2]) if end >= 0 else None
        if not isinstance(value, dict) or not isinstance(value.get("function"), dict):
            break
        tools.append(ToolSpec.from_openai(value))
        rest = rest[end + 2 + len(_GAP) :]
    return (tuple(tools), rest) if tools else ((), text)
