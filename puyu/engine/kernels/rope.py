"""Rotary positions and the write to the cache, straight from InternLM2's fused projection, in one pass.

T tokens, K key/value heads, g queries of each, N = K * g, H head_dim. The projection's row of one key/value head is g
queries, a key, a value; queries and keys are rotated (Su et al. 2021, arXiv 2104.09864), key and value go to their
rows of the cache ([key or value, head, slot]), the queries go out. Slot -1 writes nothing: padding of a batch.

    q_TNH = rope_and_cache(qkv, rows, angles, places, num_kv_heads=8)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from puyu.engine.kernels.launch import power_of_two
from puyu.model.rope import Rotation, rotate


class Angles(NamedTuple):
    """cos and sin of the first half of the head, [positions, H / 2] (the second half is equal)."""

    cos: Tensor
    sin: Tensor


class Places(NamedTuple):
    """Of each token its position in the text and its slot in the cache, int32 [T]."""

    positions_T: Tensor
    slots_T: Tensor


def rope_and_cache_reference(qkv: Tensor, rows: Tensor, angles: Angles, places: Places, *, num_kv_heads: int) -> Tensor:
    """What the model's own layers and plan do."""
    head_dim = rows.shape[-1]
    qkv = qkv.view(len(qkv), num_kv_heads, -1, head_dim)  # T, K, g + 2, H
    group = qkv.shape[2] - 2
    cos, sin = (x[places.positions_T.long()].repeat(1, 2)[:, None, None] for x in angles)
    turned = rotate(qkv[:, :, : group + 1], Rotation(cos.to(qkv.dtype), sin.to(qkv.dtype)))
    slots_T, live_T = places.slots_T.long(), places.slots_T >= 0
    by_head = rows.view(2, num_kv_heads, -1, head_dim)
    for kind, new_TKH in enumerate((turned[:, :, group], qkv[:, :, group + 1])):
        by_head[kind, :, slots_T[live_T]] = new_TKH[live_T].transpose(0, 1).to(rows.dtype)
    return turned[:, :, :group].flatten(1, 2)


def rope_and_cache(qkv: Tensor, rows: Tensor, angles: Angles, places: Places, *, num_kv_heads: int) -> Tensor:
    """Queries [T, N, H], rotated; keys and values are in the cache. One program for a token and a key/value head."""
    tokens, head_dim = qkv.shape[0], rows.shape[-1]
    group = qkv.shape[1] // (num_kv_heads * head_dim) - 2
    q_TNH = torch.empty(tokens, num_kv_heads * group, head_dim, dtype=qkv.dtype, device=qkv.device)
    _rope_and_cache[(tokens, num_kv_heads)](
        *(qkv, rows, q_TNH, angles.cos, angles.sin, places.positions_T, places.slots_T),
        rows.shape[0] // (2 * num_kv_heads),
        GROUP=group,
        HALF=head_dim // 2,
        BLOCK_G=power_of_two(group + 1),
        BLOCK_H=power_of_two(head_dim // 2),
        num_warps=2,
    )
    return q_TNH


@triton.jit
def _rope_and_cache(
    qkv_ptr,
    rows_ptr,
    q_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    num_slots,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    position = tl.load(positions_ptr + token)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    g, h = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, BLOCK_H)[None, :]
    inside = (g <= GROUP) & (h < HALF)
    source = qkv_ptr + (token * heads + head) * ((GROUP + 2) * 2 * HALF)
    first = tl.load(source + g * 2 * HALF + h, mask=inside, other=0.0)
    second = tl.load(source + g * 2 * HALF + HALF + h, mask=inside, other=0.0)
    cos = tl.load(cos_ptr + position * HALF + h, mask=h < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * HALF + h, mask=h < HALF, other=0.0).to(tl.float32)
    turned_first = first.to(tl.float32) * cos - second.to(tl.float32) * sin
    turned_second = second.to(tl.float32) * cos + first.to(tl.float32) * sin

    is_query = (g < GROUP) & (h < HALF)
    target = q_ptr + ((token * heads + head) * GROUP + g) * 2 * HALF + h
    tl.store(target, turned_first.to(first.dtype), mask=is_query)
    tl.store(target + HALF, turned_second.to(first.dtype), mask=is_query)

    is_key = (g == GROUP) & (h < HALF) & (slot >= 0)
    key = rows_ptr + (head * num_slots + slot) * 2 * HALF + g * 0 + h
    tl.store(key, turned_first.to(first.dtype), mask=is_key)
    tl.store(key + HALF, turned_second.to(first.dtype), mask=is_key)

    whole = tl.arange(0, 2 * BLOCK_H)
    live = (whole < 2 * HALF) & (slot >= 0)
    value = tl.load(source + (GROUP + 1) * 2 * HALF + whole, mask=live, other=0.0)
    tl.store(rows_ptr + ((heads + head) * num_slots + slot) * 2 * HALF + whole, value, mask=live)
