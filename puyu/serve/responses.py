"""POST /v1/responses, the stateless part: text and function calls in and out, streamed or not.

Nothing is kept between requests: `store: true`, `previous_response_id`, `conversation` and `background` are refused by
name, and the conversation so far travels in `input`. Reference: platform.openai.com/docs/api-reference/responses.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from pydantic import Field

from puyu.errors import InputError, RequestError
from puyu.serve.answers import BROKEN, dumps
from puyu.serve.chat import FunctionSpec, ToolBody, response_guide, tool_choice
from puyu.serve.protocol import SEED, Body, List, Part, same
from puyu.types import CallPart, Completion, Delta, FinishReason, GenerateRequest, Message, SamplingParams, Usage

_TEXT_KINDS = ("input_text", "output_text", "text")


class FlatTool(FunctionSpec):
    """A function as this route writes it: name and parameters beside the type."""

    type: str = "function"


class TextOptions(Part):
    format: dict[str, Any] | None = None
    verbosity: None = None


class ResponsesBody(Body):
    """POST /v1/responses."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": (False,),
        "store": (False,),
        "truncation": ("disabled",),
        "include": ([],),
        "service_tier": ("auto", "default"),
        "stream_options": ({}, {"include_obfuscation": False}),
        "previous_response_id": (),
        "conversation": (),
        "reasoning": ({"effort": "none"},),
    }

    input: str | List[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    tools: List[FlatTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    seed: int | None = SEED
    background: Any = None
    store: Any = None
    truncation: Any = None
    include: Any = None
    service_tier: Any = None
    stream_options: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    reasoning: Any = None

    @property
    def words(self) -> Mapping[str, str]:
        """What the engine's parameters are called here."""
        return {"guide": "text", "messages": "input", "max_tokens": "max_output_tokens"}

    def to_request(self, defaults: SamplingParams, *, context: int) -> GenerateRequest:
        """RequestError names the field that cannot be used."""
        for name, allowed in self.neutral.items():
            value = getattr(self, name)
            if value is not None and not any(same(value, item) for item in allowed):
                raise RequestError(f"{name}={value!r} is not supported by this server", param=name)
        given: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        params = replace(defaults, **{name: value for name, value in given.items() if value is not None})
        guide = response_guide(self._format())
        params = replace(params, max_tokens=self.max_output_tokens or context, guide=guide)
        choice = _nested_choice(self.tool_choice)
        parallel = self.parallel_tool_calls is not False
        specs, chosen = tool_choice([_nested(tool) for tool in self.tools or ()], choice, parallel=parallel)
        return GenerateRequest(self._messages(), params, specs, chosen)

    def _format(self) -> dict[str, Any] | None:
        """`text.format` as chat's `response_format`: the schema stands one level higher here."""
        form = self.text.format if self.text is not None else None
        if form is None or form.get("type") != "json_schema":
            return form
        return {"type": "json_schema", "json_schema": form}

    def _messages(self) -> tuple[Message, ...]:
        turns = [Message("system", self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return (*turns, Message("user", self.input))
        for index, item in enumerate(self.input):
            try:
                _add_item(turns, item)
            except InputError as error:
                raise RequestError(error.message, param=f"input[{index}]", remedy=error.remedy) from error
        return tuple(turns)


def _nested_choice(choice: Any) -> Any:
    """`tool_choice` in chat's form: names stand one level higher here."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function" and "function" not in choice:
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        tools = [_nested_choice(tool) for tool in choice["tools"]]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    return choice


def _nested(tool: FlatTool) -> ToolBody:
    plain = FunctionSpec(name=tool.name, description=tool.description, parameters=tool.parameters)
    return ToolBody(type=tool.type, function=plain)


def _add_item(turns: list[Message], item: Mapping[str, Any]) -> None:
    """One input item: a message, a call (part of the assistant's turn), or what a call gave."""
    kind = item.get("type", "message")
    if kind == "message":
        turns.append(Message.from_openai({"role": item.get("role"), "content": _content(item.get("content"))}))
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        turn = Message.from_openai({"role": "assistant", "content": "", "tool_calls": [call]})
        last = turns[-1] if turns and turns[-1].role == "assistant" else None
        if last is not None:
            turns[-1] = replace(last, tool_calls=(*last.tool_calls, *turn.tool_calls))
        else:
            turns.append(turn)
    elif kind == "function_call_output":
        output = item.get("output")
        content = output if isinstance(output, str) else _content(output)
        turns.append(Message.from_openai({"role": "tool", "content": content, "tool_call_id": item.get("call_id")}))
    else:
        raise InputError(f"items of type {kind!r} are not supported", remedy="use message or function_call")


def _content(content: Any) -> Any:
    """Parts of this route as parts of chat; what is not text is refused where messages are read."""
    if not isinstance(content, list):
        return content
    return [
        {"type": "text", "text": part.get("text")}
        if isinstance(part, Mapping) and part.get("type") in _TEXT_KINDS
        else part
        for part in content
    ]


# -- answers ---------------------------------------------------------------------------------------------------


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


@dataclass(slots=True)
class Response:
    """The object that comes back; its output grows while it is streamed."""

    model: str
    body: ResponsesBody
    id: str = field(default_factory=lambda: _new_id("resp"))
    created_at: int = field(default_factory=lambda: int(time.time()))
    output: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self, *, status: str, usage: Usage | None = None, reason: FinishReason | None = None) -> dict[str, Any]:
        body = self.body
        error = {"code": "server_error", "message": BROKEN[reason]} if reason in BROKEN else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": list(self.output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": (body.text.format if body.text else None) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [_tool_json(tool) for tool in body.tools or ()],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage_json(usage),
            "user": body.user,
        }


def _tool_json(tool: FlatTool) -> dict[str, Any]:
    return {"strict": False, "parameters": None, **tool.model_dump(exclude_none=True)}


def _usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def status_of(reason: FinishReason) -> str:
    """OpenAI's word for how an answer ended."""
    return "failed" if reason in BROKEN else "incomplete" if reason == "length" else "completed"


def whole_response(model: str, body: ResponsesBody, completion: Completion) -> dict[str, Any]:
    """The body of an answer that was not streamed."""
    response, reason = Response(model, body), completion.finish_reason
    ends = "incomplete" if reason == "length" else "completed"
    calls = completion.message.tool_calls
    if completion.text or not calls:
        response.output.append(_message(_new_id("msg"), completion.text, status=ends))
    response.output += [_call(_new_id("fc"), call.id, call.name, call.arguments, ends) for call in calls]
    return response.to_json(status=status_of(reason), usage=completion.usage, reason=reason)


def _message(id: str, text: str | None, *, status: str) -> dict[str, Any]:
    content = [] if text is None else [_text_part(text)]
    return {"type": "message", "id": id, "status": status, "role": "assistant", "content": content}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(id: str, call_id: str, name: str, arguments: str, status: str, /) -> dict[str, Any]:
    base = {"type": "function_call", "id": id, "call_id": call_id, "name": name}
    return base | {"arguments": arguments, "status": status}


class ResponseWriter:
    """Events of one stream: each output item is opened, filled and closed before the next begins."""

    def __init__(self, model: str, body: ResponsesBody) -> None:
        self.response = Response(model, body)
        self._number = 0
        self._item: dict[str, Any] | None = None
        self._written = ""
        self._call_index = -1

    def open(self) -> bytes:
        """The empty response."""
        shown = self.response.to_json(status="in_progress")
        return self._event("response.created", response=shown) + self._event("response.in_progress", response=shown)

    def push(self, deltas: Iterable[Delta]) -> bytes:
        """Events of what has come."""
        return b"".join([self._of(delta) for delta in deltas])

    def close(self) -> bytes:
        """Nothing: the last event says that it is the last."""
        return b""

    def _of(self, delta: Delta) -> bytes:
        data = self._text(delta.text) if delta.text else b""
        for part in delta.call_parts:
            data += self._part(part)
        if delta.finish_reason is not None:
            data += self._end(delta.finish_reason, delta.usage)
        return data

    def _text(self, text: str) -> bytes:
        data = b""
        if self._item is None or self._item["type"] != "message":
            data = self._close_item("completed")
            data += self._open_item(_message(_new_id("msg"), None, status="in_progress"))
            data += self._event("response.content_part.added", **self._place(), part=_text_part(""))
        self._written += text
        return data + self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def _part(self, part: CallPart) -> bytes:
        data = b""
        if part.index != self._call_index:
            data = self._close_item("completed")
            self._call_index = part.index
            data += self._open_item(_call(_new_id("fc"), part.id, part.name, "", "in_progress"))
        if part.arguments:
            self._written += part.arguments
            data += self._event("response.function_call_arguments.delta", **self._at(), delta=part.arguments)
        return data

    def _open_item(self, item: dict[str, Any]) -> bytes:
        self._item, self._written = item, ""
        return self._event("response.output_item.added", output_index=len(self.response.output), item=item)

    def _close_item(self, status: str) -> bytes:
        item, text = self._item, self._written
        if item is None:
            return b""
        if item["type"] == "message":
            done = item | {"status": status, "content": [_text_part(text)]}
            data = self._event("response.output_text.done", **self._place(), text=text, logprobs=[])
            data += self._event("response.content_part.done", **self._place(), part=_text_part(text))
        else:
            done = item | {"status": status, "arguments": text}
            name = item["name"]
            data = self._event("response.function_call_arguments.done", **self._at(), name=name, arguments=text)
        data += self._event("response.output_item.done", output_index=len(self.response.output), item=done)
        self.response.output.append(done)
        self._item = None
        return data

    def _end(self, reason: FinishReason, usage: Usage | None) -> bytes:
        data = b""
        if self._item is None and not self.response.output and reason not in BROKEN:
            data += self._text("")
        data += self._close_item("completed" if status_of(reason) == "completed" else "incomplete")
        status = status_of(reason)
        shown = self.response.to_json(status=status, usage=usage or Usage(), reason=reason)
        return data + self._event(f"response.{status}", response=shown)

    def _at(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self.response.output)}

    def _place(self) -> dict[str, Any]:
        return {**self._at(), "content_index": 0}

    def _event(self, kind: str, **values: Any) -> bytes:
        value = {"type": kind, "sequence_number": self._number, **values}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + dumps(value) + b"\n\n"
