"""A `tokenizer.json` read for the native encoder, where that gives the very ids of `tokenizers`; else None.

Taken are byte-level BPE models that cut text once by a pattern `pattern.py` reads, without dropout, prefixes or a
normalizer other than NFC. Single texts that NFC may change, or that spell an added token, are left to `tokenizers`.

    fast = FastEncoder.build(tokenizer_json)           # None: everything goes through `tokenizers`
    fast.encode(["12 乘以 7"])                          # [[...]], None for a text that is left
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from puyu.tokenizer.bpe import base_tokens, char_to_byte, to_chars
from puyu.tokenizer.library import MAX_ID, MAX_MERGES, Encoder, Handle, load
from puyu.tokenizer.pattern import GPT2, Program, compile_pattern

I = TypeVar("I")
_LATIN1 = {ord(char): chr(byte) for char, byte in char_to_byte().items()}


@dataclass(frozen=True, eq=False)
class FastEncoder:
    """The native encoder of one tokenizer.json. Pickles as its text; its tables are made when they are first used."""

    tokenizer_json: str
    program: Program
    added: tuple[str, ...]
    """Names of added tokens that are found in any text."""
    special: tuple[str, ...]
    """And of those that are found only when they are asked for."""

    @staticmethod
    def build(tokenizer_json: str) -> FastEncoder | None:
        """None where the library is not built or `tokenizers` would do something else."""
        if load() is None:
            return None
        content = json.loads(tokenizer_json)
        pattern = pattern_of(content)
        if pattern is None or not _is_plain_bpe(content):
            return None
        program = compile_pattern(pattern, nfc=content.get("normalizer") is not None)
        if program is None:
            return None
        names = [tuple(t["content"] for t in content["added_tokens"] if bool(t["special"]) is s) for s in (False, True)]
        return FastEncoder(tokenizer_json, program, *names)

    def __reduce__(self) -> tuple[Any, ...]:
        return FastEncoder, (self.tokenizer_json, self.program, self.added, self.special)

    @cached_property
    def _native(self) -> tuple[Encoder, Handle]:
        library = load()
        assert library is not None
        model = json.loads(self.tokenizer_json)["model"]
        vocab: dict[str, int] = model["vocab"]
        byte_ids = np.array([vocab[to_chars(bytes([byte]))] for byte in range(256)], dtype=np.int32)
        merges = np.array([_merge(vocab, *pair) for pair in merge_pairs(model)], dtype=np.int32).reshape(-1, 3)
        encoder = library.encoder(byte_ids, merges)
        if model.get("ignore_merges"):
            encoder.set_words({bytes_of(name): id for name, id in vocab.items() if is_bytes(name)})
        return encoder, library.splitter(self.program)

    def encode(self, texts: Sequence[str], *, special: bool = False) -> list[list[int] | None]:
        """Ids of each text, on all cores; None for a text that is left to `tokenizers`."""
        encoder, splitter = self._native
        return self._unless_left(texts, special, lambda encoded: encoder.lists(encoded, splitter))

    def arrays(self, texts: Sequence[str]) -> list[NDArray[np.int32] | None]:
        """`encode` of plain texts as arrays."""
        encoder, splitter = self._native
        return self._unless_left(texts, False, lambda encoded: encoder.arrays(encoded, splitter))

    def _unless_left(
        self, texts: Sequence[str], special: bool, encode: Callable[[list[bytes]], list[I | None]]
    ) -> list[I | None]:
        names = self.added + self.special if special else self.added
        left = [any(name in text for name in names) for text in texts] if names else [False] * len(texts)
        try:
            encoded = [b"" if skip else text.encode("utf-8") for text, skip in zip(texts, left, strict=True)]
        except UnicodeEncodeError:  # a lone surrogate: `tokenizers` says what is wrong
            return [None] * len(texts)
        return [None if skip else ids for ids, skip in zip(encode(encoded), left, strict=True)]


def pattern_of(content: Mapping[str, Any]) -> str | None:
    """The pattern that a byte-level tokenizer.json cuts text with, when it cuts once and by a pattern alone."""
    steps = content.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers") or [steps]
    last = parts[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(parts) == 1:
        return GPT2 if last.get("use_regex", True) else None
    split = parts[0]
    wanted = {"type": "Split", "behavior": "Isolated", "invert": False}
    if len(parts) != 2 or last.get("use_regex", True) or any(split.get(key) != value for key, value in wanted.items()):
        return None
    pattern = split["pattern"].get("Regex")
    return str(pattern) if pattern is not None else None


def _is_plain_bpe(content: Mapping[str, Any]) -> bool:
    """Whether the model is BPE over bytes with nothing else that changes ids."""
    model = content["model"]
    if (
        model.get("type", "BPE") != "BPE"
        or "merges" not in model
        or any(model.get(key) for key in ("dropout", "byte_fallback"))
    ):
        return False
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    if (content.get("normalizer") or {"type": "NFC"}).get("type") != "NFC":
        return False
    vocab = model["vocab"]
    if max(vocab.values(), default=0) > MAX_ID or len(model["merges"]) > MAX_MERGES:
        return False
    if model.get("ignore_merges") and any(
        token["special"] and token["content"] in vocab for token in content["added_tokens"]
    ):
        return False  # text is data: `Tokenizer` has such names cut apart
    return all(to_chars(token) in vocab for token in base_tokens())


def merge_pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges in rank order; older files write each as one string."""
    return [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]


def _merge(vocab: Mapping[str, int], left: str, right: str) -> tuple[int, int, int]:
    return vocab[left], vocab[right], vocab[left + right]


def bytes_of(name: str) -> bytes:
    """The bytes that a byte-level name stands for."""
    return name.translate(_LATIN1).encode("latin-1")


def is_bytes(name: str) -> bool:
    """Whether a name is made of characters that stand for bytes."""
    return all(char in char_to_byte() for char in name)
