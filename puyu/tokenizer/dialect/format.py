"""What a way to write conversations is: pieces out, a conversation back, and the normal form between the two.

A format writes a conversation as pieces: markers, which are ids and never text, and plain text. `read` takes such
pieces back. For every conversation that `pieces` accepts

    format.read(format.pieces(conversation)) == format.normalize(conversation)

and what cannot be expressed is an InputError that names the turn. A format knows no tokenizer.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from puyu.errors import InputError
from puyu.types import Conversation, Message, ToolCall, ToolSpec

to_json = json.JSONEncoder(ensure_ascii=False).encode
"""json.dumps with letters as they are."""
REMEDY = "change or remove the turn, or train with a tokenizer of another format"


class Piece(NamedTuple):
    """One marker, or plain text that is encoded by itself.

    `head`: so many characters at the beginning are the format's, not the assistant's, and are never trained on.
    """

    text: str
    marker: bool = False
    loss: bool = False
    head: int = 0


class ChatFormat(ABC):
    """One family's way to write a conversation. Values: frozen dataclasses, equal when they write the same."""

    @property
    @abstractmethod
    def markers(self) -> frozenset[str]:
        """Tokens that the vocabulary must have."""

    @abstractmethod
    def pieces(self, conversation: Conversation, *, prompt: bool = False) -> list[Piece]:
        """The conversation as it is written; with the generation prompt at the end. InputError names what cannot be."""

    @abstractmethod
    def normalize(self, conversation: Conversation) -> Conversation:
        """What is left of a conversation that was written and read again."""

    @abstractmethod
    def read(self, pieces: Sequence[Piece]) -> Conversation:
        """A written conversation; of each piece only `text` and `marker` count. InputError where it is torn."""

    @abstractmethod
    def answer(self, pieces: Sequence[Piece]) -> Message:
        """An assistant's turn, as a model writes it: between the generation prompt and the end of the turn."""

    @abstractmethod
    def spelled(self) -> tuple[str, ...]:
        """What it writes as plain text, and reads as more than text: whoever says so may be misread."""


def check_spelling(format: ChatFormat, conversation: Conversation, pieces: Sequence[Piece]) -> None:
    """InputError when what somebody said would be read as something else, because the format has no marker for it."""
    spelled = format.spelled()
    texts = [message.text for message in conversation.messages]
    if not any(name in text for name in spelled for text in texts):
        return
    found, wanted = format.read(pieces), format.normalize(conversation)
    if found == wanted:
        return
    pairs = zip(found.messages, wanted.messages, strict=False)
    index = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found.messages), len(wanted.messages)) - 1)
    names = ", ".join(repr(name) for name in spelled)
    problem = f"message {index} ({wanted.messages[index].role}) would be read as something else: it spells one of"
    raise InputError(f"{problem} {names}, which this format writes as plain text", remedy=REMEDY)


def text_of(message: Message, index: int) -> str:
    """The text of a turn; InputError for images, sound and text that is not Unicode."""
    if isinstance(message.content, str):
        text = message.content
    else:
        if kinds := sorted({part.kind for part in message.content} - {"text"}):
            raise InputError(f"message {index} ({message.role}): the format has no {' and no '.join(kinds)}")
        text = message.text
    return text if text.isascii() else unicode_of(text, f"message {index} ({message.role})")


