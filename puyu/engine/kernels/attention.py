"""Attention over the paged cache: one query of each sequence with split keys, and chunks of prompts.

B sequences, T tokens, K key/value heads, g queries of each, N = K * g, H head_dim, W blocks in a table. Keys and
values of a group are loaded once for all its queries. Online softmax in fp32: Dao 2023, arXiv 2307.08691; keys split
over programs, with a second pass that joins them: flash-decoding (Dao et al. 2023); paging: Kwon et al. 2023.

    o_BNH = decode_attention(q_BNH, rows, Pages(tables_BW, lengths_B, block_size=16), num_kv_heads=8)
    o_TNH = prefill_attention(q_TNH, rows, pages, tiles, num_kv_heads=8)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from puyu.engine.kernels.launch import num_processors, power_of_two

MAX_SPLITS = 64
_LOG2E = tl.constexpr(1.4426950408889634)


class Pages(NamedTuple):
    """Where the sequences stand: block tables int32 [B, W], and how many tokens each may see, the new ones included
    (int32 [B]; 0 for a row that only fills up a batch)."""

    tables_BW: Tensor
    lengths_B: Tensor
    block_size: int


class Tiles(NamedTuple):
    """Queries of prompts in tiles of `height`: of each tile the sequence, its first query, the end of the sequence's
    queries (both in the step's tokens), and the place in the text of the first query; all int32 [number of tiles]."""

    sequences: Tensor
    starts: Tensor
    ends: Tensor
    places: Tensor
    height: int


def tile_height(group: int, head_dim: int, dtype: torch.dtype) -> int:
    """Queries a tile, so that with all heads of the group it has 128 rows (64 where rows are wide)."""
    rows = 128 if head_dim * dtype.itemsize <= 256 else 64
    return max(rows // power_of_two(group), 1)


def tile_arrays(spans: Sequence[tuple[int, int, int, int]], height: int) -> list[np.ndarray]:
    """The four arrays of `Tiles` from (sequence, first token, length, context); the longest work comes first."""
    tiles = [
        (sequence, start + first, start + length, context + first)
        for sequence, start, length, context in spans
        for first in range(0, length, height)
    ]
    tiles.sort(key=lambda tile: -tile[3])
    return list(np.array(tiles, dtype=np.int32).reshape(-1, 4).T)


def _past(rows: Tensor, pages: Pages, sequence: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence, [K, S, H] each."""
    length, size = int(pages.lengths_B[sequence]), pages.block_size
    at = torch.arange(length, device=rows.device)
    slots = pages.tables_BW[sequence].long()[at // size] * size + at % size
    by_head = rows.view(2, num_kv_heads, -1, rows.shape[-1])
    return by_head[0][:, slots], by_head[1][:, slots]


def _attend(q_LNH: Tensor, k_KSH: Tensor, v_KSH: Tensor) -> Tensor:
    """The last L of S places attend to what is before them, plainly."""
    length, total = len(q_LNH), k_KSH.shape[1]
    group = q_LNH.shape[1] // len(k_KSH)
    k_NSH, v_NSH = (x.repeat_interleave(group, dim=0).float() for x in (k_KSH, v_KSH))
    scores = q_LNH.transpose(0, 1).float() @ k_NSH.transpose(1, 2) * q_LNH.shape[-1] ** -0.5
    future = torch.ones(length, total, dtype=torch.bool, device=q_LNH.device).triu_(total - length + 1)
    return (scores.masked_fill(future, float("-inf")).softmax(-1) @ v_NSH).transpose(0, 1).to(q_LNH.dtype)


def decode_attention_reference(q_BNH: Tensor, rows: Tensor, pages: Pages, *, num_kv_heads: int) -> Tensor:
    """One sequence after another; rows of length 0 are zero."""
    out_BNH = torch.zeros_like(q_BNH)
    for b in range(len(q_BNH)):
        if pages.lengths_B[b]:
            out_BNH[b : b + 1] = _attend(q_BNH[b : b + 1], *_past(rows, pages, b, num_kv_heads))
    return out_BNH


def prefill_attention_reference(
    q_TNH: Tensor, rows: Tensor, pages: Pages, tiles: Tiles, *, num_kv_heads: int
) -> Tensor:
    """One sequence after another; the queries of a sequence are its last tokens."""
    out_TNH = torch.zeros_like(q_TNH)
    for sequence in tiles.sequences.unique().tolist():
        mine = tiles.sequences == sequence
        span = slice(int(tiles.starts[mine].min()), int(tiles.ends[mine].max()))
        out_TNH[span] = _attend(q_TNH[span], *_past(rows, pages, sequence, num_kv_heads))
    return out_TNH


def num_splits(batch: int, num_kv_heads: int, device: torch.device) -> int:
    """How many programs share the keys of one sequence and head: about four for each processor in all."""
    wanted = triton.cdiv(4 * num_processors(device), batch * num_kv_heads)
    return min(power_of_two(wanted), MAX_SPLITS)


def decode_attention(q_BNH: Tensor, rows: Tensor, pages: Pages, *, num_kv_heads: int) -> Tensor:
    """[B, N, H]. How keys are split depends on shapes alone, so that a captured graph serves any lengths."""
    (batch, heads, head_dim), device = q_BNH.shape, q_BNH.device
    group, splits = heads // num_kv_heads, num_splits(batch, num_kv_heads, device)
    out_BNH = torch.empty_like(q_BNH)
    partial = torch.empty(batch, heads, splits, head_dim, dtype=torch.float32, device=device)
    weight = torch.empty(batch, heads, splits, dtype=torch.float32, device=device)
    block_h = power_of_two(head_dim, 16)
    _decode[(batch, num_kv_heads, splits)](
        *(q_BNH, rows, pages.tables_BW, pages.lengths_B, partial, weight),
        *(pages.tables_BW.stride(0), rows.shape[0] // (2 * num_kv_heads), head_dim**-0.5),
        GROUP=group,
        HEAD=head_dim,
        BLOCK_SIZE=pages.block_size,
        BLOCK_G=power_of_two(group, 16),
        BLOCK_H=block_h,
        BLOCK_S=_keys(rows),
        num_warps=4,
        num_stages=3,
    )
    _join[(batch * heads,)](
        partial, weight, out_BNH, SPLITS=splits, HEAD=head_dim, BLOCK_H=block_h, num_warps=4 if splits > 8 else 1
    )
    return out_BNH


def _keys(rows: Tensor) -> int:
    """Keys a tile: 16 KiB of keys for heads of 128 in bf16."""
    return 64 if rows.shape[-1] * rows.element_size() <= 256 else 32


@triton.jit
def _slot(table_ptr, at, live, BLOCK_SIZE: tl.constexpr):
    """Slots of the places `at` of one sequence."""
    block = tl.load(table_ptr + at // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    return block * BLOCK_SIZE + at % BLOCK_SIZE


@triton.jit
def _decode(
    q_ptr,
    rows_ptr,
    tables_ptr,
    lengths_ptr,
    partial_ptr,
    weight_ptr,
    table_stride,
    num_slots,
    scale,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    b, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    heads, splits = tl.num_programs(1).to(tl.int64), tl.num_programs(2)
    length = tl.load(lengths_ptr + b)
    share = tl.cdiv(tl.cdiv(length, BLOCK_S), splits) * BLOCK_S
    start = split * share
    stop = tl.minimum(start + share, length)
    g, h, s = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_S)
    in_query = (g[:, None] < GROUP) & (h[None, :] < HEAD)
    first = (b * heads + head) * GROUP
    q = tl.load(q_ptr + (first + g[:, None]) * HEAD + h[None, :], mask=in_query, other=0.0)
    best = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    out = tl.zeros((BLOCK_G, BLOCK_H), tl.float32)
    keys_ptr = rows_ptr + head * num_slots * HEAD
    values_ptr = keys_ptr + heads * num_slots * HEAD
    table_ptr = tables_ptr + b * table_stride
    for s0 in tl.range(start, stop, BLOCK_S):
        at = s0 + s
        live = at < stop
        slot = _slot(table_ptr, at, live, BLOCK_SIZE)
        inside = live[:, None] & (h[None, :] < HEAD)
        k = tl.load(keys_ptr + slot[:, None] * HEAD + h[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * (scale * _LOG2E)
        scores = tl.where(live[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        shrink = tl.exp2(best - higher)
        p = tl.exp2(scores - higher[:, None])
        v = tl.load(values_ptr + slot[:, None] * HEAD + h[None, :], mask=inside, other=0.0)
        out = tl.dot(p.to(q.dtype), v.to(q.dtype), out * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(p, axis=1)
        best = higher
    place = (first + g) * splits + split
    weight = tl.where(total > 0, best + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(weight_ptr + place, weight, mask=g < GROUP)
    if start < stop:
        tl.store(partial_ptr + place[:, None] * HEAD + h[None, :], out / total[:, None], mask=in_query)


@triton.jit
def _join(partial_ptr, weight_ptr, out_ptr, SPLITS: tl.constexpr, HEAD: tl.constexpr, BLOCK_H: tl.constexpr):
    """Add the parts of one query, each with its share of the softmax; parts that saw no key are never read."""
    row = tl.program_id(0).to(tl.int64)
    split, h = tl.arange(0, SPLITS), tl.arange(0, BLOCK_H)
    weight = tl.load(weight_ptr + row * SPLITS + split)
    best = tl.max(weight, axis=0)
    best = tl.where(best == float("-inf"), 0.0, best)
    share = tl.exp2(weight - best)
    inside = (weight > float("-inf"))[:, None] & (h[None, :] < HEAD)
    parts = tl.load(partial_ptr + (row * SPLITS + split[:, None]) * HEAD + h[None, :], mask=inside, other=0.0)
    total = tl.sum(share, axis=0)
    out = tl.sum(parts * share[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * HEAD + h, out.to(out_ptr.dtype.element_ty), mask=h < HEAD)


def prefill_attention(q_TNH: Tensor, rows: Tensor, pages: Pages, tiles: Tiles, *, num_kv_heads: int) -> Tensor:
    """[T, N, H] for the tokens of the tiles; the others' rows are left as they are (not set)."""
    heads, head_dim = q_TNH.shape[1:]
    group = heads // num_kv_heads
    out_TNH = torch.empty_like(q_TNH)
    block_m = max(tiles.height * power_of_two(group), 16)
    _prefill[(len(tiles.sequences), num_kv_heads)](
        *(q_TNH, rows, out_TNH, pages.tables_BW, tiles.sequences, tiles.starts, tiles.ends, tiles.places),
        *(pages.tables_BW.stride(0), rows.shape[0] // (2 * num_kv_heads), head_dim**-0.5),
        GROUP=group,
        HEAD=head_dim,
        BLOCK_SIZE=pages.block_size,
        HEIGHT=tiles.height,
        BLOCK_M=block_m,
        BLOCK_G=power_of_two(group),
        BLOCK_H=power_of_two(head_dim, 16),
        BLOCK_S=_keys(rows),
        num_warps=8 if block_m >= 128 else 4,
        num_stages=2,
    )
    return out_TNH


@triton.jit
def _tile_of_keys(
    q, best, total, out, keys_ptr, values_ptr, table_ptr, s0, seen, scale,
    MASKED: tl.constexpr, HEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values joins the running softmax; row m sees places up to `seen[m]`."""
    h = tl.arange(0, BLOCK_H)
    at = s0 + tl.arange(0, BLOCK_S)
    live = at <= tl.max(seen, axis=0) if MASKED else tl.full((BLOCK_S,), True, tl.int1)
    slot = _slot(table_ptr, at, live, BLOCK_SIZE)
    inside = live[:, None] & (h[None, :] < HEAD)
    k = tl.load(keys_ptr + slot[:, None] * HEAD + h[None, :], mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * (scale * _LOG2E)
    if MASKED:
        scores = tl.where(at[None, :] <= seen[:, None], scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, axis=1))
    shrink = tl.exp2(best - higher)
    p = tl.exp2(scores - higher[:, None])
    v = tl.load(values_ptr + slot[:, None] * HEAD + h[None, :], mask=inside, other=0.0)
    out = tl.dot(p.to(q.dtype), v.to(q.dtype), out * shrink[:, None], input_precision="ieee")
    return higher, total * shrink + tl.sum(p, axis=1), out


@triton.jit
def _prefill(
    q_ptr,
    rows_ptr,
    out_ptr,
    tables_ptr,
    sequences_ptr,
    starts_ptr,
    ends_ptr,
    places_ptr,
    table_stride,
    num_slots,
    scale,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    tile, head, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    sequence = tl.load(sequences_ptr + tile).to(tl.int64)
    start, end, place = tl.load(starts_ptr + tile), tl.load(ends_ptr + tile), tl.load(places_ptr + tile)
    m, h = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
    query, g = m // BLOCK_G, m % BLOCK_G  # the queries of a group are neighbors, so a tile's rows share their keys
    live = (g < GROUP) & (query < HEIGHT) & (start + query < end)
    inside = live[:, None] & (h[None, :] < HEAD)
    row = ((start + query).to(tl.int64) * heads + head) * GROUP + g
    q = tl.load(q_ptr + row[:, None] * HEAD + h[None, :], mask=inside, other=0.0)
    seen = tl.where(live, place + query, place)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    keys_ptr = rows_ptr + head * num_slots * HEAD
    values_ptr = keys_ptr + heads * num_slots * HEAD
    table_ptr = tables_ptr + sequence * table_stride
    free = (place + 1) // BLOCK_S * BLOCK_S  # keys that every query of the tile sees
    for s0 in tl.range(0, free, BLOCK_S):
        best, total, out = _tile_of_keys(
            q, best, total, out, keys_ptr, values_ptr, table_ptr, s0, seen, scale,
            False, HEAD, BLOCK_SIZE, BLOCK_H, BLOCK_S,
        )  # fmt: skip
    for s0 in tl.range(free, tl.max(seen, axis=0) + 1, BLOCK_S):
        best, total, out = _tile_of_keys(
            q, best, total, out, keys_ptr, values_ptr, table_ptr, s0, seen, scale,
            True, HEAD, BLOCK_SIZE, BLOCK_H, BLOCK_S,
        )  # fmt: skip
    out = out / total[:, None]
    tl.store(out_ptr + row[:, None] * HEAD + h[None, :], out.to(q.dtype), mask=inside)
