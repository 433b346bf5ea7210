"""Values of NF4 codes on a GPU, in one pass: what `NF4.dequantized` gives, bit for bit. Triton; imported where it runs.

values = nf4_values(codes, block_scales, table, torch.bfloat16)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BYTES = 2048
"""Codes of a program, two weights each."""


def nf4_values(codes: Tensor, scales_N: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """[O, I] of `dtype` from codes uint8 [O, I / 2], a scale of fp32 for each 64 weights and the 16 values, fp32."""
    rows, half = codes.shape
    found = torch.empty(rows, 2 * half, dtype=dtype, device=codes.device)
    total = codes.numel()
    _values[(triton.cdiv(total, _BYTES),)](codes, scales_N, table, found, total, BYTES=_BYTES, num_warps=4)
    return found


@triton.jit
def _values(codes_ptr, scales_ptr, table_ptr, to_ptr, total, BYTES: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * BYTES
    at = begin + tl.arange(0, BYTES)
    inside = at < total
    pair = tl.load(codes_ptr + at, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales_ptr + at // 32, mask=inside, other=0.0)
    even = tl.load(table_ptr + (pair >> 4)) * scale
    odd = tl.load(table_ptr + (pair & 15)) * scale
    both = tl.interleave(even, odd)
    place = 2 * begin + tl.arange(0, 2 * BYTES)
    tl.store(to_ptr + place, both.to(to_ptr.dtype.element_ty), mask=place < 2 * total)
