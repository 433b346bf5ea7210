"""How many bytes a token carries, by group of texts. More bytes per token means shorter sequences.

>>> compression(tokenizer, {"en": ["The cat sat."], "zh": ["你好。"]})["zh"]["bytes_per_token"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from puyu.tokenizer.tokenizer import Tokenizer


def compression(tokenizer: Tokenizer, groups: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """Texts, bytes, tokens, bytes per token and characters per token of each group that is not empty."""
    return {name: _one(tokenizer, texts) for name, texts in sorted(groups.items()) if any(texts)}


def _one(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, float]:
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    size = sum(len(text.encode("utf-8")) for text in texts)
    return {
        "texts": len(texts),
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": round(size / tokens, 3),
        "chars_per_token": round(sum(map(len, texts)) / tokens, 3),
    }
