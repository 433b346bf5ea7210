"""POST /v1/chat/completions: the body, and what it means to the engine.

Tools are offered, forbidden, or forced by `tool_choice`; forced calls follow a grammar, so that their arguments fit
the tool's schema. Answers are written by `answers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from puyu.errors import InputError, RequestError
from puyu.serve.protocol import List, Part, Sampling, json_guide
from puyu.types import GenerateRequest, Guide, Message, SamplingParams, ToolChoice, ToolSpec


class ChatMessage(Part):
    """One turn; what OpenAI's own answers carry beside it may come back and is not read."""

    role: str
    content: str | List[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: List[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: None = None
    reasoning_content: Any = None


class FunctionSpec(Part):
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Forced calls always follow the schema; free ones are the model's own words, whatever this says."""


class ToolBody(Part):
    type: str = "function"
    function: FunctionSpec


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **Sampling.neutral,
        "modalities": (["text"],),
        "reasoning_effort": ("none",),
        "store": (False,),
    }

    messages: List[ChatMessage]
    tools: List[ToolBody] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0)
    response_format: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    modalities: Any = None
    reasoning_effort: Any = None
    store: Any = None
    chat_template_kwargs: dict[str, Any] | None = None

    def to_request(self, defaults: SamplingParams, *, context: int) -> GenerateRequest:
        """RequestError names the field that cannot be used. Without a limit the answer may fill the context."""
        self.check_supported()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        if self.max_completion_tokens is not None and limit is not None and limit < 1:
            raise RequestError(f"max_completion_tokens must be at least 1, got {limit}", param="max_completion_tokens")
        top = (self.top_logprobs or 0) if self.logprobs else None
        params = self.params(defaults, max_tokens=context if limit is None else limit, top_logprobs=top)
        params = self._formed(params)
        tools, choice = tool_choice(self.tools, self.tool_choice, parallel=self.parallel_tool_calls is not False)
        request = GenerateRequest(read_messages(self.messages), params, tools, choice)
        return self.limited(replace(request, template=self.chat_template_kwargs or {}))

    @property
    def words(self) -> Mapping[str, str]:
        return super().words if self.structured_outputs is not None else {"guide": "response_format"}

    def _formed(self, params: SamplingParams) -> SamplingParams:
        guide = response_guide(self.response_format)
        if guide is not None and params.guide is not None:
            message = "response_format and structured_outputs say the same thing; give one"
            raise RequestError(message, param="structured_outputs")
        return params if guide is None else replace(params, guide=guide)


def response_guide(form: Mapping[str, Any] | None) -> Guide | None:
    """OpenAI's `response_format`; any JSON object is a schema too."""
    kind = form.get("type") if form is not None else None
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return Guide("json_schema", {"type": "object"})
    schema = form.get("json_schema") if kind == "json_schema" else None
    if isinstance(schema, Mapping) and isinstance(schema.get("schema"), Mapping):
        return json_guide(schema["schema"], param="response_format")
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


# -- tools -----------------------------------------------------------------------------------------------------


def tool_choice(
    tools: Sequence[ToolBody] | None, choice: str | Mapping[str, Any] | None, *, parallel: bool
) -> tuple[tuple[ToolSpec, ...], ToolChoice]:
    """The tools that are offered, and whether they must be called; RequestError names what cannot be read."""
    specs = tuple(tool_spec(tool) for tool in tools or ())
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise RequestError("two tools have the same name", param="tools")
    chosen = _read_choice(choice, parallel=parallel)
    if chosen.mode == "none":
        return (), chosen
    if chosen.mode == "required" and not specs:
        raise RequestError("tool_choice needs tools", param="tool_choice")
    unknown = next((name for name in chosen.names if name not in names), None)
    if unknown is not None:
        raise RequestError(f"tool_choice names {unknown!r}, which is none of the tools", param="tool_choice")
    if chosen.mode == "auto" and chosen.names:
        specs = tuple(spec for spec in specs if spec.name in chosen.names)
    return specs, chosen


def _read_choice(choice: str | Mapping[str, Any] | None, *, parallel: bool) -> ToolChoice:
    if choice in (None, "auto"):
        return ToolChoice(parallel=parallel)
    if choice == "none":
        return ToolChoice("none")
    if choice == "required":
        return ToolChoice("required", parallel=parallel)
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if isinstance(choice, Mapping) and kind == "function" and (name := _function_name(choice)):
        return ToolChoice("required", (name,), parallel=False)
    allowed = choice.get("allowed_tools") if isinstance(choice, Mapping) and kind == "allowed_tools" else None
    if isinstance(allowed, Mapping) and allowed.get("mode") in ("auto", "required"):
        names = [_function_name(tool) for tool in allowed.get("tools") or ()]
        if names and all(names):
            return ToolChoice(allowed["mode"], tuple(str(name) for name in names), parallel=parallel)
    remedy = "use auto, none, required, {'type': 'function', 'function': {'name': ...}} or allowed_tools"
    raise RequestError(f"tool_choice {choice!r} cannot be read", param="tool_choice", remedy=remedy)


def _function_name(value: Any) -> str:
    """The name in {'type': 'function', 'function': {'name': ...}}; empty when there is none."""
    function = value.get("function") if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def tool_spec(tool: ToolBody) -> ToolSpec:
    """A tool of the house."""
    if tool.type != "function":
        raise RequestError(f"tools of type {tool.type!r} are not supported, only function", param="tools")
    function = tool.function
    parameters = function.parameters or {"type": "object", "properties": {}}
    return ToolSpec(function.name, function.description or "", parameters)
