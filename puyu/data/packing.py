"""Documents -> Batch: several documents end to end in one row of tokens, with boundaries, targets and weights.

Sources define the *global* batch; rank r of a world takes every world-th row (or document) of it, so neither the
token stream nor the saved cursor depends on how many processes run. Knows no attention plan and no loss.

    >>> batch = pack_documents([(ids, loss), (other_ids, None)])
    >>> batch.starts_S, batch.num_tokens
    ((0, 17), 40)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from puyu.data.mix import Mixture, key_of, permuted
from puyu.data.rows import Packing, Rows, Stretch
from puyu.data.shards import TokenShard
from puyu.errors import CheckpointError, ConfigError, InputError

Ids = Sequence[int] | np.ndarray
Doc = tuple[Ids, Sequence[bool] | np.ndarray | None]
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Packed tokens. `targets_T` is the next token of the same document; `weights_T` 0 where nothing is learned.

    `starts_S` are the first tokens of the documents, the first is 0. `extras` holds named arrays per token (`_T`)
    or per document (`_S`). Where the batch names `sources`, `extras["source_T"]` is the number of each token's source.
    """

    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    weights_T: Tensor
    starts_S: tuple[int, ...]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.tokens_T.numel()

    @property
    def ends_S(self) -> tuple[int, ...]:
        """One past the last token of each document."""
        return (*self.starts_S[1:], self.num_tokens)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            tokens_T=self.tokens_T.to(device),
            positions_T=self.positions_T.to(device),
            targets_T=self.targets_T.to(device),
            weights_T=self.weights_T.to(device),
            extras={name: value.to(device) for name, value in self.extras.items()},
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a document. `next_id` is the token after it, so that a cut loses no target; None at the end."""

    ids: Ids
    loss: Sequence[bool] | np.ndarray | None = None
    next_id: int | None = None
    next_loss: bool = True


def pack_documents(docs: Iterable[Doc], *, extras: Mapping[str, Tensor] | None = None) -> Batch:
    """Whole documents end to end. `loss[i]` says whether token i is learned (as the target of token i-1)."""
    return pack_pieces([Piece(ids, loss) for ids, loss in docs], extras=extras)


def pack_pieces(pieces: Sequence[Piece], *, extras: Mapping[str, Tensor] | None = None) -> Batch:
    """Pieces end to end, positions from 0 in each. No piece at all gives one token of weight 0.

    (A rank without work must still run the forward pass: its peers wait for it in collectives.)
    """
    pieces = pieces or [Piece([0])]
    lengths_S = np.array([len(piece.ids) for piece in pieces], dtype=np.int64)
    starts_S = np.concatenate([[0], np.cumsum(lengths_S)[:-1]])
    tokens_T = np.concatenate([np.asarray(piece.ids, dtype=np.int64) for piece in pieces])
    learned_T = np.concatenate([_flags(piece) for piece in pieces])
    targets_T, weights_T = np.roll(tokens_T, -1), np.roll(learned_T, -1).astype(np.float32)
    last_S = starts_S + lengths_S - 1
    targets_T[last_S] = [0 if piece.next_id is None else piece.next_id for piece in pieces]
    weights_T[last_S] = [float(piece.next_id is not None and piece.next_loss) for piece in pieces]
    return Batch(
        tokens_T=torch.from_numpy(tokens_T),
        positions_T=torch.from_numpy(np.arange(len(tokens_T)) - np.repeat(starts_S, lengths_S)),
        targets_T=torch.from_numpy(targets_T),
        weights_T=torch.from_numpy(weights_T),
        starts_S=tuple(starts_S.tolist()),
        extras=dict(extras or {}),
    )


def piece_of(shard: TokenShard, stretch: Stretch) -> Piece:
    """A stretch of a document with what stands behind it."""
    ids, loss = shard.doc(stretch.doc)
    cut = slice(stretch.begin, stretch.end)
    if stretch.end == len(ids):
        return Piece(ids[cut], None if loss is None else loss[cut])
    follows = True if loss is None else bool(loss[stretch.end])
    return Piece(ids[cut], None if loss is None else loss[cut], int(ids[stretch.end]), follows)


def named(batch: Batch, cuts: Sequence[Stretch], sources: Sequence[str]) -> Batch:
    """The batch of these stretches, with the source of each token."""
    numbers_S = np.array([sources.index(cut.source) for cut in cuts] or [0], dtype=np.int64)
    lengths_S = [cut.end - cut.begin for cut in cuts] or [1]
    source_T = torch.from_numpy(np.repeat(numbers_S, lengths_S))
    return replace(batch, sources=tuple(sources), extras={**batch.extras, "source_T": source_T})


def _flags(piece: Piece) -> np.ndarray:
    return np.ones(len(piece.ids), dtype=bool) if piece.loss is None else np.asarray(piece.loss, dtype=bool)


class PretrainSource:
    """Batches of `rows` rows of at most `seq_len` tokens from the stream that a mixture draws (see rows.py).

    No token and no target is lost: the last token of a cut piece still has its successor as target. The state fits any
    world size and any row. Where the mixture's epochs are used up the last batch has fewer rows, then ConfigError.
    """

    def __init__(
        self,
        shards: Mapping[str, TokenShard],
        mixture: Mixture,
        *,
        seq_len: int,
        rows: int,
        packing: Packing = "hard",
    ) -> None:
        self.shards, self.mixture = dict(shards), mixture
        self._stream = Rows(self.shards, mixture, packing=packing)
        self.set_shape(seq_len=seq_len, rows=rows)

    def set_shape(self, *, seq_len: int, rows: int) -> None:
        """Change the row length and count (a phase with longer context); the stream goes on where it is."""
        if seq_len < 2 or rows < 1:
            raise ConfigError(f"a batch needs seq_len >= 2 and at least one row, not {seq_len} and {rows}")
        self.seq_len, self.rows = seq_len, rows

    @property
    def fill(self) -> float:
        """Share of the rows' room that held tokens, so far."""
        return self._stream.fill

    def next_batch(self, *, rank: int = 0, world: int = 1) -> Batch:
        """Advance by one global batch; return this rank's rows."""
        rows = [row for _ in range(self.rows) if (row := self._stream.next_row(self.seq_len))]
        if not rows:
            raise ConfigError(
                "the sources of this phase are used up: each was seen as often as its epochs allow",
                remedy="raise epochs, take fewer steps, or give weight to more sources",
            )
        cuts = [cut for row in rows[rank::world] for cut in row]
        return named(pack_pieces([piece_of(self.shards[cut.source], cut) for cut in cuts]), cuts, sorted(self.shards))

    def state(self) -> dict[str, Any]:
        return self._stream.state()

    def load(self, state: Mapping[str, Any]) -> None:
        self._stream.load(state)


