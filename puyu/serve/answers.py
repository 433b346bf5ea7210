"""Completions and deltas in OpenAI's words: whole answers, and server-sent events. Pure; HTTP is `http.py`'s business.

A chat stream is: one role chunk for each answer, content and tool-call deltas as they come (id and name first, then
pieces of the arguments), one chunk with the finish reason for each answer, a usage chunk where asked for, `[DONE]`.
The constant part of a chunk is encoded once for a stream, since this runs for every token.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from puyu.serve.protocol import error_body
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import CallPart, Completion, Delta, ToolCall, TopLogprobs, Usage

DONE = b"data: [DONE]\n\n"
BROKEN = {
    "error": "the engine failed on this request",
    "abort": "the answer was ended before it was complete; the server may be stopping",
    "timeout": "the answer took longer than the request allowed",
}


@dataclass(frozen=True, slots=True)
class Head:
    """What every chunk of one answer repeats."""

    model: str
    chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def to_json(self, *, chunk: bool) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        name = f"{kind}.chunk" if self.chat and chunk else kind
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": name, "created": self.created, "model": self.model}


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def total(usages: Iterable[Usage]) -> Usage:
    """Token counts of several requests together."""
    parts = list(usages)
    return Usage(
        sum(part.prompt_tokens for part in parts),
        sum(part.completion_tokens for part in parts),
        sum(part.cached_tokens for part in parts),
    )


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"


# -- whole answers ---------------------------------------------------------------------------------------------


def chat_answer(head: Head, completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """The body of a chat completion."""
    choices = [_chat_choice(index, answer, tokenizer) for index, answer in enumerate(completion.choices)]
    return head.to_json(chunk=False) | {"choices": choices, "usage": usage_json(completion.usage)}


def _chat_choice(index: int, answer: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if calls := answer.message.tool_calls:
        message |= {"content": answer.text or None, "tool_calls": [call_json(call) for call in calls]}
    logprobs = None
    if answer.logprobs:
        logprobs = _chat_logprobs(answer.token_ids, answer.logprobs, answer.top_logprobs, tokenizer)
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason}


def call_json(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _chat_logprobs(
    ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[TopLogprobs], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Every generated token, the one that ended the text included."""
    rows = []
    for at, (id, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        top = [_token_row(other, value, tokenizer) for other, value in (tops[at] if at < len(tops) else ())]
        rows.append(_token_row(id, logprob, tokenizer) | {"top_logprobs": top})
    return {"content": rows, "refusal": None}


def _token_row(id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.token_bytes(id)
    return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that comes back before its answer; `silent`: nothing of the answer is shown."""

    prompt_ids: tuple[int, ...]
    silent: bool = False


def text_answer(
    head: Head, completions: Sequence[Completion], tokenizer: Tokenizer, *, echoes: Sequence[Echo] = ()
) -> dict[str, Any]:
    """The body of a text completion; choices of all prompts in order, usage of all together."""
    shown = [_echoed(answer, echoes[at], tokenizer) if echoes else answer for at, answer in enumerate(completions)]
    answers = [answer for completion in shown for answer in completion.choices]
    choices = [_text_choice(index, answer, tokenizer) for index, answer in enumerate(answers)]
    usage = usage_json(total(completion.usage for completion in shown))
    return head.to_json(chunk=False) | {"choices": choices, "usage": usage}


def _text_choice(index: int, answer: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    logprobs = None
    if answer.logprobs or answer.prompt_logprobs:
        values = (*answer.prompt_logprobs, *answer.logprobs)
        places = (*((),) * len(answer.prompt_logprobs), *answer.top_logprobs)
        logprobs = _text_logprobs(answer.token_ids, values, places, tokenizer)
    return {"index": index, "text": answer.text, "logprobs": logprobs, "finish_reason": answer.finish_reason}


def _echoed(completion: Completion, echo: Echo, tokenizer: Tokenizer) -> Completion:
    """The completion with its prompt in front, without <s>."""
    skip = 1 if echo.prompt_ids[0] == tokenizer.bos_id else 0
    ids = echo.prompt_ids[skip:]
    prompt = tokenizer.decode(ids)
    answers = []
    for answer in completion.choices:
        message = replace(answer.message, content=prompt + ("" if echo.silent else answer.text))
        prompt_logprobs = completion.prompt_logprobs[skip:]
        kept = replace(answer, message=message, prompt_logprobs=prompt_logprobs, alternatives=())
        if echo.silent:
            usage = replace(completion.usage, completion_tokens=0)
            kept = replace(kept, token_ids=(), logprobs=(), top_logprobs=(), usage=usage, finish_reason="length")
        answers.append(replace(kept, token_ids=(*ids, *kept.token_ids)))
    return replace(answers[0], alternatives=tuple(answers[1:]))


def _text_logprobs(
    ids: Sequence[int], logprobs: Sequence[float | None], tops: Sequence[TopLogprobs], tokenizer: Tokenizer
) -> dict[str, Any]:
    texts = [tokenizer.token_bytes(id).decode("utf-8", "replace") for id in ids]
    offsets = [0]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    rows = [_top_texts(top, tokenizer) for top in tops]
    return {
        "tokens": texts,
        "token_logprobs": list(logprobs),
        "top_logprobs": rows if any(rows) else None,
        "text_offset": offsets[:-1],
    }


def _top_texts(top: TopLogprobs, tokenizer: Tokenizer) -> dict[str, float] | None:
    """OpenAI's form; of tokens that read the same, the likeliest stays."""
    rows: dict[str, float] = {}
    for id, value in top:
        rows.setdefault(tokenizer.token_bytes(id).decode("utf-8", "replace"), value)
    return rows or None


# -- streams ---------------------------------------------------------------------------------------------------


class Writer:
    """One stream of either kind: `open`, `push` for each batch of deltas, `close`."""

    def __init__(self, head: Head, tokenizer: Tokenizer, *, answers: int, include_usage: bool) -> None:
        self.head, self.tokenizer = head, tokenizer
        self.answers, self.include_usage = answers, include_usage
        self._before = b"data: " + dumps(head.to_json(chunk=True))[:-1] + b',"choices":[{"index":'
        # with include_usage every chunk has the field, null until the last (OpenAI's form)
        self._after = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self._usages: list[Usage] = []
        self._offsets = [0] * answers
        self._called: set[tuple[int, int]] = set()

    def open(self) -> bytes:
        """The role of each answer."""
        if not self.head.chat:
            return b""
        role = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._chunk(index, role) for index in range(self.answers))

    def push(self, deltas: Iterable[Delta]) -> bytes:
        """Chunks of what has come. An answer that breaks gives an error object."""
        return b"".join([self._events(delta) for delta in deltas])

    def close(self) -> bytes:
        """The usage, where asked for, and the end."""
        if not self.include_usage or not self._usages:
            return DONE
        usage = usage_json(total(self._usages))
        return event(self.head.to_json(chunk=True) | {"choices": [], "usage": usage}) + DONE

    def _events(self, delta: Delta) -> bytes:
        data = b""
        if delta.text or delta.token_ids:
            data = self._text(delta)
        for part in delta.call_parts if self.head.chat else ():
            data += self._chunk(delta.index, {"tool_calls": [self._call(delta.index, part)]})
        if delta.finish_reason is not None:
            data += self._end(delta)
        return data

    def _text(self, delta: Delta) -> bytes:
        if not delta.token_ids:
            if self.head.chat:
                inner = b',"delta":{"content":' + dumps(delta.text) + b'},"logprobs":null,"finish_reason":null'
            else:
                inner = b',"text":' + dumps(delta.text) + b',"logprobs":null,"finish_reason":null'
            return self._before + str(delta.index).encode() + inner + self._after
        if self.head.chat:
            logprobs = _chat_logprobs(delta.token_ids, delta.logprobs, delta.top_logprobs, self.tokenizer)
            return self._chunk(delta.index, {"content": delta.text}, logprobs=logprobs)
        return self._chunk(delta.index, delta.text, logprobs=self._text_rows(delta))

    def _text_rows(self, delta: Delta) -> dict[str, Any]:
        rows = _text_logprobs(delta.token_ids, delta.logprobs, delta.top_logprobs, self.tokenizer)
        start = self._offsets[delta.index]
        self._offsets[delta.index] += sum(len(token) for token in rows["tokens"])
        return rows | {"text_offset": [start + offset for offset in rows["text_offset"]]}

    def _call(self, answer: int, part: CallPart) -> dict[str, Any]:
        if (answer, part.index) in self._called:
            return {"index": part.index, "function": {"arguments": part.arguments}}
        self._called.add((answer, part.index))
        function = {"name": part.name, "arguments": part.arguments}
        return {"index": part.index, "id": part.id, "type": "function", "function": function}

    def _end(self, delta: Delta) -> bytes:
        if delta.usage is not None:
            self._usages.append(delta.usage)
        if delta.finish_reason in BROKEN:
            return event(error_body(BROKEN[delta.finish_reason], kind="server_error"))
        return self._chunk(delta.index, {} if self.head.chat else "", reason=delta.finish_reason)

    def _chunk(
        self, index: int, content: Any, *, logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> bytes:
        name = "delta" if self.head.chat else "text"
        inner = dumps({name: content, "logprobs": logprobs, "finish_reason": reason})[1:-1]
        return self._before + str(index).encode() + b"," + inner + self._after
