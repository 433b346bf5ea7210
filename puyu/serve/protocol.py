"""OpenAI's request bodies as strict models, and what they mean to the engine.

A field that is unknown, of the wrong type, or not supported is refused by name (400); nothing is ignored that
would change the answer. `SamplingParams` ranges are the engine front's to check. Reference:
platform.openai.com/docs/api-reference; extensions (top_k, min_p, repetition_penalty, min_tokens, ignore_eos,
stop_token_ids) have vLLM's names.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from puyu.errors import InputError, RequestError
from puyu.types import GenerateRequest, Guide, Message, SamplingParams, ToolSpec

MAX_PAIRS = 4096
MAX_DEPTH = 64
SEED = Field(default=None, ge=-(2**63), lt=2**63)


class Body(BaseModel):
    """Base of every body: no coercion, no unknown field, no text that is not valid Unicode."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_plain(cls, value: Any) -> Any:
        if wrong := _not_plain(value):
            raise ValueError(wrong)
        return value


def _not_plain(value: Any) -> str:
    """Why a body cannot be used further on: nested without end, or text that no tokenizer can read."""
    level = [value]
    for _ in range(MAX_DEPTH):
        if any(isinstance(item, str) and not _is_unicode(item) for item in level):
            return "the body holds a lone surrogate, which is not valid Unicode"
        level = [inner for item in level for inner in _inside(item)]
        if not level:
            return ""
    return f"the body is nested more than {MAX_DEPTH} levels deep"


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list) else []


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampling(Body):
    """What chat and completions share. `neutral`: fields that are not supported, with values that say nothing."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "n": (1,),
        "service_tier": ("auto", "default"),
    }

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = SEED
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    n: Any = None
    service_tier: Any = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check_supported(self) -> None:
        """RequestError for the first field that asks for something this server cannot do."""
        for name, allowed in self.neutral.items():
            value = getattr(self, name)
            if value is not None and not any(_same(value, item) for item in allowed):
                raise RequestError(f"{name}={value!r} is not supported by this server", param=name)
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")

    def params(self, defaults: SamplingParams, *, max_tokens: int, logprobs: bool) -> SamplingParams:
        """What was given, over the server's defaults."""
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
            "stop": None if self.stop is None else _texts(self.stop),
            "stop_token_ids": None if self.stop_token_ids is None else tuple(self.stop_token_ids),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logit_bias": None if self.logit_bias is None else _bias(self.logit_bias),
            "min_tokens": self.min_tokens,
        }
        values = {name: value for name, value in given.items() if value is not None}
        return replace(defaults, max_tokens=max_tokens, logprobs=logprobs, **values)


def _same(value: Any, item: Any) -> bool:
    return bool(value == item) and isinstance(value, bool) == isinstance(item, bool)


def _bias(value: Mapping[str, float]) -> dict[int, float]:
    """Token ids come as text, since JSON knows no other keys."""
    wrong = next((key for key in value if not (key.isascii() and key.isdigit())), None)
    if wrong is not None:
        raise RequestError(f"logit_bias has the key {wrong!r}, which is no token id", param="logit_bias")
    return {int(key): bias for key, bias in value.items()}


