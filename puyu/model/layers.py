"""RMSNorm and the gated MLP. Plain single-device code; T tokens, D hidden.

RMSNorm (Zhang & Sennrich 2019) normalizes in fp32 and casts back before the weight, in the order of the
published InternLM2 and LLaMA code. SwiGLU: Shazeer 2020.
"""

from __future__ import annotations

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


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one product."""

    def __init__(self, config: ModelConfig, *, size: int | None = None) -> None:
        """`size`: another number of inner units than the config's (an expert's)."""
        super().__init__()
        size = config.intermediate_size if size is None else size
        self.gate_up = Linear(config.hidden_size, 2 * size, bias=config.mlp_bias)
        self.down = Linear(size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_TD).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
