"""Between people and ids: messages and parameters -> `Request`, and how its answer will be read.

Everything that can be wrong with a request is found here, before it is queued, and named by its field. Answers are
read by `reader.py`, tool calls by `calls/`. Knows no tensors and no scheduler; `LLM` and `serve` are two thin users of
it.

    front = Front(tokenizer, context=2048)
    request = front.prepare(GenerateRequest((Message("user", "Hi"),)))
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from puyu.engine.calls import pick_format
from puyu.engine.constrain import Compiler
from puyu.engine.reader import Reader
from puyu.engine.request import Matcher, Request
from puyu.errors import InputError, RequestError
from puyu.tokenizer.chat import render_prompt
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import (
    GenerateRequest,
    Guide,
    Message,
    SamplingParams,
)

MAX_STOPS, MAX_BAD_WORDS = 16, 256
MAX_ANSWERS, MAX_BEAMS, MAX_TOP_LOGPROBS = 128, 32, 50
LONG_TOKEN = 16
"""Characters to a token that hardly any text has on the whole: what is longer is judged by its beginning."""
_SEED_STEP = 0x9E3779B1
"""Between the seeds of several answers to one prompt; the first has the request's own."""


class Front:
    """Validates and renders requests for one tokenizer and one context length."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context: int,
        check_adapter: Callable[[str], None] | None = None,
        is_reward: bool = False,
        call_format: str = "auto",
    ) -> None:
        """`check_adapter` raises RequestError for a name that is not loaded; a reward model does not answer."""
        self.calls = pick_format(tokenizer, call_format)
        self.tokenizer, self.context, self.is_reward = tokenizer, context, is_reward
        self.check_adapter = check_adapter or _no_adapter
        self._compiler = Compiler(tokenizer)
        self._markers = {tokenizer.special_tokens[name]: name for name in self.calls.markers}
        self._numbers = itertools.count()

    def prepare(self, request: GenerateRequest) -> tuple[Request, ...]:
        """The ids and limits of a request, once for each answer; RequestError names a field that cannot be accepted.

        `max_tokens` is capped to what the context has room for; such a request ends with reason "length".
        """
        params = request.params
        if self.is_reward:
            raise RequestError("this is a reward model, it does not answer", param="model", remedy="use LLM.reward")
        check_params(params, vocab_size=self.tokenizer.vocab_size)
        _check_limits(request)
        self.check_adapter(request.adapter)
        self.check_size(request)
        ids = self.prompt_ids(request)
        room = self._room(len(ids), field="messages" if request.is_chat else "prompt")
        first = Request(
            id=self.new_id(),
            prompt_ids=tuple(ids),
            max_tokens=min(params.max_tokens, room),
            params=replace(params, logprobs=params.logprobs or params.best_of > params.n),
            stop_ids=self._stop_ids(params),
            priority=request.priority,
            deadline=_moment(request.timeout),
            queue_deadline=_moment(request.queue_timeout),
            adapter=request.adapter,
            bad_words=self._bad_words(params.bad_words),
        )
        guide = self._guide(request)
        if guide is not None:
            first = replace(first, guide=self._compiled(guide, first, of_tools=guide is not params.guide))
        count = 1 if params.beam_width else max(params.n, params.best_of)
        return (first, *(self._sibling(first, index) for index in range(1, count)))

    def _guide(self, request: GenerateRequest) -> Guide | None:
        """The form of the answer: what was asked for, or a tool call, or either."""
        choice, guide = request.tool_choice, request.params.guide
        tools = [tool for tool in request.tools if not choice.names or tool.name in choice.names]
        if choice.mode == "required":
            if not tools:
                raise RequestError("a call is required, but there is no tool", param="tool_choice")
            if guide is not None:
                raise RequestError("a required call has a form of its own", param="tool_choice", remedy="use 'auto'")
            return Guide("grammar", self.calls.grammar(tools, several=choice.parallel))
        if guide is None or not tools or choice.mode == "none" or self.calls.form is None:
            return guide
        return Guide("grammar", self.calls.grammar(tools, several=choice.parallel, otherwise=guide))

    def _compiled(self, guide: Guide, part: Request, *, of_tools: bool) -> Matcher:
        """The grammar; what is wrong with one that was made of tools is the tools' fault."""
        try:
            return self._compiler.compile(guide, stop_ids=part.stop_ids)
        except RequestError as error:
            if not of_tools:
                raise
            raise RequestError(error.message, param="tools", remedy=error.remedy) from error

    def reader(self, request: GenerateRequest, part: Request) -> Reader:
        """What reads the answer. Calls are looked for where tools are offered; InternLM2's are special tokens, which
        mean nothing else."""
        offered = bool(request.tools) and request.tool_choice.mode != "none"
        if not request.is_chat or not (offered or self.calls.name == "internlm2"):
            return Reader(part, self.tokenizer)
        calls = self.calls.reader(several=request.tool_choice.parallel)
        return Reader(part, self.tokenizer, calls=calls, markers=self._markers)

    def prepare_pool(self, ids: Sequence[int], *, pooling: str, adapter: str = "") -> Request:
        """A request for the pooled hidden states of `ids`, or for their reward."""
        if pooling not in ("last", "mean"):
            raise RequestError(f"pooling must be 'last' or 'mean', got {pooling!r}", param="pooling")
        self.check_adapter(adapter)
        if not ids:
            raise RequestError("the input is empty", param="input")
        if len(ids) > self.context:
            message = f"the input has {len(ids)} tokens, more than the context of {self.context}"
            raise RequestError(message, param="input", remedy="shorten it", code="context_length_exceeded")
        pool: Any = pooling
        return Request(self.new_id(), tuple(ids), 0, adapter=adapter, pool=pool)

    def new_id(self) -> str:
        """An id that no other request has."""
        return f"request-{next(self._numbers)}"

    def _sibling(self, first: Request, index: int) -> Request:
        """Another answer to the same prompt, which the first one computes for both."""
        seed = first.params.seed
        params = replace(first.params, seed=None if seed is None else seed + index * _SEED_STEP, prompt_logprobs=False)
        return replace(first, id=self.new_id(), params=params, leader=first.id)

    def _room(self, count: int, *, field: str) -> int:
        if count >= self.context:
            raise self._too_long(f"{count}", field=field)
        return self.context - count

    def _too_long(self, count: str, *, field: str) -> RequestError:
        return RequestError(
            f"the prompt has {count} tokens, which leaves no room to answer in a context of {self.context}",
            param=field,
            remedy="shorten the prompt, or start the engine with a larger cache if the model allows it",
            code="context_length_exceeded",
        )

    def check_size(self, request: GenerateRequest) -> None:
        """Refuse a prompt that is far too long by its beginning: to encode megabytes takes seconds, and a hundred times
        their memory."""
        prompt: Any = request.prompt
        if not isinstance(prompt, str) and not request.is_chat:
            return
        texts = [prompt] if isinstance(prompt, str) else [message.text for message in prompt]
        most = self.context * LONG_TOKEN
        if sum(len(text) for text in texts) > most:
            count = len(self.tokenizer.encode("".join(texts)[:most]))
            if count > 2 * self.context:  # the cut may change its last tokens, but not half of all
                raise self._too_long(f"more than {count}", field="messages" if request.is_chat else "prompt")

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        ends = () if params.ignore_eos else self.tokenizer.stop_ids
        return frozenset((*params.stop_token_ids, *ends))

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as it stands at the beginning of a text, and after a space."""
        rows = []
        for word in words:
            rows += [tuple(self.tokenizer.encode(text)) for text in (word, " " + word.lstrip())]
            if not all(rows[-2:]):
                raise RequestError(f"bad_words: {word!r} is no token of this model", param="bad_words")
        return tuple(dict.fromkeys(rows))

    def prompt_ids(self, request: GenerateRequest) -> list[int]:
        """Messages through the chat template; plain text after <s>, as a base model was trained; ids as they are."""
        if isinstance(request.prompt, str):
            return self.text_ids(request.prompt)
        if not request.is_chat:
            return self._checked_ids(request.prompt)
        messages: Any = request.prompt
        _check_messages(messages)
        tools = request.tools if request.tool_choice.mode != "none" else ()
        if tools or any(message.tool_calls for message in messages):
            messages, tools = self.calls.prompt(messages, tools)
        try:
            return render_prompt(messages, tools, self.tokenizer, options=request.template)
        except InputError as error:
            remedy = error.remedy or "give the prompt as plain text"
            raise RequestError(error.message, param="messages", remedy=remedy) from error

    def _checked_ids(self, ids: Sequence[Any]) -> list[int]:
        wrong = next((id for id in ids if not _is_id(id, self.tokenizer.vocab_size)), None)
        if wrong is not None:
            message = f"{wrong!r} is no id of the vocabulary of {self.tokenizer.vocab_size}"
            raise RequestError(message, param="prompt")
        return list(ids)

    def text_ids(self, text: str) -> list[int]:
        """<s>, where the tokenizer has one, and the text; what looks like a marker is plain text."""
        ids = self.tokenizer.encode(text)
        bos = self.tokenizer.bos_id
        if bos is None and not ids:
            raise RequestError("the prompt is empty", param="prompt")
        return ids if bos is None else [bos, *ids]


def check_params(params: SamplingParams, *, vocab_size: int) -> None:
    """RequestError for the first parameter out of its range."""
    _check_numbers(params)
    _check_lists(params, vocab_size)
    _check_answers(params)
    fits = params.guide is None or isinstance(params.guide, Guide)
    _require(fits, "guide", "a Guide", params)


def _check_numbers(params: SamplingParams) -> None:
    _require(_is_int(params.max_tokens) and params.max_tokens >= 1, "max_tokens", "an integer of at least 1", params)
    _require(_in(params.temperature, 0, 1e6), "temperature", "a number of at least 0", params)
    _require(_in(params.top_p, 0, 1) and params.top_p > 0, "top_p", "above 0 and at most 1", params)
    _require(_is_int(params.top_k) and params.top_k >= 0, "top_k", "an integer of at least 0 (0 is off)", params)
    _require(_in(params.min_p, 0, 1), "min_p", "from 0 (off) to 1", params)
    _require(params.seed is None or _is_int(params.seed), "seed", "an integer", params)
    fits = _is_int(params.min_tokens) and 0 <= params.min_tokens <= params.max_tokens
    _require(fits, "min_tokens", "an integer from 0 to max_tokens", params)
    fits = _in(params.repetition_penalty, 0, 100) and params.repetition_penalty > 0
    _require(fits, "repetition_penalty", "above 0 and at most 100 (1 is off)", params)
    for name in ("presence_penalty", "frequency_penalty", "length_penalty"):
        _require(_in(getattr(params, name), -100, 100), name, "a number from -100 to 100", params)
    fits = _is_int(params.top_logprobs) and 0 <= params.top_logprobs <= MAX_TOP_LOGPROBS
    _require(fits, "top_logprobs", f"an integer from 0 to {MAX_TOP_LOGPROBS}", params)


def _check_lists(params: SamplingParams, vocab_size: int) -> None:
    for name, most in (("stop", MAX_STOPS), ("bad_words", MAX_BAD_WORDS)):
        texts = getattr(params, name)
        fits = isinstance(texts, tuple) and len(texts) <= most
        fits = fits and all(isinstance(text, str) and text for text in texts)
        _require(fits, name, f"at most {most} texts, none of them empty", params)
    ids_fit = isinstance(params.stop_token_ids, tuple)
    ids_fit = ids_fit and all(_is_id(id, vocab_size) for id in params.stop_token_ids)
    _require(ids_fit, "stop_token_ids", f"token ids below {vocab_size}", params)
    bias = params.logit_bias
    fits = isinstance(bias, Mapping) and all(_is_id(id, vocab_size) for id in bias)
    fits = fits and all(_in(value, -1e6, 1e6) for value in bias.values())
    _require(fits, "logit_bias", f"numbers by token ids below {vocab_size}", params)


def _check_answers(params: SamplingParams) -> None:
    """How many answers, and that beam search is not asked to sample."""
    _require(_is_int(params.n) and 1 <= params.n <= MAX_ANSWERS, "n", f"an integer from 1 to {MAX_ANSWERS}", params)
    fits = _is_int(params.best_of) and (params.best_of == 0 or params.n <= params.best_of <= MAX_ANSWERS)
    _require(fits, "best_of", f"0, or an integer from n to {MAX_ANSWERS}", params)
    fits = _is_int(params.beam_width) and 0 <= params.beam_width <= MAX_BEAMS
    _require(fits, "beam_width", f"an integer from 0 (off) to {MAX_BEAMS}", params)
    if params.beam_width:
        plain = SamplingParams(
            params.max_tokens,
            stop_token_ids=params.stop_token_ids,
            ignore_eos=params.ignore_eos,
            seed=params.seed,
            n=params.n,
            beam_width=params.beam_width,
            length_penalty=params.length_penalty,
        )
        _require(params.n <= params.beam_width, "n", "at most beam_width", params)
        _require(params == plain, "beam_width", "0 where sampling, penalties, stops or a guide are wanted", params)


def _check_limits(request: GenerateRequest) -> None:
    for name in ("timeout", "queue_timeout"):
        value = getattr(request, name)
        if value is not None and not (_in(value, 0, 1e9) and value > 0):
            raise RequestError(f"{name} must be a number of seconds above 0, got {value!r}", param=name)
    if not _is_int(request.priority):
        raise RequestError(f"priority must be an integer, got {request.priority!r}", param="priority")


def _moment(seconds: float | None) -> float:
    return math.inf if seconds is None else time.monotonic() + seconds


def _no_adapter(name: str) -> None:
    if name:
        raise RequestError(f"no such adapter: {name!r}", param="adapter", remedy="load adapters when the engine starts")


def _require(fits: bool, field: str, wanted: str, params: SamplingParams) -> None:
    if not fits:
        raise RequestError(f"{field} must be {wanted}, got {getattr(params, field)!r}", param=field)


def _is_id(value: Any, vocab_size: int) -> bool:
    return _is_int(value) and 0 <= value < vocab_size


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _in(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise RequestError("a chat needs at least one message", param="messages")
    for index, message in enumerate(messages):
        if not isinstance(message.content, str) and any(part.kind != "text" for part in message.content):
            raise RequestError("this model reads text only", param=f"messages[{index}].content")


def as_messages(messages: str | Sequence[Message | dict[str, Any]]) -> tuple[Message, ...]:
    """A user's text, messages, or OpenAI's dicts -> messages."""
    if isinstance(messages, str):
        return (Message("user", messages),)
    try:
        return tuple(item if isinstance(item, Message) else Message.from_openai(item) for item in messages)
    except InputError as error:
        raise RequestError(error.message, param="messages", remedy=error.remedy) from error
