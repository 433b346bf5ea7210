"""RMSNorm, rotary positions, gated MLP. Plain single-device code; T tokens, D hidden, H head_dim.

RMSNorm (Zhang & Sennrich 2019) normalizes in fp32 and casts back before the weight, in the order of the
published InternLM2 and LLaMA code. Rotary positions (Su et al. 2021) rotate halves, as Hugging Face does.
SwiGLU: Shazeer 2020.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puyu.model.config import ModelConfig
from puyu.model.linear import Linear


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight.to(x.dtype)


class Rotation(NamedTuple):
    """cos and sin of each token's angles, [T, 1, 1, H], both halves equal."""

    cos: Tensor
    sin: Tensor


def rotation(positions_T: Tensor, *, theta: float, head_dim: int, dtype: torch.dtype) -> Rotation:
    """Angles position * theta^(-2i/H), computed in fp32 (fp64 for an fp64 model)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=wide) / head_dim
    angles = positions_T.to(wide)[:, None] / theta**exponents
    angles = torch.cat((angles, angles), dim=-1)[:, None, None, :]
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x_TxxH: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each (i, i + H/2) pair; x is [T, groups, heads, H]."""
    first, second = x_TxxH.chunk(2, dim=-1)
    return x_TxxH * rotation.cos + torch.cat((-second, first), dim=-1) * rotation.sin


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_TD).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
