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
    CallPart,
    Completion,
    Delta,
    FinishReason,
    GenerateRequest,
    Guide,
    Message,
    SamplingParams,
    Scored,
    ToolCall,
    ToolChoice,
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
    """The path and the JSON body: chat for messages, completions for plain text. An adapter is asked for as `model`."""
    _check_sendable(request)
    body: dict[str, Any] = {"model": request.adapter or model, **_params_body(request.params), **_limits_body(request)}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if not request.is_chat:
        prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        return "/v1/completions", body | _text_body(request.params) | {"prompt": prompt}
    body["messages"] = [item.to_openai() for item in request.prompt if isinstance(item, Message)]
    if request.tools:
        body |= {"tools": [tool.to_openai() for tool in request.tools], **_choice_body(request.tool_choice)}
    if request.params.logprobs:
        body["logprobs"] = True
    if request.params.guide is not None:
        body |= _guide_body(request.params.guide)
    if request.template:
        body["chat_template_kwargs"] = dict(request.template)
    return "/v1/chat/completions", body


def _params_body(params: SamplingParams) -> dict[str, Any]:
    """OpenAI's fields always; fields that only some servers know, just where they differ from the default."""
    body: dict[str, Any] = {"max_tokens": params.max_tokens, "temperature": params.temperature, "top_p": params.top_p}
    for name in _OPTIONAL_PARAMS:
        value = getattr(params, name)
        if value != getattr(_DEFAULT, name):
            body[name] = list(value) if isinstance(value, tuple) else value
    if params.logit_bias:
        body["logit_bias"] = {str(id): bias for id, bias in params.logit_bias.items()}
    return body


def _limits_body(request: GenerateRequest) -> dict[str, Any]:
    given = {"priority": request.priority or None, "timeout": request.timeout, "queue_timeout": request.queue_timeout}
    return {name: value for name, value in given.items() if value is not None}


def _text_body(params: SamplingParams) -> dict[str, Any]:
    """What plain text has in other words than chat."""
    body: dict[str, Any] = {"logprobs": 1} if params.logprobs else {}
    if params.best_of:
        body["best_of"] = params.best_of
    return body | (_guide_body(params.guide, everywhere=True) if params.guide is not None else {})


def _guide_body(guide: Guide, *, everywhere: bool = False) -> dict[str, Any]:
    """OpenAI's word for a schema in a chat; vLLM's for other forms and places."""
    value = json.loads(guide.value) if guide.kind == "json_schema" and isinstance(guide.value, str) else guide.value
    if guide.kind == "json_schema" and not everywhere:
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": value}}}
    kind = "json" if guide.kind == "json_schema" else guide.kind
    return {"structured_outputs": {kind: list(value) if isinstance(value, tuple) else value}}


