"""A scripted LanguageModel: answers come from two functions; what was asked is remembered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from puyu.types import Completion, Delta, GenerateRequest, Message, Scored


class FakeModel:
    def __init__(
        self,
        answer: Callable[[GenerateRequest], Message | str] = lambda request: "ok",
        logprob: Callable[[str, str], float] = lambda context, continuation: -float(len(continuation)),
    ) -> None:
        self.answer, self.logprob = answer, logprob
        self.asked: list[GenerateRequest] = []
        self.pairs: list[tuple[str, str]] = []

    async def generate(self, request: GenerateRequest) -> Completion:
        self.asked.append(request)
        found = self.answer(request)
        message = found if isinstance(found, Message) else Message("assistant", found)
        return Completion(message, "tool_calls" if message.tool_calls else "stop")

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        done = await self.generate(request)
        yield Delta(done.text, done.message.tool_calls, done.finish_reason)

    async def score(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        self.pairs += pairs
        return [Scored(self.logprob(c, t), max(1, len(t)), len(t.encode()), False) for c, t in pairs]


@pytest.fixture
def fake_model() -> type[FakeModel]:
    return FakeModel
