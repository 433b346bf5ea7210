"""Between people and ids: messages and parameters -> `Request`; generated ids -> text, stops, tool calls, `Completion`.

Everything that can be wrong with a request is found here, before it is queued, and named by its field. Stop strings
are matched on text, across token boundaries, and text that may turn out to be the beginning of one is held back.
Knows no tensors and no scheduler; `LLM` and `serve` are two thin users of it.

    front = Front(tokenizer, context=2048)
    request = front.prepare(GenerateRequest((Message("user", "Hi"),)))
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from puyu.engine.request import Request
from puyu.errors import InputError, RequestError
from puyu.files import hash_json
from puyu.tokenizer.chat import parse, render_prompt
from puyu.tokenizer.tokenizer import StreamDecoder, Tokenizer
from puyu.types import (
    Completion,
    FinishReason,
    GenerateRequest,
    Message,
    SamplingParams,
    ToolCall,
    Usage,
)

MAX_STOPS = 16


class Front:
    """Validates and renders requests for one tokenizer and one context length."""

    def __init__(self, tokenizer: Tokenizer, *, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context
        self._numbers = itertools.count()

    def prepare(self, request: GenerateRequest) -> Request:
        """The ids and limits of a request; RequestError names the field that cannot be accepted.

        `max_tokens` is capped to what the context has room for; such a request ends with reason "length".
        """
        check_params(request.params, vocab_size=self.tokenizer.vocab_size)
        field = "prompt" if isinstance(request.prompt, str) else "messages"
        ids = self.prompt_ids(request)
        room = self.context - len(ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, which leaves no room to answer in a context of {self.context}",
                param=field,
                remedy="shorten the prompt, or start the engine with a larger cache if the model allows it",
            )
        stops = set(request.params.stop_token_ids)
        if not request.params.ignore_eos:
            stops.update(self.tokenizer.stop_ids)
        number = f"request-{next(self._numbers)}"
        return Request(number, tuple(ids), min(request.params.max_tokens, room), request.params, frozenset(stops))

    def prompt_ids(self, request: GenerateRequest) -> list[int]:
        """Messages through the chat template; plain text after <s>, as a base model was trained."""
        if isinstance(request.prompt, str):
            return self.text_ids(request.prompt)
        _check_messages(request.prompt)
        try:
            return render_prompt(request.prompt, request.tools, self.tokenizer)
        except InputError as error:
            remedy = error.remedy or "give the prompt as plain text"
            raise RequestError(error.message, param="messages", remedy=remedy) from error

    def text_ids(self, text: str) -> list[int]:
        """<s>, where the tokenizer has one, and the text; what looks like a marker is plain text."""
        ids = self.tokenizer.encode(text)
        bos = self.tokenizer.bos_id
        if bos is None and not ids:
            raise RequestError("the prompt is empty", param="prompt")
        return ids if bos is None else [bos, *ids]


def check_params(params: SamplingParams, *, vocab_size: int) -> None:
    """RequestError for the first parameter out of its range."""
    _require(_is_int(params.max_tokens) and params.max_tokens >= 1, "max_tokens", "an integer of at least 1", params)
    _require(_in(params.temperature, 0, 1e6), "temperature", "a number of at least 0", params)
    _require(_in(params.top_p, 0, 1) and params.top_p > 0, "top_p", "above 0 and at most 1", params)
    _require(_is_int(params.top_k) and params.top_k >= 0, "top_k", "an integer of at least 0 (0 is off)", params)
    _require(params.seed is None or _is_int(params.seed), "seed", "an integer", params)
    stops_fit = isinstance(params.stop, tuple) and len(params.stop) <= MAX_STOPS
    stops_fit = stops_fit and all(isinstance(stop, str) and stop for stop in params.stop)
    _require(stops_fit, "stop", f"at most {MAX_STOPS} strings, none of them empty", params)
    ids_fit = all(_is_int(id) and 0 <= id < vocab_size for id in params.stop_token_ids)
    _require(ids_fit, "stop_token_ids", f"token ids below {vocab_size}", params)


def _require(fits: bool, field: str, wanted: str, params: SamplingParams) -> None:
    if not fits:
        raise RequestError(f"{field} must be {wanted}, got {getattr(params, field)!r}", param=field)


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


class Reader:
    """Generated ids one by one -> text that may be shown; all pieces together are the text of the completion."""

    def __init__(self, request: Request, tokenizer: Tokenizer, *, chat: bool) -> None:
        self.request, self.tokenizer, self.chat = request, tokenizer, chat
        self.text = ""
        self.stopped = False
        self._decoder = StreamDecoder(tokenizer, skip_special=True)
        self._held = ""
        self._in_call = False

    def push(self, token: int) -> str:
        """The text that this token completes; sets `stopped` when a stop string is found."""
        if self.stopped or token in self.request.stop_ids or self._is_call(token):
            return ""
        self._held += self._decoder.push(token)
        return self._release()

    def close(self) -> str:
        """The text that was held back; a character that the end has torn is dropped."""
        if self.stopped:
            return ""
        self._held += self._decoder.flush().rstrip("\ufffd")
        shown = self._release()
        rest, self._held = self._held, ""
        self.text += rest
        return shown + rest

    def completion(
        self, ids: Sequence[int], logprobs: Sequence[float], *, reason: FinishReason, usage: Usage
    ) -> Completion:
        """What came back, after `close`."""
        calls = self._calls(ids) if self.chat else ()
        return Completion(
            message=Message("assistant", self.text, tool_calls=calls),
            finish_reason="tool_calls" if calls and reason == "stop" else reason,
            usage=usage,
            token_ids=tuple(ids),
            logprobs=tuple(logprobs),
            raw_text=self.tokenizer.decode(ids),
        )

    def _is_call(self, token: int) -> bool:
        """Whether the token belongs to a tool call, whose text is not part of the answer's."""
        if not self.chat or self.tokenizer.action_start_id is None:
            return False
        if self._in_call:
            self._in_call = token != self.tokenizer.action_end_id
            return True
        self._in_call = token == self.tokenizer.action_start_id
        return self._in_call

    def _release(self) -> str:
        """Give out what can no longer become a stop string; cut at the first that is complete."""
        found = [at for stop in self.request.params.stop if (at := self._held.find(stop)) >= 0]
        if found:
            shown, self._held, self.stopped = self._held[: min(found)], "", True
        else:
            keep = _open_end(self._held, self.request.params.stop)
            shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += shown
        return shown

    def _calls(self, ids: Sequence[int]) -> tuple[ToolCall, ...]:
        """Tool calls with ids that depend on prompt and place only, so that equal runs give equal transcripts."""
        if self.tokenizer.action_start_id not in ids:
            return ()
        calls = parse(ids, self.tokenizer).tool_calls
        seed = hash_json([self.request.prompt_ids, list(ids)])
        return tuple(replace(call, id=f"call_{seed[:16]}{index}") for index, call in enumerate(calls))


def _open_end(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that some stop string begins with."""
    longest = min(max((len(stop) - 1 for stop in stops), default=0), len(text))
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
