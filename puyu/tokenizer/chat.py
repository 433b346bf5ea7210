"""Conversations <-> ids with the exact spans that a model is trained on, in the format of the tokenizer's folder.

    rendered = render(conversation, tokenizer)            # .ids and .loss, the same length
    for rendered in render_all(conversations, tokenizer)  # many at once: fast, in bounded memory
    parse_conversation(rendered.ids, tokenizer) == normalize(conversation, tokenizer)

The formats stand in `dialect`: InternLM2's ChatML, plain ChatML, Qwen 2.5 and 3, Llama 3 and 3.1. Only their markers
are ids of their own; what people and tools wrote is encoded as plain text, so it cannot forge a turn. A folder of
another family is rendered through its own Jinja template in a sandbox, for inference only: such a template has no
loss spans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from puyu.errors import InputError, RequestError
from puyu.tokenizer.dialect.encode import Rendered, encode_all, pieces_of
from puyu.tokenizer.dialect.format import ChatFormat, Piece
from puyu.tokenizer.dialect.internlm2 import INTERPRETER, InternLM2
from puyu.tokenizer.dialect.recognize import is_internlm2 as is_native
from puyu.tokenizer.dialect.recognize import recognize
from puyu.tokenizer.template import CHAT_TEMPLATE, render_jinja
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Conversation, Message, ToolSpec

__all__ = [
    "CHAT_TEMPLATE",
    "INTERPRETER",
    "Rendered",
    "format_of",
    "is_native",
    "normalize",
    "parse",
    "parse_conversation",
    "plain_pieces",
    "render",
    "render_all",
    "render_prompt",
    "render_text",
]

_BATCH = 1 << 21  # characters of text that are encoded at once


def format_of(tokenizer: Tokenizer) -> ChatFormat:
    """The format of the tokenizer's folder; InputError when it is none of ours."""
    if (found := recognize(tokenizer)) is not None:
        return found
    raise InputError(
        "this tokenizer's chat template is none of InternLM2's, ChatML's, Qwen's or Llama 3's, so the assistant's "
        "spans are unknown",
        remedy="train with a tokenizer of one of these families, or use render_prompt for inference",
    )


def render(conversation: Conversation, tokenizer: Tokenizer, *, add_generation_prompt: bool = False) -> Rendered:
    """Ids and loss spans; InputError for a template of another family, and for what the format cannot express."""
    format = format_of(tokenizer)
    pieces = _learned(format.pieces(conversation, prompt=add_generation_prompt), conversation)
    return encode_all([pieces], format, tokenizer)[0]


def _learned(pieces: list[Piece], conversation: Conversation) -> list[Piece]:
    """The pieces, those of turns that are not learned without their loss: each turn of the assistant is one stretch."""
    flags = [message.learned for message in conversation.messages if message.role == "assistant"]
    if all(flags):
        return pieces
    found, number = list[Piece](), -1
    for before, piece in zip([None, *pieces[:-1]], pieces, strict=True):
        number += piece.loss and not (before and before.loss)
        found.append(piece if not piece.loss or flags[number] else piece._replace(loss=False))
    assert number == len(flags) - 1, "a format has not one stretch for each turn of the assistant"
    return found


def render_all(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    *,
    where: Callable[[int], str] = "conversation {}".format,
) -> Iterator[Rendered]:
    """`render` of many, in order; about 2 M characters are held at once.

    InputError begins with `where` of the one that cannot be rendered, counted from 0.
    """
    format = format_of(tokenizer)
    written: list[list[Piece]] = []
    held = 0
    for number, conversation in enumerate(conversations):
        try:
            pieces = _learned(format.pieces(conversation), conversation)
        except InputError as error:
            raise InputError(f"{where(number)}: {error.message}", remedy=error.remedy) from error
        written.append(pieces)
        held += sum(len(piece[0]) for piece in pieces)
        if held >= _BATCH:
            yield from encode_all(written, format, tokenizer)
            written, held = [], 0
    yield from encode_all(written, format, tokenizer)


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
    if not is_native(tokenizer):
        return render_jinja(conversation, tokenizer, add_generation_prompt=True, options=options)
    for message in messages:
        if not isinstance(message.content, str) and any(part.kind != "text" for part in message.content):
            kinds = sorted({part.kind for part in message.content} - {"text"})
            raise RequestError(f"this model reads text only, not {' or '.join(kinds)}", param="messages")
    pieces = InternLM2().pieces(conversation, prompt=True)
    return list(encode_all([pieces], InternLM2(), tokenizer)[0].ids)


def render_text(conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
    """The conversation in InternLM2's ChatML, as a person would read it."""
    return "".join(piece.text for piece in InternLM2().pieces(conversation, prompt=add_generation_prompt))


def plain_pieces(conversation: Conversation) -> list[str]:
    """What stands between InternLM2's markers: role words, contents, tool lists, bodies of calls."""
    return [piece.text for piece in InternLM2().pieces(conversation) if not piece.marker]


def normalize(conversation: Conversation, tokenizer: Tokenizer) -> Conversation:
    """What is left of a conversation that is rendered and parsed; each format's `normalize` says what that is."""
    return format_of(tokenizer).normalize(conversation)


def parse_conversation(ids: Sequence[int], tokenizer: Tokenizer) -> Conversation:
    """The conversation in rendered ids, told apart by markers; InputError where they are torn.

    It is `normalize` of what was rendered, as far as the tokenizer decodes to what it encoded (Qwen's composes
    characters: Unicode NFC).
    """
    format = format_of(tokenizer)
    return format.read(pieces_of(ids, format, tokenizer))


def parse(ids: Sequence[int], tokenizer: Tokenizer) -> Message:
    """The assistant's message in generated ids: text and tool calls, told apart by token id.

    Reads up to the first stop token; a block without its end counts as a call, so that the caller can show the
    model its torn JSON. Ids of calls are left empty. A tokenizer without a format of ours is read as InternLM2's.
    """
    format = recognize(tokenizer) or InternLM2()
    end = next((at for at, id in enumerate(ids) if id in tokenizer.stop_ids), len(ids))
    return format.answer(pieces_of(ids[:end], format, tokenizer))
