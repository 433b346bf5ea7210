"""The tokenizer stage: kept corpus (and chats) -> tokenizer.json, tokenizer_config.json, report.json.

    puyu tokenizer --data runs/nano/data --out runs/nano/tokenizer

The same config and input give the same bytes. It takes seconds, so a killed run simply starts again.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from puyu.configure import Config
from puyu.errors import ConfigError, InputError
from puyu.files import hash_json, read_jsonl_lines, write_json
from puyu.log import Progress
from puyu.tokenizer.bpe import count_pieces, learn_merges
from puyu.tokenizer.chat import plain_pieces
from puyu.tokenizer.measure import compression
from puyu.tokenizer.template import CHAT_TEMPLATE
from puyu.tokenizer.tokenizer import LEADING_SPECIALS, TRAILING_SPECIALS, Tokenizer, from_merges
from puyu.types import Conversation

_SPECIALS = len(LEADING_SPECIALS) + len(TRAILING_SPECIALS)


class TokenizerConfig(Config):
    data: Path | None = None
    """Folder of the data stage (its kept.jsonl), or one JSONL file of objects with the field 'text'."""
    extra_texts: list[Path] = Field(default_factory=list)
    """JSONL files of chats or preferences (.jsonl, .jsonl.gz) whose words should get tokens too."""
    extra_weight: int = Field(default=3, ge=1)
    """Each text of extra_texts counts this many times."""
    vocab_size: int = Field(default=8192, ge=256 + _SPECIALS, le=1 << 20)
    """Number of tokens, special tokens and the 256 bytes included."""
    numbers: bool = False
    """Give every number of up to three digits a token of its own first (1,100 of the merges), as InternLM2 has it."""
    min_count: int = Field(default=2, ge=1)
    """A pair of tokens must occur this often to be merged."""
    max_bytes: int = Field(default=16_000_000, ge=1)
    """Learn from at most this many bytes of the corpus (documents drawn by seed)."""
    report_bytes: int = Field(default=1_000_000, ge=1)
    """Measure compression on at most this many bytes of each language."""
    seed: int = 0
    """Which documents are drawn when there are more than max_bytes."""


def run(config: TokenizerConfig, *, out: Path) -> dict[str, Any]:
    """Train and save; returns vocabulary, merges, bytes per token of each language, seconds."""
    began = time.monotonic()
    documents = _draw(list(_documents(config.data)) if config.data else [], config)
    chats = [text for path in config.extra_texts for text in _chat_texts(path)]
    pieces = _counted("corpus", [text for _, text in documents])
    for piece, count in _counted("chats", chats).items():
        pieces[piece] += count * config.extra_weight
    if config.numbers:
        pieces += _numbers(config, more_often_than=pieces.total())
    tokenizer = _train(pieces, config)
    tokenizer.save(out)
    report = _report(tokenizer, config, documents, chats)
    write_json(out / "report.json", report)
    rates = {f"bytes_per_token_{name}": row["bytes_per_token"] for name, row in report["compression"].items()}
    numbers = {key: report[key] for key in ("vocab_size", "merges", "train_bytes")}
    return numbers | rates | {"seconds": round(time.monotonic() - began, 2)}


def _train(pieces: Counter[bytes], config: TokenizerConfig) -> Tokenizer:
    if not pieces:
        raise ConfigError(
            "the tokenizer has nothing to learn from", remedy="set data or extra_texts to files with text"
        )
    wanted = config.vocab_size - _SPECIALS
    progress = Progress("merges", wanted - 256, unit="merge")
    merges = learn_merges(pieces, num_tokens=wanted, min_count=config.min_count, on_merge=progress.update)
    progress.close()
    return from_merges(merges, chat_template=CHAT_TEMPLATE)


def _numbers(config: TokenizerConfig, *, more_often_than: int) -> Counter[bytes]:
    """All strings of two and three digits, counted so often that they are merged before anything else."""
    least = 256 + _SPECIALS + 1100
    if config.vocab_size < least:
        raise ConfigError(f"numbers: true needs a vocab_size of at least {least}, not {config.vocab_size}")
    digits = [f"{n:0{length}d}".encode() for length in (2, 3) for n in range(10**length)]
    return Counter(dict.fromkeys(digits, more_often_than + 1))


def _counted(name: str, texts: list[str]) -> Counter[bytes]:
    progress = Progress(f"pre-tokens of {name}", len(texts), unit="B")

    def watched() -> Iterator[str]:
        for text in texts:
            yield text
            progress.update(work=len(text.encode("utf-8")))

    pieces = count_pieces(watched())
    progress.close()
    return pieces


def _documents(data: Path) -> Iterator[tuple[str, str]]:
    """(group, text): the group is `code` for code, else the language."""
    path = data / "kept.jsonl" if data.is_dir() else data
    if not path.is_file():
        raise InputError(f"no such file: {path}", remedy="run the data stage first (`puyu data`)")
    for line, row in read_jsonl_lines(path):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise InputError(f"{path}, line {line}: the field 'text' is missing or not text")
        yield ("code" if row.get("domain") == "code" else str(row.get("language") or "other")), text


def _draw(documents: list[tuple[str, str]], config: TokenizerConfig) -> list[tuple[str, str]]:
    """All documents, or those of the smallest seeded hashes until max_bytes are reached; in file order."""
    sizes = [len(text.encode("utf-8")) for _, text in documents]
    if sum(sizes) <= config.max_bytes:
        return documents
    order = sorted(range(len(documents)), key=lambda i: hash_json([config.seed, documents[i][1]]))
    chosen, total = [], 0
    for index in order:
        if total + sizes[index] <= config.max_bytes:
            chosen.append(index)
            total += sizes[index]
    return [documents[index] for index in sorted(chosen)]


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


def _report(
    tokenizer: Tokenizer, config: TokenizerConfig, documents: list[tuple[str, str]], chats: list[str]
) -> dict[str, Any]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for group, text in documents:
        groups[group].append(text)
    if chats:
        groups["chat"] = chats
    shown = {name: list(_first_bytes(texts, config.report_bytes)) for name, texts in groups.items()}
    return {
        "vocab_size": tokenizer.vocab_size,
        "wanted_vocab_size": config.vocab_size,
        "merges": tokenizer.vocab_size - 256 - _SPECIALS,
        "train_documents": len(documents),
        "train_bytes": _size(text for _, text in documents) + _size(chats),
        "special_tokens": tokenizer.special_tokens,
        "fingerprint": tokenizer.fingerprint,
        "compression": compression(tokenizer, shown),
    }


def _size(texts: Iterable[str]) -> int:
    return sum(len(text.encode("utf-8")) for text in texts)


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    total = 0
    for text in texts:
        if total >= limit:
            return
        total += len(text.encode("utf-8"))
        yield text
