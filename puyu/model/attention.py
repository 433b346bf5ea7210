"""Attention and its plans: which token may see which, decided outside the model and passed as an argument.

T tokens, N query heads, K key/value heads, H head_dim; g = N / K. Training builds a `PackedPlan` from the
starts of documents; the engine builds a `PagedPlan` from its scheduler. Both give the same numbers (tested).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from puyu.model.config import ModelConfig
from puyu.model.layers import RMSNorm
from puyu.model.linear import Linear
from puyu.model.packed import PackedPlan
from puyu.model.paged import KVCache, PagedPlan, PagedSequence
from puyu.model.rope import Rotation, rotate

__all__ = ["Attention", "KVCache", "PackedPlan", "PagedPlan", "PagedSequence", "Plan"]


class Plan(Protocol):
    """Who sees whom. Keys and values of layer `layer` come with their queries; where they are kept is the plan's."""

    def attend(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layer: int, *, window: int = 0) -> Tensor: ...


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and InternLM2's fused projection.

    `window` is how many tokens a query sees, itself included; 0 is all before it.
    """

    def __init__(self, config: ModelConfig, *, window: int = 0) -> None:
        super().__init__()
        self.group, self.head_dim, self.window = config.queries_per_kv, config.head_dim, window
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, rows, bias=config.qkv_bias)
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.out_bias)
        normed = config.row.qk_norm is not None
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if normed else None
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if normed else None

    def forward(self, x_TD: Tensor, rotation: Rotation, plan: Plan, layer: int) -> Tensor:
        qkv = self.qkv(x_TD).unflatten(-1, (-1, self.group + 2, self.head_dim))  # T, K, g + 2, H
        turned = rotate(self._normed(qkv[:, :, : self.group + 1]), rotation)
        q_TNH = turned[:, :, : self.group].flatten(1, 2)
        k_TKH, v_TKH = turned[:, :, self.group], qkv[:, :, self.group + 1]
        o_TNH = plan.attend(q_TNH, k_TKH, v_TKH, layer, window=self.window)
        return self.out(o_TNH.flatten(1))

    def _normed(self, qk: Tensor) -> Tensor:
        if self.q_norm is None or self.k_norm is None:
            return qk
        return torch.cat((self.q_norm(qk[:, :, : self.group]), self.k_norm(qk[:, :, self.group :])), dim=2)