def grouped(items: Iterable[T], size: Callable[[T], int], *, most: int) -> Iterator[list[T]]:
    """Neighbors in groups of at most `most` in size; what is larger stands alone."""
    group, room = list[T](), most
    for item in items:
        if group and size(item) > room:
            yield group
            group, room = [], most
        group.append(item)
        room -= size(item)
    if group:
        yield group


class EpochCursor:
    """Items of known size, each epoch in a new seeded order, gathered greedily into groups of at most `budget`.

    A group may span the end of an epoch. The state is two numbers.
    """

    def __init__(self, sizes: Sequence[int], budget: int, *, seed: int) -> None:
        if not sizes:
            raise InputError("there is nothing to train on: no document is left", remedy="check the data files")
        assert max(sizes) <= budget, "items above the budget are dropped, with a count, before they get here"
        self.sizes, self.budget, self.seed = list(sizes), budget, seed
        self.epoch = self.position = 0

    def next_group(self) -> list[int]:
        """Indices of the next group, in order."""
        group, room = [], self.budget
        while self.sizes[index := self._peek()] <= room:
            group.append(index)
            room -= self.sizes[index]
            self._advance()
        return group

    def _peek(self) -> int:
        return permuted(self.position, len(self.sizes), key_of(self.seed, self.epoch))

    def _advance(self) -> None:
        self.position += 1
        if self.position == len(self.sizes):
            self.epoch, self.position = self.epoch + 1, 0

    def groups_in(self, epochs: float) -> int:
        """How many groups from the beginning until `epochs` epochs have been seen."""
        walker = EpochCursor(self.sizes, self.budget, seed=self.seed)
        goal, seen, count = round(epochs * len(self.sizes)), 0, 0
        while seen < goal:
            seen += len(walker.next_group())
            count += 1
        return count

    def state(self) -> dict[str, Any]:
        return {"seed": self.seed, "items": len(self.sizes), "epoch": self.epoch, "position": self.position}

    def load(self, state: Mapping[str, Any]) -> None:
        if (state["seed"], state["items"]) != (self.seed, len(self.sizes)):
            raise CheckpointError(
                f"the saved data cursor is over {state['items']} documents with seed {state['seed']}, the data has "
                f"{len(self.sizes)} with seed {self.seed}",
                remedy="restore the data and seed of the saved run, or start in another output folder",
            )
        self.epoch, self.position = state["epoch"], state["position"]


