"""`LLM`: a model directory, or a model in memory, as something that answers. The offline face of the engine.

Blocking calls step the engine in the caller's thread; the async ones of `LanguageModel` share a background thread.
Both batch whatever is under way together. Nothing is downloaded unless the name is a hub id given by the caller.

    llm = LLM("runs/nano/ppo")
    print(llm.chat("Who are you?").text)
    for piece in llm.stream_chat("Who are you?"): print(piece.text, end="")
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from puyu.device import pick_device, pick_dtype, require_torch
from puyu.engine.core import EngineConfig, Stats
from puyu.engine.driver import Driver
from puyu.engine.front import as_messages
from puyu.engine.loop import AsyncEngine, last_delta
from puyu.engine.overlap import make_engine
from puyu.engine.score import score
from puyu.errors import CheckpointError
from puyu.hub import resolve
from puyu.model.checkpoint import load_model
from puyu.model.heads import CausalLM
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Completion, Delta, GenerateRequest, Message, SamplingParams, Scored, ToolSpec

Chat = str | Sequence[Message | dict[str, Any]]
"""A user's text, messages, or OpenAI's dicts."""


class LLM:
    """A language model that runs here. Close it, or use it in a `with` block, when the async calls were used."""

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        config: EngineConfig | None = None,
    ) -> None:
        """`path`: a model directory or a hub id (`puyu.hub`)."""
        require_torch()
        asked = config or EngineConfig()
        folder = resolve(path, allow_pickle=asked.allow_pickle)
        where = pick_device(device)
        tokenizer = Tokenizer.load(folder)
        model = load_model(
            folder,
            dtype=pick_dtype(dtype, where),
            device=where,
            allow_pickle=asked.allow_pickle,
            context=asked.context or None,
        )
        self._set(model, tokenizer, config, name=Path(folder).name)

    @classmethod
    def from_model(
        cls, model: CausalLM, tokenizer: Tokenizer, *, config: EngineConfig | None = None, name: str = "model"
    ) -> LLM:
        """Answer with a model that somebody else owns: weights are shared, not copied.

        After the owner has changed them, call `reset_prefix_cache`.
        """
        llm = cls.__new__(cls)
        llm._set(model, tokenizer, config, name=name)
        return llm

    def _set(self, model: CausalLM, tokenizer: Tokenizer, config: EngineConfig | None, *, name: str) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}",
                remedy="use the tokenizer that the model was trained with",
            )
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.driver = Driver(make_engine(model, config, num_ids=tokenizer.vocab_size), tokenizer)
        self.loop = AsyncEngine(self.driver)

    # ---- blocking ----

    def chat(
        self, messages: Chat, *, tools: Sequence[ToolSpec] = (), params: SamplingParams | None = None, **changes: Any
    ) -> Completion:
        """Answer a conversation. `changes` are fields of SamplingParams, as in `llm.chat("Hi", temperature=0.7)`."""
        return self.generate_all([_chat_request(messages, tools, params, changes)])[0]

    def complete(self, text: str, *, params: SamplingParams | None = None, **changes: Any) -> Completion:
        """Continue plain text, without a chat template."""
        return self.generate_all([GenerateRequest(text, _params(params, changes))])[0]

    def generate_all(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Run many requests as one batch; completions in their order. RequestError before any of them runs."""
        results: dict[int, Completion] = {}
        ids: list[str] = []
        try:
            for index, request in enumerate(requests):
                ids.append(self.driver.submit(request, done=partial(results.__setitem__, index)))
            while len(results) < len(ids):
                self.driver.pump()
        finally:
            for index, request_id in enumerate(ids):
                if index not in results:
                    self.driver.abort(request_id)
        return [results[index] for index in range(len(ids))]

    def stream_chat(
        self, messages: Chat, *, tools: Sequence[ToolSpec] = (), params: SamplingParams | None = None, **changes: Any
    ) -> Iterator[Delta]:
        """Answer a conversation piece by piece; leaving the loop early aborts the request."""
        yield from self._stream(_chat_request(messages, tools, params, changes))

    def _stream(self, request: GenerateRequest) -> Iterator[Delta]:
        items: SimpleQueue[str | Completion] = SimpleQueue()
        request_id, ended = self.driver.submit(request, done=items.put, text=items.put), False
        try:
            while not ended:
                self.driver.pump()
                while not items.empty():
                    item = items.get()
                    ended = isinstance(item, Completion)
                    yield last_delta(item) if isinstance(item, Completion) else Delta(item)
        finally:
            if not ended:
                self.driver.abort(request_id)
                self.driver.pump()

    def score_all(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """Log-likelihood of each (context, continuation); see `score.py` for the convention."""
        with self.driver.lock:
            return score(self.model, self.tokenizer, pairs)

    def prompt_ids(self, request: GenerateRequest) -> list[int]:
        """The ids that a request's prompt becomes."""
        return self.driver.front.prompt_ids(request)

    # ---- LanguageModel ----

    async def generate(self, request: GenerateRequest) -> Completion:
        """Run one request; concurrent calls are batched."""
        return await self.loop.generate(request)

    def stream(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """Deltas whose text together is that of `generate`."""
        return self.loop.stream(request)

    async def score(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """Like `score_all`."""
        return await asyncio.to_thread(self.score_all, pairs)

    # ---- care ----

    def reset_prefix_cache(self) -> None:
        """Forget cached keys and values; necessary after the weights have changed."""
        with self.driver.lock:
            self.driver.engine.reset_prefix_cache()

    def stats(self) -> Stats:
        return self.driver.stats()

    def close(self) -> None:
        """Abort what is under way and stop the background thread, if there is one."""
        self.loop.close(drain=0)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _params(params: SamplingParams | None, changes: dict[str, Any]) -> SamplingParams:
    return replace(params or SamplingParams(), **changes)


def _chat_request(
    messages: Chat, tools: Sequence[ToolSpec], params: SamplingParams | None, changes: dict[str, Any]
) -> GenerateRequest:
    return GenerateRequest(as_messages(messages), _params(params, changes), tuple(tools))
