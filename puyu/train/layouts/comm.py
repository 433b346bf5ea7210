"""Collectives along one dimension: with gradients, for what passes between layers; by rows, for weights and gradients.

Every function takes a process group, or None where the process is alone, and then costs nothing. T tokens of the whole
row, t of this process; the group's processes hold the parts in the order of their ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

Group = dist.ProcessGroup | None
_Map = Callable[[Tensor], Tensor]
# The newer names of torch 2.13, which warns at each call of the older ones.
_gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_scatter_into = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def size_of(group: Group) -> int:
    """Processes of a group."""
    return 1 if group is None else dist.get_world_size(group)


def all_gather(x: Tensor, group: Group) -> Tensor:
    """The equal parts of all processes end to end along the first dimension."""
    if group is None:
        return x
    whole = x.new_empty(x.shape[0] * size_of(group), *x.shape[1:])
    _gather_into(whole, x.contiguous(), group=group)
    return whole


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """This process's equal part, along the first dimension, of the sum over processes."""
    if group is None:
        return x
    part = x.new_empty(x.shape[0] // size_of(group), *x.shape[1:])
    _scatter_into(part, x.contiguous(), group=group)
    return part


def all_reduce(x: Tensor, group: Group, *, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum over processes, in place."""
    if group is not None:
        dist.all_reduce(x, op=op, group=group)
    return x


def all_to_all(x: Tensor, given: Sequence[int], taken: Sequence[int], group: Group) -> Tensor:
    """Send `given[r]` rows to rank r, take `taken[r]` rows from it; rows stand in the order of ranks."""
    if group is None:
        return x
    out = x.new_empty(sum(taken), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), list(taken), list(given), group=group)
    return out


class _Travel(torch.autograd.Function):
    """A linear map between processes, and for gradients its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: _Map, back: _Map) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


def _travel(x: Tensor, there: _Map, back: _Map) -> Tensor:
    found: Tensor = _Travel.apply(x, there, back)  # type: ignore[no-untyped-call]
    return found


def gather_tokens(x_tD: Tensor, group: Group) -> Tensor:
    """[t, D] -> [T, D]; what flows back is summed, because every process uses the whole for a part of the result."""
    return _travel(x_tD, partial(all_gather, group=group), partial(reduce_scatter, group=group))


def scatter_tokens(x_TD: Tensor, group: Group) -> Tensor:
    """Partial sums [T, D] of every process -> this process's tokens [t, D] of the sum."""
    return _travel(x_TD, partial(reduce_scatter, group=group), partial(all_gather, group=group))


def exchange(x: Tensor, given: Sequence[int], taken: Sequence[int], group: Group) -> Tensor:
    """`all_to_all` with a gradient, which goes back the same way."""
    there = partial(all_to_all, given=given, taken=taken, group=group)
    return _travel(x, there, partial(all_to_all, given=taken, taken=given, group=group))


def row_range(rows: int, rank: int, size: int) -> tuple[int, int]:
    """First row and number of rows of a rank, as `torch.chunk` (and FSDP2) cuts: all but the last are equal."""
    chunk = -(-rows // size)
    first = min(rank * chunk, rows)
    return first, min(chunk, rows - first)


Going = Generator[dist.Work, None, Tensor]
"""A collective on its way: gives what must be waited for, and returns its result to who asks then."""


class Lane:
    """Collectives that are on their way while the process goes on, at most `most` routines at once.

    All processes must begin the same routines in the same order; each is taken up again in that order.
    """

    def __init__(self, *, most: int = 8) -> None:
        self.most = most
        self._going: deque[tuple[Iterator[dist.Work], dist.Work]] = deque()

    def begin(self, routine: Iterator[dist.Work]) -> None:
        """Run a routine as far as the first collective that it waits for."""
        work = next(routine, None)
        if work is not None:
            self._going.append((routine, work))
        while len(self._going) > self.most:
            self._resume()

    def finish(self) -> None:
        """Wait until all have ended."""
        while self._going:
            self._resume()

    def _resume(self) -> None:
        routine, work = self._going.popleft()
        work.wait()
        self.begin(routine)


def sum_whole(x: Tensor, group: Group) -> Going:
    """The sum of x over processes, in place if x is contiguous."""
    x = x.contiguous()
    if group is not None:
        yield dist.all_reduce(x, group=group, async_op=True)
    return x


def sum_rows(x: Tensor, group: Group) -> Going:
    """This process's rows (`row_range`) of the sum of x over processes."""
    if group is None:
        return x
    size = size_of(group)
    chunk = -(-x.shape[0] // size)
    whole, part = _padded(x, chunk * size).contiguous(), x.new_empty(chunk, *x.shape[1:])
    yield _scatter_into(part, whole, group=group, async_op=True)
    _, count = row_range(x.shape[0], dist.get_rank(group), size)
    return part[:count]


def join_rows(x: Tensor, out: Tensor, group: Group) -> Iterator[dist.Work]:
    """Fill `out` with the rows that the processes hold, each its `row_range`."""
    if group is None:
        out.copy_(x)
        return
    size = size_of(group)
    chunk = -(-out.shape[0] // size)
    whole = out.new_empty(chunk * size, *out.shape[1:])
    yield _gather_into(whole, _padded(x, chunk).contiguous(), group=group, async_op=True)
    out.copy_(whole[: out.shape[0]])


def _padded(x: Tensor, rows: int) -> Tensor:
    missing = rows - x.shape[0]
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing)) if missing else x
