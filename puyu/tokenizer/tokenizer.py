"""`Tokenizer`: text <-> ids over a Hugging Face folder (`tokenizer.json`, `tokenizer_config.json`).

Text is data: `encode` reads `<|im_start|>` in a user's text as plain characters unless `special=True`.
Works with our own byte-level files, with any `tokenizer.json` (Qwen, Llama, Mistral ...) and with SentencePiece's
`tokenizer.model` alone (InternLM2). Knows no model; of its files it reads the end ids in generation_config.json.

    >>> tokenizer = Tokenizer.load(Path("runs/nano/tokenizer"))
    >>> tokenizer.decode(tokenizer.encode("12 乘以 7"))
    '12 乘以 7'
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from puyu.errors import InputError
from puyu.files import hash_bytes, read_object, write_text
from puyu.hub import base_of
from puyu.tokenizer.bpe import PATTERN, base_tokens, char_to_byte, pre_tokenizer, to_chars
from puyu.tokenizer.encode import FastEncoder
from puyu.tokenizer.sentencepiece import cut_apart, to_tokenizer_json

LEADING_SPECIALS = ("<unk>", "<s>", "</s>")
# InternLM2's order, at the end of the vocabulary; the reward token stands before them.
TRAILING_SPECIALS = (
    "<|reward|>",
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)
MAX_LENGTH = 1 << 20  # transformers warns about longer texts; the model's own limit is in its config.json

_FILES = ("tokenizer.json", "tokenizer.model")  # in this order
_REMEDY = "give the folder of a tokenizer or of a checkpoint, or run `puyu tokenizer` again"


class Tokenizer:
    """Text <-> ids. Read-only; two with one `fingerprint` give the same ids."""

    def __init__(self, tokenizer_json: str, config: Mapping[str, Any], *, stop_ids: Sequence[int] = ()) -> None:
        """`stop_ids`: more ids that end a text than the tokenizer's own."""
        self._json = tokenizer_json
        self._config = dict(config)
        self._special_aware = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._plain = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._plain.encode_special_tokens = True
        _keep_text_apart(self._plain)
        for backend in (self._special_aware, self._plain):
            backend.no_padding()
            backend.no_truncation()
        self._fast = FastEncoder.build(tokenizer_json)
        self._added = self._special_aware.get_added_tokens_decoder()
        self._byte_level = isinstance(self._special_aware.decoder, decoders.ByteLevel)
        ids = self._special_aware.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = max(ids, default=-1) + 1
        """One more than the largest id; some vocabularies have gaps."""
        self.fingerprint: str = hash_bytes(tokenizer_json.encode("utf-8"))
        self.chat_template: str | None = _template(self._config.get("chat_template"), "default")
        self.tool_template: str | None = _template(self._config.get("chat_template"), "tool_use")
        """Another template for when tools are on offer; few folders have one."""
        self.bos_id = self._named("bos_token")
        self.eos_id = self._named("eos_token")
        self.pad_id = self._named("pad_token")
        self.im_start_id = self.token_id("<|im_start|>")
        self.im_end_id = self.token_id("<|im_end|>")
        self.action_start_id = self.token_id("<|action_start|>")
        self.action_end_id = self.token_id("<|action_end|>")
        self.plugin_id = self.token_id("<|plugin|>")
        self.interpreter_id = self.token_id("<|interpreter|>")
        self.reward_id = self.token_id("<|reward|>")
        ends = (self.eos_id, self.im_end_id, self.token_id("<|eot_id|>"), *stop_ids)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(end for end in ends if end is not None))
        self.special_ids = frozenset(id for id, token in self._added.items() if token.special)

    @staticmethod
    def load(folder: Path | str) -> Tokenizer:
        """Read a folder; InputError names the file that is missing or torn. An adapter's may leave it to its base."""
        folder = Path(folder)
        if not any((folder / name).is_file() for name in _FILES):
            folder = base_of(folder)
        path = next((p for name in _FILES if (p := folder / name).is_file()), None)
        if path is None:
            raise InputError(f"no {' or '.join(_FILES)} in {folder}", remedy=_REMEDY)
        config, stop_ids = _read_config(folder), _read_stop_ids(folder / "generation_config.json")
        try:
            text = path.read_text("utf-8") if path.suffix == ".json" else to_tokenizer_json(path.read_bytes(), config)
            return Tokenizer(text, config, stop_ids=stop_ids)
        except InputError as error:
            raise InputError(f"{path}: {error.message}", remedy=error.remedy) from error
        except Exception as error:  # `tokenizers` raises bare Exception for a file it cannot read
            raise InputError(f"{path} is torn or not a tokenizer: {error}", remedy=_REMEDY) from error

    def save(self, folder: Path) -> None:
        """Write the same files again, byte for byte in tokenizer.json."""
        write_text(folder / "tokenizer.json", self._json)
        write_text(folder / "tokenizer_config.json", json.dumps(self._config, ensure_ascii=False, indent=2) + "\n")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text, no <s> added. `special=False`: text like `<|im_start|>` is plain text."""
        ids = self._fast.encode([text], special=special)[0] if self._fast else None
        if ids is not None:
            return ids
        backend = self._special_aware if special else self._plain
        return backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many plain texts, on all cores."""
        texts = list(texts)
        found = self._fast.encode(texts) if self._fast else [None] * len(texts)
        rest = self._rest(texts, found)
        return [next(rest) if ids is None else ids for ids in found]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """`encode_batch` as arrays of int32, which may share their memory."""
        texts = list(texts)
        found = self._fast.arrays(texts) if self._fast else [None] * len(texts)
        rest = self._rest(texts, found)
        return [np.array(next(rest), dtype=np.int32) if ids is None else ids for ids in found]

    def _rest(self, texts: Sequence[str], found: Sequence[object]) -> Iterator[list[int]]:
        """Ids of the texts of which nothing was found."""
        left = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        return (ids.ids for ids in (self._plain.encode_batch_fast(left, add_special_tokens=False) if left else ()))

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self._special_aware.decode(list(ids), skip_special_tokens=skip_special)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one token stands for."""
        if id in self._added:
            return self._added[id].content.encode("utf-8")
        piece = self._special_aware.id_to_token(id)
        if piece is None and 0 <= id < self.vocab_size:
            return b""  # an id that the vocabulary leaves out: a model may choose it all the same
        if piece is None:
            raise InputError(f"token id {id} is not in the vocabulary of {self.vocab_size}")
        if self._byte_level:
            return bytes(char_to_byte()[char] for char in piece)
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes([int(match[1], 16)])
        return piece.replace("▁", " ").encode("utf-8")

    def token_id(self, token: str) -> int | None:
        """The id of one token by its name, or None."""
        return self._special_aware.token_to_id(token)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Name -> id of the special tokens."""
        return {self._added[id].content: id for id in sorted(self.special_ids)}

    @property
    def open_tokens(self) -> dict[str, int]:
        """Name -> id of added tokens that are not special: `encode` finds them in any text (Qwen's <tool_call>)."""
        return {self._added[id].content: id for id in sorted(self._added.keys() - self.special_ids)}

    @property
    def json_text(self) -> str:
        """The content of tokenizer.json."""
        return self._json

    @property
    def is_byte_level(self) -> bool:
        """Whether each token is a run of bytes whose concatenation is the text."""
        return self._byte_level

    @property
    def variables(self) -> dict[str, str]:
        """`bos_token` and so on, as chat templates read them."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
        return {name: text for name in names if (text := _content(self._config.get(name))) is not None}

    def _named(self, field: str) -> int | None:
        name = _content(self._config.get(field))
        return self.token_id(name) if name is not None else None

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:8]})"


class StreamDecoder:
    """Ids one by one -> text that never ends inside a character; all pieces together equal `decode`."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # only for tokenizers that are not byte-level
        self._context = 0  # ids before this one no longer change the text after it
        self._shown = 0  # ids before this one have been given out

    def push(self, id: int) -> str:
        """The text that this token completes (may be empty)."""
        if id in self._skip:
            return ""
        if self._tokenizer.is_byte_level:
            return self._bytes.decode(self._tokenizer.token_bytes(id))
        self._ids.append(id)
        return self._window(final=False)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a torn character."""
        return self._bytes.decode(b"", True) if self._tokenizer.is_byte_level else self._window(final=True)

    def _window(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        now = self._tokenizer.decode(self._ids[self._context :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not final):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return now[len(before) :]


def from_merges(
    merges: Sequence[tuple[bytes, bytes]], *, chat_template: str, pattern: str = PATTERN, spare: int = 0
) -> Tokenizer:
    """A tokenizer from learned merges: <unk> <s> </s>, 256 bytes, merged tokens, spare tokens, chat tokens.

    `spare`: so many special tokens `[UNUSED_TOKEN_0]` ... that no text gives, to be named later or to pad.
    """
    pieces = dict.fromkeys([*base_tokens(), *(left + right for left, right in merges)])
    specials = (*LEADING_SPECIALS, *(f"[UNUSED_TOKEN_{n}]" for n in range(spare)), *TRAILING_SPECIALS)
    learned = list(map(to_chars, pieces))
    refuse_spelled(learned, specials)
    names = [*LEADING_SPECIALS, *learned, *specials[len(LEADING_SPECIALS) :]]
    ranked = [(to_chars(left), to_chars(right)) for left, right in merges]
    backend = tokenizers.Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, ranked))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizer(pattern), to_bytes])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", LEADING_SPECIALS.index("<s>"))]
    )
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return Tokenizer(backend.to_str(pretty=True), hf_config(chat_template))


def refuse_spelled(words: Iterable[str], specials: Iterable[str]) -> None:
    """InputError for special tokens whose names are words of the vocabulary: any text that says one would give it."""
    if spelled := sorted(set(specials).intersection(words)):
        raise InputError(
            f"the vocabulary has words that spell special tokens: {', '.join(map(repr, spelled))}",
            remedy="cut text with a pattern that cuts them, or give the special tokens other names",
        )


def hf_config(chat_template: str) -> dict[str, Any]:
    """tokenizer_config.json as transformers reads it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
        "chat_template": chat_template,
    }


