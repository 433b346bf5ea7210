"""What a process has of each parameter: the slice that it computes with, and the rows of it that it updates.

A `Cut` says where a local slice lies in the whole tensor, a `Share` which rows of the slice lie here and which of those
have their optimizer states here. Gradients are plain sums: a share adds them over the processes that hold the same
slice, by rows where only rows are needed (ZeRO; Rajbhandari et al. 2020, arXiv 1910.02054), and brings the updated rows
back to all. What FSDP2 shards comes as a DTensor whose gradient is summed already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from puyu.train.layouts.comm import Going, Group, join_rows, row_range, sum_rows, sum_whole
from puyu.train.pieces import Piece


class Cut(NamedTuple):
    """A slice of a whole tensor along one dimension, in runs: (place in the slice, place in the whole, length)."""

    shape: tuple[int, ...]
    dim: int
    runs: tuple[tuple[int, int, int], ...]

    @staticmethod
    def none(tensor: Tensor) -> Cut:
        """The whole tensor."""
        return Cut(tuple(tensor.shape), 0, ((0, 0, tensor.shape[0]),))

    @staticmethod
    def even(tensor: Tensor, rank: int, size: int, *, dim: int = 0, halves: int = 1) -> Cut:
        """The rank's part (`row_range`); with `halves` 2 its equal part of each half (gate and up are one matrix)."""
        if halves == 1:
            first, count = row_range(tensor.shape[dim], rank, size)
            return Cut(tuple(tensor.shape), dim, ((0, first, count),))
        count = tensor.shape[dim] // (size * halves)
        starts = [half * count * size + rank * count for half in range(halves)]
        return Cut(tuple(tensor.shape), dim, tuple((i * count, start, count) for i, start in enumerate(starts)))

    def of(self, whole: Tensor) -> Tensor:
        """The slice, copied."""
        return torch.cat([whole.detach().narrow(self.dim, start, count) for _, start, count in self.runs], self.dim)

    def pieces(self, name: str, rows: Tensor, first: int, *, owner: bool) -> Iterator[Piece]:
        """Rows of the slice, from `first` on, as rectangles of the whole tensor."""
        shape, blank = (self.shape[0], *rows.shape[1:]) if self.dim == 0 else self.shape, (0,) * len(self.shape)
        for place, start, count in self.runs:
            if self.dim:
                yield Piece(name, shape, (first, start), rows.narrow(1, place, count), owner)
                continue
            begin, end = max(place, first), min(place + count, first + rows.shape[0])
            if begin < end:
                yield Piece(name, shape, (start + begin - place, *blank[1:]), rows[begin - first : end - first], owner)


class Dim(NamedTuple):
    """This process along one dimension of the mesh."""

    rank: int = 0
    size: int = 1
    group: Group = None


@dataclass(frozen=True)
class Spread:
    """Over which processes the gradient of a parameter is summed, and how its rows are divided among them."""

    sums: tuple[Dim, ...] = ()
    """All dimensions of processes with the same slice whose gradients this package sums."""
    rows: int = 0
    """How many of `sums`, from the first on, divide the rows of optimizer states; the others hold them all."""
    early: int = 0
    """How many of them divide gradients after each micro-batch; the others wait for the last."""
    copies: tuple[Dim, ...] = ()
    """Dimensions along which FSDP2 replicates: they may divide the rows of states too, but gradients are summed."""
    tensor: Group = None
    """Tensor group of a parameter that is not sliced: each process has the gradient of its tokens only."""
    speaks: bool = True
    """Whether this process is the owner among tensor peers (always, for a slice)."""


