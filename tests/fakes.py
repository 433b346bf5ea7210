"""Scripted models for tests: what they answer is written down beforehand, what they were asked is kept."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

from puyu.types import Completion, Delta, GenerateRequest, Message, Scored, ToolCall, Usage


def said(text: str) -> Completion:
    """A plain answer."""
    return Completion(Message("assistant", text), "stop", Usage(10, len(text)), raw_text=text)


def called(*calls: ToolCall, text: str = "") -> Completion:
    """A turn that asks for tools."""
    return Completion(Message("assistant", text, tool_calls=calls), "tool_calls", Usage(10, 5))


@dataclass
class ScriptedModel:
    """A LanguageModel that gives its completions in order and fails when it is asked for more."""

    script: list[Completion]
    requests: list[GenerateRequest] = field(default_factory=list)

    def __init__(self, script: Iterable[Completion]) -> None:
        self.script, self.requests = list(script), []

    async def generate(self, request: GenerateRequest) -> Completion:
        self.requests.append(request)
        assert len(self.requests) <= len(self.script), "the script is over"
        return self.script[len(self.requests) - 1]

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        completion = await self.generate(request)
        for char in completion.text:
            yield Delta(char)
        yield Delta("", completion.message.tool_calls, completion.finish_reason, completion.usage)

    async def score(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        return [Scored(-float(len(c)), len(c), len(c.encode()), False) for _, c in pairs]
