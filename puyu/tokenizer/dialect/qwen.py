r"""Qwen 2.5 and 3: ChatML with tools in the system turn, calls between markers, results in a turn of the user.

    <|im_start|>assistant\n<think>\nreasoning\n</think>\n\nanswer\n
    <tool_call>\n{"name": "f", "arguments": {...}}\n</tool_call><|im_end|>\n
    <|im_start|>user\n<tool_response>\n84\n</tool_response><|im_end|>\n

Qwen 3 keeps the reasoning of the answers after the last question only, and sets an empty block before a last answer
without reasoning. The block that it sets is not trained on, nor is an answer whose reasoning it leaves out: that is
not what the assistant wrote. Source: the chat templates of Qwen2.5-Instruct and Qwen3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from puyu.tokenizer.dialect.calls import read_call
from puyu.tokenizer.dialect.chatml import (
    ASSISTANT,
    END,
    END_TRAINED,
    NEWLINE,
    START,
    header,
    turn,
    turns,
    with_system,
)
from puyu.tokenizer.dialect.format import (
    ChatFormat,
    Piece,
    Reader,
    arguments_of,
    check_spelling,
    check_turns,
    name_of,
    plain,
    plain_call,
    plain_tools,
    read_tools,
    text_of,
    to_json,
    unicode_of,
)
from puyu.types import Conversation, Message, ToolSpec

_CALL, _CALL_END = Piece("<tool_call>", True), Piece("</tool_call>", True)
_RESULT, _RESULT_END = "<tool_response>", "</tool_response>"
_THINK, _THINK_END = "<think>", "</think>"
_BEFORE_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_AFTER_TOOLS = "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
_HOW_TO_CALL = (
    *(_CALL, _CALL_END, Piece(" XML tags:\n"), _CALL),
    *(Piece('\n{"name": <function-name>, "arguments": <args-json-object>}\n'), _CALL_END),
)


@dataclass(frozen=True, slots=True)
class Qwen(ChatFormat):
    """`system`: the system turn of a conversation without one (2.5), or None (3). `thinking`: reasoning is told from
    the answer. `result_markers`: <tool_response> is a token (3), not plain text (2.5). `opening`: what the generation
    prompt adds to the assistant's header."""

    system: str | None = None
    thinking: bool = False
    result_markers: bool = False
    opening: str = ""

    @property
    def markers(self) -> frozenset[str]:
        """Of turns and calls; of results and reasoning where they have some."""
        optional = (_RESULT, _RESULT_END) * self.result_markers + (_THINK, _THINK_END) * self.thinking
        return frozenset({START.text, END.text, _CALL.text, _CALL_END.text, *optional})

    def pieces(self, conversation: Conversation, *, prompt: bool = False) -> list[Piece]:
        """InputError for images and sound, for arguments that are no JSON object, names with quotes, and where
        <tool_response> is plain text for whoever spells it so that it would be read as a result."""
        check_turns(conversation)
        messages = conversation.messages
        found = list(self._system_turn(conversation))
        kept = _first_kept(messages)
        for index, message in enumerate(messages):
            if message.role == "assistant":
                found += self._assistant(message, index, is_kept=index > kept, is_last=index == len(messages) - 1)
            elif message.role != "tool":
                found += turn(message.role, text_of(message, index)) if index or message.role != "system" else ()
            elif index == 0 or messages[index - 1].role != "tool":
                found += self._results(messages, index)
        check_spelling(self, conversation, found)
        return [*found, START, *self._opening()] if prompt else found

    def _opening(self) -> list[Piece]:
        if self.opening.startswith(_THINK):
            return [Piece(ASSISTANT), Piece(_THINK, True), Piece(self.opening.removeprefix(_THINK))]
        return [Piece(ASSISTANT + self.opening)]

    def _system_turn(self, conversation: Conversation) -> Iterator[Piece]:
        first = conversation.messages[0]
        text = text_of(first, 0) if first.role == "system" else self.system
        if not conversation.tools:
            yield from turn("system", text) if text is not None else ()
            return
        lines = "".join("\n" + to_json(tool.to_openai()) for tool in conversation.tools)
        before = "" if text is None else text + "\n\n"
        yield START
        yield Piece(f"system\n{before}{_BEFORE_TOOLS}{unicode_of(lines, 'tools')}{_AFTER_TOOLS}")
        yield from (*_HOW_TO_CALL, END, NEWLINE)

    def _assistant(self, message: Message, index: int, *, is_kept: bool, is_last: bool) -> list[Piece]:
        reasoning, content = self._told_apart(text_of(message, index))
        calls = message.tool_calls
        border = "\n" if content and calls else ""
        loss = True
        found = [START]
        if self.thinking and is_kept and (reasoning or is_last):
            loss = bool(reasoning)
            found += (Piece(ASSISTANT), Piece(_THINK, True, loss), Piece(f"\n{reasoning}\n", False, loss))
            text = "\n\n" + content.lstrip("\n") + border
            found += (Piece(_THINK_END, True, loss), Piece(text, False, True, 0 if loss else 2))
            loss = True
        else:
            loss = not reasoning
            found.append(Piece(ASSISTANT + content + border, False, loss, len(ASSISTANT)))
        for number, call in enumerate(calls):
            body = f'\n{{"name": "{name_of(call, index)}", "arguments": {arguments_of(call, index)}}}\n'
            found += (NEWLINE._replace(loss=loss),) if number else ()
            found += (_CALL._replace(loss=loss), Piece(body, False, loss), _CALL_END._replace(loss=loss))
        return [*found, END_TRAINED if loss else END, NEWLINE]

    def _told_apart(self, text: str) -> tuple[str, str]:
        """Reasoning and answer, as Qwen 3's template finds them."""
        if not self.thinking or _THINK_END not in text:
            return "", text
        reasoning = text.split(_THINK_END)[0].rstrip("\n").split(_THINK)[-1].strip("\n")
        return reasoning, text.split(_THINK_END)[-1].lstrip("\n")

    def _results(self, messages: Sequence[Message], start: int) -> list[Piece]:
        """Results that follow each other are one turn."""
        texts = []
        for index in range(start, len(messages)):
            if messages[index].role != "tool":
                break
            texts.append(text_of(messages[index], index))
        if not self.result_markers:
            body = "\n".join(f"{_RESULT}\n{text}\n{_RESULT_END}" for text in texts)
            return [START, Piece(f"user\n{body}"), END, NEWLINE]
        found = [START]
        for number, text in enumerate(texts):
            found += (Piece("\n" if number else "user\n"), Piece(_RESULT, True), Piece(f"\n{text}\n"))
            found.append(Piece(_RESULT_END, True))
        return [*found, END, NEWLINE]

    def normalize(self, conversation: Conversation) -> Conversation:
        """Metadata, names, ids of calls and of results are dropped; parts are joined to one text; arguments are spelled
        in one way; tools are as JSON keeps them; the default system turn is spelled out. With `thinking`, a kept
        reasoning is `<think>\\nreasoning\\n</think>\\n\\n` before the answer, without line breaks at its ends and at
        the answer's beginning; reasoning that is empty or stands before the last question is dropped."""
        messages, kept = [], _first_kept(conversation.messages)
        last = len(conversation.messages) - 1
        for index, message in enumerate(conversation.messages):
            text = text_of(message, index)
            if message.role == "assistant":
                text = self._normal_text(message, text, is_kept=index > kept, is_last=index == last)
            messages.append(plain(message, text, [plain_call(call, index) for call in message.tool_calls]))
        return Conversation(with_system(tuple(messages), self.system), plain_tools(conversation.tools))

    def _normal_text(self, message: Message, text: str, *, is_kept: bool, is_last: bool) -> str:
        reasoning, content = self._told_apart(text)
        if not self.thinking or not is_kept or not (reasoning or is_last):
            return content
        answer = content.lstrip("\n") or ("\n" if content and message.tool_calls else "")
        return f"{_THINK}\n{reasoning}\n{_THINK_END}\n\n{answer}" if reasoning else answer

    def read(self, pieces: Sequence[Piece]) -> Conversation:
        """The conversation; a turn without its end is read to the end."""
        messages: list[Message] = []
        tools: tuple[ToolSpec, ...] = ()
        for body in turns(pieces, ""):
            role, text = header(body)
            if role == "assistant":
                messages.append(self.answer([Piece(text), *body[1:]]))
            elif tuple(body[1:]) == _HOW_TO_CALL and text.endswith(_AFTER_TOOLS):
                before, _, lines = text.removesuffix(_AFTER_TOOLS).rpartition(_BEFORE_TOOLS)
                listed = ",".join(lines.split("\n")[1:])
                tools = read_tools(f"[{listed}]")
                messages += [Message("system", before.removesuffix("\n\n"))] if before else []
            elif role == "user":
                results = _marked_results(body) if self.result_markers else _plain_results(text)
                messages += [Message("tool", result) for result in results] or [Message("user", text)]
            else:
                messages.append(Message(role, text))
        return Conversation(tuple(messages), tools)

    def answer(self, pieces: Sequence[Piece]) -> Message:
        """Text, with its reasoning, and calls; a call without its end counts, so that its torn JSON can be shown."""
        reader = Reader(pieces)
        told = reader.until(_CALL.text)
        reasoning, text = "", "".join(piece.text for piece in told if not piece.marker)
        if (end := next((at for at, piece in enumerate(told) if piece == Piece(_THINK_END, True)), None)) is not None:
            reasoning = "".join(piece.text for piece in told[:end] if not piece.marker).strip("\n")
            text = "".join(piece.text for piece in told[end + 1 :] if not piece.marker).removeprefix("\n\n")
        calls = []
        if reader.more:
            text = text[:-1] or text if text.endswith("\n") else text
        while reader.more:
            body = "".join(piece.text for piece in reader.until(_CALL_END.text) if not piece.marker)
            calls.append(read_call(body))
            reader.until(_CALL.text)
        content = f"{_THINK}\n{reasoning}\n{_THINK_END}\n\n{text}" if reasoning else text
        return Message("assistant", content, tool_calls=tuple(calls))

    def spelled(self) -> tuple[str, ...]:
        """The border of results where it is no token."""
        return () if self.result_markers else ("tool_response>",)


def _first_kept(messages: Sequence[Message]) -> int:
    """The index of the last question: answers after it keep their reasoning."""
    questions = [index for index, message in enumerate(messages) if message.role == "user"]
    return questions[-1] if questions else len(messages) - 1


def _marked_results(body: Sequence[Piece]) -> list[str]:
    """The results between markers in a turn of the user; none where it is the user's own."""
    reader, found = Reader(body[1:]), []
    while reader.more:
        reader.marker(_RESULT)
        found.append(reader.text()[1:-1])
        reader.marker(_RESULT_END)
        reader.text()
    return found


def _plain_results(text: str) -> list[str]:
    """The same where nothing marks them but their spelling."""
    if not text.startswith(f"{_RESULT}\n") or not text.endswith(f"\n{_RESULT_END}"):
        return []
    return text[len(_RESULT) + 1 : -len(_RESULT_END) - 1].split(f"\n{_RESULT_END}\n{_RESULT}\n")
