r"""Conversations <-> ids in InternLM2's ChatML, with the exact spans that a model is trained on.

    <s><|im_start|>system\nYou are Puyu.<|im_end|>\n
    <|im_start|>system name=<|plugin|>\n[{"name": "calculator", ...}]<|im_end|>\n
    <|im_start|>user\n12*7=?<|im_end|>\n
    <|im_start|>assistant\n
    <|action_start|><|plugin|>\n{"name": "calculator", "parameters": {...}}<|action_end|><|im_end|>\n
    <|im_start|>environment name=<|plugin|>\n84<|im_end|>\n

Only the markers are special ids; what people and tools wrote is encoded as plain text, so it cannot forge a turn.
Each piece between two markers is encoded by itself, header and content apart. A folder of another family is
rendered through its own Jinja template in a sandbox, for inference only: such a template has no loss spans.
Source: InternLM2 technical report (arXiv 2403.17297), chat_format of the InternLM repository.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from puyu.errors import InputError, RequestError
from puyu.tokenizer.template import CHAT_TEMPLATE, render_jinja
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Conversation, Message, ToolCall, ToolSpec

__all__ = [
    "CHAT_TEMPLATE",
    "INTERPRETER",
    "Rendered",
    "is_native",
    "parse",
    "plain_pieces",
    "render",
    "render_prompt",
    "render_text",
]

INTERPRETER = "interpreter"  # the name of the tool that an <|interpreter|> block calls

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "environment"}
_BODY = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"parameters"\s*: ?(.*)\}\s*', re.DOTALL)
_NAME = re.compile(r'"name"\s*:\s*"([^"\\]*)"')
_PARAMETERS = re.compile(r'"(?:parameters|arguments)"\s*:\s*(.*)', re.DOTALL)
_FENCE = re.compile(r"\s*```(?:python|py)?\n(.*?)\n?```\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Rendered:
    """Ids of a conversation; `loss` is True on what the assistant wrote, its <|im_end|> included."""

    ids: tuple[int, ...]
    loss: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Plain text, or one marker."""

    text: str
    marker: bool = False
    loss: bool = False


def render(conversation: Conversation, tokenizer: Tokenizer, *, add_generation_prompt: bool = False) -> Rendered:
    """Ids and loss spans; InputError when the tokenizer lacks the markers or has a template of another family."""
    if not is_native(tokenizer):
        raise InputError(
            "this tokenizer's chat template is not InternLM2's, so the assistant's spans are unknown",
            remedy="train with a tokenizer made by `puyu tokenizer`, or use render_prompt for inference",
        )
    return _encode(_pieces(conversation, add_generation_prompt=add_generation_prompt), tokenizer)


