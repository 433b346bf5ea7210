"""Ring attention: keys and values travel around the processes, whose queries stay where they are.

Liu et al. 2023 (arXiv 2310.01889). The parts of a softmax are joined online (Milakov and Gimelshein 2018); the backward
pass sends keys and values around once more, with their gradients, which end where they belong. Documents and windows
are exact: a query sees the keys [low, itself], and `low` never falls, so that blocks of queries touch no key that none
of them sees. t tokens here, N query heads, K key heads, g = N / K, H head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from puyu.train.layouts.comm import Group, size_of

_BLOCK = 512
"""Queries whose scores are held at once."""


@dataclass(frozen=True, slots=True)
class RingPlan:
    """Equal runs of a packed row, one on each process, in the order of ranks."""

    starts_t: Tensor
    """Where, in the whole row, the document of each of this process's tokens begins (on the CPU)."""
    rank: int
    group: Group

    @staticmethod
    def build(starts_S: Sequence[int], num_tokens: int, *, rank: int, group: Group) -> RingPlan:
        """`starts_S` are those of the whole row, of `num_tokens` tokens."""
        starts = torch.tensor(starts_S)
        lengths = torch.diff(starts, append=torch.tensor([num_tokens]))
        count = num_tokens // size_of(group)
        return RingPlan(starts.repeat_interleave(lengths)[rank * count : (rank + 1) * count], rank, group)

    def attend(self, q_tNH: Tensor, k_tKH: Tensor, v_tKH: Tensor, layer: int, *, window: int = 0) -> Tensor:
        q_KgtH = q_tNH.unflatten(1, (k_tKH.shape[1], -1)).permute(1, 2, 0, 3)
        kv_2KtH = torch.stack((k_tKH, v_tKH)).transpose(1, 2).contiguous()
        o_KgtH: Tensor = _Ring.apply(q_KgtH, kv_2KtH, self, window)  # type: ignore[no-untyped-call]
        return o_KgtH.permute(2, 0, 1, 3).flatten(1, 2)

    def tiles(self, source: int, window: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Queries and keys of the block from `source` of which some see some, and which see which [queries, keys]."""
        count = len(self.starts_t)
        first, base = self.rank * count, source * count
        places_t = torch.arange(first, first + count)
        low_t = torch.maximum(self.starts_t, places_t - window + 1) if window else self.starts_t
        for start in range(0, count, _BLOCK):
            stop = min(start + _BLOCK, count)
            a, b = max(int(low_t[start]) - base, 0), min(first + stop - base, count)
            if a < b:
                keys = torch.arange(base + a, base + b)
                seen = (keys <= places_t[start:stop, None]) & (keys >= low_t[start:stop, None])
                yield slice(start, stop), slice(a, b), seen


class _Ring(torch.autograd.Function):
    """q [K, g, t, H], kv [2, K, t, H] -> o like q."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, plan: RingPlan, window: int) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full(q.shape[:-1], float("-inf"), dtype=wide, device=q.device)
        for source, block in _around(plan, kv):
            for rows, keys, seen in plan.tiles(source, window):
                scores = _scores(q[:, :, rows], block[0][:, keys], seen)
                # The first block holds every query itself, so that the new normalizer is finite from then on.
                both = torch.logaddexp(lse[:, :, rows], scores.logsumexp(-1))
                shares = (scores - both[..., None]).exp_().to(kv.dtype)
                kept = (lse[:, :, rows] - both).exp_()[..., None]
                out[:, :, rows] = out[:, :, rows] * kept + _product(shares, block[1][:, keys])
                lse[:, :, rows] = both
        result = out.to(q.dtype)
        ctx.save_for_backward(q, kv, result, lse)
        ctx.plan, ctx.window = plan, window
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, kv, out, lse = ctx.saved_tensors
        plan, wide = ctx.plan, lse.dtype
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        delta = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
        dkv = torch.zeros(kv.shape, dtype=wide, device=q.device)
        for source, block in _around(plan, kv):
            for rows, keys, seen in plan.tiles(source, ctx.window):
                shares = (_scores(q[:, :, rows], block[0][:, keys], seen) - lse[:, :, rows, None]).exp_()
                given, scale = grad[:, :, rows], q.shape[-1] ** -0.5
                slope = _product(given, block[1][:, keys].mT).to(wide)
                slope = ((slope - delta[:, :, rows]) * shares * scale).to(kv.dtype)
                dq[:, :, rows] += _product(slope, block[0][:, keys])
                dkv[0][:, keys] += slope.flatten(1, 2).mT @ q[:, :, rows].flatten(1, 2)
                dkv[1][:, keys] += shares.to(kv.dtype).flatten(1, 2).mT @ given.flatten(1, 2)
            dkv = _arrived(*_passed(dkv, plan))  # the gradients of a block go where the block goes, and then home
        return dq.to(q.dtype), dkv.to(kv.dtype), None, None


def _around(plan: RingPlan, kv: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each process's block with its rank, the own one first; the next one travels meanwhile."""
    size = size_of(plan.group)
    for step in range(size):
        coming = _passed(kv, plan) if step < size - 1 else None
        yield (plan.rank - step) % size, kv
        if coming:
            kv = _arrived(*coming)


def _passed(x: Tensor, plan: RingPlan) -> tuple[Tensor, list[dist.Work], Tensor]:
    """Begin to send x to the next process, and to receive that of the one before."""
    size, group = size_of(plan.group), plan.group
    if group is None:
        return x, [], x
    after, before = (dist.get_global_rank(group, (plan.rank + step) % size) for step in (1, -1))
    coming = torch.empty_like(x)
    ops = [dist.P2POp(dist.isend, x, after, group), dist.P2POp(dist.irecv, coming, before, group)]
    return coming, dist.batch_isend_irecv(ops), x


def _arrived(coming: Tensor, works: list[dist.Work], sent: Tensor) -> Tensor:
    """What was sent, when it is here; `sent` lives until then."""
    for work in works:
        work.wait()
    return coming


def _scores(q_KgqH: Tensor, k_KkH: Tensor, seen_qk: Tensor) -> Tensor:
    """Scaled products [K, g, q, k], -inf where a query does not see a key."""
    scores = _product(q_KgqH, k_KkH.mT).to(torch.promote_types(q_KgqH.dtype, torch.float32))
    return scores.mul_(q_KgqH.shape[-1] ** -0.5).masked_fill_(~seen_qk.to(scores.device), float("-inf"))


def _product(x_Kgqi: Tensor, y_Kij: Tensor) -> Tensor:
    """Rows of all heads of a group times the matrix of their key head."""
    return (x_Kgqi.flatten(1, 2) @ y_Kij).unflatten(1, x_Kgqi.shape[1:3])