def unicode_of(text: str, where: str) -> str:
    """The same text; InputError when it holds half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half a surrogate pair at character {error.start}") from error
    return text


def arguments_of(call: ToolCall, index: int) -> str:
    """The arguments of a call in one spelling: a JSON object, ', ' and ': ' between its parts, letters as they are."""
    try:
        text = to_json(call.parsed())
    except InputError as error:
        raise InputError(f"message {index}: {error.message}", remedy=REMEDY) from error
    return text if text.isascii() else unicode_of(text, f"message {index}: arguments of {call.name!r}")


def indented(value: Any, gap: str = "\n") -> str:
    """json.dumps(value, indent=4) with letters as they are."""
    inner = gap + "    "
    if isinstance(value, dict) and value:
        lines = [f"{to_json(str(key))}: {indented(item, inner)}" for key, item in value.items()]
        return f"{{{inner}{f',{inner}'.join(lines)}{gap}}}"
    if isinstance(value, list | tuple) and value:
        return f"[{inner}{f',{inner}'.join([indented(item, inner) for item in value])}{gap}]"
    return to_json(value)


def name_of(call: ToolCall, index: int) -> str:
    """A name that stands between quotes as it is; InputError for one that would end them."""
    if to_json(call.name) != f'"{call.name}"' or not call.name:
        raise InputError(f"message {index}: the format cannot write the name {call.name!r} of a call", remedy=REMEDY)
    return unicode_of(call.name, f"message {index}: name of a call")


def plain(message: Message, text: str, calls: Iterable[ToolCall] = ()) -> Message:
    """A turn without what no format keeps: ids, names, the borders of its parts."""
    return Message(message.role, text, tool_calls=tuple(calls))


def plain_call(call: ToolCall, index: int) -> ToolCall:
    """A call without its id, arguments in one spelling."""
    return ToolCall(name_of(call, index), arguments_of(call, index))


def plain_tools(tools: Sequence[ToolSpec]) -> tuple[ToolSpec, ...]:
    """Tools as JSON keeps them; empty parameters become a schema of an object without fields."""
    return tuple(ToolSpec.from_openai(json.loads(json.dumps(tool.to_openai()))) for tool in tools)


def read_tools(text: str) -> tuple[ToolSpec, ...]:
    """The tools in a JSON list; InputError where it is torn or holds something else."""
    try:
        return tuple(ToolSpec.from_openai(value) for value in json.loads(text))
    except (InputError, ValueError, RecursionError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"a written conversation has a torn list of tools: {error}") from error


def refuse_tools(conversation: Conversation, family: str) -> None:
    """InputError for tools, calls and results in a format that has none."""
    if conversation.tools:
        raise InputError(f"{family} has no place for tools", remedy="leave out the tools")
    for index, message in enumerate(conversation.messages):
        if message.role == "tool" or message.tool_calls:
            what = "the result of a tool" if message.role == "tool" else "a call of a tool"
            raise InputError(f"message {index} ({message.role}): {family} has no place for {what}", remedy=REMEDY)


def check_turns(conversation: Conversation) -> None:
    """InputError for a conversation without turns, and for calls that are not the assistant's."""
    if not conversation.messages:
        raise InputError("a conversation needs a message")
    for index, message in enumerate(conversation.messages):
        if message.tool_calls and message.role != "assistant":
            raise InputError(f"message {index} ({message.role}): only an assistant calls tools", remedy=REMEDY)


class Reader:
    """Walks over pieces; texts side by side are one."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces: list[Piece] = []
        for piece in pieces:
            if self._pieces and not piece.marker and not self._pieces[-1].marker:
                self._pieces[-1] = Piece(self._pieces[-1].text + piece.text)
            elif piece.text:
                self._pieces.append(Piece(piece.text, piece.marker))
        self._at = 0

    @property
    def more(self) -> bool:
        return self._at < len(self._pieces)

    def is_marker(self, name: str) -> bool:
        return self.more and self._pieces[self._at] == Piece(name, True)

    def marker(self, name: str) -> None:
        """Step over a marker; InputError when another piece stands there."""
        if not self.is_marker(name):
            found = self._pieces[self._at].text[:40] if self.more else "the end"
            raise InputError(f"a written conversation should have {name} where it has {found!r}")
        self._at += 1

    def text(self) -> str:
        """The text that stands here; "" before a marker."""
        if not self.more or self._pieces[self._at].marker:
            return ""
        self._at += 1
        return self._pieces[self._at - 1].text

    def until(self, name: str) -> list[Piece]:
        """Everything before a marker, and step over it; to the end where it is missing."""
        start = self._at
        while self.more and not self.is_marker(name):
            self._at += 1
        found = self._pieces[start : self._at]
        self._at += 1
        return found
