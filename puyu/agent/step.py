"""What an agent did: Steps in a Trajectory, which is also training data.

A `Step` is one model turn and the observations of the calls in it. A `Trajectory` is the whole run: where it
began, its steps, how it ended. Frozen; nothing of the run is left out, mistakes of the model included.

    trajectory.answer                  # the text of the last turn, empty when a limit was reached before it
    trajectory.to_conversation()       # Conversation with native tool calls, in either style: ready for SFT

It knows neither the model nor how a turn was parsed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from puyu.tools.tool import Observation
from puyu.types import Conversation, FinishReason, Message, ToolCall, ToolSpec, Usage

Status = Literal["done", "max_turns", "length", "abort", "error"]
"""done: the model answered. max_turns: it still wanted tools. length: its last turn was cut by max_tokens or the
context. abort, error: the server ended the last turn so."""


@dataclass(frozen=True, slots=True)
class Step:
    """One model turn: free text (thought or answer), the calls in it, and what each led to, in call order."""

    text: str
    calls: tuple[ToolCall, ...] = ()
    observations: tuple[Observation, ...] = ()
    finish_reason: FinishReason = "stop"
    usage: Usage = field(default_factory=Usage)
    raw_text: str = ""
    note: str = ""

    def to_messages(self) -> Iterator[Message]:
        """The assistant turn, a tool turn for each observation, and the reply to a turn that could not be read."""
        yield Message("assistant", self.text, tool_calls=self.calls)
        for observation in self.observations:
            yield observation.to_message()
        if self.note:
            yield Message("user", self.note)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One run of an agent. `opening` is what stood before the first step: system, earlier turns, the request."""

    opening: tuple[Message, ...]
    steps: tuple[Step, ...]
    status: Status
    tools: tuple[ToolSpec, ...] = ()

    @property
    def answer(self) -> str:
        """The final text; empty when the run ended without one."""
        if self.status in ("done", "length") and self.steps and not self.steps[-1].calls:
            return self.steps[-1].text
        return ""

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """Every call of the run, in order."""
        return tuple(call for step in self.steps for call in step.calls)

    @property
    def usage(self) -> Usage:
        """Tokens of all turns together."""
        used = [step.usage for step in self.steps]
        return Usage(
            sum(usage.prompt_tokens for usage in used),
            sum(usage.completion_tokens for usage in used),
            sum(usage.cached_tokens for usage in used),
        )

    @property
    def messages(self) -> tuple[Message, ...]:
        """The whole run as messages, with native tool calls."""
        return (*self.opening, *(message for step in self.steps for message in step.to_messages()))

    def to_conversation(self) -> Conversation:
        """The run as training data; status and turn count stand in the metadata."""
        metadata: dict[str, Any] = {"status": self.status, "turns": len(self.steps)}
        return Conversation(self.messages, self.tools, metadata)

    def transcript(self) -> str:
        """The run for a person, one line or block a turn."""
        return "\n".join(_line(message) for message in self.messages)


def _line(message: Message) -> str:
    calls = "".join(f"\n  -> {call.name}({call.arguments})" for call in message.tool_calls)
    name = f"{message.role} {message.name}" if message.name else message.role
    return f"{name}: {message.text}{calls}".rstrip()
