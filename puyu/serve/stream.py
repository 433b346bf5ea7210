"""Completions and deltas in OpenAI's words: whole answers, and server-sent events chunk by chunk.

A chat stream is: role chunk, content deltas, tool-call deltas (name first, then arguments), one chunk with the
finish reason, a usage chunk where asked for, `[DONE]`. Pure functions; HTTP is `app.py`'s business.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from puyu.serve.protocol import error_body
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Completion, Delta, ToolCall, Usage

DONE = b"data: [DONE]\n\n"
BROKEN = {
    "error": "the engine failed on this request",
    "abort": "the server is stopping; the answer is incomplete",
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


# -- whole answers ---------------------------------------------------------------------------------------------


def chat_answer(head: Head, completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """The body of a chat completion."""
    message: dict[str, Any] = {"role": "assistant", "content": completion.text or None}
    if calls := completion.message.tool_calls:
        message["tool_calls"] = [_call_json(call) for call in calls]
    else:
        message["content"] = completion.text
    logprobs = {"content": _token_rows(completion, tokenizer)} if completion.logprobs else None
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": completion.finish_reason}
    return head.to_json(chunk=False) | {"choices": [choice], "usage": usage_json(completion.usage)}


def text_answer(head: Head, completions: Sequence[Completion], tokenizer: Tokenizer) -> dict[str, Any]:
    """The body of a text completion; usage is that of all prompts together."""
    choices = [
        {
            "index": index,
            "text": completion.text,
            "logprobs": _text_logprobs(completion, tokenizer) if completion.logprobs else None,
            "finish_reason": completion.finish_reason,
        }
        for index, completion in enumerate(completions)
    ]
    used = [completion.usage for completion in completions]
    total = Usage(
        sum(usage.prompt_tokens for usage in used),
        sum(usage.completion_tokens for usage in used),
        sum(usage.cached_tokens for usage in used),
    )
    return head.to_json(chunk=False) | {"choices": choices, "usage": usage_json(total)}


def _call_json(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _token_rows(completion: Completion, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Every generated token, the one that ended the text included."""
    rows = []
    for id, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
        data = tokenizer.token_bytes(id)
        text = data.decode("utf-8", "replace")
        rows.append({"token": text, "logprob": logprob, "bytes": list(data), "top_logprobs": []})
    return rows


def _text_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    rows = _token_rows(completion, tokenizer)
    offsets, at = [], 0
    for row in rows:
        offsets.append(at)
        at += len(row["token"])
    return {
        "tokens": [row["token"] for row in rows],
        "token_logprobs": [row["logprob"] for row in rows],
        "top_logprobs": None,
        "text_offset": offsets,
    }


# -- streams ---------------------------------------------------------------------------------------------------


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


async def events(
    head: Head, deltas: AsyncGenerator[Delta, None], *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """A whole stream. A request that fails under way ends it with an error object."""
    if head.chat:
        yield _chunk(head, {"role": "assistant", "content": ""}, include_usage=include_usage)
    async with contextlib.aclosing(deltas):
        async for delta in deltas:
            for value in _delta_events(head, delta, include_usage=include_usage):
                yield value
    yield DONE


def _delta_events(head: Head, delta: Delta, *, include_usage: bool) -> Iterator[bytes]:
    if delta.text:
        yield _text_chunk(head, delta.text, include_usage=include_usage)
    for part in _call_parts(delta.tool_calls):
        yield _chunk(head, {"tool_calls": [part]}, include_usage=include_usage)
    if delta.finish_reason in BROKEN:
        yield event(error_body(BROKEN[delta.finish_reason], kind="server_error"))
    elif delta.finish_reason is not None:
        yield _finish_chunk(head, delta.finish_reason, include_usage=include_usage)
        if include_usage:
            yield event(head.to_json(chunk=True) | {"choices": [], "usage": usage_json(delta.usage or Usage())})


def _chunk(head: Head, delta: dict[str, Any], *, include_usage: bool, reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return _event_of(head, choice, include_usage=include_usage)


def _text_chunk(head: Head, text: str, *, include_usage: bool, reason: str | None = None) -> bytes:
    if head.chat:
        return _chunk(head, {"content": text}, include_usage=include_usage)
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
    return _event_of(head, choice, include_usage=include_usage)


def _finish_chunk(head: Head, reason: str, *, include_usage: bool) -> bytes:
    if head.chat:
        return _chunk(head, {}, include_usage=include_usage, reason=reason)
    return _text_chunk(head, "", include_usage=include_usage, reason=reason)


def _event_of(head: Head, choice: dict[str, Any], *, include_usage: bool) -> bytes:
    """With include_usage every chunk has the field, null until the last (OpenAI's form)."""
    extra: dict[str, Any] = {"usage": None} if include_usage else {}
    return event(head.to_json(chunk=True) | {"choices": [choice]} | extra)


def _call_parts(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Each call as two fragments: id and name, then the arguments."""
    parts: list[dict[str, Any]] = []
    for index, call in enumerate(calls):
        opening = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}
        parts += [{"index": index, **opening}, {"index": index, "function": {"arguments": call.arguments}}]
    return parts
