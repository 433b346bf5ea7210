"""What is planned: a model, its rows and its batch; parameters by kind, and the slice that a process computes with.

Job(config, row=4096, batch_tokens=4194304).kinds
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import torch

from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM
from puyu.train.optim import part_of
from puyu.train.planning.trace import Compute, Trace, Trunk, trace_model, trace_trunks


@dataclass(frozen=True)
class Job:
    """What is trained, whatever the layout."""

    model: ModelConfig
    row: int
    """Tokens of a row."""
    batch_tokens: int
    """Tokens of an optimizer step, over all processes."""
    dtype: torch.dtype = torch.bfloat16
    cpu: bool = False
    """Whether it runs on a CPU, whose attention and loss work in smaller pieces."""
    _traces: dict[tuple[int, int], Trace] = field(default_factory=dict, init=False, compare=False)
    _trunks: dict[int, tuple[Trunk, ...]] = field(default_factory=dict, init=False, compare=False)
    _blocks: dict[int, int] = field(default_factory=dict, init=False, compare=False)

    @property
    def master(self) -> int:
        """Bytes of a master weight, a gradient, a moment."""
        return 8 if self.dtype == torch.float64 else 4

    @cached_property
    def kinds(self) -> Counter[str]:
        """Parameters by kind."""
        return parameters(self.model)

    def slice(self, tensor: int) -> ModelConfig:
        """What one of `tensor` processes that share each matrix computes."""
        c = self.model
        return c.with_(
            num_heads=c.num_heads // tensor,
            num_kv_heads=c.num_kv_heads // tensor,
            intermediate_size=c.intermediate_size // tensor,
            vocab_size=-(-c.vocab_size // tensor),
        )

    def trace(self, tensor: int, tokens: int) -> Trace:
        """The parts of that slice in a micro-batch of a process."""
        if (tensor, tokens) not in self._traces:
            dense, moe = self.slice(tensor), self.model.experts
            if moe:  # a token's experts together are as wide as one MLP
                dense = dense.with_(experts=None, intermediate_size=moe.per_token * moe.size + moe.shared_size)
            if tensor not in self._trunks:
                self._trunks[tensor] = trace_trunks(dense, row=self.row, dtype=self.dtype)
            like = Compute(self.dtype, self.cpu)
            found = trace_model(dense, self._trunks[tensor], tokens=tokens, row=self.row, like=like)
            self._traces[tensor, tokens] = found
        return self._traces[tensor, tokens]

    def block(self, tensor: int) -> int:
        """Parameters of a layer of that slice."""
        if tensor not in self._blocks:
            one = parameters(self.slice(tensor).with_(num_layers=1, windows=()))
            self._blocks[tensor] = one["attention"] + one["MLP"] + 2 * self.model.hidden_size
        return self._blocks[tensor]

    def held(self, tensor: int) -> int:
        """Parameters of that slice in all."""
        tables = 1 if self.model.tie_embeddings else 2
        return (
            self.block(tensor) * self.model.num_layers
            + tables * self.model.vocab_size * self.model.hidden_size // tensor
        )


def parameters(config: ModelConfig) -> Counter[str]:
    """Parameters by kind: embedding, attention, MLP, norms, head."""
    counts = Counter[str]()
    with torch.device("meta"):
        model = CausalLM(config)
    for name, parameter in model.named_parameters():
        kind = next((k for word, k in ((".attention.", "attention"), (".mlp.", "MLP")) if word in name), part_of(name))
        counts[kind] += parameter.numel()
    return counts
