"""The parts of a language model that one process of a pipeline holds, and gradients of weights that can wait.

Names of parameters stay those of the whole model. Embedding: first chunk; final norm, head and loss: last chunk. Knows
no message and no order.

    stage = Stage(model, cut(costs(model), parts=4), rank=0, stages=4)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puyu.data.packing import Batch
from puyu.model.attention import Plan
from puyu.model.heads import CausalLM
from puyu.model.linear import Linear
from puyu.train.layouts.comm import gather_tokens, scatter_tokens
from puyu.train.layouts.tensor import GatherLinear, ScatterLinear
from puyu.train.objectives import LossOutput, Step, head_weight, lm_loss, lm_loss_of

Inputs = tuple[Tensor, Tensor, Plan]
"""What every stage makes of a batch itself: tokens, positions, attention plan."""


class Absent(nn.Module):
    """A part of the model that another process holds; calling it is an error."""


def costs(model: CausalLM, *, slices: int = 1) -> list[float]:
    """Cost of each block, in weights; the head counts with the last one, the embedding is a look-up.

    The same on all `slices` tensor-parallel processes, whose slices of the head are not: the largest counts.
    """
    found = [float(sum(parameter.numel() for parameter in block.parameters())) for block in model.trunk.layers]
    found[-1] += -(-model.config.vocab_size // slices) * model.config.hidden_size
    return found


def cut(costs: Sequence[float], *, parts: int) -> list[range]:
    """Consecutive ranges, none empty, whose largest sum is as small as can be; the later ones are the lighter."""
    count, total = len(costs), [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[k][i]: the smallest largest sum of k ranges over the first i layers, and where the last of them begins
    best = [[(0.0 if i == 0 else float("inf"), 0) for i in range(count + 1)]]
    for part in range(1, parts + 1):
        row = [(float("inf"), 0)] * part
        for i in range(part, count + 1):
            row.append(min((max(best[-1][j][0], total[i] - total[j]), -j) for j in range(part - 1, i)))
        best.append(row)
    bounds = [count]
    for part in range(parts, 0, -1):
        bounds.append(-best[part][bounds[-1]][1])
    return [range(a, b) for a, b in pairwise(reversed(bounds))]


class Stage(Step):
    """This process's chunks of a model; the rest of the model is dropped, in place."""

    model: CausalLM

    def __init__(self, model: CausalLM, cuts: Sequence[range], *, rank: int, stages: int, slices: int = 1) -> None:
        """`slices`: tensor-parallel processes, which share the tokens between their matrices."""
        super().__init__(model, lm_loss)
        self.slices = slices
        self.cuts, self.last = cuts, len(cuts) - 1
        self.mine = range(rank, len(cuts), stages)
        kept = {layer for chunk in self.mine for layer in cuts[chunk]}
        trunk = model.trunk
        for layer in set(range(len(trunk.layers))) - kept:
            trunk.layers[layer] = Absent()
        ends = self.last in self.mine
        if 0 not in self.mine and not (ends and model.head is None):
            trunk.register_module("embedding", Absent())
        if not ends:
            trunk.register_module("norm", Absent())
        if not ends and model.head is not None:
            model.register_module("head", Absent())

    def forward(  # type: ignore[override]
        self, chunk: int, batch: Batch, inputs: Inputs, x_TD: Tensor | None
    ) -> Tensor | LossOutput:
        """Hidden states [T, D] behind the chunk, or the loss; `x_TD` is what the chunk before it gave."""
        model, (tokens_T, positions_T, plan) = self.model, inputs
        trunk = model.trunk
        x_TD = trunk.embedded(tokens_T) if x_TD is None else x_TD
        x_TD = trunk.through(x_TD, positions_T, plan, self.cuts[chunk])
        if chunk < self.last:
            return x_TD
        return lm_loss_of(trunk.norm(x_TD)[: batch.num_tokens], head_weight(self.model), batch)

    def room(self, inputs: Inputs) -> Tensor:
        """An empty tensor of the size that passes between chunks."""
        trunk, tokens_T = self.model.trunk, inputs[0]
        dtype = trunk.compute_dtype or next(self.parameters()).dtype
        return torch.empty(len(tokens_T) // self.slices, trunk.config.hidden_size, dtype=dtype, device=tokens_T.device)


Product = tuple[nn.Parameter, Tensor, Tensor]
"""A weight [O, I], the gradient of its product's output [T, O], and the input [T, I]."""

_KINDS = (Linear, GatherLinear, ScatterLinear)


class LateWeights:
    """Lets the backward pass of every `Linear`, sliced or not, leave the gradient of its matrix for later.

    The values are the same.
    """

    def __init__(self) -> None:
        self._left: list[Product] = []

    @contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """In force inside the block."""
        linear = (module for module in model.modules() if isinstance(module, Linear) and type(module) in _KINDS)
        layers = [layer for layer in linear if layer.weight.requires_grad]
        for layer in layers:
            layer.forward = partial(self._forward, layer)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _forward(self, layer: Linear, x: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        if isinstance(layer, ScatterLinear):
            y = scatter_tokens(self._product(x, layer.weight, None), layer.group)
            return y if bias is None else y + bias
        x = gather_tokens(x, layer.group) if isinstance(layer, GatherLinear) else x
        return self._product(x, layer.weight, bias)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product: Tensor = _LateProduct.apply(x, weight, bias, self._left)  # type: ignore[no-untyped-call]
        return product

    def take(self) -> list[Product]:
        """What the backward passes since the last call have left."""
        left = self._left.copy()
        self._left.clear()
        return left


@torch.no_grad()
def add_products(products: Sequence[Product]) -> None:
    """Add these gradients to their weights."""
    for weight, grad, x in products:
        value = (grad.T @ x).to(weight.dtype)
        weight.grad = value if weight.grad is None else weight.grad.add_(value)


class _LateProduct(torch.autograd.Function):
    """F.linear, whose backward pass gives the gradient of x and puts what that of W needs into a list."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: Tensor | None, left: list[Product]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.left = left
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.left.append((weight, grad.flatten(0, -2), x.flatten(0, -2)))
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None, None
