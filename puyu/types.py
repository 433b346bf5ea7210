"""The shared words of the house: messages, conversations, requests, completions, and the LanguageModel protocol.

Standard library only. Everything is frozen: a value that crosses a room is never changed in place.
`Message` is OpenAI's chat message; InternLM's `environment` role is role `tool` with a name.

    >>> Message("user", "2+2?").to_openai()
    {'role': 'user', 'content': '2+2?'}
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from puyu.errors import InputError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")

FinishReason = Literal["stop", "length", "tool_calls", "abort", "error", "timeout"]
"""Why a completion ended. `timeout`: its own limit of time, waiting or in all, was reached."""


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a message's content. `value` is the text, or a URL / data URI of the image or sound."""

    kind: Literal["text", "image", "audio"]
    value: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for. `arguments` is JSON text, as the model wrote it."""

    name: str
    arguments: str
    id: str = ""

    def parsed(self) -> dict[str, Any]:
        """The arguments as a dict; raises InputError when they are not a JSON object."""
        try:
            value = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise InputError(f"arguments of tool call {self.name!r} are not JSON: {error}") from error
        if not isinstance(value, dict):
            raise InputError(f"arguments of tool call {self.name!r} must be a JSON object, not {type(value).__name__}")
        return value


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """What a model is told about a tool: name, description, JSON Schema of the parameters."""

    name: str
    description: str
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})

    def to_openai(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    @staticmethod
    def from_openai(value: Mapping[str, Any]) -> ToolSpec:
        function = value.get("function", value)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError("a tool needs a name: {'type': 'function', 'function': {'name': ...}}")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        return ToolSpec(function["name"], function.get("description", ""), parameters)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. An assistant turn may carry tool calls; a tool turn carries the id of the call it answers."""

    role: Role
    content: str | tuple[Part, ...] = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""
    learned: bool = True
    """Whether fine-tuning learns it, where it is the assistant's."""

    @property
    def text(self) -> str:
        """The text of the turn; other parts are left out."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.value for part in self.content if part.kind == "text")

    def to_openai(self) -> dict[str, Any]:
        value: dict[str, Any] = {"role": self.role, "content": _content_to_openai(self.content)}
        if self.tool_calls:
            value["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        if self.tool_call_id:
            value["tool_call_id"] = self.tool_call_id
        if self.name:
            value["name"] = self.name
        return value

    @staticmethod
    def from_openai(value: Mapping[str, Any]) -> Message:
        """Read OpenAI's form; also InternLM's role `environment` and `arguments` given as an object."""
        role = {"environment": "tool", "developer": "system"}.get(str(value.get("role")), value.get("role"))
        if role not in ROLES:
            raise InputError(
                f"unknown role {value.get('role')!r} in a message", remedy=f"use one of {', '.join(ROLES)}"
            )
        return Message(
            role=role,
            content=_content_from_openai(value.get("content")),
            tool_calls=tuple(_call_from_openai(call) for call in _mappings(value, "tool_calls")),
            tool_call_id=value.get("tool_call_id") or "",
            name=value.get("name") or "",
        )


def _mappings(value: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    """A list of objects, or nothing."""
    found = value.get(name) or ()
    if not isinstance(found, list | tuple) or not all(isinstance(item, Mapping) for item in found):
        raise InputError(f"field {name!r} must be a list of objects")
    return found


def metadata_of(value: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of itself."""
    found = value.get("metadata") or {}
    if not isinstance(found, Mapping):
        raise InputError("field 'metadata' must be an object")
    return dict(found)


