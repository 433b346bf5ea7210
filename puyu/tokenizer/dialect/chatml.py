r"""Plain ChatML: turns of a role and a text, and nothing else. Qwen 2 and many fine-tuned models.

    <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n
    <|im_start|>assistant\nHello!<|im_end|>\n

Header and text are encoded together, as whoever encodes the whole text at once does. Tools are refused: their place
in a plain turn is nobody's convention. Source: OpenAI's chatml.md, the template of Qwen 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from puyu.errors import InputError
from puyu.tokenizer.dialect.format import ChatFormat, Piece, Reader, check_turns, plain, refuse_tools, text_of
from puyu.types import ROLES, Conversation, Message, Role

START, END, END_TRAINED = Piece("<|im_start|>", True), Piece("<|im_end|>", True), Piece("<|im_end|>", True, True)
NEWLINE = Piece("\n")
ASSISTANT = "assistant\n"


@dataclass(frozen=True, slots=True)
class ChatML(ChatFormat):
    """`system`: the system turn of a conversation without one, or None; `bos`: the token before everything, or ""."""

    system: str | None = None
    bos: str = ""

    @property
    def markers(self) -> frozenset[str]:
        """Of turns, and the first token."""
        return frozenset({START.text, END.text} | ({self.bos} if self.bos else set()))

    def pieces(self, conversation: Conversation, *, prompt: bool = False) -> list[Piece]:
        """InputError for tools, calls, results, images and sound."""
        check_turns(conversation)
        refuse_tools(conversation, "plain ChatML")
        found = [Piece(self.bos, True)] if self.bos else []
        if self.system is not None and conversation.messages[0].role != "system":
            found += turn("system", self.system)
        for index, message in enumerate(conversation.messages):
            found += turn(message.role, text_of(message, index))
        return [*found, START, Piece(ASSISTANT)] if prompt else found

    def normalize(self, conversation: Conversation) -> Conversation:
        """Metadata and names are dropped, parts are joined to one text; the default system turn is spelled out."""
        messages = tuple(plain(message, text_of(message, i)) for i, message in enumerate(conversation.messages))
        return Conversation(with_system(messages, self.system))

    def read(self, pieces: Sequence[Piece]) -> Conversation:
        """The conversation; a turn without its end is read to the end."""
        messages = []
        for body in turns(pieces, self.bos):
            role, text = header(body)
            messages.append(Message(role, text))
        return Conversation(tuple(messages))

    def answer(self, pieces: Sequence[Piece]) -> Message:
        """All text; other markers are left out."""
        return Message("assistant", "".join(piece.text for piece in pieces if not piece.marker))

    def spelled(self) -> tuple[str, ...]:
        """Nothing: the ends of turns are markers."""
        return ()


def turn(role: str, text: str) -> tuple[Piece, ...]:
    """One turn; the assistant's is trained on, without its header."""
    if role == "assistant":
        return (START, Piece(f"{ASSISTANT}{text}", False, True, len(ASSISTANT)), END_TRAINED, NEWLINE)
    return (START, Piece(f"{role}\n{text}"), END, NEWLINE)


def with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """The default system turn before messages that have none."""
    if system is None or (messages and messages[0].role == "system"):
        return messages
    return (Message("system", system), *messages)


def turns(pieces: Sequence[Piece], bos: str) -> list[list[Piece]]:
    """What stands between the beginning and the end of each turn."""
    reader = Reader(pieces)
    if bos:
        reader.marker(bos)
    found = []
    while reader.more:
        reader.marker(START.text)
        found.append(reader.until(END.text))
        reader.text()
    return found


def header(body: Sequence[Piece]) -> tuple[Role, str]:
    """The role of a turn and the text behind its header, up to the first marker."""
    first = body[0].text if body and not body[0].marker else ""
    name, newline, text = first.partition("\n")
    role = next((role for role in ROLES if role == name), None)
    if role is None or not newline:
        raise InputError(f"a written conversation has a turn of {first[:40]!r}")
    return role, text