class ItemSource(Generic[T]):
    """Whole items, packed into batches of at most `tokens_per_batch` tokens."""

    def __init__(
        self,
        items: Sequence[T],
        pack: Callable[[list[T]], Batch],
        size: Callable[[T], int],
        *,
        tokens_per_batch: int,
        seed: int,
    ) -> None:
        self.items, self._pack = list(items), pack
        self.cursor = EpochCursor([size(item) for item in self.items], tokens_per_batch, seed=seed)

    def next_batch(self, *, rank: int = 0, world: int = 1) -> Batch:
        """Advance by one global batch; return this rank's items."""
        return self._pack([self.items[i] for i in self.cursor.next_group()[rank::world]])

    def steps_for(self, epochs: float) -> int:
        """Batches until `epochs` epochs have been seen."""
        return self.cursor.groups_in(epochs)

    def state(self) -> dict[str, Any]:
        return self.cursor.state()

    def load(self, state: Mapping[str, Any]) -> None:
        self.cursor.load(state)


class ConversationSource(ItemSource[Doc]):
    """Whole documents with loss masks, in batches of at most `tokens_per_batch` tokens.

    Documents above that (or above `max_tokens`) are dropped and counted in `dropped["too_long"]`; those without a
    learned token in `dropped["nothing_to_learn"]`.
    """

    def __init__(self, docs: Sequence[Doc], *, tokens_per_batch: int, seed: int, max_tokens: int | None = None) -> None:
        limit = min(tokens_per_batch, max_tokens or tokens_per_batch)
        fits = [doc for doc in docs if len(doc[0]) <= limit]
        learn = [doc for doc in fits if doc[1] is None or any(doc[1][1:])]
        self.dropped = {"too_long": len(docs) - len(fits), "nothing_to_learn": len(fits) - len(learn)}
        super().__init__(learn, pack_documents, lambda doc: len(doc[0]), tokens_per_batch=tokens_per_batch, seed=seed)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two scored sequences, the better first, each ending in the reward token. `domain` is a small number."""

    chosen: Ids
    rejected: Ids
    domain: int = 0
    margin: float = 0.0

    @property
    def num_tokens(self) -> int:
        return len(self.chosen) + len(self.rejected)


def with_reward_token(ids: Sequence[int], reward_id: int, *, max_length: int) -> list[int]:
    """Append the reward token after cutting the tail to `max_length`, so that it survives the cut."""
    return [*ids[: max_length - 1], reward_id]


def pack_pairs(pairs: Sequence[Pair]) -> Batch:
    """Chosen and rejected adjacent. Extras: `pair_S` (pair number), `last_S` (reward token), `domain_S`; `margin_P` of
    each pair."""
    docs: list[Doc] = [(ids, None) for pair in pairs for ids in (pair.chosen, pair.rejected)]
    batch = pack_documents(docs)
    last_S = np.array(batch.ends_S[: len(docs)], dtype=np.int64) - 1
    extras = {
        "pair_S": torch.arange(len(pairs)).repeat_interleave(2),
        "last_S": torch.from_numpy(last_S),
        "domain_S": torch.tensor([pair.domain for pair in pairs], dtype=torch.long).repeat_interleave(2),
        "margin_P": torch.tensor([pair.margin for pair in pairs], dtype=torch.float64),
    }
    return replace(batch, extras=extras)


class PreferenceSource(ItemSource[Pair]):
    """Pairs, kept whole, in batches of at most `tokens_per_batch` tokens; longer pairs are dropped and counted."""

    def __init__(self, pairs: Sequence[Pair], *, tokens_per_batch: int, seed: int) -> None:
        fits = [pair for pair in pairs if pair.num_tokens <= tokens_per_batch]
        self.dropped = {"too_long": len(pairs) - len(fits)}
        super().__init__(fits, pack_pairs, lambda pair: pair.num_tokens, tokens_per_batch=tokens_per_batch, seed=seed)
