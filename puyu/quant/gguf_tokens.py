"""tokenizer.json -> the `tokenizer.*` keys of a GGUF file.

llama.cpp has its own tokenizers: byte-level BPE is its "gpt2" (tokens, merges, and the name of one of the regular
expressions that it has built in), SentencePiece-like BPE with byte fallback its "llama" (tokens with scores, here the
ranks of merges). The expression is found by what tokenizer.json cuts with. Puyu's own has no equal there; `dbrx` cuts
in fewer places, and where it leaves out a cut there is no merge across it, so the tokens are the same but for
combining marks.

    keys = tokenizer_metadata(Path("runs/nano/sft"), vocab_size=8192)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puyu.errors import ConfigError
from puyu.files import read_object
from puyu.tokenizer.bpe import PATTERN
from puyu.tokenizer.tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_EXPRESSIONS = {
    _ENGLISH + _LLAMA3: "llama-bpe",
    _ENGLISH + _QWEN2: "qwen2",
    PATTERN: "dbrx",
}
"""What a Split pre-tokenizer cuts with -> llama.cpp's name."""


def tokenizer_metadata(folder: Path, *, vocab_size: int, pre: str | None = None) -> dict[str, Any]:
    """The keys; ids without a token are filled up, because llama.cpp wants as many as the embedding has rows."""
    tokenizer = Tokenizer.load(folder)
    value = json.loads(tokenizer.json_text)  # also where the folder has tokenizer.model alone
    model = value["model"]
    if model.get("type") != "BPE":
        raise ConfigError(f"{folder}: a {model.get('type')} tokenizer is not exported to GGUF", remedy="BPE only")
    tokens, types = _tokens(value, vocab_size)
    found: dict[str, Any] = {"tokenizer.ggml.model": "gpt2" if tokenizer.is_byte_level else "llama"}
    if tokenizer.is_byte_level:
        found["tokenizer.ggml.pre"] = pre or _pre(value, folder)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        found |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges}
    else:
        scores = _scores(tokens, model["merges"])
        found |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores, "tokenizer.ggml.token_type": types}
        found["tokenizer.ggml.add_space_prefix"] = "Prepend" in str(value.get("normalizer"))
    return found | _special(folder, tokenizer)


def _tokens(value: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    by_id = {id: token for token, id in value["model"]["vocab"].items()}
    types = {id: _BYTE if _is_byte(token) else _NORMAL for id, token in by_id.items()}
    for added in value.get("added_tokens", ()):
        by_id[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added.get("special") else _USER
    unknown = value["model"].get("unk_token") or "<unk>"
    types |= {id: _UNKNOWN for id, token in by_id.items() if token == unknown}
    tokens = [by_id.get(id, f"[PAD{id}]") for id in range(vocab_size)]
    return tokens, [types.get(id, _UNUSED) for id in range(vocab_size)]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Minus the rank of the first merge that makes a token: the highest score is merged first."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _pre(value: Mapping[str, Any], folder: Path) -> str:
    parts = value.get("pre_tokenizer") or {}
    parts = parts.get("pretokenizers", [parts])
    patterns = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    if len(patterns) == 1 and patterns[0] in _EXPRESSIONS:
        return _EXPRESSIONS[patterns[0]]
    if not patterns and any(part.get("type") == "ByteLevel" and part.get("use_regex", True) for part in parts):
        return "gpt-2"
    raise ConfigError(
        f"{folder}/tokenizer.json cuts text with {patterns}, for which llama.cpp has no name that is known here",
        remedy="give its name there with --pre NAME (see llama.cpp's convert_hf_to_gguf_update.py)",
    )


def _special(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id, "unknown": None}
    ids["unknown"] = tokenizer.token_id("<unk>")
    ids["eot"] = tokenizer.token_id("<|im_end|>")
    found: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id is not None}
    path = folder / "tokenizer_config.json"
    found["tokenizer.ggml.add_bos_token"] = path.is_file() and bool(read_object(path).get("add_bos_token"))
    if tokenizer.chat_template:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found
