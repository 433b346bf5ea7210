"""tiktoken's files: one line `base64 rank` for each token, the pattern and special tokens said beside it.

In such a vocabulary a pair is merged when its bytes are a token, the lower rank first. That is the same as a list of
merges exactly when each token, encoded with the ranks below its own, gives two parts: those are its merge. Tokens of
which this is not true could never be reached, or not in one way only, and are refused by name.

    tokenizer = from_ranks(read_ranks(Path("cl100k_base.tiktoken")), pattern=CL100K, special={"<|endoftext|>": 100257})
    export = to_ranks(tokenizer)                        # .ranks, .pattern, .special

Source: tiktoken's `load.py` (format), Sennrich et al. 2016. Nothing is downloaded: the file is given.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from puyu.errors import InputError
from puyu.files import atomic_write, read_object, write_json
from puyu.tokenizer.bpe import pre_tokenizer, to_chars
from puyu.tokenizer.encode import bytes_of, is_bytes, merge_pairs, pattern_of
from puyu.tokenizer.pattern import GPT2
from puyu.tokenizer.tokenizer import Tokenizer, refuse_spelled

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt2": GPT2, "cl100k": CL100K}
"""Patterns that users may name instead of writing them."""
_OTHERWISE = "export tokenizer.json instead"

Ranks = dict[bytes, int]
Merge = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class RanksExport:
    """What a ranks file and the note beside it hold."""

    ranks: Ranks
    pattern: str
    special: dict[str, int]


def read_ranks(path: Path) -> Ranks:
    """The file; InputError names the line that is wrong or the byte that is missing."""
    ranks: Ranks = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", remedy="give a tiktoken ranks file") from error
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if not parts:
            continue
        try:
            token, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
        except (binascii.Error, ValueError, IndexError) as error:
            raise InputError(f"{path}, line {number} is not `base64 rank`: {error}") from error
        if token in ranks or not token:
            raise InputError(f"{path}, line {number}: the token {token!r} is empty or named twice")
        ranks[token] = rank
    if len(set(ranks.values())) != len(ranks):
        raise InputError(f"{path} gives one rank to several tokens")
    if min(ranks.values(), default=0) < 0:
        raise InputError(f"{path} has a rank below 0", remedy="ranks are ids: number them from 0")
    _check_bytes(ranks, str(path))
    return ranks


def _check_bytes(ranks: Mapping[bytes, int], where: str) -> None:
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise InputError(f"{where}: no token for the byte {missing:#04x}", remedy="all 256 bytes must be among them")


def write_ranks(export: RanksExport, path: Path) -> None:
    """The file, and NAME.json beside it with the pattern and the special tokens, which the file cannot hold."""
    with atomic_write(path, "wb") as stream:
        for token, rank in sorted(export.ranks.items(), key=lambda item: item[1]):
            stream.write(base64.b64encode(token) + b" %d\n" % rank)
    write_json(note_of(path), {"pattern": export.pattern, "special_tokens": export.special})


def note_of(path: Path) -> Path:
    """Where the pattern and special tokens of a ranks file stand."""
    return path.with_name(f"{path.name}.json")


def read_note(path: Path) -> tuple[str | None, dict[str, int]]:
    """(pattern, special tokens) that `write_ranks` left beside a file, if any."""
    if not note_of(path).is_file():
        return None, {}
    note = read_object(note_of(path))
    return note.get("pattern"), dict(note.get("special_tokens") or {})


def recover_merges(ranks: Mapping[bytes, int]) -> list[Merge]:
    """The merge of each token of several bytes, by rank; InputError for tokens that merges do not reach."""
    merges, lost = [], []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        parts = merged(token, ranks, below=ranks[token])
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        else:
            lost.append((token, parts))
    if lost:
        token, parts = lost[0]
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise InputError(
            f"rank {ranks[token]}, {token!r}{more}: no merge of two tokens reaches it (lower ranks give {parts})",
            remedy="keep fewer ranks, or leave these tokens out",
        )
    return merges


def merged(data: bytes, ranks: Mapping[bytes, int], *, below: int) -> list[bytes]:
    """The parts of a byte string after all merges whose rank is lower than `below`, the lowest first."""
    parts = [data[i : i + 1] for i in range(len(data))]
    while len(parts) > 1:
        pairs = [ranks.get(parts[i] + parts[i + 1], below) for i in range(len(parts) - 1)]
        best = min(pairs)
        if best >= below:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def ranks_of(tokenizer_json: str) -> tuple[Ranks, str]:
    """(token -> place in the order of merges, the 256 bytes first; pattern) of a byte-level BPE tokenizer.json."""
    content = json.loads(tokenizer_json)
    pattern = pattern_of(content)
    model = content["model"]
    if pattern is None or model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise InputError(
            "this tokenizer is no byte-level BPE that cuts text by one pattern",
            remedy="only those have ranks; give another tokenizer",
        )
    if content.get("normalizer") is not None:
        raise InputError("this tokenizer changes text before it cuts it (a normalizer), which ranks cannot say")
    ranks = {bytes([byte]): byte for byte in range(256)}
    for left, right in merge_pairs(model):
        ranks.setdefault(bytes_of(left + right), len(ranks))
    return ranks, pattern


def first_ranks(ranks: Mapping[bytes, int], count: int) -> list[Merge]:
    """The merges of the first `count` ranks, which must hold all 256 bytes and be reached by merges among them."""
    if not 256 <= count <= len(ranks):
        raise InputError(f"cannot keep {count} of {len(ranks)} ranks", remedy="keep at least the 256 bytes")
    kept = dict(sorted(ranks.items(), key=lambda item: item[1])[:count])
    _check_bytes(kept, f"the first {count} ranks")
    return recover_merges(kept)


def from_ranks(
    ranks: Mapping[bytes, int],
    *,
    pattern: str,
    special: Mapping[str, int] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """A tokenizer whose ids are the ranks. InputError where a special token's id is taken, a token is not reached or
    spells a special one, or the pattern is torn."""
    special = dict(special or {})
    taken = set(ranks.values()) & set(special.values())
    if taken or len(set(special.values())) != len(special):
        raise InputError(f"special tokens need ids of their own; taken: {sorted(taken)[:5] or 'one is named twice'}")
    merges = [(to_chars(left), to_chars(right)) for left, right in recover_merges(ranks)]
    vocab = {to_chars(token): rank for token, rank in ranks.items()}
    refuse_spelled(vocab, special)
    backend = tokenizers.Tokenizer(models.BPE(vocab | special, merges))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizer(pattern), to_bytes])
    backend.decoder = decoders.ByteLevel()
    names = sorted(special, key=special.__getitem__)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return Tokenizer(backend.to_str(pretty=True), dict(config or {}))


def to_ranks(tokenizer: Tokenizer) -> RanksExport:
    """The ranks of a tokenizer, its ids unchanged; InputError that says why when tiktoken would give other ids."""
    content = json.loads(tokenizer.json_text)
    order, pattern = ranks_of(tokenizer.json_text)
    model, special = content["model"], tokenizer.special_tokens
    plain = [token["content"] for token in content["added_tokens"] if not token["special"]]
    if plain:
        raise InputError(f"{plain[0]!r} is found in any text and is not special; a ranks file cannot say that")
    vocab = {bytes_of(name): id for name, id in model["vocab"].items() if name not in special and is_bytes(name)}
    ranks = {token: id for token, id in vocab.items() if token in order}
    if len(ranks) != len(vocab):
        lost = next(token for token in vocab if token not in order)
        raise InputError(f"the token {lost!r} is made by no merge", remedy="tiktoken would find it in texts")
    _check_order(ranks, [(bytes_of(left), bytes_of(right)) for left, right in merge_pairs(model)])
    return RanksExport(ranks, pattern, dict(special))


def _check_order(ranks: Mapping[bytes, int], listed: Sequence[Merge]) -> None:
    """The merges that tiktoken makes must be listed, in the order of the ids. It never comes to others: what stands
    inside the borders of a token is put together as when the token is encoded alone."""
    places = {pair: place for place, pair in enumerate(listed)}  # of a pair that is listed twice the last one counts
    merges = recover_merges(ranks)
    unlisted = next((pair for pair in merges if pair not in places), None)
    if unlisted is not None:
        raise InputError(f"tiktoken would merge {unlisted}, which this tokenizer does not", remedy=_OTHERWISE)
    for first, second in itertools.pairwise(merges):
        if places[first] > places[second]:
            raise InputError(
                f"{b''.join(first)!r} is merged after {b''.join(second)!r} but has the lower id; ranks are both order "
                "and id",
                remedy=_OTHERWISE,
            )


def parse_special(items: Iterable[str]) -> dict[str, int]:
    """NAME=ID arguments."""
    found = {}
    for item in items:
        name, _, id = item.rpartition("=")
        if not name or not id.isdecimal():
            raise InputError(f"{item!r} is not NAME=ID", remedy="for example '<|endoftext|>=100257'")
        found[name] = int(id)
    return found
