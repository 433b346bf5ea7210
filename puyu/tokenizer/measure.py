"""How well a tokenizer carries texts, by group: bytes, characters and words of a token, and what it has no token for.

>>> compression(tokenizer, {"en": ["The cat sat."], "zh": ["你好。"]})["zh"]["bytes_per_token"]
>>> fertility({"ours": ours, "other": other}, {"zh": texts})["zh"]["ours"]["tokens_per_word"]

Words are runs of letters and digits, and each character of Chinese, Japanese and Thai, which write without spaces; so
`tokens_per_word` (fertility, Rust et al. 2021, arXiv 2012.15613) can be compared within a language, not between two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from puyu.tokenizer.tokenizer import Tokenizer

_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")

Row = dict[str, float]


def compression(tokenizer: Tokenizer, groups: Mapping[str, Sequence[str]]) -> dict[str, Row]:
    """Texts, bytes, tokens, bytes per token and characters per token of each group that is not empty."""
    return {name: _one(texts, _count(tokenizer, texts)) for name, texts in sorted(groups.items()) if any(texts)}


def fertility(tokenizers: Mapping[str, Tokenizer], groups: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Row]]:
    """Group -> tokenizer -> tokens, bytes, characters and words of a token, shares of torn characters and unknowns.

    `torn_share`: of all tokens, those that are part of a character only (single bytes of one included);
    `unknown_share`: those that stand for a text which is lost. `against_first`: tokens, as a share of the first
    tokenizer's.
    """
    found: dict[str, dict[str, Row]] = {}
    for group, texts in sorted(groups.items()):
        if not any(texts):
            continue
        rows = {name: _fertile(tokenizer, texts) for name, tokenizer in tokenizers.items()}
        first = next(iter(rows.values()))["tokens"]
        found[group] = {name: row | {"against_first": _rate(row["tokens"], first)} for name, row in rows.items()}
    return found


def _count(tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    return sum(map(len, tokenizer.encode_batch(texts)))


def _rate(count: float, of: float, digits: int = 3) -> float:
    """0.0 of nothing: a normalizer may leave nothing of a text that is all blanks."""
    return round(count / of, digits) if of else 0.0


def _one(texts: Sequence[str], tokens: int) -> Row:
    size = sum(len(text.encode("utf-8")) for text in texts)
    return {
        "texts": len(texts),
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": _rate(size, tokens),
        "chars_per_token": _rate(sum(map(len, texts)), tokens),
    }


def _fertile(tokenizer: Tokenizer, texts: Sequence[str]) -> Row:
    ids = [id for encoded in tokenizer.encode_batch(texts) for id in encoded]
    words = sum(len(_WORD.findall(text)) for text in texts)
    kinds = {id: _kind(tokenizer, id) for id in set(ids)}
    torn, unknown = (sum(kinds[id] == kind for id in ids) for kind in ("torn", "unknown"))
    return _one(texts, len(ids)) | {
        "words": words,
        "tokens_per_word": _rate(len(ids), words),
        "torn_share": _rate(torn, len(ids), 5),
        "unknown_share": _rate(unknown, len(ids), 5),
    }


def _kind(tokenizer: Tokenizer, id: int) -> str:
    """Whether a token in a text is whole characters, part of one, or the unknown token."""
    if id in tokenizer.special_ids:
        return "unknown"  # in plain text no other special token comes up
    try:
        tokenizer.token_bytes(id).decode("utf-8")
    except UnicodeDecodeError:
        return "torn"
    return "whole"
