"""A trunk with its head: `CausalLM` gives logits, `ScalarModel` one number per token.

    logits_TV = model.logits(model.trunk(tokens_T, positions_T, plan))

The head is a step of its own, so that a loss asks for logits only where it needs them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puyu.model.attention import Plan
from puyu.model.config import ModelConfig
from puyu.model.linear import Linear
from puyu.model.transformer import Transformer


class _Headed(nn.Module):
    """What both kinds of model do with their trunk."""

    trunk: Transformer

    @property
    def config(self) -> ModelConfig:
        """The shape, with the rotary base as it is now."""
        return self.trunk.config.with_(rope_theta=self.trunk.rope_theta)

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Run activations and products of the trunk in `dtype`; master weights stay as they are."""
        self.trunk.compute_dtype = dtype

    def set_shape(self, config: ModelConfig) -> None:
        """Take the positions of a config that differs in nothing else."""
        self.trunk.config, self.trunk.rope_theta = config, config.rope_theta

    def set_rope_theta(self, theta: float) -> None:
        """Change the rotary base (a new training phase with longer context)."""
        self.trunk.rope_theta = theta


class CausalLM(_Headed):
    """A trunk with a language head (or the embedding itself, when tied)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.trunk = Transformer(config)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, plan: Plan) -> Tensor:
        """Logits [T, V]."""
        return self.logits(self.trunk(tokens_T, positions_T, plan))

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Hidden states -> logits [T, V], in the dtype of the hidden states."""
        if self.head is None:
            return F.linear(hidden_TD, self.trunk.embedding.weight.to(hidden_TD.dtype))
        return self.head(hidden_TD)

    def set_context(self, length: int) -> None:
        """Let contexts have `length` tokens; see `ModelConfig.stretched` for what that does to positions."""
        self.set_shape(self.config.stretched(length))


class ScalarModel(_Headed):
    """A trunk with one number per token: reward models and PPO's critic. The head starts at zero."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.trunk = Transformer(config)
        self.head = Linear(config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, plan: Plan) -> Tensor:
        """Values [T], fp32."""
        return self.scalar(self.trunk(tokens_T, positions_T, plan))

    def scalar(self, hidden_TD: Tensor) -> Tensor:
        """Hidden states -> one value per token, in fp32 or wider."""
        wide = hidden_TD.dtype if hidden_TD.dtype == torch.float64 else torch.float32
        return self.head(hidden_TD.to(wide)).squeeze(-1)
