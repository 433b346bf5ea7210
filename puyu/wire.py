"""OpenAI's protocol as a client sees it: bodies that are sent, answers and streams that are read. Pure functions.

    >>> request_body(GenerateRequest("2+2="), "tiny")[0]
    '/v1/completions'

It opens no connection and knows no address; `puyu.client` does. Format: platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from puyu.errors import RequestError, ResourceError
from puyu.types import (
    Completion,
    Delta,
    FinishReason,
    GenerateRequest,
    Guide,
    Message,
    SamplingParams,
    Scored,
    ToolCall,
    Usage,
)

FINISH: Mapping[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "abort": "abort",
    "content_filter": "abort",
}


# -- bodies: what is sent -------------------------------------------------------------------------------------


def request_body(request: GenerateRequest, model: str, *, stream: bool = False) -> tuple[str, dict[str, Any]]:
    """The path and the JSON body: chat for messages, completions for plain text."""
    _check_sendable(request)
    body: dict[str, Any] = {"model": model, **_params_body(request.params)}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if request.params.guide is not None:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": _schema(request.params.guide)},
        }
    if not request.is_chat:
        if request.params.logprobs:
            body["logprobs"] = 1
        prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        return "/v1/completions", body | {"prompt": prompt}
    body["messages"] = [item.to_openai() for item in request.prompt if isinstance(item, Message)]
    if request.tools:
        body["tools"] = [tool.to_openai() for tool in request.tools]
    if request.params.logprobs:
        body["logprobs"] = True
    return "/v1/chat/completions", body


def _params_body(params: SamplingParams) -> dict[str, Any]:
    """OpenAI's fields always; fields that only some servers know, just where they differ from the default."""
    body: dict[str, Any] = {"max_tokens": params.max_tokens, "temperature": params.temperature, "top_p": params.top_p}
    if params.seed is not None:
        body["seed"] = params.seed
    if params.stop:
        body["stop"] = list(params.stop)
    if params.top_k:
        body["top_k"] = params.top_k
    if params.stop_token_ids:
        body["stop_token_ids"] = list(params.stop_token_ids)
    if params.ignore_eos:
        body["ignore_eos"] = True
    for name in ("min_p", "min_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        if getattr(params, name) != getattr(_DEFAULT, name):
            body[name] = getattr(params, name)
    if params.logit_bias:
        body["logit_bias"] = {str(id): bias for id, bias in params.logit_bias.items()}
    return body


_DEFAULT = SamplingParams()
_LOCAL_PARAMS = ("top_logprobs", "prompt_logprobs", "bad_words", "n", "best_of", "beam_width")
_LOCAL_LIMITS = ("priority", "timeout", "queue_timeout", "adapter")


def _check_sendable(request: GenerateRequest) -> None:
    """RequestError for what the wire has no word for: nothing that would change the answer is left out in silence."""
    plain = GenerateRequest("")
    wrong = [name for name in _LOCAL_PARAMS if getattr(request.params, name) != getattr(_DEFAULT, name)]
    wrong += [name for name in _LOCAL_LIMITS if getattr(request, name) != getattr(plain, name)]
    guide = request.params.guide
    if guide is not None and (guide.kind != "json_schema" or isinstance(request.prompt, str)):
        wrong.append("guide")
    if wrong:
        raise RequestError(
            f"{wrong[0]} cannot be sent to a server", param=wrong[0], remedy="use an LLM in this process"
        )


def _schema(guide: Guide) -> Any:
    return json.loads(guide.value) if isinstance(guide.value, str) else guide.value


# -- answers: what is read ------------------------------------------------------------------------------------


def read_completion(answer: Any) -> Completion:
    """A whole answer of either route."""
    with _shape("an answer with 'choices'"):
        choice = answer["choices"][0]
        usage = _read_usage(answer.get("usage"))
        reason = _finish(choice.get("finish_reason"))
        if "message" not in choice:
            logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or ()
            text = choice["text"]
            return Completion(Message("assistant", text), reason, usage, logprobs=tuple(logprobs), raw_text=text)
        message = Message.from_openai({**choice["message"], "role": "assistant"})
        logprobs = (choice.get("logprobs") or {}).get("content") or ()
        values = tuple(float(item["logprob"]) for item in logprobs)
        return Completion(message, reason, usage, logprobs=values, raw_text=message.text)


@contextlib.contextmanager
def _shape(wanted: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        remedy = "check that the URL is that of an OpenAI-compatible server"
        raise ResourceError(f"the server's answer is not {wanted} ({error!r})", remedy=remedy) from error


def _finish(reason: str | None) -> FinishReason:
    return FINISH.get(reason or "", "error")


def _read_usage(usage: Mapping[str, Any] | None) -> Usage:
    if not usage:
        return Usage()
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Usage(usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0, cached)


def read_models(answer: Any) -> list[str]:
    with _shape("a list of models"):
        return [str(row["id"]) for row in answer["data"]]


def read_scores(answer: Any) -> list[Scored]:
    with _shape("a list of scores"):
        return [
            Scored(float(row["logprob"]), int(row["num_tokens"]), int(row["num_bytes"]), bool(row["is_greedy"]))
            for row in answer["scores"]
        ]


def read_echo(answer: Any, context: str, continuation: str) -> Scored:
    """Sum the log-probs of the tokens that start inside the continuation (never of the token made after it)."""
    with _shape("a completion with echoed log-probs"):
        logprobs = answer["choices"][0]["logprobs"]
        rows = list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["text_offset"], strict=True))
        best = logprobs.get("top_logprobs") or [None] * len(rows)
    end = len(context) + len(continuation)
    inside = [i for i, (_, value, offset) in enumerate(rows) if len(context) <= offset < end and value is not None]
    greedy = all(bool(best[i]) and max(best[i], key=best[i].get) == rows[i][0] for i in inside)
    total = float(sum(rows[i][1] for i in inside))
    return Scored(total, len(inside), len(continuation.encode()), greedy and bool(inside))


