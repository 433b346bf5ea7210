"""ReAct for a model whose chat template knows no tools: the prompt that explains the form, and the reader of answers.

    Thought: I should add.
    Action: calculator
    Action Input: {"expression": "1+1"}

A label counts only at the start of a line and outside fenced code, as in puyu.agent.react, which speaks the same form
with a model from outside. After Yao et al. 2022 (arXiv 2210.03629).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from puyu.engine.calls.body import Nesting, whole_arguments
from puyu.engine.calls.reader import SPACE, CallReader
from puyu.types import Message, ToolSpec

STOP = "Observation:"

_LABELS = ("thought", "action input", "action", "observation", "final answer")
_COLONS = ":\uff1a"
_LONGEST = 80  # characters of a line, indented or not, in which a label must end
_RUN = re.compile(r"\n|`|[^\n`]+")
_FENCE = re.compile(r"```\w*\n?(.*?)```", re.DOTALL)


class ReactReader(CallReader):
    """Thoughts and final answers are text without their labels; an action is a call; an observation, which only the
    tool may give, ends the answer. Space before a call belongs to neither."""

    def __init__(self, *, several: bool = True) -> None:
        super().__init__(several=several)
        self._line = ""  # the beginning of a line that may turn out to be a label
        self._is_line_start = True
        self._is_fenced = False
        self._num_ticks = 0
        self._section = self._in_text
        self._space = ""  # may turn out to stand before a call
        self._is_final = False  # the final answer has begun, in which an action is text
        self._is_labeled = False  # the section's text has not begun after its label
        self._follows_call = False
        self._held: list[str] = []  # a label and what follows it, or arguments that are no object
        self._nesting = Nesting()

    def _read(self, text: str, at: int) -> int:
        """Lines: labels go to `_label`, everything else to the section."""
        if self._is_line_start and not self._is_fenced:
            return self._read_start(text, at)
        run = _RUN.match(text, at)
        assert run is not None, "neither a line break, nor a tick, nor anything else"
        self._num_ticks = self._num_ticks + 1 if run[0] == "`" else 0
        if self._num_ticks == 3:
            self._is_fenced, self._num_ticks = not self._is_fenced, 0
        self._is_line_start = run[0] == "\n"
        self._section(run[0])
        return run.end()

    def _read_start(self, text: str, at: int) -> int:
        line = self._line + text[at]
        word = line.strip(" \t").lower()
        if text[at] in _COLONS and word[:-1].rstrip(" \t") in _LABELS:
            self._line, self._is_line_start = "", False
            self._label(word[:-1].rstrip(" \t"), line)
        elif _may_become_label(line):
            self._line = line
        else:
            self._is_line_start = False
            self._flush_line()
            return at
        return at + 1

    def _flush_line(self) -> None:
        line, self._line = self._line, ""
        if line:
            self._section(line)

    def _label(self, label: str, line: str) -> None:
        if self._is_final and label != "observation":
            self._in_text(line)
            return
        follows_name = self._section == self._after_name
        if label == "action input" and follows_name:
            self._held, self._nesting, self._section = [], Nesting(), self._in_input
            self._space = ""
            return
        self._end_section()
        if label == "observation":
            self._out.stop()
        elif label == "action":
            self._held, self._section = [line], self._in_name
        elif label == "action input":
            self._say(line)
        else:
            self._is_labeled, self._is_final = True, label == "final answer"

    def _in_text(self, piece: str) -> None:
        if self._is_labeled:
            piece = piece.lstrip(SPACE)
            self._is_labeled = not piece
        core = piece.rstrip(SPACE)
        if core:
            self._say(core)
        self._space += piece[len(core) :]

    def _in_name(self, piece: str) -> None:
        self._held = [self._held[0], self._name_text() + piece]
        if piece == "\n" and self._name():
            self._begin()

    def _after_name(self, piece: str) -> None:
        if piece.strip(SPACE):
            self._end_section()
            self._in_text(piece)
        else:
            self._space += piece

    def _in_input(self, piece: str) -> None:
        if self._nesting.depth == 0:
            piece = piece if self._held else piece.lstrip(SPACE)
            if self._held or not piece.startswith("{"):
                self._held += [piece] if piece else []
                return
        at = 0
        while at < len(piece):
            at += len(self._nesting.take(piece, at))
            if self._nesting.depth == 0:
                self._out.arguments(piece[:at])
                self._end_call()
                self._in_text(piece[at:])
                return
        self._out.arguments(piece)

    def _name(self) -> str:
        return self._name_text().strip().strip("`\"' ")

    def _name_text(self) -> str:
        return "".join(self._held[1:])

    def _begin(self) -> None:
        self._out.begin(self._name())
        self._space, self._section = "", self._after_name

    def _end_section(self) -> None:
        """A call that is open is over; an action without a name is text."""
        if self._section == self._in_name and self._name():
            self._begin()
        if self._section == self._after_name:
            self._out.arguments("{}")
            self._end_call()
        elif self._section == self._in_input:
            if self._nesting.depth == 0:
                self._out.arguments(whole_arguments(_unfenced("".join(self._held))))
            self._end_call()
        elif self._section == self._in_name:
            self._section = self._in_text
            self._in_text("".join(self._held))

    def _end_call(self) -> None:
        self._out.end()
        self._section, self._follows_call = self._in_text, True
        self._is_labeled = self._is_fenced = False

    def _end(self) -> None:
        self._flush_line()
        self._end_section()
        if not self._follows_call:
            self._say("")

    def _say(self, text: str) -> None:
        self._out.text(self._space + text)
        self._space, self._follows_call = "", False


def _may_become_label(line: str) -> bool:
    word = line.lstrip(" \t").lower()
    return len(line) <= _LONGEST and any(
        label.startswith(word) or (word.startswith(label) and word.rstrip(" \t") == label) for label in _LABELS
    )


def _unfenced(written: str) -> str:
    fence = _FENCE.fullmatch(written.strip())
    return (fence[1] if fence else written).strip()


def react_messages(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> tuple[Message, ...]:
    """The same conversation for a template without tools: they are explained in the system message, calls are
    written out, and what they returned comes as a user's turn (joined with the one after it)."""
    turns: list[Message] = []
    observed = False
    for message in messages:
        turn = _as_text(message, has_tools=bool(tools))
        if observed and turn.role == "user":
            turns[-1] = replace(turns[-1], content=f"{turns[-1].text}\n{turn.text}")
        else:
            turns.append(turn)
        observed = message.role == "tool" or (observed and turn.role == "user")
    if not tools:
        return tuple(turns)
    if turns and turns[0].role == "system":
        first, rest = f"{turns[0].text}\n\n{_instructions(tools)}", turns[1:]
    else:
        first, rest = _instructions(tools), turns
    return (Message("system", first), *rest)