@dataclass
class Share:
    """One parameter here. `update` is what the optimizer sees: rows [first, first + n) of the slice."""

    name: str
    parameter: nn.Parameter
    cut: Cut
    spread: Spread
    whole_matrices: bool = False
    """The optimizer needs whole matrices (it gathers DTensors itself)."""
    update: nn.Parameter = field(init=False)
    first: int = field(init=False)
    _levels: list[Tensor] = field(init=False, default_factory=list)
    _held_first: int = field(init=False, default=0)
    _early: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        held = self.held
        if isinstance(self.parameter, DTensor):
            mesh, places = self.parameter.device_mesh, self.parameter.placements
            at = next(i for i, place in enumerate(places) if isinstance(place, Shard))
            self._held_first, _ = row_range(self.parameter.shape[0], mesh.get_local_rank(at), mesh.size(at))
        self._levels, self.first, rows = [held], self._held_first, held
        for dim in self._dividers:
            begin, count = row_range(len(rows), dim.rank, dim.size)
            rows, self.first = rows[begin : begin + count], self.first + begin
            self._levels.append(rows)
        plain = rows is held and (self.whole_matrices or not isinstance(self.parameter, DTensor))
        self.update = self.parameter if plain else nn.Parameter(rows, requires_grad=self.parameter.requires_grad)

    @property
    def held(self) -> Tensor:
        """The rows of the slice that lie here."""
        found = self.parameter.detach()
        return found.to_local() if isinstance(found, DTensor) else found

    @property
    def _dividers(self) -> tuple[Dim, ...]:
        """Dimensions that divide the rows of the states beyond what lies here."""
        return (*self.spread.sums[: self.spread.rows], *self.spread.copies[: self.spread.rows])

    @property
    def owns_weight(self) -> bool:
        """Whether this process writes its rows of the weight."""
        return self.spread.speaks and all(dim.rank == 0 for dim in (*self.spread.sums, *self.spread.copies))

    @property
    def owns_state(self) -> bool:
        """Whether this process writes, and counts in the norm, its rows of the states."""
        others = (*self.spread.sums[self.spread.rows :], *self.spread.copies[self.spread.rows :])
        return self.spread.speaks and all(dim.rank == 0 for dim in others)

    # gradients ------------------------------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether the gradient is complete only after the whole backward pass (that of a parameter that FSDP2 has)."""
        return isinstance(self.parameter, DTensor)

    def reduce_early(self) -> Iterator[dist.Work]:
        """After a micro-batch: add its gradient to the rows kept here, and forget the rest."""
        grad = self.parameter.grad
        if not self.spread.early or grad is None:
            return
        self.parameter.grad = None
        found = yield from self._summed(grad, self.spread.sums[: self.spread.early])
        self._early = found if self._early is None else self._early.add_(found)

    def settle(self) -> Iterator[dist.Work]:
        """After the last micro-batch: `update.grad` becomes the sum over all processes of its rows."""
        yield from self.reduce_early()
        spread, grad = self.spread, self._early if self.spread.early else self.parameter.grad
        if grad is None:
            return
        if isinstance(grad, DTensor):
            if self.whole_matrices:
                return
            grad = grad.to_local()
        self._early = self.parameter.grad = None
        grad = yield from self._summed(grad, spread.sums[spread.early : spread.rows])
        for dim in spread.copies[: spread.rows]:
            begin, count = row_range(len(grad), dim.rank, dim.size)
            grad = grad[begin : begin + count]
        for group in (*(dim.group for dim in spread.sums[max(spread.rows, spread.early) :]), spread.tensor):
            grad = yield from sum_whole(grad, group)
        self.update.grad = grad

    def _summed(self, grad: Tensor, dims: tuple[Dim, ...]) -> Going:
        for dim in dims:
            grad = yield from sum_rows(grad, dim.group)
        return grad

    def publish(self) -> Iterator[dist.Work]:
        """After an update: every process gets the rows that others have updated."""
        for dim, rows, whole in reversed(list(zip(self._dividers, self._levels[1:], self._levels, strict=False))):
            yield from join_rows(rows, whole, dim.group)

    def drop_gradient(self) -> None:
        """Forget all that was added up."""
        self.parameter.grad = self.update.grad = self._early = None

    # pieces ---------------------------------------------------------------------------------------------------------

    def pieces(self) -> Iterator[Piece]:
        """What lies here of the weight."""
        yield from self.cut.pieces(self.name, self.held, self._held_first, owner=self.owns_weight)

    def state_pieces(self, kind: str, value: Tensor) -> Iterator[Piece]:
        """What lies here of one state of the optimizer, as KIND/NAME."""
        name = f"{kind}/{self.name}"
        value = value.to_local() if isinstance(value, DTensor) else value
        if value.ndim == 0:  # a count, the same everywhere
            first = self.first == 0 and not any(start for _, start, _ in self.cut.runs[:1])
            yield Piece(name, (), (), value, self.owns_state and first)
        else:
            yield from self.cut.pieces(name, value, self.first, owner=self.owns_state)
