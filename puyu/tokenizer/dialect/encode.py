"""Pieces -> ids with exact loss spans, and ids -> pieces. Many conversations cost one call of the tokenizer.

Each text is encoded once however often it stands in a batch, so headers, tool lists and system turns cost nothing. A
text that spells a marker gives no marker: special tokens are plain text to `encode_batch`, and where a vocabulary
has a marker that is not special (Qwen's <tool_call>), the text is cut inside it and encoded in parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from puyu.errors import InputError
from puyu.tokenizer.dialect.format import ChatFormat, Piece
from puyu.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Rendered:
    """Ids of a conversation; `loss` is True on what the assistant wrote, the marker that ends its turn included."""

    ids: tuple[int, ...]
    loss: tuple[bool, ...]


def encode_all(written: Sequence[Sequence[Piece]], format: ChatFormat, tokenizer: Tokenizer) -> list[Rendered]:
    """Ids and loss spans of several written conversations; InputError when the tokenizer lacks a marker."""
    texts: dict[str, None] = {}
    markers: dict[str, int] = {}
    for pieces in written:
        for text, is_marker, _, head in pieces:
            if is_marker:
                markers[text] = 0
            else:
                texts[text] = None
                if head:
                    texts[text[:head]] = None
    for name in markers:
        markers[name] = marker_id(name, tokenizer)
    table = _encoded(list(texts), format, tokenizer)
    return [_joined(pieces, table, markers, tokenizer) for pieces in written]


def marker_id(name: str, tokenizer: Tokenizer) -> int:
    """The id of a marker; InputError names the one that is missing."""
    id = tokenizer.token_id(name)
    if id is None:
        remedy = "use a tokenizer with the tokens of its chat format"
        raise InputError(f"the tokenizer has no token {name!r}", remedy=remedy)
    return id


def _encoded(texts: list[str], format: ChatFormat, tokenizer: Tokenizer) -> dict[str, list[int]]:
    spelled = _open_markers(format, tokenizer)
    if spelled is None:
        return dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    parts = {text: spelled.split(text) for text in texts if spelled.search(text)}
    table = _encoded_plainly([text for text in texts if text not in parts], parts.values(), tokenizer)
    return table | {text: [id for part in cut for id in table[part]] for text, cut in parts.items()}


def _encoded_plainly(texts: list[str], more: Iterable[list[str]], tokenizer: Tokenizer) -> dict[str, list[int]]:
    whole = list(dict.fromkeys([*texts, *(part for parts in more for part in parts)]))
    return dict(zip(whole, tokenizer.encode_batch(whole), strict=True))


@lru_cache(maxsize=16)
def _open_markers(format: ChatFormat, tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Where to cut a text that spells one of the format's markers that the vocabulary does not call special."""
    names = sorted(format.markers - tokenizer.special_tokens.keys())
    return re.compile("|".join(f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in names)) if names else None


def _joined(
    pieces: Sequence[Piece], table: Mapping[str, list[int]], markers: Mapping[str, int], tokenizer: Tokenizer
) -> Rendered:
    ids: list[int] = []
    loss: list[bool] = []
    for text, is_marker, trained, head in pieces:
        if is_marker:
            ids.append(markers[text])
            loss.append(trained)
            continue
        new = table[text]
        ids += new
        if head and trained:
            size = _head_size(new, text[:head], table, tokenizer)
            loss += [False] * size + [True] * (len(new) - size)
        else:
            loss += [trained] * len(new)
    return Rendered(tuple(ids), tuple(loss))


def _head_size(ids: list[int], head: str, table: Mapping[str, list[int]], tokenizer: Tokenizer) -> int:
    """How many ids hold the header. One that holds some of the text behind it too is the header's: the model does not
    write it, the prompt ends inside it."""
    expected = table[head]
    if ids[: len(expected)] == expected:
        return len(expected)
    return next(size for size in range(len(ids) + 1) if len(tokenizer.decode(ids[:size])) >= len(head))


def pieces_of(ids: Sequence[int], format: ChatFormat, tokenizer: Tokenizer) -> list[Piece]:
    """Ids as markers (the format's, and all special tokens) and the texts between them."""
    markers = _marker_ids(format, tokenizer)
    found: list[Piece] = []
    start = 0
    for at, id in enumerate(ids):
        if id in markers:
            if at > start:
                found.append(Piece(tokenizer.decode(ids[start:at])))
            found.append(Piece(markers[id], True))
            start = at + 1
    if start < len(ids):
        found.append(Piece(tokenizer.decode(ids[start:])))
    return found


@lru_cache(maxsize=16)
def _marker_ids(format: ChatFormat, tokenizer: Tokenizer) -> dict[int, str]:
    known = {id: name for name in format.markers if (id := tokenizer.token_id(name)) is not None}
    return {id: name for name, id in tokenizer.special_tokens.items()} | known