def _as_text(message: Message, *, has_tools: bool) -> Message:
    if message.role == "tool":
        return Message("user", f"{STOP} {message.text}")
    if message.role != "assistant" or not (message.tool_calls or has_tools):
        return message
    if not message.tool_calls:
        return Message("assistant", f"Final Answer: {message.text}")
    calls = [f"Action: {call.name}\nAction Input: {call.arguments or '{}'}" for call in message.tool_calls]
    thought = [f"Thought: {message.text}"] if message.text else []
    return Message("assistant", "\n".join([*thought, *calls]))


def _instructions(tools: Sequence[ToolSpec]) -> str:
    listed = [
        json.dumps({"name": t.name, "description": t.description, "parameters": dict(t.parameters)}, ensure_ascii=False)
        for t in tools
    ]
    lines = [
        "You may call these tools, given as JSON with the JSON Schema of their parameters:",
        *listed,
        "",
        "To call one, write these lines and then stop:",
        "Thought: why you call it",
        f"Action: its name, one of {', '.join(tool.name for tool in tools)}",
        "Action Input: its arguments, a JSON object on one line",
        f"The next turn then begins with '{STOP}' and brings the result. Call as many as you need, one after another.",
        "When you know the answer, or need no tool, write:",
        "Final Answer: the answer",
    ]
    return "\n".join(lines)