# -- streams --------------------------------------------------------------------------------------------------


class SseDecoder:
    """Bytes in any pieces -> the JSON objects of `data:` lines. Splits at newline bytes only, so that characters
    that Python calls line ends (U+2028, U+0085) stay inside their text."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, chunk: bytes) -> list[dict[str, Any]]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [event for line in lines if (event := _sse_event(line)) is not None]


def _sse_event(line: bytes) -> dict[str, Any] | None:
    if not line.startswith(b"data:"):
        return None
    data = line[5:].strip()
    if data == b"[DONE]":
        return None
    try:
        event = json.loads(data)
    except ValueError as error:
        raise ResourceError(f"the server's stream holds a line that is not JSON: {data[:80]!r}") from error
    return event if isinstance(event, dict) else None


@dataclass(slots=True)
class StreamReader:
    """Chunks of a stream -> Deltas. Tool calls are gathered and given whole, in call order, at the end."""

    calls: dict[int, ToolCall] = field(default_factory=dict)
    reason: FinishReason | None = None
    usage: Usage = field(default_factory=Usage)

    def push(self, event: Mapping[str, Any]) -> Iterator[Delta]:
        if "error" in event:
            raise _stream_error(event["error"])
        self.usage = _read_usage(event["usage"]) if event.get("usage") else self.usage
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            for fragment in delta.get("tool_calls") or ():
                self._gather(fragment)
            if choice.get("finish_reason"):
                self.reason = _finish(choice["finish_reason"])
            if text := delta.get("content") or choice.get("text"):
                yield Delta(text)

    def _gather(self, fragment: Mapping[str, Any]) -> None:
        function = fragment.get("function") or {}
        index = int(fragment.get("index") or 0)
        known = self.calls.get(index, ToolCall("", ""))
        self.calls[index] = replace(
            known,
            name=known.name + (function.get("name") or ""),
            arguments=known.arguments + (function.get("arguments") or ""),
            id=known.id or fragment.get("id") or "",
        )

    def finish(self) -> Delta:
        """The last delta; a stream that ended without a finish reason was cut."""
        if self.reason is None:
            remedy = "ask again; look into the server's log"
            raise ResourceError("the stream ended before the answer was complete", remedy=remedy)
        calls = tuple(self.calls[index] for index in sorted(self.calls))
        return Delta(tool_calls=calls, finish_reason=self.reason, usage=self.usage)


def _stream_error(error: Any) -> RequestError | ResourceError:
    if isinstance(error, Mapping) and error.get("type") == "invalid_request_error":
        return RequestError(str(error.get("message")), param=error.get("param"))
    message = error.get("message") if isinstance(error, Mapping) else error
    return ResourceError(f"the server stopped the stream: {message}", remedy="look into the server's log")
