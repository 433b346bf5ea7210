"""A tokenizer as a SentencePiece `tokenizer.model`, where that model gives the same ids for every text; else an error.

Exact are tokenizers of SentencePiece's own kind: BPE over characters with byte fallback, spaces written as `▁`, every
way to put a piece together from two others a merge, better pieces first. It is proved each time: the written model is
read again by `sentencepiece.py`, whose ids equal the library's, and must give the same vocabulary, merges and rules.
Byte-level BPE is refused: SentencePiece has neither a pattern that cuts text nor pieces that are part of a character.

    path.write_bytes(to_sentencepiece(tokenizer))
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from struct import pack
from typing import Any

from puyu.errors import InputError
from puyu.tokenizer.encode import bytes_of, is_bytes, merge_pairs
from puyu.tokenizer.sentencepiece import BPE, SPACE, Kind, to_tokenizer_json
from puyu.tokenizer.tokenizer import Tokenizer

_REMEDY = "export tokenizer.json instead: every reader of it gives the same ids"


def to_sentencepiece(tokenizer: Tokenizer) -> bytes:
    """The serialized model; InputError that says what it cannot express."""
    content = json.loads(tokenizer.json_text)
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise InputError(f"a {model.get('type')} model cannot be written as SentencePiece BPE", remedy=_REMEDY)
    if tokenizer.is_byte_level:
        raise InputError(_why_not(content), remedy=_REMEDY)
    steps = _steps(content.get("normalizer"))
    if steps not in ([("Replace", SPACE)], [("Prepend", SPACE), ("Replace", SPACE)]):
        raise InputError(f"its normalizer {steps} is not SentencePiece's way to write spaces", remedy=_REMEDY)
    data = _model(content, dummy_prefix=len(steps) == 2)
    _prove(content, data)
    return data


def _why_not(content: Mapping[str, Any]) -> str:
    """What of a byte-level BPE SentencePiece has no words for."""
    reasons = ["the pattern that cuts text before merging"] if content.get("pre_tokenizer") else []
    torn = next((name for name in content["model"]["vocab"] if is_bytes(name) and _is_torn(name)), None)
    if torn is not None:
        id = content["model"]["vocab"][torn]
        reasons.append(f"tokens that are part of a character (id {id} is {bytes_of(torn)!r})")
    reasons.append(f"a text with {SPACE!r}, which it reads as a space")
    return f"a byte-level BPE cannot be a SentencePiece model; what it cannot express: {'; '.join(reasons)}"


def _is_torn(name: str) -> bool:
    data = bytes_of(name)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return len(data) > 1
    return False


def _steps(normalizer: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The normalizer as (type, what is put)."""
    if normalizer is None:
        return []
    parts = normalizer.get("normalizers", [normalizer])
    found = []
    for part in parts:
        plain = part["type"] != "Replace" or part["pattern"] == {"String": " "}
        found.append((part["type"] if plain else "another Replace", part.get("prepend") or part.get("content") or ""))
    return found


def _model(content: Mapping[str, Any], *, dummy_prefix: bool) -> bytes:
    model = content["model"]
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    first: dict[str, int] = {}
    for left, right in merge_pairs(model):
        first.setdefault(left + right, len(first))
    pieces = []
    for id, (name, listed) in enumerate(sorted(model["vocab"].items(), key=lambda item: item[1])):
        if id != listed:
            raise InputError(f"its ids have a gap at {id}; pieces of SentencePiece have none", remedy=_REMEDY)
        kind = _kind(name, model.get("unk_token"), special)
        score = -float(first.get(name, len(first))) if kind is Kind.NORMAL else 0.0
        pieces.append(_field(1, _field(1, name.encode("utf-8")) + b"\x15" + pack("<f", score) + _number(3, kind)))
    trainer = _number(3, BPE) + _number(35, bool(model.get("byte_fallback")))
    normalizer = _field(1, b"identity") + _number(3, dummy_prefix) + _number(4, False) + _number(5, True)
    return b"".join(pieces) + _field(2, trainer) + _field(3, normalizer)


def _kind(name: str, unknown: str | None, special: set[str]) -> Kind:
    if name == unknown:
        return Kind.UNKNOWN
    if name in special:
        return Kind.CONTROL
    return Kind.BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", name) else Kind.NORMAL


def _prove(content: Mapping[str, Any], data: bytes) -> None:
    """Read the model again: it must say what was given."""
    again = json.loads(to_tokenizer_json(data, {}))
    names = ("vocab", "byte_fallback", "unk_token", "fuse_unk", "ignore_merges")
    different = [name for name in names if (again["model"].get(name) or None) != (content["model"].get(name) or None)]
    if merge_pairs(again["model"]) != merge_pairs(content["model"]):
        different.append("merges (SentencePiece joins any two pieces that make a third, the better one first)")
    if (again.get("pre_tokenizer") or None) != (content.get("pre_tokenizer") or None):
        different.append("pre_tokenizer")
    added, found = ({(t["id"], t["content"], t["special"]) for t in one["added_tokens"]} for one in (content, again))
    if names_of := sorted({name for _, name, _ in added ^ found}):
        different.append(f"added tokens {', '.join(map(repr, names_of))}")
    if different:
        raise InputError(f"a SentencePiece model cannot express its {', '.join(different)}", remedy=_REMEDY)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _field(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data