def _texts(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


class ChatMessage(BaseModel):
    """One turn; what OpenAI's own answers carry beside it may come back and is not read."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    reasoning_content: Any = None


class FunctionSpec(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: str = "function"
    function: FunctionSpec


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **Sampling.neutral,
        "top_logprobs": (0,),
        "parallel_tool_calls": (True,),
        "modalities": (["text"],),
        "reasoning_effort": ("none",),
        "store": (False,),
        "tool_choice": ("auto", "none"),
    }

    messages: list[ChatMessage]
    tools: list[ToolBody] | None = None
    tool_choice: Any = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    top_logprobs: Any = None
    parallel_tool_calls: Any = None
    response_format: Any = None
    modalities: Any = None
    reasoning_effort: Any = None
    store: Any = None

    def to_request(self, defaults: SamplingParams, *, context: int) -> GenerateRequest:
        """RequestError names the field that cannot be used. Without a limit the answer may fill the context."""
        self.check_supported()
        if self.stream and self.logprobs:
            raise RequestError("logprobs are not available in a stream", param="logprobs")
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        if self.max_completion_tokens is not None and limit is not None and limit < 1:
            raise RequestError(f"max_completion_tokens must be at least 1, got {limit}", param="max_completion_tokens")
        max_tokens = context if limit is None else limit
        params = self.params(defaults, max_tokens=max_tokens, logprobs=bool(self.logprobs))
        params = replace(params, guide=_guide(self.response_format))
        tools = self.tools if self.tool_choice != "none" else None
        return GenerateRequest(read_messages(self.messages), params, tuple(_spec(tool) for tool in tools or ()))


def _guide(form: Any) -> Guide | None:
    """OpenAI's `response_format`; any JSON object is a schema too."""
    kind = form.get("type") if isinstance(form, Mapping) else None
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return Guide("json_schema", {"type": "object"})
    schema = form.get("json_schema") if kind == "json_schema" else None
    if isinstance(schema, Mapping) and isinstance(schema.get("schema"), Mapping):
        return Guide("json_schema", schema["schema"])
    remedy = "use {'type': 'json_schema', 'json_schema': {'name': ..., 'schema': {...}}}, json_object or text"
    raise RequestError(f"response_format {kind!r} cannot be read", param="response_format", remedy=remedy)


def read_messages(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """Messages of the house; RequestError names the place."""
    turns = []
    for index, message in enumerate(messages):
        try:
            turns.append(Message.from_openai(message.model_dump()))
        except InputError as error:
            raise RequestError(error.message, param=f"messages[{index}]", remedy=error.remedy) from error
    return tuple(turns)


def _spec(tool: ToolBody) -> ToolSpec:
    function = tool.function
    parameters = function.parameters or {"type": "object", "properties": {}}
    return ToolSpec(function.name, function.description or "", parameters)


class CompletionBody(Sampling):
    """POST /v1/completions. `prompt` is a text, several texts, or the ids of one text."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **Sampling.neutral,
        "best_of": (1,),
        "suffix": ("",),
        "logprobs": (0, 1),
        "echo": (False,),
    }

    prompt: str | list[str] | list[int]
    logprobs: Any = None
    echo: Any = None
    best_of: Any = None
    suffix: Any = None

    def to_requests(self, prompts: Sequence[str], defaults: SamplingParams) -> list[GenerateRequest]:
        """One request for each prompt."""
        self.check_supported()
        if self.stream and (self.logprobs is not None or len(prompts) > 1):
            wrong = "logprobs" if self.logprobs is not None else "prompt"
            raise RequestError(f"a stream has one prompt and no logprobs, see {wrong}", param=wrong)
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        params = self.params(defaults, max_tokens=max_tokens, logprobs=self.logprobs is not None)
        return [GenerateRequest(prompt, params) for prompt in prompts]


class ScoreBody(Body):
    """POST /score: log-likelihood of each (context, continuation)."""

    pairs: list[list[str]] = Field(max_length=MAX_PAIRS)

    def to_pairs(self) -> list[tuple[str, str]]:
        for index, pair in enumerate(self.pairs):
            if len(pair) != 2:
                raise RequestError("a pair is [context, continuation]", param=f"pairs[{index}]")
        return [(context, continuation) for context, continuation in self.pairs]


class TokenizeBody(Body):
    """POST /tokenize: ids of a text, or of a rendered chat."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[ToolBody] | None = None
    add_special_tokens: bool = True

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        return tuple(_spec(tool) for tool in self.tools or ())


class DetokenizeBody(Body):
    """POST /detokenize: the text of ids."""

    tokens: list[int]


# -- errors ----------------------------------------------------------------------------------------------------


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def explain(errors: Sequence[Mapping[str, Any]], model: type[BaseModel] | None) -> tuple[str, str | None]:
    """The first problem of a body as (message, param); an unknown field names the nearest one."""
    first = errors[0]
    place = [part for part in first["loc"] if part != "body"]
    param = _param(place)
    if first["type"] == "json_invalid":
        return f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}", None
    if not place and first["type"] in ("missing", "model_attributes_type", "model_type", "dict_type"):
        return "the body must be a JSON object, sent with Content-Type: application/json", None
    if first["type"] == "extra_forbidden":
        known = list(model.model_fields) if model is not None and len(place) == 1 else []
        near = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5)
        return f"unknown field {param!r}" + (f" (did you mean {near[0]!r}?)" if near else ""), param
    if first["type"] == "missing":
        return f"the field {param!r} is missing", param
    return f"{param or 'body'}: {first['msg']}", param


def _param(place: Sequence[str | int]) -> str | None:
    """`messages[0].role`; below other fields the top name is enough (unions add words of their own)."""
    if not place:
        return None
    deep = place if place[0] in ("messages", "tools") else place[:1]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in deep).removeprefix(".")
