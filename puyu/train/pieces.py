"""What a process holds of a run's tensors: rectangles of whole tensors, by name. Checkpoints are made of nothing else.

A layout says which rectangles of each weight and moment lie on this process; saving writes those that it owns, loading
fills them, whichever layout wrote them. Knows no file and no optimizer.

    weights = gather_whole(layout.pieces())     # rank 0: every tensor, whole, on the CPU
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from puyu.dist import World, current_world


class Piece(NamedTuple):
    """A rectangle of a tensor. `tensor` shares its memory with the parameter or moment, so loading copies into it.

    Processes that hold the same rectangle agree on one `owner`, which writes it; together the owned rectangles cover
    each tensor exactly once.
    """

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: tuple[int, ...]
    """Where the rectangle begins."""
    tensor: Tensor
    owner: bool = True

    @property
    def window(self) -> tuple[slice, ...]:
        """The rectangle as an index into the whole tensor."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.tensor.shape, strict=True))


def gather_whole(pieces: Iterable[Piece]) -> dict[str, Tensor]:
    """All tensors, whole, on rank 0's CPU; empty elsewhere. Every process must call it."""
    owned = [piece for piece in pieces if piece.owner]
    world = current_world()
    whole: dict[str, Tensor] = {}
    if world.size == 1:
        for piece in owned:
            _put(whole, piece)
        return whole
    catalogs: list[list[tuple]] = [[] for _ in range(world.size)]
    rows = [(p.name, p.shape, p.start, tuple(p.tensor.shape), p.tensor.dtype) for p in owned]
    dist.all_gather_object(catalogs, rows)
    for rank, rows in enumerate(catalogs):
        for piece in _sent(rank, rows, owned, world):
            _put(whole, piece)
    return whole


def _sent(rank: int, rows: list[tuple], owned: list[Piece], world: World) -> Iterator[Piece]:
    """The pieces of one rank as rank 0 gets them."""
    for number, (name, shape, start, size, dtype) in enumerate(rows):
        if rank == world.rank:
            tensor = owned[number].tensor.contiguous().cpu()
            if rank:
                dist.send(tensor, 0)
        elif world.is_main:
            tensor = torch.empty(size, dtype=dtype)
            dist.recv(tensor, rank)
        if world.is_main:
            yield Piece(name, shape, start, tensor)


def _put(whole: dict[str, Tensor], piece: Piece) -> None:
    if piece.name not in whole:
        whole[piece.name] = torch.empty(piece.shape, dtype=piece.tensor.dtype)
    whole[piece.name][piece.window] = piece.tensor.cpu()
