"""The tokenizer stage: kept corpus (and chats) -> tokenizer.json, tokenizer_config.json, report.json.

    puyu tokenizer --data runs/nano/data --out runs/nano/tokenizer

The same config and documents give the same bytes, in whatever order the documents come. Texts are read as a stream:
memory holds the different pre-tokens, not the corpus. A killed run starts again from the beginning.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from puyu.configure import Config
from puyu.errors import ConfigError, InputError
from puyu.files import hash_json, read_jsonl_lines, write_json
from puyu.log import Progress
from puyu.tokenizer.bpe import PATTERN
from puyu.tokenizer.chat import plain_pieces
from puyu.tokenizer.dialect.format import unicode_of
from puyu.tokenizer.extend import Base, Extension, read_base
from puyu.tokenizer.learn import LONGEST, Learned, add_all, learn, piece_table
from puyu.tokenizer.library import MOST_CHARACTERS
from puyu.tokenizer.measure import compression
from puyu.tokenizer.template import CHAT_TEMPLATE
from puyu.tokenizer.tokenizer import LEADING_SPECIALS, TRAILING_SPECIALS, Tokenizer, from_merges
from puyu.types import Conversation

_SPECIALS = len(LEADING_SPECIALS) + len(TRAILING_SPECIALS)
_MORE_THAN_ALL = 1 << 40  # a count that no corpus reaches


class TokenizerConfig(Config):
    data: Path | None = None
    """Folder of the data stage (its kept.jsonl), or one JSONL file of objects with the field 'text'."""
    languages: list[str] = Field(default_factory=list)
    """Learn only from documents of these languages (`code` for code); empty: from all."""
    extra_texts: list[Path] = Field(default_factory=list)
    """JSONL files of chats or preferences (.jsonl, .jsonl.gz) whose words should get tokens too."""
    extra_weight: int = Field(default=3, ge=1)
    """Each text of extra_texts counts this many times."""
    extend: Extension | None = None
    """Go on from the first ranks of a vocabulary that exists, as InternLM2 does from cl100k."""
    vocab_size: int = Field(default=8192, ge=256 + _SPECIALS, le=1 << 20)
    """Number of tokens: special tokens, the 256 bytes, kept and spare ones included; padding comes on top."""
    spare: int = Field(default=0, ge=0)
    """So many tokens `[UNUSED_TOKEN_n]` that no text gives, to be named later."""
    pad_to_multiple: int = Field(default=1, ge=1)
    """Add spare tokens until the vocabulary is a multiple of this (128 suits matrix units)."""
    numbers: bool = False
    """Give every number of up to three digits a token of its own first (1,100 of the merges), as InternLM2 has it."""
    min_count: int = Field(default=2, ge=1)
    """A pair of tokens must occur this often to be merged."""
    max_bytes: int = Field(default=16_000_000, ge=1)
    """Learn from at most this many bytes of the corpus (documents drawn by seed)."""
    longest_piece: int = Field(default=LONGEST, ge=8, le=MOST_CHARACTERS)
    """Runs without a border are cut after so many characters while learning."""
    max_piece_bytes: int = Field(default=1 << 27, ge=1 << 10)
    """When the different pre-tokens hold more bytes than this, rare ones are sampled; memory grows with it."""
    report_bytes: int = Field(default=1_000_000, ge=1)
    """Measure compression on at most this many bytes of each language."""
    seed: int = 0
    """Which documents are drawn when there are more than max_bytes."""


@dataclass
class _Seen:
    """What went by while texts were counted: documents, bytes, the first texts of each group for the report."""

    report_bytes: int
    documents: int = 0
    bytes: int = 0
    texts: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    sizes: Counter[str] = field(default_factory=Counter)

    def add(self, group: str, text: str) -> str:
        size = len(text.encode("utf-8"))
        self.bytes += size
        if self.sizes[group] < self.report_bytes:
            self.texts[group].append(text)
            self.sizes[group] += size
        return text


def run(config: TokenizerConfig, *, out: Path) -> dict[str, Any]:
    """Train and save; returns vocabulary, merges, bytes per token of each language, seconds."""
    began = time.monotonic()
    base = read_base(config.extend) if config.extend else Base(PATTERN)
    seen = _Seen(config.report_bytes)
    learned = _learn(config, base, seen)
    merges = [*base.merges, *learned.merges]
    tokenizer = _assemble(config, base, merges)
    tokenizer.save(out)
    report = _report(tokenizer, config, seen) | {
        "merges": len(merges),
        "kept_ranks": base.kept,
        "spare": tokenizer.vocab_size - 256 - _SPECIALS - len(merges),
        "rare_pieces_one_in": learned.every,
    }
    write_json(out / "report.json", report)
    rates = {f"bytes_per_token_{name}": row["bytes_per_token"] for name, row in report["compression"].items()}
    numbers = {key: report[key] for key in ("vocab_size", "merges", "train_bytes")}
    return numbers | rates | {"seconds": round(time.monotonic() - began, 2)}


def _learn(config: TokenizerConfig, base: Base, seen: _Seen) -> Learned:
    table = piece_table(base.pattern, longest=config.longest_piece)
    if config.numbers:
        table.weigh(_numbers(config))
    progress = Progress("pre-tokens", 0, unit="B")
    documents = _drawn(config) if config.data else iter(())
    for size in add_all(table, _watched(documents, seen)):
        progress.update(work=size)
    chats = (seen.add("chat", text) for path in config.extra_texts for text in _chat_texts(path))
    for size in add_all(table, chats, weight=config.extra_weight):
        progress.update(work=size)
    progress.close()
    if not seen.bytes:
        remedy = "set data or extra_texts to files with text"
        raise ConfigError("the tokenizer has nothing to learn from", remedy=remedy)
    return _merges(config, base, table)


def _merges(config: TokenizerConfig, base: Base, table: Any) -> Learned:
    wanted = config.vocab_size - _SPECIALS - config.spare
    if wanted < max(256, 256 + len(base.merges)):
        remedy = "raise vocab_size, or keep fewer"
        raise ConfigError(f"vocab_size {config.vocab_size} is too small for what is kept and spare", remedy=remedy)
    progress = Progress("merges", wanted - 256 - len(base.merges), unit="merge")
    limits = {"min_count": config.min_count, "most_bytes": config.max_piece_bytes}
    learned = learn(table, num_tokens=wanted, kept=base.merges, on_merge=progress.update, **limits)
    progress.close()
    return learned


def _assemble(config: TokenizerConfig, base: Base, merges: list[tuple[bytes, bytes]]) -> Tokenizer:
    size = 256 + _SPECIALS + len(merges) + config.spare
    spare = config.spare + -size % config.pad_to_multiple
    return from_merges(merges, chat_template=CHAT_TEMPLATE, pattern=base.pattern, spare=spare)


def _numbers(config: TokenizerConfig) -> dict[bytes, int]:
    """All strings of two and three digits, counted so often that they are merged before anything else."""
    least = 256 + _SPECIALS + 1100
    if config.extend:
        raise ConfigError("numbers: true cannot come after kept ranks", remedy="leave out numbers or extend")
    if config.vocab_size < least:
        raise ConfigError(f"numbers: true needs a vocab_size of at least {least}, not {config.vocab_size}")
    digits = [f"{n:0{length}d}".encode() for length in (2, 3) for n in range(10**length)]
    return dict.fromkeys(digits, _MORE_THAN_ALL)


def _watched(documents: Iterable[tuple[str, str]], seen: _Seen) -> Iterator[str]:
    for group, text in documents:
        seen.documents += 1
        yield seen.add(group, text)


def _documents(config: TokenizerConfig) -> Iterator[tuple[str, str]]:
    """(group, text): the group is `code` for code, else the language."""
    assert config.data is not None
    path = config.data / "kept.jsonl" if config.data.is_dir() else config.data
    if not path.is_file():
        raise InputError(f"no such file: {path}", remedy="run the data stage first (`puyu data`)")
    for line, row in read_jsonl_lines(path):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise InputError(f"{path}, line {line}: the field 'text' is missing or not text")
        group = "code" if row.get("domain") == "code" else str(row.get("language") or "other")
        if not config.languages or group in config.languages:
            yield group, unicode_of(text, f"{path}, line {line}")


def _drawn(config: TokenizerConfig) -> Iterator[tuple[str, str]]:
    """All documents, or those of the smallest seeded hashes until max_bytes are reached; in file order."""
    sizes = [len(text.encode("utf-8")) for _, text in _documents(config)]
    if sum(sizes) <= config.max_bytes:
        yield from _documents(config)
        return
    hashes = [hash_json([config.seed, text]) for _, text in _documents(config)]
    chosen, total = set(), 0
    for index in sorted(range(len(sizes)), key=hashes.__getitem__):
        if total + sizes[index] <= config.max_bytes:
            chosen.add(index)
            total += sizes[index]
    yield from (document for index, document in enumerate(_documents(config)) if index in chosen)


def _chat_texts(path: Path) -> Iterator[str]:
    """What a chat renders between its markers; of a preference pair, the prompt with each answer."""
    for line, row in read_jsonl_lines(path):
        try:
            yield from plain_pieces(Conversation.from_openai({"messages": _messages(row), "tools": row.get("tools")}))
        except (InputError, AttributeError, KeyError, TypeError) as error:
            remedy = "extra_texts needs conversations ('messages') or preferences ('prompt', 'chosen', 'rejected')"
            raise InputError(f"{path}, line {line} is not a chat: {error!r}", remedy=remedy) from error


def _messages(row: Mapping[str, Any]) -> list[Any]:
    if "messages" in row:
        return list(row["messages"])
    turns = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    answers = [row["chosen"], row["rejected"]]
    return turns + [{"role": "assistant", "content": a} if isinstance(a, str) else a for a in answers]


def _report(tokenizer: Tokenizer, config: TokenizerConfig, seen: _Seen) -> dict[str, Any]:
    return {
        "vocab_size": tokenizer.vocab_size,
        "wanted_vocab_size": config.vocab_size,
        "train_documents": seen.documents,
        "train_bytes": seen.bytes,
        "special_tokens": tokenizer.special_tokens,
        "fingerprint": tokenizer.fingerprint,
        "compression": compression(tokenizer, seen.texts),
    }
