"""What all request bodies share: strict models, sampling fields, OpenAI's error object. Knows no route.

A field that is unknown, of the wrong type, or not supported is refused by name (400); nothing is ignored that
would change the answer. `SamplingParams` ranges are the engine front's to check. Reference:
platform.openai.com/docs/api-reference; extensions (top_k, min_p, repetition_penalty, min_tokens, ignore_eos,
stop_token_ids, bad_words, priority, structured_outputs) have vLLM's names, `timeout` and `queue_timeout` are ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from puyu.errors import RequestError
from puyu.types import GenerateRequest, Guide, SamplingParams

T = TypeVar("T")
MAX_DEPTH = 64
List = Annotated[list[T], Field(fail_fast=True)]
"""A list that is refused at its first wrong item: a report of every one of a million would take seconds."""
SEED = Field(default=None, ge=-(2**63), lt=2**63)


class Part(BaseModel):
    """Base of what stands inside bodies: no coercion, no unknown field."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Body(Part):
    """Base of every body: also no text that is not valid Unicode, and no endless nesting."""

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
        level = [inner for item in level if isinstance(item, dict | list) for inner in _inside(item)]
        if not level:
            return ""
    return f"the body is nested more than {MAX_DEPTH} levels deep"


def _inside(value: dict[Any, Any] | list[Any]) -> list[Any]:
    return [*value.keys(), *value.values()] if isinstance(value, dict) else value


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


class StreamOptions(Part):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted and without effect: nothing is padded."""


class StructuredOutputs(Part):
    """vLLM's field for forms beyond JSON Schema: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: List[str] | None = None
    grammar: str | None = None

    def guide(self) -> Guide:
        """RequestError unless exactly one form is given."""
        given = {
            "json_schema": self.json_,
            "regex": self.regex,
            "choice": None if self.choice is None else tuple(self.choice),
            "grammar": self.grammar,
        }
        asked: list[Any] = [(kind, value) for kind, value in given.items() if value is not None]
        if len(asked) != 1:
            message = "structured_outputs holds exactly one of json, regex, choice, grammar"
            raise RequestError(message, param="structured_outputs")
        return Guide(*asked[0])


class Sampling(Body):
    """What all generation shares. `neutral`: fields that are not supported, with values that say nothing."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"service_tier": ("auto", "default")}

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = SEED
    stop: str | List[str] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    service_tier: Any = None
    # extensions
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    length_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: List[int] | None = None
    bad_words: List[str] | None = None
    beam_width: int | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)
    timeout: float | None = None
    queue_timeout: float | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def words(self) -> Mapping[str, str]:
        """What the engine's parameters are called here."""
        return {"guide": "structured_outputs"}

    def check_supported(self) -> None:
        """RequestError for the first field that asks for something this server cannot do."""
        for name, allowed in self.neutral.items():
            value = getattr(self, name)
            if value is not None and not any(same(value, item) for item in allowed):
                raise RequestError(f"{name}={value!r} is not supported by this server", param=name)
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")

    def params(self, defaults: SamplingParams, *, max_tokens: int, top_logprobs: int | None) -> SamplingParams:
        """What was given, over the server's defaults. `top_logprobs` None asks for no log-probabilities."""
        given = {name: getattr(self, name) for name in _PLAIN if getattr(self, name) is not None}
        if self.top_k is not None:
            given["top_k"] = 0 if self.top_k == -1 else self.top_k
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.stop_token_ids is not None:
            given["stop_token_ids"] = tuple(self.stop_token_ids)
        if self.bad_words is not None:
            given["bad_words"] = tuple(self.bad_words)
        if self.logit_bias is not None:
            given["logit_bias"] = _bias(self.logit_bias)
        if self.structured_outputs is not None:
            given["guide"] = self.structured_outputs.guide()
        given |= {"logprobs": top_logprobs is not None, "top_logprobs": top_logprobs or 0, "max_tokens": max_tokens}
        return replace(defaults, **given)

    def limited(self, request: GenerateRequest) -> GenerateRequest:
        """The request with this body's priority and limits of time."""
        return replace(request, priority=self.priority or 0, timeout=self.timeout, queue_timeout=self.queue_timeout)


_PLAIN = (
    *("temperature", "top_p", "seed", "ignore_eos", "min_p", "repetition_penalty", "frequency_penalty"),
    *("presence_penalty", "length_penalty", "min_tokens", "n", "beam_width"),
)


def same(value: Any, item: Any) -> bool:
    """Equal, where True is not 1."""
    return bool(value == item) and isinstance(value, bool) == isinstance(item, bool)


def _bias(value: Mapping[str, float]) -> dict[int, float]:
    """Token ids come as text, since JSON knows no other keys."""
    wrong = next((key for key in value if not (key.isascii() and key.isdigit() and len(key) < 16)), None)
    if wrong is not None:
        raise RequestError(f"logit_bias has the key {wrong!r}, which is no token id", param="logit_bias")
    return {int(key): bias for key, bias in value.items()}


def json_guide(schema: Any, *, param: str) -> Guide:
    """A JSON Schema as a guide; anything but an object is refused."""
    if not isinstance(schema, Mapping):
        raise RequestError("a JSON Schema is an object", param=param)
    return Guide("json_schema", schema)


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
