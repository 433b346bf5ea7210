"""Causal attention as plain products, for bf16 training on a CPU: blocks of queries, two products and a softmax each.

torch's flash kernel for CPUs is slow in its backward pass at short lengths and small heads; products over blocks
of queries reach the speed of a dense product. Keys behind a block's last query are never touched. The attention
probabilities are kept for the backward pass, so it is for rows up to `LONGEST`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 128
LONGEST = 1024


def dense_causal(q_SLNH: Tensor, k_SLKH: Tensor, v_SLKH: Tensor) -> Tensor:
    """Causal attention per row -> [S, L, N, H]. Query heads of one key head are rows of the same product."""
    num_kv = k_SLKH.shape[2]
    q_SKgLH = q_SLNH.unflatten(2, (num_kv, -1)).permute(0, 2, 3, 1, 4).contiguous()
    k_SKLH, v_SKLH = (x.transpose(1, 2).contiguous() for x in (k_SLKH, v_SLKH))
    o_SKgLH = _DenseCausal.apply(q_SKgLH, k_SKLH, v_SKLH)
    return o_SKgLH.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _rows(x_SKgLH: Tensor, start: int, stop: int) -> Tensor:
    """The queries [start, stop) of all heads of a group as rows of one matrix."""
    return x_SKgLH[:, :, :, start:stop].flatten(2, 3)


def suits(q_SLNH: Tensor) -> bool:
    """Whether this way is the faster one: bf16 on a CPU, rows of moderate length, and gradients are wanted."""
    training = torch.is_grad_enabled() and q_SLNH.requires_grad
    return training and q_SLNH.device.type == "cpu" and q_SLNH.dtype == torch.bfloat16 and q_SLNH.shape[1] <= LONGEST


class _DenseCausal(torch.autograd.Function):
    """q [S, K, g, L, H], k and v [S, K, L, H] -> o like q."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, length, scale = torch.empty_like(q), q.shape[3], q.shape[-1] ** -0.5
        keys, parts = k.transpose(-1, -2), []
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            scores = (_rows(q, start, stop) @ keys[..., :stop]).mul_(scale).unflatten(2, (-1, stop - start))
            future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu_(1)
            scores[..., start:].masked_fill_(future, float("-inf"))
            parts.append(torch.softmax(scores, -1).flatten(2, 3))
            out[:, :, :, start:stop] = (parts[-1] @ v[:, :, :stop]).unflatten(2, (-1, stop - start))
        ctx.save_for_backward(q, k, v, *parts)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *parts = ctx.saved_tensors
        wide = torch.promote_types(k.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        values, scale = v.transpose(-1, -2), q.shape[-1] ** -0.5
        for start, p in zip(range(0, q.shape[3], BLOCK), parts, strict=True):
            stop = p.shape[-1]
            rows = _rows(grad, start, stop)
            dv[:, :, :stop] += p.transpose(-1, -2) @ rows
            ds = torch._softmax_backward_data(rows @ values[..., :stop], p, -1, p.dtype).mul_(scale)
            dq[:, :, :, start:stop] = (ds @ k[:, :, :stop]).unflatten(2, (-1, stop - start))
            dk[:, :, :stop] += ds.transpose(-1, -2) @ _rows(q, start, stop)
        return dq, dk.to(k.dtype), dv.to(v.dtype)
