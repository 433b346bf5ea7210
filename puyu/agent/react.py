"""ReAct as text, for models without native tool calls: Thought, Action, Action Input, Observation, Final Answer.

    >>> read_turn("Thought: add\\nAction: calculator\\nAction Input: {\\"expression\\": \\"1+1\\"}").calls[0].name
    'calculator'

After Yao et al. 2022 (arXiv 2210.03629). The model is stopped before `Observation:`, so that it cannot invent one.
A marker counts only at the start of a line and outside fenced code. A turn that has neither an action nor a final
answer is not guessed at: it gets a note that says which form is wanted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from puyu.agent.step import Step
from puyu.types import Message, ToolCall, ToolSpec

STOP = "Observation:"
NOTE = (
    "That turn has neither an action nor a final answer. Write either\n"
    "Action: a tool's name\nAction Input: its arguments as a JSON object\nor\nFinal Answer: the answer"
)
_MARKER = re.compile(
    r"^[ \t]*(Thought|Action Input|Action|Observation|Final Answer)[ \t]*[:\uFF1A][ \t]*", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Turn:
    """A parsed turn: free text, calls, and whether `text` is the final answer."""

    text: str
    calls: tuple[ToolCall, ...] = ()
    final: bool = False


def instructions(tools: Sequence[ToolSpec]) -> str:
    """The system text that explains the form and lists the tools."""
    listed = "\n".join(
        json.dumps({"name": t.name, "description": t.description, "parameters": dict(t.parameters)}, ensure_ascii=False)
        for t in tools
    )
    return (
        f"You can use these tools:\n{listed}\n\nReply in this form:\n"
        "Thought: what to do next\n"
        f"Action: one of {', '.join(tool.name for tool in tools)}\n"
        "Action Input: its arguments as a JSON object\n"
        "You are then given the line 'Observation: the result'. Repeat as often as needed. At the end:\n"
        "Final Answer: the answer to the question"
    )


def read_turn(text: str, *, turn: int = 0) -> Turn:
    """Parse one turn. The first action or final answer at a line's start decides; what follows an Observation that
    the model wrote itself is dropped."""
    thought: list[str] = []
    name = ""
    for marker, body in _sections(text):
        if marker == "observation":
            break
        if marker == "final answer":
            return Turn(body, final=True)
        if marker == "action":
            name = body.strip().strip("`\"' ")
        elif marker == "action input" and name:
            return Turn("\n".join(thought).strip(), (ToolCall(name, _unfenced(body), f"call_{turn}_0"),))
        elif body:
            thought.append(body)
    if name:
        return Turn("\n".join(thought).strip(), (ToolCall(name, "{}", f"call_{turn}_0"),))
    return Turn(text.strip())


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """(marker in lower case, body) in order; text before the first marker has marker ''."""
    marker, fenced = "", False
    lines: list[str] = []
    for line in text.splitlines():
        found = None if fenced else _MARKER.match(line)
        if found:
            yield marker, "\n".join(lines).strip()
            marker, lines = found[1].lower(), [line[found.end() :]]
        else:
            lines.append(line)
        if line.count("```") % 2:
            fenced = not fenced
    yield marker, "\n".join(lines).strip()


def _unfenced(body: str) -> str:
    fence = re.fullmatch(r"```\w*\n?(.*?)```", body.strip(), re.DOTALL)
    return (fence[1] if fence else body).strip()


def to_messages(step: Step) -> Iterator[Message]:
    """A step as the model is shown it: its own text, and the observation as a user turn."""
    yield Message("assistant", step.raw_text)
    seen = [f"{STOP} {observation.text}" for observation in step.observations]
    if seen or step.note:
        yield Message("user", "\n".join([*seen, step.note] if step.note else seen))
