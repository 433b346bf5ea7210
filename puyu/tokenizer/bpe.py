"""Byte-level BPE: counts of pre-tokens in, ranked merges out.

Pure Python with incremental pair counts and a lazy heap over unique pre-tokens; it refuses to know files and
special tokens. The merges equal those of Hugging Face `tokenizers` (tested): the most frequent pair wins, a tie
goes to the pair with the smaller ids, where the 256 bytes are numbered by the code point that stands for them.
Source: Sennrich et al. 2016 (arXiv 1508.07909); bytes as in GPT-2.

    >>> learn_merges({b"low": 5, b"lower": 2}, num_tokens=258)
    [(b'l', b'o'), (b'lo', b'w')]
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

from tokenizers import Regex, pre_tokenizers

from puyu.errors import InputError

# Where a token may never reach across. Numbers are cut after three digits, as in cl100k, which InternLM2 follows: a
# model copies a short number as one token, where single digits that repeat would mislead it (docs/log.md). Each line
# break stands alone, so that a chat turn has the same ids whether its header and its text are encoded together or not.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"| ?[\p{L}\p{M}]+"  # a word or a run of Chinese, with one space before it
    r"|\p{N}{1,3}"  # up to three digits
    r"|[\r\n]"  # one line break
    r"| ?[^\s\p{L}\p{M}\p{N}]+"  # punctuation
    r"|[^\S\r\n]+(?!\S)"  # spaces before a line break or before the last space of a run
    r"|\s"
)

_SHIFT = 24  # a pair of ids is kept as one integer, left << 24 | right: cheap to hash, ordered like the tuple
_MASK = (1 << _SHIFT) - 1


@cache
def byte_to_char() -> dict[int, str]:
    """GPT-2's table: printable bytes stand for themselves, the others for code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(256 + n) for n, byte in enumerate(others)}


@cache
def char_to_byte() -> dict[str, int]:
    """The table the other way round."""
    return {char: byte for byte, char in byte_to_char().items()}


def to_chars(data: bytes) -> str:
    """Bytes as the text that `tokenizer.json` writes for them."""
    table = byte_to_char()
    return "".join(table[byte] for byte in data)


@cache
def base_tokens() -> tuple[bytes, ...]:
    """The 256 single bytes in id order (the code points of their characters)."""
    return tuple(bytes([byte]) for byte in sorted(range(256), key=byte_to_char().__getitem__))


def pre_tokenizer(pattern: str = PATTERN) -> pre_tokenizers.PreTokenizer:
    """Cuts text at the borders of a pattern; every character is in exactly one piece. InputError for a torn pattern."""
    try:
        return pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as error:  # `tokenizers` raises bare Exception for what Oniguruma refuses
        remedy = "give a regular expression that Oniguruma reads; mind brackets and backslashes"
        raise InputError(f"the pattern {pattern!r} cannot be read: {error}", remedy=remedy) from error


def count_pieces(texts: Iterable[str], pattern: str = PATTERN) -> Counter[bytes]:
    """How often each pre-token occurs, as UTF-8 bytes."""
    splitter = pre_tokenizer(pattern)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update([piece for piece, _ in splitter.pre_tokenize_str(text)])
    return Counter({piece.encode("utf-8"): count for piece, count in counts.items()})


@dataclass
class _Corpus:
    """Unique pre-tokens as lists of ids, and for each pair its count and the words that may hold it."""

    words: list[list[int]]
    counts: list[int]
    pairs: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    where: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))

    @staticmethod
    def build(pieces: Mapping[bytes, int], kept: Sequence[tuple[int, int]]) -> _Corpus:
        rank = {token[0]: index for index, token in enumerate(base_tokens())}
        corpus = _Corpus([[rank[byte] for byte in piece] for piece in pieces], list(pieces.values()))
        for new, (left, right) in enumerate(kept, 256):
            for word in corpus.words:
                merge_word(word, left << _SHIFT | right, new)
        for index, (word, count) in enumerate(zip(corpus.words, corpus.counts, strict=True)):
            for left, right in pairwise(word):
                pair = left << _SHIFT | right
                corpus.pairs[pair] += count
                corpus.where[pair].add(index)
        return corpus

    def merge(self, pair: int, new: int) -> set[int]:
        """Replace the pair everywhere; returns the pairs that became more frequent."""
        pairs, where = self.pairs, self.where
        grown: set[int] = set()
        for index in where.pop(pair):
            count = self.counts[index]
            lost, gained = merge_word(self.words[index], pair, new)
            for other in lost:
                pairs[other] -= count
            for other in gained:
                pairs[other] += count
                where[other].add(index)
            grown.update(gained)
        del pairs[pair]
        return grown


def merge_word(word: list[int], pair: int, new: int) -> tuple[list[int], list[int]]:
    """Merge a pair from left to right in one word, in place: (pairs lost, pairs gained), with repeats."""
    left, right = pair >> _SHIFT, pair & _MASK
    lost: list[int] = []
    gained: list[int] = []
    at, remaining = 0, word.count(left)
    while remaining:
        at = word.index(left, at)
        if at + 1 == len(word) or word[at + 1] != right:
            at, remaining = at + 1, remaining - 1
            continue
        word[at : at + 2] = (new,)
        remaining -= 2 if left == right else 1
        if at:
            lost.append(word[at - 1] << _SHIFT | left)
            gained.append(word[at - 1] << _SHIFT | new)
        at += 1
        if at < len(word):
            lost.append(right << _SHIFT | word[at])
            gained.append(new << _SHIFT | word[at])
    return lost, gained


def learn_merges(
    pieces: Mapping[bytes, int],
    *,
    num_tokens: int,
    min_count: int = 2,
    kept: Sequence[tuple[bytes, bytes]] = (),
    on_merge: Callable[[], None] | None = None,
) -> list[tuple[bytes, bytes]]:
    """Merges in rank order until there are `num_tokens` tokens (256 bytes included) or no pair is frequent enough.

    `kept`: merges that are made first, of a vocabulary to go on from; they count in num_tokens and are not returned.
    """
    tokens = [*base_tokens(), *(left + right for left, right in kept)]
    ids = {token: index for index, token in enumerate(tokens)}
    corpus = _Corpus.build(pieces, [(ids[left], ids[right]) for left, right in kept])
    heap = [(-count, pair) for pair, count in corpus.pairs.items() if count >= min_count]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    while heap and len(tokens) < num_tokens:
        claimed, pair = heapq.heappop(heap)
        count = corpus.pairs.get(pair, 0)
        if count != -claimed:  # counts only fall between two pushes: put it back with what it has now
            if count >= min_count:
                heapq.heappush(heap, (-count, pair))
            continue
        left, right = tokens[pair >> _SHIFT], tokens[pair & _MASK]
        new = ids.setdefault(left + right, len(tokens))
        if new == len(tokens):
            tokens.append(left + right)
        merges.append((left, right))
        for other in corpus.merge(pair, new):
            if (grown := corpus.pairs.get(other, 0)) >= min_count:
                heapq.heappush(heap, (-grown, other))
        if on_merge:
            on_merge()
    return merges