def _content_to_openai(content: str | tuple[Part, ...]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [_part_to_openai(part) for part in content]


def _part_to_openai(part: Part) -> dict[str, Any]:
    if part.kind == "image":
        return {"type": "image_url", "image_url": {"url": part.value}}
    if part.kind == "audio":
        return {"type": "input_audio", "input_audio": {"data": part.value, "format": "wav"}}
    return {"type": "text", "text": part.value}


def _content_from_openai(content: Any) -> str | tuple[Part, ...]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InputError(f"message content must be text or a list of parts, not {type(content).__name__}")
    return tuple(_part_from_openai(part) for part in content)


def _part_from_openai(part: Any) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Part("text", part["text"])
    if kind == "image_url" and isinstance(part.get("image_url"), Mapping):
        return Part("image", str(part["image_url"].get("url", "")))
    if kind == "input_audio" and isinstance(part.get("input_audio"), Mapping):
        return Part("audio", str(part["input_audio"].get("data", "")))
    raise InputError(f"cannot read this content part: {part!r}", remedy="use type text, image_url or input_audio")


def _call_from_openai(value: Any) -> ToolCall:
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError("a tool call needs 'function': {'name': ..., 'arguments': ...}")
    arguments = function.get("arguments", "{}")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(function["name"], arguments, str(value.get("id") or ""))


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order with the tools on offer. `metadata` holds source and license, never training text."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def to_openai(self) -> dict[str, Any]:
        value: dict[str, Any] = {"messages": [message.to_openai() for message in self.messages]}
        if self.tools:
            value["tools"] = [tool.to_openai() for tool in self.tools]
        if self.metadata:
            value["metadata"] = dict(self.metadata)
        return value

    @staticmethod
    def from_openai(value: Mapping[str, Any]) -> Conversation:
        if not isinstance(value.get("messages"), Sequence):
            raise InputError("a conversation needs the field 'messages', a list")
        return Conversation(
            messages=tuple(Message.from_openai(message) for message in value["messages"]),
            tools=tuple(ToolSpec.from_openai(tool) for tool in _mappings(value, "tools")),
            metadata=metadata_of(value),
        )


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, the better first. `domain` picks the reward model's system prompt; `margin` is by how
    much their scores should differ at least."""

    prompt: Conversation
    chosen: Message
    rejected: Message
    domain: str = "default"
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer to a prompt, and whether it is wanted."""

    prompt: Conversation
    answer: Message
    good: bool


@dataclass(frozen=True, slots=True)
class Guide:
    """The form that an answer must have. `value` by kind: a JSON Schema, a regular expression, a Lark grammar, or the
    texts to choose from."""

    kind: Literal["json_schema", "regex", "grammar", "choice"]
    value: str | Mapping[str, Any] | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch those filters off."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    """How many of the most likely tokens to report at each place, beside the one that was chosen."""
    prompt_logprobs: bool = False
    min_p: float = 0.0
    """Tokens less likely than this share of the most likely one are left out (arXiv 2407.01082)."""
    min_tokens: int = 0
    """Tokens before the end of the text, or a stop token, may come."""
    repetition_penalty: float = 1.0
    """Above 1: tokens of the prompt and the answer become less likely (Keskar et al. 2019, arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that stands in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that a token stands in the answer."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    bad_words: tuple[str, ...] = ()
    """Texts whose last token is never chosen after the tokens before it."""
    n: int = 1
    """Answers to give; each has a stream of random numbers of its own."""
    best_of: int = 0
    """Answers to sample, of which the `n` likeliest are given; 0 is as many as `n`."""
    beam_width: int = 0
    """Above 0: beam search with so many beams instead of sampling; the `n` best are given."""
    length_penalty: float = 1.0
    """Beam search ranks by logprob / length ** length_penalty."""
    guide: Guide | None = None


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds from submission: until the request began to be computed, until its first token, until its end."""

    began: float
    first_token: float
    ended: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request, and its times where they are known."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    times: Times | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools are called: as the model likes, never, or at least one."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] = ()
    """The only tools that may be called; empty is all."""
    parallel: bool = True
    """Whether an answer may hold more than one call."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Messages (rendered with the chat template), plain text after <s>, or the very ids (for base models)."""

    prompt: str | tuple[Message, ...] | tuple[int, ...]
    params: SamplingParams = SamplingParams()
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    priority: int = 0
    """Higher goes first; equal ones in the order of arrival."""
    timeout: float | None = None
    """Seconds from submission to the end; what is there by then comes back with reason `timeout`."""
    queue_timeout: float | None = None
    """Seconds that the request may wait before it begins."""
    adapter: str = ""
    """Name of a LoRA adapter that the engine has loaded; empty is the model itself."""
    template: Mapping[str, Any] = field(default_factory=dict)
    """More variables for a chat template that is not ours: documents, enable_thinking and the like."""

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is a conversation."""
        return not isinstance(self.prompt, str) and not any(isinstance(item, int) for item in self.prompt)


TopLogprobs = tuple[tuple[int, float], ...]
"""(token id, natural log-probability) of the most likely tokens at one place, the likeliest first."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back. `message` holds text and parsed tool calls; ids and logprobs are of generated tokens only."""

    message: Message
    finish_reason: FinishReason
    usage: Usage = Usage()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    raw_text: str = ""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[float | None, ...] = ()
    """One for each token of the prompt; None for the first, which follows nothing."""
    alternatives: tuple[Completion, ...] = ()
    """The other answers when more than one was asked for."""

    @property
    def text(self) -> str:
        return self.message.text

    @property
    def choices(self) -> tuple[Completion, ...]:
        """All answers, this one first."""
        return (self, *self.alternatives)


@dataclass(frozen=True, slots=True)
class CallPart:
    """A piece of a tool call as it is written. The first of a call has its name; later ones more of the arguments."""

    index: int
    """Which call of the answer."""
    arguments: str = ""
    name: str = ""
    id: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """One step of a stream. The last one has a finish reason and the usage."""

    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    """All calls of the answer, with its finish reason."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    index: int = 0
    """Which of several answers the piece belongs to."""
    call_parts: tuple[CallPart, ...] = ()
    """Tool calls as they are written; together they are `tool_calls`."""
    token_ids: tuple[int, ...] = ()
    """The tokens of this step, where log-probabilities were asked for; what they spell may come later."""
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-likelihood of a continuation after a context (natural log, summed over its tokens)."""

    logprob: float
    num_tokens: int
    num_bytes: int
    is_greedy: bool


@runtime_checkable
class LanguageModel(Protocol):
    """Anything that continues text: our engine, our server, or somebody's endpoint."""

    async def generate(self, request: GenerateRequest) -> Completion:
        """Run one request to its end."""
        ...

    def stream(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """Yield deltas; the concatenated text equals that of `generate`."""
        ...

    async def score(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """Log-likelihood of each (context, continuation)."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """Texts to vectors of one length."""

    async def embed(self, texts: Sequence[str]) -> list[list[float]]: ...
