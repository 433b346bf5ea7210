"""tokenizer.json files of the kinds that published byte-level models have, made from a list of merges."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from puyu.tokenizer import bpe
from puyu.tokenizer.pattern import GPT2
from puyu.tokenizer.ranks import CL100K

QWEN2 = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
PATTERNS = {"ours": bpe.PATTERN, "gpt2": GPT2, "cl100k": CL100K, "qwen2": QWEN2, "o200k": O200K}
SPECIAL = ("<s>", "<|im_end|>")

HARD = [
    *(
        "",
        " ",
        "  ",
        "a",
        " a",
        "a  b   ",
        "\n\n\n",
        "\r\n \r\n",
        "\t\tx",
        "   \n  y",
        "x \n",
        "x\u3000\u00a0y",
        "\x85\u2028",
    ),
    *(
        "it's IT'S 'ſ 'K we'LL they'Re''s don'tt",
        "١٢٣٤ ½² Ⅷ 12345678",
        "naïve café e\u0301a\u0301 Å \u212b",
        "각 \u1100\u1161\u11a8",
    ),
    *(
        "👩‍🔬👍🏽🇨🇳",
        "𠮷野家 \U0002ebf0",
        "ǅ ᾳ ʰ ـ",
        "हिन्दी ไทย ქართული",
        "\x00\x7f\ufffd\ue000\U0010ffff",
        "مرحبا שלום",
    ),
    *(
        "你好，世界。这是一个测试！",
        "「引用」…… ——",
        "かな カナ ー が か\u3099",
        "=== --- /// ###\r\n//\n",
        "a_b.c(d)[e]{f}",
        "<s>x<|im_end|>",
        "'s",
    ),
    *(
        "\U0001e4d0\U00010d4a\U00016ac0",
        "\u0897\u1c89\ua7cb",
        "ab" * 300,
        "我" * 300,
        " " * 600,
        "🎉" * 100,
        "a\u0300" * 90,
    ),
]


def backend(
    merges: Sequence[tuple[bytes, bytes]],
    pattern: str,
    *,
    nfc: bool = False,
    whole_words: bool = False,
    plain_added: Sequence[str] = (),
) -> Tokenizer:
    """As `tokenizers` reads it; ids are in the order of the merges."""
    names = dict.fromkeys(map(bpe.to_chars, [*bpe.base_tokens(), *(left + right for left, right in merges)]))
    pairs = [(bpe.to_chars(left), bpe.to_chars(right)) for left, right in merges]
    made = Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, pairs, ignore_merges=whole_words))
    if pattern == GPT2:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    if nfc:
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    made.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain_added])
    return made


def changed(made: Tokenizer, **model: object) -> str:
    """Its JSON with other values in the model."""
    content = json.loads(made.to_str())
    content["model"] |= model
    return json.dumps(content)
