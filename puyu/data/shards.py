"""TokenShard: token ids on disk, memory-mapped, with document boundaries, loss bits and the tokenizer's fingerprint.

Four files beside one another: `NAME.tokens` (uint16 or uint32, by vocabulary size), `NAME.ends` (uint64, the end of
each document), `NAME.loss` (one bit a token; only when some document has a mask), and `NAME.json`, written last: a
shard without it does not exist. Opening checks every size against the header, so a truncated file is named, never read.
Knows nothing of batches, mixtures, or torch.

    >>> info = write_shard(folder / "web", [([1, 5, 2], None)], tokenizer_hash=tokenizer.fingerprint, vocab_size=8192)
    >>> TokenShard.open(folder / "web").doc(0)[0].tolist()
    [1, 5, 2]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from puyu.errors import InputError
from puyu.files import atomic_write, disk_errors, read_json, write_json

_REMEDY = "remove the shard's folder and run the same command again; it is written anew"


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """The header of a shard. `dtype` is `uint16` or `uint32`."""

    num_docs: int
    num_tokens: int
    dtype: str
    has_loss: bool
    vocab_size: int
    tokenizer_hash: str


def _file(prefix: Path, kind: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{kind}")


class ShardWriter:
    """Append documents one by one; nothing can be opened until `close` has written the header.

    Use it as a context manager: an exception inside leaves no shard behind.
    """

    def __init__(self, prefix: Path, *, tokenizer_hash: str, vocab_size: int) -> None:
        self.prefix, self.tokenizer_hash, self.vocab_size = prefix, tokenizer_hash, vocab_size
        self.dtype = np.dtype("uint16" if vocab_size <= 1 << 16 else "uint32")
        self.num_tokens = 0
        self._ends: list[int] = []
        self._masks: list[tuple[int, np.ndarray]] = []
        self._stack = ExitStack()
        _file(prefix, "json").unlink(missing_ok=True)
        self._tokens = self._stack.enter_context(atomic_write(_file(prefix, "tokens"), "wb"))

    def append(self, ids: Sequence[int] | np.ndarray, loss: Sequence[bool] | np.ndarray | None = None) -> None:
        """Add one document; `loss` (one bool a token) is all-true when left out. Empty documents are refused."""
        ids_T = np.asarray(ids)
        if loss is not None:
            mask_T = np.asarray(loss, dtype=bool)
            assert mask_T.shape == ids_T.shape, "one loss flag for each token"
            self._masks.append((self.num_tokens, mask_T))
        self.extend([ids_T])

    def extend(self, docs: Sequence[np.ndarray]) -> None:
        """Add documents without masks."""
        if not docs:
            return
        sizes, first = np.array([len(doc) for doc in docs]), len(self._ends)
        if not sizes.all():
            empty = first + int(sizes.argmin())
            raise InputError(f"{self.prefix}: document {empty} has no tokens", remedy="drop it before writing")
        ids_T = np.concatenate(docs)
        if ids_T.min() < 0 or ids_T.max() >= self.vocab_size:
            wrong = int(np.flatnonzero((ids_T < 0) | (ids_T >= self.vocab_size))[0])
            number = first + int(np.searchsorted(np.cumsum(sizes), wrong, side="right"))
            raise InputError(f"{self.prefix}: a token id of document {number} is outside 0..{self.vocab_size - 1}")
        with disk_errors(self.prefix):
            self._tokens.write(ids_T.astype(self.dtype).data)
        self._ends += (self.num_tokens + np.cumsum(sizes)).tolist()
        self.num_tokens += ids_T.size

    def close(self) -> ShardInfo:
        """Finish the data files, then write the header."""
        self._stack.close()
        with atomic_write(_file(self.prefix, "ends"), "wb") as stream:
            stream.write(np.asarray(self._ends, dtype=np.uint64).tobytes())
        if self._masks:
            with atomic_write(_file(self.prefix, "loss"), "wb") as stream:
                stream.write(np.packbits(self._loss_bits()).tobytes())
        else:
            _file(self.prefix, "loss").unlink(missing_ok=True)
        info = ShardInfo(
            num_docs=len(self._ends),
            num_tokens=self.num_tokens,
            dtype=self.dtype.name,
            has_loss=bool(self._masks),
            vocab_size=self.vocab_size,
            tokenizer_hash=self.tokenizer_hash,
        )
        write_json(_file(self.prefix, "json"), asdict(info))
        return info

    def _loss_bits(self) -> np.ndarray:
        bits_T = np.ones(self.num_tokens, dtype=bool)
        for start, mask_T in self._masks:
            bits_T[start : start + mask_T.size] = mask_T
        return bits_T

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._stack.__exit__(kind, error, trace)


def write_shard(
    prefix: Path,
    docs: Iterable[tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray | None]],
    *,
    tokenizer_hash: str,
    vocab_size: int,
) -> ShardInfo:
    """Write all documents as one shard; a kill at any moment leaves the old shard or none."""
    with ShardWriter(prefix, tokenizer_hash=tokenizer_hash, vocab_size=vocab_size) as writer:
        for ids, loss in docs:
            writer.append(ids, loss)
    return TokenShard.open(prefix).info


@dataclass(frozen=True)
class TokenShard:
    """An open shard. Reading a document touches only its own pages."""

    info: ShardInfo
    tokens_T: np.ndarray
    ends_D: np.ndarray
    loss_B: np.ndarray | None

    @staticmethod
    def open(prefix: Path, *, tokenizer_hash: str | None = None) -> TokenShard:
        """Map a shard; InputError when it is missing, truncated, or made with another tokenizer."""
        header = _file(prefix, "json")
        if not header.is_file():
            raise InputError(f"no such token shard: {header}", remedy=_REMEDY)
        try:
            info = ShardInfo(**read_json(header))
        except TypeError as error:
            raise InputError(f"{header} is not the header of a token shard: {error}", remedy=_REMEDY) from error
        if tokenizer_hash is not None and tokenizer_hash != info.tokenizer_hash:
            raise InputError(
                f"{prefix} holds ids of tokenizer {info.tokenizer_hash}, but the tokenizer in use is {tokenizer_hash}",
                remedy="tokenize again with this tokenizer, or use the one the shard was made with",
            )
        bits = -(-info.num_tokens // 8)
        return TokenShard(
            info=info,
            tokens_T=_map(_file(prefix, "tokens"), info.dtype, info.num_tokens),
            ends_D=_map(_file(prefix, "ends"), "uint64", info.num_docs),
            loss_B=_map(_file(prefix, "loss"), "uint8", bits) if info.has_loss else None,
        )

    @property
    def num_docs(self) -> int:
        return self.info.num_docs

    @property
    def num_tokens(self) -> int:
        return self.info.num_tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest document; reads all their ends."""
        return int(np.diff(self.ends_D, prepend=np.uint64(0)).max(initial=0))

    def _bounds(self, index: int) -> tuple[int, int]:
        return int(self.ends_D[index - 1]) if index else 0, int(self.ends_D[index])

    def length(self, index: int) -> int:
        """Tokens of document `index`."""
        start, end = self._bounds(index)
        return end - start

    def doc(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids and loss flags (None: all true) of document `index`."""
        start, end = self._bounds(index)
        if self.loss_B is None:
            return self.tokens_T[start:end], None
        bits_T = np.unpackbits(self.loss_B[start // 8 : -(-end // 8)])[start % 8 :][: end - start]
        return self.tokens_T[start:end], bits_T.astype(bool)


def _map(path: Path, dtype: str, count: int) -> np.ndarray:
    """Map a file after checking that it holds exactly `count` values."""
    need = count * np.dtype(dtype).itemsize
    have = path.stat().st_size if path.is_file() else None
    if have is None:
        raise InputError(f"a part of a token shard is missing: {path}", remedy=_REMEDY)
    if have != need:
        word = "truncated" if have < need else "too long"
        raise InputError(f"{path} is {word}: {have} bytes, its header says {need}", remedy=_REMEDY)
    return np.memmap(path, dtype=dtype, mode="r") if need else np.zeros(0, dtype=dtype)
