"""What is planned: a model, its rows and its batch; parameters by kind, and the slice that a process computes with.

Job(config, row=4096, batch_tokens=4194304).kinds
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import gcd
from typing import NamedTuple

import torch
from torch import nn

from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM
from puyu.train import optim
from puyu.train.memory import MemoryConfig
from puyu.train.optim import OptimConfig, part_of
from puyu.train.planning.live import LiveBytes
from puyu.train.planning.trace import (
    Checkpoint,
    Compute,
    Part,
    Trace,
    Trunk,
    between,
    trace_head,
    trace_model,
    trace_trunks,
)


class Held(NamedTuple):
    """Bytes of the optimizer's states: of a block, of a table; and what an update needs beside them."""

    block: int
    table: int
    working: int


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
    optim: OptimConfig = field(default_factory=OptimConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """As configured; `checkpoint` is tried at all levels."""
    float8: bool = False
    _traces: dict[tuple[int, int, str], Trace] = field(default_factory=dict, init=False, compare=False)
    _trunks: dict[tuple[int, str], tuple[Trunk, ...]] = field(default_factory=dict, init=False, compare=False)
    _heads: dict[tuple[int, int], Part] = field(default_factory=dict, init=False, compare=False)
    _slices: dict[int, ModelConfig] = field(default_factory=dict, init=False, compare=False)
    _blocks: dict[int, int] = field(default_factory=dict, init=False, compare=False)

    @property
    def master(self) -> int:
        """Bytes of a master weight, a gradient, a moment."""
        return 8 if self.dtype == torch.float64 else 4

    @property
    def gathered(self) -> float:
        """Bytes of a block's weights that travel, of each of their own: they are cast before, but for float8."""
        return 1.0 if self.float8 else self.dtype.itemsize / self.master

    @cached_property
    def kinds(self) -> Counter[str]:
        """Parameters by kind."""
        return parameters(self.model)

    def slice(self, tensor: int) -> ModelConfig:
        """What one of `tensor` processes that share each matrix computes."""
        c = self.model
        if tensor not in self._slices:
            self._slices[tensor] = c.with_(
                num_heads=c.num_heads // tensor,
                num_kv_heads=c.num_kv_heads // tensor,
                intermediate_size=c.intermediate_size // tensor,
                vocab_size=-(-c.vocab_size // tensor),
            )
        return self._slices[tensor]

    def trace(self, tensor: int, tokens: int, checkpoint: Checkpoint = "none") -> Trace:
        """The parts of that slice in a micro-batch of a process."""
        key = tensor, tokens, checkpoint
        if key not in self._traces:
            like = Compute(self.dtype, self.cpu, checkpoint, self.memory.offload, self.float8)
            sliced = self.slice(tensor)
            if (tensor, tokens) not in self._heads:
                self._heads[tensor, tokens] = trace_head(sliced, tokens, like)
            trunks, head = self._trunks_of(tensor, like), self._heads[tensor, tokens]
            self._traces[key] = trace_model(sliced, trunks, head, tokens=tokens, row=self.row, like=like)
        return self._traces[key]

    def _trunks_of(self, tensor: int, like: Compute) -> tuple[Trunk, ...]:
        """Traced once; slices between the whole and the thinnest lie on the line through both."""
        key, most = (tensor, like.checkpoint), gcd(self.model.num_kv_heads, 8)
        if key not in self._trunks:
            if 1 < tensor < most:
                ends = self._trunks_of(1, like), self._trunks_of(most, like)
                self._trunks[key] = between(*ends, share=(1 - 1 / tensor) / (1 - 1 / most))
            else:
                self._trunks[key] = trace_trunks(self.slice(tensor), row=self.row, like=like)
        return self._trunks[key]

    def block(self, tensor: int) -> int:
        """Parameters of a layer of that slice."""
        if tensor not in self._blocks:
            one = parameters(self.slice(tensor).with_(num_layers=1, windows=()))
            self._blocks[tensor] = one["attention"] + one["MLP"] + 2 * self.model.hidden_size
        return self._blocks[tensor]

    @cached_property
    def plain(self) -> Job:
        """The same with all activations kept on the device."""
        return replace(self, memory=MemoryConfig())

    @property
    def experts(self) -> int:
        """Parameters of all routed experts of a layer."""
        moe = self.model.experts
        return 3 * moe.count * moe.size * self.model.hidden_size if moe else 0

    @property
    def idle(self) -> int:
        """Those of them that a trace does not see: it has all rows pass through one expert."""
        return self.experts - self.experts // self.model.experts.count if self.model.experts else 0

    def held(self, tensor: int) -> int:
        """Parameters of that slice in all."""
        tables = 1 if self.model.tie_embeddings else 2
        return (
            self.block(tensor) * self.model.num_layers
            + tables * self.model.vocab_size * self.model.hidden_size // tensor
        )

    @cached_property
    def states(self) -> Held:
        """Of the whole model; AdamW's are two numbers a weight, the others are counted on their code."""
        if self.optim.kind == "adamw":
            table = 2 * self.master * self.model.vocab_size * self.model.hidden_size
            return Held(2 * self.master * self.block(1), table, 0)
        return count_states(self)


def count_states(job: Job) -> Held:
    """States and working memory of an optimizer, by a step on tensors without numbers; matrices only, in two layers
    (Muon's: as many as it takes at once)."""
    sparse = job.model.experts
    layers = job.model.num_layers if job.optim.kind == "muon" and not sparse else 1
    with torch.device("meta"):
        named = list(CausalLM(job.model.with_(num_layers=layers, windows=())).named_parameters())
    optimizer = optim.make_optimizer(named, job.optim)
    optim.allocate(optimizer)
    sizes = {name: _bytes(optimizer, parameter) for name, parameter in named}
    for name, parameter in named:
        if parameter.ndim == 2 and (".layers." in name or job.optim.kind == "adamw8"):
            parameter.grad = torch.empty_like(parameter)
    states = [x for state in optimizer.state.values() for x in state.values()]
    held = [parameter.grad for _, parameter in named if parameter.grad is not None]
    with LiveBytes([*(parameter for _, parameter in named), *states, *held]) as live:
        optimizer.step()
    of_block = sum(size for name, size in sizes.items() if ".layers." in name) // layers
    return Held(of_block, sizes["trunk.embedding.weight"], live.mark().peak)


def _bytes(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> int:
    return sum(state.nbytes for state in optimizer.state[parameter].values() if state.ndim)


def parameters(config: ModelConfig) -> Counter[str]:
    """Parameters by kind: embedding, attention, MLP, norms, head."""
    counts = Counter[str]()
    with torch.device("meta"):
        model = CausalLM(config)
    for name, parameter in model.named_parameters():
        kind = next((k for word, k in ((".attention.", "attention"), (".mlp.", "MLP")) if word in name), part_of(name))
        counts[kind] += parameter.numel()
    return counts
