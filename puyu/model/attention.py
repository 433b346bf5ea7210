"""Attention and its plans: which token may see which, decided outside the model and passed as an argument.

T tokens, N query heads, K key/value heads, H head_dim; g = N / K. Training builds a `PackedPlan` from the
starts of documents; the engine builds a `PagedPlan` from its scheduler. Both give the same numbers (tested).
"""

from __future__ import annotations

from torch import Tensor, nn

from puyu.model.config import ModelConfig
from puyu.model.layers import Rotation, rotate
from puyu.model.linear import Linear
from puyu.model.packed import PackedPlan
from puyu.model.paged import KVCache, PagedPlan, PagedSequence

__all__ = ["Attention", "KVCache", "PackedPlan", "PagedPlan", "PagedSequence", "Plan"]

Plan = PackedPlan | PagedPlan


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and InternLM2's fused projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.group = config.queries_per_kv
        self.head_dim = config.head_dim
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, rows, bias=config.qkv_bias)
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.out_bias)

    def forward(self, x_TD: Tensor, rotation: Rotation, plan: Plan, layer: int) -> Tensor:
        qkv = self.qkv(x_TD).unflatten(-1, (-1, self.group + 2, self.head_dim))  # T, K, g + 2, H
        turned = rotate(qkv[:, :, : self.group + 1], rotation)
        q_TNH = turned[:, :, : self.group].flatten(1, 2)
        o_TNH = plan.attend(q_TNH, turned[:, :, self.group], qkv[:, :, self.group + 1], layer)
        return self.out(o_TNH.flatten(1))
