"""RMSNorm of many rows, and the gated activation: what stands between the matrix products of a long step.

T rows, D hidden, I intermediate. For a few rows both live inside the products themselves (`matmul.py`). Numbers are
those of `model/layers.py`: fp32 inside, rounded where the modules round (Zhang & Sennrich 2019; Shazeer 2020).

    h_TD = rms_norm(x_TD, weight_D, eps=1e-5)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from puyu.engine.kernels.launch import power_of_two


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """x / rms(x) * weight."""
    return F.rms_norm(x_TD, x_TD.shape[-1:], None, eps) * weight_D.to(x_TD.dtype)


def rms_norm(x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """x / rms(x) * weight, one program a row."""
    rows, size = x_TD.shape
    out_TD = torch.empty_like(x_TD)
    block = power_of_two(size)
    warps = 4 if block <= 2048 else 8
    _rms_norm[(rows,)](x_TD, weight_D, out_TD, x_TD.stride(0), size, eps, BLOCK=block, num_warps=warps)
    return out_TD


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, stride, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(x_ptr + row * stride + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / size + eps)
    # products in fp32 and then rounded are what bf16 arithmetic gives, too
    normal = (wide * scale).to(x.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(x.dtype).to(tl.float32)
    tl.store(out_ptr + row * size + columns, (normal * weight).to(x.dtype), mask=inside)


def silu_mul_reference(gate_up_T2I: Tensor) -> Tensor:
    """silu(gate) * up, of the two halves."""
    gate_TI, up_TI = gate_up_T2I.chunk(2, dim=-1)
    return F.silu(gate_TI) * up_TI


def silu_mul(gate_up_T2I: Tensor) -> Tensor:
    """silu(gate) * up in one pass -> [T, I]."""
    rows, size = gate_up_T2I.shape[0], gate_up_T2I.shape[1] // 2
    out_TI = torch.empty(rows, size, dtype=gate_up_T2I.dtype, device=gate_up_T2I.device)
    block = min(power_of_two(size), 1024)
    _silu_mul[(rows, triton.cdiv(size, block))](gate_up_T2I, out_TI, size, BLOCK=block, num_warps=4)
    return out_TI


@triton.jit
def _silu_mul(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(x_ptr + row * 2 * size + columns, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * 2 * size + size + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide * tl.sigmoid(wide)).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + row * size + columns, (silu * up.to(tl.float32)).to(gate.dtype), mask=inside)