def _read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with the templates of chat_template.jinja and its kin, where newer tools put them."""
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config: dict[str, Any] = {}
    if path.is_file():
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON: {error}", remedy=_REMEDY) from error
        if not isinstance(value, dict):
            raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}", remedy=_REMEDY)
        config = value
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    if (more := folder / "additional_chat_templates" / "tool_use.jinja").is_file():
        named = {"default": _template(config.get("chat_template"), "default"), "tool_use": more.read_text("utf-8")}
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items() if text]
    return config


def _read_stop_ids(path: Path) -> tuple[int, ...]:
    """The end ids of generation_config.json: chat models name several there."""
    ends = read_object(path).get("eos_token_id") if path.is_file() else None
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def _content(token: Any) -> str | None:
    """A token in tokenizer_config.json is a string or an object with `content`."""
    return token.get("content") if isinstance(token, Mapping) else token


def _keep_text_apart(backend: tokenizers.Tokenizer) -> None:
    """Models that find every word of their vocabulary in a text (all but plain BPE) would find special tokens there."""
    model = backend.model
    if isinstance(model, models.BPE) and not model.ignore_merges:
        return
    words = backend.get_vocab(with_added_tokens=False)
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    names = [name for name in special if name in words and len(name) > 1]
    if names:
        before = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
        backend.pre_tokenizer = pre_tokenizers.Sequence([*before, cut_apart(names)])


def _template(template: Any, name: str) -> str | None:
    """A template is a string, or a list of {"name", "template"}; the string is the default."""
    if isinstance(template, list):
        return next((str(item["template"]) for item in template if item.get("name") == name), None)
    return str(template) if template is not None and name == "default" else None
