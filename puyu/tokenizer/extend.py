"""The vocabulary to go on from: the first ranks of one that exists, the InternLM2 way.

InternLM2 keeps the first 60,004 ranks of cl100k, adds 32,397 tokens learned from Chinese and 147 spare ones
(arXiv 2403.17297, section 2.1). Here the new merges are learned on texts that the kept ones have already merged, so
kept and new tokens are one list of merges and each of them is reached (checked when the ranks are read).

    base = read_base(Extension(base=Path("cl100k_base.tiktoken"), keep=60_004, pattern="cl100k"))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field

from puyu.configure import Config
from puyu.errors import ConfigError
from puyu.tokenizer.bpe import pre_tokenizer
from puyu.tokenizer.ranks import PATTERNS, Merge, first_ranks, ranks_of, read_note, read_ranks
from puyu.tokenizer.tokenizer import Tokenizer


class Extension(Config):
    base: Path
    """A tokenizer's folder, or a tiktoken ranks file."""
    keep: int = Field(ge=256)
    """So many ranks are kept, the first ones, the 256 bytes included."""
    pattern: str = ""
    """Where text is cut: a regular expression, `cl100k` or `gpt2`; empty: as the base does (a ranks file does not say
    it, unless NAME.json stands beside it)."""


@dataclass(frozen=True, slots=True)
class Base:
    """The pattern and the merges to go on from."""

    pattern: str
    merges: list[Merge] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """Ranks that are kept, the bytes included."""
        return 256 + len(self.merges) if self.merges else 0


def read_base(config: Extension) -> Base:
    """Read and check what is kept; InputError names the ranks that cannot be."""
    if config.base.is_dir():
        ranks, own = ranks_of(Tokenizer.load(config.base).json_text)
    else:
        ranks, (note, _) = read_ranks(config.base), read_note(config.base)
        own = note or ""
    pattern = PATTERNS.get(config.pattern, config.pattern) or own
    if not pattern:
        remedy = "set extend.pattern to a regular expression or to one of: " + ", ".join(PATTERNS)
        raise ConfigError(f"{config.base} does not say where text is cut", remedy=remedy)
    pre_tokenizer(pattern)  # a torn one is named before anything is counted
    return Base(pattern, first_ranks(ranks, config.keep))
