"""`LLM`: a model directory, or a model in memory, as something that answers. The offline face of the engine.

Blocking calls step the engine in the caller's thread; the async ones of `LanguageModel` share a background thread.
Both batch whatever is under way together. Nothing is downloaded unless the name is a hub id given by the caller.

    llm = LLM("runs/nano/ppo")
    print(llm.chat("Who are you?").text)
    for piece in llm.stream_chat("Who are you?"): print(piece.text, end="")

A reward checkpoint is opened the same way and scores conversations: `LLM("runs/nano/reward").reward([...])`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from puyu.device import pick_device, pick_dtype, release_memory, require_torch
from puyu.engine.core import EngineConfig, Stats
from puyu.engine.driver import Driver
from puyu.engine.front import as_messages
from puyu.engine.loop import AsyncEngine, last_deltas
from puyu.engine.overlap import make_engine
from puyu.engine.request import Request, Running
from puyu.engine.score import encode_pairs, score_encoded
from puyu.engine.speculate import ModelDrafter
from puyu.engine.weights import Model, drop_weights, refill_weights, update_weights
from puyu.errors import CheckpointError, ConfigError, InputError, RequestError, ResourceError
from puyu.hub import resolve
from puyu.model.checkpoint import is_scalar_checkpoint, load_model, load_scalar_model, read_config
from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.lora import AdapterBank
from puyu.tokenizer.chat import render_all
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import (
    Completion,
    Conversation,
    Delta,
    GenerateRequest,
    Message,
    SamplingParams,
    Scored,
    ToolChoice,
    ToolSpec,
)

if TYPE_CHECKING:
    import torch

Chat = str | Sequence[Message | dict[str, Any]]
"""A user's text, messages, or OpenAI's dicts."""

DRAFT_TOKENS = 4
"""Guessed at a time when a draft model is given and the config does not say."""


class LLM:
    """A language model that runs here. Close it, or use it in a `with` block, when the async calls were used."""

    _sources: list[tuple[Model, Path]]
    """Models that can be read again, and where from."""

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        config: EngineConfig | None = None,
        draft_model: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> None:
        """`path`: a model directory or a hub id (`puyu.hub`); `draft_model`: a small model with the same tokenizer that
        guesses ahead; `adapters`: peft directories by the names that requests use."""
        require_torch()
        asked = config or EngineConfig()
        folder = resolve(path, allow_pickle=asked.allow_pickle)
        where = pick_device(device)
        tokenizer = Tokenizer.load(folder)
        self._load: Callable[[Path], Model] = partial(
            _load,
            device=where,
            dtype=pick_dtype(dtype, where),
            allow_pickle=asked.allow_pickle,
            context=asked.context or None,
        )
        model, drafter, folders = self._load(folder), None, [folder]
        if draft_model is not None:
            folders.append(resolve(draft_model, allow_pickle=asked.allow_pickle))
            drafter, config = self._drafter(folders[1], tokenizer), _with_drafts(config)
        self._set(model, tokenizer, config, name=Path(folder).name, drafter=drafter)
        self._sources = list(zip([model, drafter.model] if drafter else [model], folders, strict=True))
        for name, adapter in (adapters or {}).items():
            self.load_adapter(name, adapter)

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

    def _drafter(self, folder: Path, tokenizer: Tokenizer) -> ModelDrafter:
        if Tokenizer.load(folder).fingerprint != tokenizer.fingerprint:
            raise CheckpointError(f"{folder} has another tokenizer", remedy="a draft model needs the model's own")
        model = self._load(folder)
        if not isinstance(model, CausalLM):
            raise CheckpointError(f"{folder} is a reward model, which guesses nothing")
        if model.config.vocab_size < tokenizer.vocab_size:
            message = f"{folder} has {model.config.vocab_size} ids, its tokenizer {tokenizer.vocab_size}"
            raise CheckpointError(message, remedy="use a draft model that knows every token")
        return ModelDrafter(model, num_ids=tokenizer.vocab_size)

    def _set(
        self,
        model: Model,
        tokenizer: Tokenizer,
        config: EngineConfig | None,
        *,
        name: str,
        drafter: ModelDrafter | None = None,
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}",
                remedy="use the tokenizer that the model was trained with",
            )
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self._is_empty = False
        self._sources = []
        self._allow_pickle = config is not None and config.allow_pickle
        self._bank = AdapterBank(model) if isinstance(model, CausalLM) else None
        sizes: dict[str, Any] = {"num_ids": tokenizer.vocab_size, "drafter": drafter, "bank": self._bank}
        self.driver = Driver(make_engine(model, config, **sizes), tokenizer)
        self.loop = AsyncEngine(self.driver)

    # ---- blocking ----

    def chat(
        self,
        messages: Chat,
        *,
        tools: Sequence[ToolSpec] = (),
        tool_choice: ToolChoice = ToolChoice(),  # noqa: B008 - frozen
        params: SamplingParams | None = None,
        **changes: Any,
    ) -> Completion:
        """Answer a conversation. `changes` are fields of SamplingParams, as in `llm.chat("Hi", temperature=0.7)`."""
        request = _chat_request(messages, tools, params, changes)
        return self.generate_all([replace(request, tool_choice=tool_choice)])[0]

    def complete(self, text: str, *, params: SamplingParams | None = None, **changes: Any) -> Completion:
        """Continue plain text, without a chat template."""
        return self.generate_all([GenerateRequest(text, _params(params, changes))])[0]

    def generate_all(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Run many requests as one batch; completions in their order. RequestError before any of them runs."""
        return self._run([partial(self.driver.submit, request) for request in requests])

    def batch(
        self,
        items: Sequence[Chat],
        *,
        params: SamplingParams | None = None,
        plain: bool = False,
        progress: Callable[[int, int], None] | None = None,
        **changes: Any,
    ) -> list[Completion]:
        """Answer many chats as one batch, in their order, or continue `plain` texts without the chat template.
        `progress` is told (finished, all) as they finish."""
        _several(items, "items")
        if plain:
            requests = [GenerateRequest(str(item), _params(params, changes)) for item in items]
        else:
            requests = [_chat_request(item, (), params, changes) for item in items]
        return self._run([partial(self.driver.submit, request) for request in requests], progress)

    def stream(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """Deltas whose text together is that of `generate`."""
        return self.loop.stream(request)

    def _run(
        self, submits: Sequence[Callable[..., str]], progress: Callable[[int, int], None] | None = None
    ) -> list[Any]:
        """Submit all and step until each is done; results in order. What goes wrong on the way aborts the rest."""
        results: dict[int, Any] = {}
        ids: list[str] = []

        def done(index: int, result: Any) -> None:
            results[index] = result
            if progress is not None:
                progress(len(results), len(submits))

        try:
            for index, submit in enumerate(submits):
                self._require_awake()
                ids.append(submit(done=partial(done, index)))
            while len(results) < len(ids):
                self._require_awake()
                self.driver.pump()
        finally:
            for index, request_id in enumerate(ids):
                if index not in results:
                    self.driver.abort(request_id)
        return [results[index] for index in range(len(ids))]

    def stream_chat(
        self,
        messages: Chat,
        *,
        tools: Sequence[ToolSpec] = (),
        tool_choice: ToolChoice = ToolChoice(),  # noqa: B008 - frozen
        params: SamplingParams | None = None,
        **changes: Any,
    ) -> Iterator[Delta]:
        """Answer a conversation piece by piece; leaving the loop early aborts the request."""
        request = _chat_request(messages, tools, params, changes)
        yield from self._stream(replace(request, tool_choice=tool_choice))

    def stream_text(self, text: str, *, params: SamplingParams | None = None, **changes: Any) -> Iterator[Delta]:
        """Continue plain text piece by piece; leaving the loop early aborts the request."""
        yield from self._stream(GenerateRequest(text, _params(params, changes)))

    def _stream(self, request: GenerateRequest) -> Iterator[Delta]:
        items: SimpleQueue[Delta | Completion] = SimpleQueue()

        self._require_awake()
        request_id, ended = self.driver.submit(request, done=items.put, show=items.put), False
        try:
            while not ended:
                self._require_awake()
                self.driver.pump()
                while not items.empty():
                    item = items.get()
                    ended = isinstance(item, Completion)
                    yield from last_deltas(item) if isinstance(item, Completion) else [item]
        finally:
            if not ended:
                self.driver.abort(request_id)
                self.driver.pump()

    def score_all(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """Log-likelihood of each (context, continuation); see `score.py` for the convention."""
        model = self.model
        if not isinstance(model, CausalLM):
            raise RequestError("this is a reward model, it has no likelihoods", param="model", remedy="use LLM.reward")
        encoded = encode_pairs(self.tokenizer, pairs)  # before the lock, so that the engine does not wait for it
        with self.driver.lock:
            if self._is_empty:
                self._require_awake()
            return score_encoded(model, encoded, pairs)

    def embed(
        self, texts: Sequence[str], *, pooling: str = "mean", normalize: bool = True, adapter: str = ""
    ) -> list[list[float]]:
        """One vector a text: the last layer's normed states after <s> and the text, their mean or the last one,
        scaled to length 1 if `normalize`."""
        if isinstance(self.model, ScalarModel):
            raise RequestError("this is a reward model, it embeds nothing", param="model", remedy="use LLM.reward")
        _several(texts, "texts")
        front = self.driver.front
        prepared = [front.prepare_pool(front.text_ids(text), pooling=pooling, adapter=adapter) for text in texts]
        vectors = self._pooled(prepared)
        return [_unit(vector) for vector in vectors] if normalize else vectors

    def reward(self, conversations: Sequence[Conversation | Sequence[Message]]) -> list[float]:
        """The score of each conversation, which ends with the answer that is judged. Needs a reward checkpoint."""
        rows = self.reward_ids(conversations)
        return [row[0] for row in self._pooled([self.driver.front.prepare_pool(ids, pooling="last") for ids in rows])]

    def reward_ids(self, conversations: Sequence[Conversation | Sequence[Message]]) -> list[list[int]]:
        """What a reward model reads of each conversation."""
        if not isinstance(self.model, ScalarModel):
            message = "this is a language model, it gives no rewards"
            raise RequestError(message, param="model", remedy="load a checkpoint of `puyu reward`")
        reward_id = self.model.config.extra.get("reward_token_id")
        if not isinstance(reward_id, int):
            raise CheckpointError("config.json has no reward_token_id", remedy="train it with `puyu reward`")
        whole = [item if isinstance(item, Conversation) else Conversation(tuple(item)) for item in conversations]
        for item in whole:
            self.driver.front.check_size(GenerateRequest(item.messages))
        try:
            return [[*rendered.ids, reward_id] for rendered in render_all(whole, self.tokenizer)]
        except InputError as error:
            raise RequestError(error.message, param="messages", remedy=error.remedy) from error

    def _pooled(self, requests: Sequence[Request]) -> list[list[float]]:
        found: list[Running] = self._run([partial(self.driver.submit_pool, request) for request in requests])
        for at, running in enumerate(found):
            if running.finish_reason != "stop":
                raise ResourceError(f"input {at} ended with {running.finish_reason!r}", remedy="look into the log")
        return [running.pooled for running in found]

    def prompt_ids(self, request: GenerateRequest) -> list[int]:
        """The ids that a request's prompt becomes."""
        return self.driver.front.prompt_ids(request)

    # ---- LanguageModel ----

    async def generate(self, request: GenerateRequest) -> Completion:
        """Run one request; concurrent calls are batched."""
        return await self.loop.generate(request)

    async def score(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """Like `score_all`."""
        return await asyncio.to_thread(self.score_all, pairs)

    # ---- care ----

    def reset_prefix_cache(self) -> None:
        """Forget cached keys and values; necessary after the weights have changed."""
        with self.driver.lock:
            self.driver.engine.reset_prefix_cache()

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Read a LoRA adapter, a peft directory; requests name it in `GenerateRequest.adapter`."""
        with self.driver.lock:
            self._adapters().load(name, resolve(path))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter that no request uses."""
        with self.driver.lock:
            if self.driver.uses(name):
                raise RequestError(f"requests under way use the adapter {name!r}", param="adapter", remedy="wait")
            self._adapters().unload(name)
            self.driver.engine.scheduler.pool.reset()  # another adapter may get the name

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may use."""
        return self._bank.names if self._bank is not None else ()

    def _adapters(self) -> AdapterBank:
        if self._bank is None:
            raise RequestError("a reward model takes no adapters", param="adapter")
        return self._bank

    def update_weights(self, state: Mapping[str, torch.Tensor] | str | Path) -> None:
        """New weights in place: a checkpoint folder, or tensors by its names or by our own. What is under way is
        computed again with them. Everything is checked before anything is changed."""
        with self.driver.lock:
            if self._is_empty:
                self._require_awake()
            self.driver.engine.settle()
            folder = None
            if not isinstance(state, Mapping):
                folder = resolve(state, allow_pickle=self._allow_pickle)
                if read_config(folder).family != self.model.config.family:
                    raise CheckpointError(f"{folder} holds a model of another family")
                dtype = self.model.trunk.embedding.weight.dtype
                state = _load(folder, device="cpu", dtype=dtype, allow_pickle=self._allow_pickle).state_dict()
                if set(state) != set(self.model.state_dict()):
                    raise CheckpointError(f"{folder} holds a model of another shape")
            update_weights(self.model, state)
            self._sources = [(self.model, folder), *self._sources[1:]] if folder and self._sources else []
            self.driver.engine.reset_prefix_cache()

    def sleep(self, level: int = 1) -> None:
        """Give memory back until `wake`: 1, the key/value cache; 2, the weights as well. Requests wait meanwhile."""
        if level not in (1, 2):
            raise ConfigError(f"sleep has the levels 1 and 2, not {level!r}")
        if level == 2 and not self._sources:
            raise ConfigError("these weights were given in memory and cannot be loaded again", remedy="use level 1")
        with self.driver.lock:
            self.driver.engine.sleep()
            if level == 2 and not self._is_empty:
                self._is_empty = True
                for model, _ in self._sources:
                    drop_weights(model)
            release_memory(self.driver.engine.runner.device)

    def wake(self) -> None:
        """Take the memory again; what waits goes on."""
        with self.driver.lock:
            for model, folder in self._sources if self._is_empty else ():
                refill_weights(model, self._load(folder))
            self._is_empty = False
            self.driver.engine.wake()
        self.loop.nudge()

    @property
    def is_asleep(self) -> bool:
        return self.driver.engine.is_asleep

    def _require_awake(self) -> None:
        if self.is_asleep:
            raise ResourceError("the engine is asleep", remedy="call wake() first")

    def stats(self) -> Stats:
        return self.driver.stats()

    def close(self) -> None:
        """Abort what is under way and stop the background thread, if there is one."""
        self.loop.close(drain=0)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _load(
    folder: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    allow_pickle: bool = False,
    context: int | None = None,
) -> Model:
    """A language model, or a reward model, whose weights are never pickled and whose context is its own."""
    read_config(folder)  # says what is wrong with the folder
    if is_scalar_checkpoint(folder):
        return load_scalar_model(folder, dtype=dtype, device=device)
    return load_model(folder, dtype=dtype, device=device, allow_pickle=allow_pickle, context=context)


def _with_drafts(config: EngineConfig | None) -> EngineConfig:
    config = config or EngineConfig()
    return config if config.draft_tokens else config.model_copy(update={"draft_tokens": DRAFT_TOKENS})


def _unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length for value in vector] if length else vector


def _params(params: SamplingParams | None, changes: dict[str, Any]) -> SamplingParams:
    known = [item.name for item in fields(SamplingParams)]
    for name in changes:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise RequestError(f"no sampling parameter is called {name!r}", param=name, remedy=remedy)
    return replace(params or SamplingParams(), **changes)


def _several(texts: Sequence[Any], field: str) -> None:
    if isinstance(texts, str):
        raise RequestError(f"{field} must be a list of texts, not one text", param=field, remedy="write [text]")


def _chat_request(
    messages: Chat, tools: Sequence[ToolSpec], params: SamplingParams | None, changes: dict[str, Any]
) -> GenerateRequest:
    return GenerateRequest(as_messages(messages), _params(params, changes), tuple(tools))
