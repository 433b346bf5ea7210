"""One decoder for all families: tokens in, hidden states out. Knows no tokenizer, no trainer, no scheduler.

    hidden_TD = trunk(tokens_T, positions_T, plan)

Heads stand apart (`heads.py`), so that a loss can choose at which tokens it wants logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puyu.model.attention import Attention, Plan
from puyu.model.config import ModelConfig
from puyu.model.layers import GatedMLP, RMSNorm
from puyu.model.moe import ExpertMLP
from puyu.model.rope import Rotation, rotation


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config, window=config.window(index))
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        sparse = config.experts is not None and index not in config.experts.dense_layers
        self.mlp: nn.Module = ExpertMLP(config) if sparse else GatedMLP(config)

    def forward(self, x_TD: Tensor, rotation: Rotation, plan: Plan, layer: int) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), rotation, plan, layer)
        return x_TD + self.mlp(self.mlp_norm(x_TD))


class HostEmbedding(nn.Module):
    """An embedding that does not train, in the host's memory wherever the model goes; rows follow their tokens."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().cpu(), requires_grad=False)

    def forward(self, tokens_T: Tensor) -> Tensor:
        return F.embedding(tokens_T.to(self.weight.device), self.weight).to(tokens_T.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return self


class Transformer(nn.Module):
    """Embedding, blocks, final norm. Activations run in `compute_dtype` (None: the dtype of the weights)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.rope_theta = config.rope_theta
        # given its weight, the module draws no random numbers, which on the meta device costs seconds of imports
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight, _freeze=False)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, plan: Plan, embeds_TD: Tensor | None = None) -> Tensor:
        """Hidden states [T, D] after the final norm."""
        x_TD = self.embedded(tokens_T) if embeds_TD is None else embeds_TD.to(self.compute_dtype or embeds_TD.dtype)
        return self.norm(self.through(x_TD, positions_T, plan, range(len(self.layers))))

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.norm.weight.device

    def embedded(self, tokens_T: Tensor) -> Tensor:
        """What the first block reads, [T, D]."""
        x_TD: Tensor = self.embedding(tokens_T)
        return x_TD.to(self.compute_dtype or x_TD.dtype)

    def through(self, x_TD: Tensor, positions_T: Tensor, plan: Plan, layers: range) -> Tensor:
        """Some blocks, in their order: [T, D] -> [T, D]."""
        turn = self.rotation(positions_T, x_TD.dtype)
        for index in layers:
            x_TD = self.layers[index](x_TD, turn, plan, index)
        return x_TD

    def rotation(self, positions_T: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation of these positions, with the base and the stretching as they are now."""
        config = self.config
        return rotation(
            positions_T, theta=self.rope_theta, head_dim=config.head_dim, dtype=dtype, scaling=config.scaling
        )