def _choice_body(choice: ToolChoice) -> dict[str, Any]:
    body: dict[str, Any] = {} if choice.parallel else {"parallel_tool_calls": False}
    names = [{"type": "function", "function": {"name": name}} for name in choice.names]
    if choice.mode == "required" and len(names) == 1:
        return body | {"tool_choice": names[0]}
    if names:
        return body | {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": names}}}
    return body if choice.mode == "auto" else body | {"tool_choice": choice.mode}


_DEFAULT = SamplingParams()
_OPTIONAL_PARAMS = (
    *("seed", "stop", "top_k", "stop_token_ids", "ignore_eos", "min_p", "min_tokens", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "n", "bad_words", "beam_width", "length_penalty"),
)
_LOCAL_PARAMS = ("top_logprobs", "prompt_logprobs")


def _check_sendable(request: GenerateRequest) -> None:
    """RequestError for what the wire has no word for: nothing that would change the answer is left out in silence."""
    wrong = [name for name in _LOCAL_PARAMS if getattr(request.params, name) != getattr(_DEFAULT, name)]
    if request.params.best_of and request.is_chat:
        wrong.append("best_of")
    if wrong:
        raise RequestError(
            f"{wrong[0]} cannot be sent to a server", param=wrong[0], remedy="use an LLM in this process"
        )


# -- answers: what is read ------------------------------------------------------------------------------------


def read_completion(answer: Any) -> Completion:
    """A whole answer of either route."""
    with _shape("an answer with 'choices'"):
        usage = _read_usage(answer.get("usage"))
        first, *others = [_read_choice(choice, usage) for choice in answer["choices"]]
        return replace(first, alternatives=tuple(others))


def _read_choice(choice: Mapping[str, Any], usage: Usage) -> Completion:
    reason, logprobs = _finish(choice.get("finish_reason")), _logprobs_of(choice)
    if "message" not in choice:
        text = choice["text"]
        return Completion(Message("assistant", text), reason, usage, logprobs=logprobs, raw_text=text)
    message = Message.from_openai({**choice["message"], "role": "assistant"})
    return Completion(message, reason, usage, logprobs=logprobs, raw_text=message.text)


def _logprobs_of(choice: Mapping[str, Any]) -> tuple[float, ...]:
    """Of the generated tokens, in either route's form."""
    found = choice.get("logprobs") or {}
    return tuple(float(item["logprob"]) for item in found.get("content") or ()) or tuple(
        value for value in found.get("token_logprobs") or () if value is not None
    )


@contextlib.contextmanager
def _shape(wanted: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
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


def read_vectors(answer: Any) -> list[list[float]]:
    """Embeddings in the order of their inputs."""
    with _shape("a list of embeddings"):
        rows = sorted(answer["data"], key=lambda row: int(row["index"]))
        return [[float(value) for value in row["embedding"]] for row in rows]


def read_rewards(answer: Any) -> list[float]:
    with _shape("a list of rewards"):
        return [float(row["score"]) for row in sorted(answer["data"], key=lambda row: int(row["index"]))]


def read_ranking(answer: Any) -> list[tuple[int, float]]:
    """(place of the document, relevance), the most relevant first."""
    with _shape("a ranking"):
        return [(int(row["index"]), float(row["relevance_score"])) for row in answer["results"]]


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
    """Chunks of a stream -> Deltas. Tool calls are given as they come, and whole, in call order, at the end."""

    calls: dict[tuple[int, int], ToolCall] = field(default_factory=dict)
    """By answer and place in it."""
    reasons: dict[int, FinishReason] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)

    def push(self, event: Mapping[str, Any]) -> Iterator[Delta]:
        if "error" in event:
            raise _stream_error(event["error"])
        self.usage = _read_usage(event["usage"]) if event.get("usage") else self.usage
        for choice in event.get("choices") or ():
            index, delta = int(choice.get("index") or 0), choice.get("delta") or {}
            parts = tuple(self._gather(index, fragment) for fragment in delta.get("tool_calls") or ())
            if choice.get("finish_reason"):
                self.reasons[index] = _finish(choice["finish_reason"])
            text, logprobs = delta.get("content") or choice.get("text") or "", _logprobs_of(choice)
            if text or parts or logprobs:
                yield Delta(text, index=index, call_parts=parts, logprobs=logprobs)

    def _gather(self, index: int, fragment: Mapping[str, Any]) -> CallPart:
        function = fragment.get("function") or {}
        place = int(fragment.get("index") or 0)
        part = CallPart(place, function.get("arguments") or "", function.get("name") or "", fragment.get("id") or "")
        known = self.calls.get((index, place), ToolCall("", ""))
        self.calls[index, place] = ToolCall(
            known.name + part.name, known.arguments + part.arguments, known.id or part.id
        )
        return part

    def finish(self) -> list[Delta]:
        """The end of each answer, the usage with the last; a stream that ended without a finish reason was cut."""
        if not self.reasons:
            remedy = "ask again; look into the server's log"
            raise ResourceError("the stream ended before the answer was complete", remedy=remedy)
        ends = [
            Delta(tool_calls=self._calls_of(index), finish_reason=self.reasons[index], index=index)
            for index in sorted(self.reasons)
        ]
        return [*ends[:-1], replace(ends[-1], usage=self.usage)]

    def _calls_of(self, index: int) -> tuple[ToolCall, ...]:
        return tuple(
            call for (answer, _), call in sorted(self.calls.items(), key=lambda item: item[0]) if answer == index
        )


def _stream_error(error: Any) -> RequestError | ResourceError:
    if isinstance(error, Mapping) and error.get("type") == "invalid_request_error":
        return RequestError(str(error.get("message")), param=error.get("param"))
    message = error.get("message") if isinstance(error, Mapping) else error
    return ResourceError(f"the server stopped the stream: {message}", remedy="look into the server's log")
