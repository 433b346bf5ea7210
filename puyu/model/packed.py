"""Attention over documents packed into one row of tokens: training, scoring, and the prompts of a step.

Each document is causal within itself and hidden from the others. S documents, L padded length, T tokens, N query
heads, K key/value heads, H head_dim.

    plan = PackedPlan.build((0, 5), num_tokens=9)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from puyu.model import dense

_SIZES = tuple(64 * 2**i for i in range(16))
"""Padded lengths. Coarse on purpose: a bucket costs a dozen calls a layer, padding only a little attention."""

_LENGTH_STEP, _COUNT_STEP, _FILLED = 32, 4, 512
"""A bucket's length is a multiple of the first. In training on a CPU, which compiles a kernel for each new shape, its
number of rows is one of the second, up to the third: rows of long documents cost more than a kernel."""


_WINDOW_BLOCK = 128
"""Queries whose windows are computed together, at least."""


class Bucket(NamedTuple):
    """Documents of similar length, padded: `gather` [S, L] points into the packed tokens. Rows that only fill up
    repeat the first document."""

    gather: Tensor
    num_documents: int
    length: int


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """Documents in one row of tokens, each causal within itself and hidden from the others.

    Documents are gathered into a few padded buckets. Padding stands behind a document, so the causal mask
    alone keeps it out, and the fast kernel without an explicit mask applies.
    """

    buckets: tuple[Bucket, ...]
    scatter: Tensor | None
    """Where each packed token stands in the concatenated buckets; None when one bucket is the row itself."""

    @staticmethod
    def build(starts_S: Sequence[int], num_tokens: int, device: torch.device | str = "cpu") -> PackedPlan:
        """`starts_S`: first token of each document, rising, the first 0."""
        starts = list(starts_S)
        assert starts and starts[0] == 0 and starts[-1] < num_tokens, "starts must begin with 0 and stay below T"
        lengths = [end - start for start, end in zip(starts, [*starts[1:], num_tokens], strict=True)]
        if len(set(lengths)) == 1:
            gather = torch.arange(num_tokens, device=device).reshape(len(starts), lengths[0])
            return PackedPlan((Bucket(gather, len(starts), lengths[0]),), None)
        return _bucketed(starts, lengths, num_tokens, device)

    def attend(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layer: int, *, window: int = 0) -> Tensor:
        """Causal attention inside each document -> [T, N, H]; `window`: how many tokens a query sees (0: all)."""
        if self.scatter is None:
            bucket = self.buckets[0]
            rows = [x.reshape(bucket.num_documents, bucket.length, *x.shape[1:]) for x in (q_TNH, k_TKH, v_TKH)]
            return _causal(*rows, window=window).flatten(0, 1)
        parts = [
            _causal(
                *(x[bucket.gather.flatten()].unflatten(0, bucket.gather.shape) for x in (q_TNH, k_TKH, v_TKH)),
                window=window,
            )
            for bucket in self.buckets
        ]
        return torch.cat([part.flatten(0, 1) for part in parts])[self.scatter]


def _bucketed(starts: list[int], lengths: list[int], num_tokens: int, device: torch.device | str) -> PackedPlan:
    by_size: dict[int, list[tuple[int, int]]] = {}
    for start, length in zip(starts, lengths, strict=True):
        size = next(size for size in _SIZES if size >= length)
        by_size.setdefault(size, []).append((start, length))
    buckets, scatter, base = [], torch.empty(num_tokens, dtype=torch.long), 0
    for documents in by_size.values():
        longest = -(-max(length for _, length in documents) // _LENGTH_STEP) * _LENGTH_STEP
        first = torch.tensor([start for start, _ in documents])
        last = torch.tensor([start + length - 1 for start, length in documents])
        gather = torch.minimum(first[:, None] + torch.arange(longest), last[:, None])
        for row, (start, length) in enumerate(documents):
            scatter[start : start + length] = torch.arange(length) + base + row * longest
        if torch.is_grad_enabled() and torch.device(device).type == "cpu" and longest <= _FILLED:
            gather = torch.cat([gather, gather[:1].expand(-len(documents) % _COUNT_STEP, -1)])
        base += gather.numel()
        buckets.append(Bucket(gather.to(device), len(gather), longest))
    return PackedPlan(tuple(buckets), scatter.to(device))


def _causal(q_SLNH: Tensor, k_SLKH: Tensor, v_SLKH: Tensor, *, window: int) -> Tensor:
    """Causal attention per row -> [S, L, N, H]; key/value heads are repeated for their queries."""
    narrow = 0 < window < q_SLNH.shape[1]
    if not narrow and dense.suits(q_SLNH):
        return dense.dense_causal(q_SLNH, k_SLKH, v_SLKH)
    repeat = q_SLNH.shape[2] // k_SLKH.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_SLNH, k_SLKH, v_SLKH))
    if repeat > 1:
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    if narrow:
        return _windowed(q, k, v, window).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _windowed(q_SNLH: Tensor, k_SNLH: Tensor, v_SNLH: Tensor, window: int) -> Tensor:
    """Each query sees the last `window` tokens. In blocks of queries, so that no mask has L x L places."""
    length, parts = q_SNLH.shape[2], []
    step = max(_WINDOW_BLOCK, min(window, 8 * _WINDOW_BLOCK))
    for start in range(0, length, step):
        stop, first = min(start + step, length), max(0, start - window + 1)
        seen = window_mask(first, stop, queries=stop - start, window=window, device=q_SNLH.device)
        rows = q_SNLH[:, :, start:stop], k_SNLH[:, :, first:stop], v_SNLH[:, :, first:stop]
        parts.append(F.scaled_dot_product_attention(*rows, attn_mask=seen))
    return torch.cat(parts, dim=2)


def window_mask(first: int, stop: int, *, queries: int, window: int, device: torch.device) -> Tensor:
    """Which of the places [first, stop) the last `queries` of them see: [queries, places]. `window` 0: all before."""
    keys = torch.arange(first, stop, device=device)
    query = keys[-queries:, None]
    seen = keys <= query
    return seen & (keys > query - window) if window else seen