def render_prompt(
    messages: Sequence[Message],
    tools: Sequence[ToolSpec],
    tokenizer: Tokenizer,
    *,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids up to and with the generation prompt: native where the template is InternLM2's, else through Jinja.

    `options` are more variables for a template that is not ours: documents, enable_thinking and the like.
    """
    conversation = Conversation(tuple(messages), tuple(tools))
    if is_native(tokenizer):
        return list(_encode(_pieces(conversation, add_generation_prompt=True), tokenizer).ids)
    return render_jinja(conversation, tokenizer, add_generation_prompt=True, options=options)


def render_text(conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
    """The rendered conversation as a person would read it."""
    return "".join(piece.text for piece in _pieces(conversation, add_generation_prompt=add_generation_prompt))


def plain_pieces(conversation: Conversation) -> list[str]:
    """What stands between the markers: role words, contents, tool lists, bodies of calls."""
    return [piece.text for piece in _pieces(conversation, add_generation_prompt=False) if not piece.marker]


@lru_cache(maxsize=16)
def is_native(tokenizer: Tokenizer) -> bool:
    """Whether the folder speaks InternLM2's ChatML: it has the markers, and its template renders a probe as we do."""
    markers = (tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.action_start_id, tokenizer.plugin_id)
    if None in markers or tokenizer.action_end_id is None or tokenizer.variables.get("bos_token") != "<s>":
        return False
    if tokenizer.chat_template in (None, CHAT_TEMPLATE):
        return True
    probe = Conversation(
        (Message("system", "S"), Message("user", "Q"), Message("assistant", "A"), Message("user", "R"))
    )
    try:
        ids = render_jinja(probe, tokenizer, add_generation_prompt=True)
    except InputError:  # a template that cannot render a plain chat is somebody else's; render_prompt will say why
        return False
    return ids == list(_encode(_pieces(probe, add_generation_prompt=True), tokenizer).ids)


def _pieces(conversation: Conversation, *, add_generation_prompt: bool) -> Iterator[_Piece]:
    yield _Piece("<s>", marker=True)
    messages = conversation.messages
    tools_after = 1 if messages and messages[0].role == "system" else 0
    for index, message in enumerate(messages):
        if index == tools_after:
            yield from _tool_turn(conversation.tools)
        yield from _turn(message)
    if len(messages) <= tools_after:
        yield from _tool_turn(conversation.tools)
    if add_generation_prompt:
        yield from (_Piece("<|im_start|>", marker=True), _Piece("assistant\n"))


def _tool_turn(tools: Sequence[ToolSpec]) -> Iterator[_Piece]:
    if tools:
        specs = [{"name": t.name, "description": t.description, "parameters": dict(t.parameters)} for t in tools]
        yield from _header("system", plugin=True)
        yield _Piece(json.dumps(specs, ensure_ascii=False))
        yield from _end(loss=False)


def _turn(message: Message) -> Iterator[_Piece]:
    loss = message.role == "assistant"
    yield from _header(_ROLES[message.role], plugin=message.role == "tool")
    yield _Piece(_text_of(message), loss=loss)
    for call in message.tool_calls:
        yield from (_Piece("<|action_start|>", marker=True, loss=loss), _Piece("<|plugin|>", marker=True, loss=loss))
        name = json.dumps(call.name, ensure_ascii=False)
        yield _Piece(f'\n{{"name": {name}, "parameters": {call.arguments or "{}"}}}', loss=loss)
        yield _Piece("<|action_end|>", marker=True, loss=loss)
    yield from _end(loss=loss)


def _header(role: str, *, plugin: bool) -> Iterator[_Piece]:
    yield _Piece("<|im_start|>", marker=True)
    if plugin:
        yield from (_Piece(f"{role} name="), _Piece("<|plugin|>", marker=True), _Piece("\n"))
    else:
        yield _Piece(f"{role}\n")


def _end(*, loss: bool) -> Iterator[_Piece]:
    yield from (_Piece("<|im_end|>", marker=True, loss=loss), _Piece("\n"))


def _text_of(message: Message) -> str:
    if not isinstance(message.content, str) and any(part.kind != "text" for part in message.content):
        kinds = sorted({part.kind for part in message.content} - {"text"})
        raise RequestError(f"this model reads text only, not {' or '.join(kinds)}", param="messages")
    return message.text


def _encode(pieces: Iterator[_Piece], tokenizer: Tokenizer) -> Rendered:
    ids: list[int] = []
    loss: list[bool] = []
    for piece in pieces:
        new = [_marker_id(piece.text, tokenizer)] if piece.marker else tokenizer.encode(piece.text)
        ids += new
        loss += [piece.loss] * len(new)
    return Rendered(tuple(ids), tuple(loss))


def _marker_id(marker: str, tokenizer: Tokenizer) -> int:
    id = tokenizer.token_id(marker)
    if id is None:
        raise InputError(
            f"the tokenizer has no token {marker!r}", remedy="use a tokenizer with InternLM2's chat tokens"
        )
    return id


def parse(ids: Sequence[int], tokenizer: Tokenizer) -> Message:
    """The assistant's message in generated ids: text and tool calls, told apart by token id.

    Reads up to the first stop token; a block without its end counts as a call, so that the caller can show the
    model its torn JSON. Ids of calls are left empty.
    """
    ids = _until_stop(list(ids), tokenizer)
    text: list[int] = []
    calls: list[ToolCall] = []
    while ids:
        start = _index(ids, tokenizer.action_start_id)
        text += ids[:start]
        block, ids = _cut(ids[start + 1 :], tokenizer.action_end_id)
        if block:
            calls.append(_call(block, tokenizer))
    return Message("assistant", tokenizer.decode(text, skip_special=True), tool_calls=tuple(calls))


def _until_stop(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    end = next((at for at, id in enumerate(ids) if id in tokenizer.stop_ids), len(ids))
    return ids[:end]


def _index(ids: list[int], wanted: int | None) -> int:
    return ids.index(wanted) if wanted is not None and wanted in ids else len(ids)


def _cut(ids: list[int], at: int | None) -> tuple[list[int], list[int]]:
    end = _index(ids, at)
    return ids[:end], ids[end + 1 :]


def _call(block: list[int], tokenizer: Tokenizer) -> ToolCall:
    kind, body = block[0], tokenizer.decode(block, skip_special=True)
    if kind == tokenizer.interpreter_id:
        fenced = _FENCE.fullmatch(body)
        code = fenced[1] if fenced else body.strip("\n")
        return ToolCall(INTERPRETER, json.dumps({"code": code}, ensure_ascii=False))
    return _plugin_call(body)


def _plugin_call(body: str) -> ToolCall:
    """Arguments as the model wrote them, also when they are torn; other shapes are read as well as they can be."""
    value, ours = _json_or_none(body), _BODY.fullmatch(body)
    if isinstance(value, dict) and (ours is None or set(value) != {"name", "parameters"}):
        arguments = value.get("parameters", value.get("arguments", {}))
        return ToolCall(str(value.get("name", "")), json.dumps(arguments, ensure_ascii=False))
    if ours and isinstance(known := _json_or_none(ours[1]), str):
        return ToolCall(known, ours[2])
    name, arguments = _NAME.search(body), _PARAMETERS.search(body)
    return ToolCall(name[1] if name else "", arguments[1] if arguments else body.strip("\n"))


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):  # torn, or numbers of thousands of digits, or brackets without end
        return None
