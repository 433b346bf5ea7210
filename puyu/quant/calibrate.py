"""What the layers of a model see: calibration tokens go through it block by block, each block after its quantization.

Block i is observed with inputs that the quantized blocks before it have made, so that later layers make up for the
errors of earlier ones. Only one block's statistics are held at a time. Knows nothing of how codes are chosen.

    block_by_block(model, documents, lambda index, block, seen: ...)

T tokens, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from puyu.log import Progress
from puyu.model.heads import CausalLM
from puyu.model.linear import Linear
from puyu.model.packed import PackedPlan
from puyu.model.transformer import Block

BATCH_TOKENS = 4096


@dataclass
class Seen:
    """Inputs of one layer, gathered over all tokens."""

    tokens: int
    gram_II: Tensor
    """Sum of x x^T: products of a batch in fp32, the sum over batches in fp64."""
    mean_I: Tensor
    """Mean absolute value of each input."""
    largest_I: Tensor

    @staticmethod
    def nothing(inputs: int, device: torch.device) -> Seen:
        zeros = torch.zeros(inputs, dtype=torch.float64, device=device)
        return Seen(0, torch.zeros(inputs, inputs, dtype=torch.float64, device=device), zeros, zeros.clone())

    def add(self, x: Tensor) -> None:
        x_TI = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(x_TI):
            return
        self.gram_II += x_TI.T @ x_TI
        total = self.tokens + len(x_TI)
        self.mean_I += (x_TI.abs().mean(0).double() - self.mean_I) * (len(x_TI) / total)
        self.largest_I = torch.maximum(self.largest_I, x_TI.abs().amax(0).double())
        self.tokens = total

    def divided(self, scales_I: Tensor) -> Seen:
        """What the layer sees once its inputs are divided."""
        s = scales_I.double()
        return Seen(self.tokens, self.gram_II / s[:, None] / s, self.mean_I / s, self.largest_I / s)


Visit = Callable[[int, Block, dict[str, Seen]], None]


def linears(block: nn.Module) -> dict[str, Linear]:
    """The layers of a block that are quantized, by name; routers are no `Linear` and stay as they are."""
    return {name: child for name, child in block.named_modules() if isinstance(child, Linear)}


@torch.no_grad()
def block_by_block(model: CausalLM, documents: Sequence[Sequence[int]], visit: Visit) -> None:
    """Call `visit(index, block, seen)` for each block in order; it may change the block in place."""
    batches = [_entered(model, batch) for batch in packed(documents)]
    progress = Progress("quantize", len(model.trunk.layers), unit="blocks")
    for index, block in enumerate(model.trunk.layers):
        assert isinstance(block, Block)
        seen = {name: Seen.nothing(layer.in_features, layer.weight.device) for name, layer in linears(block).items()}
        handles = [layer.register_forward_pre_hook(_adder(seen[name])) for name, layer in linears(block).items()]
        for batch in batches:
            batch.run(block, index)
        for handle in handles:
            handle.remove()
        visit(index, block, seen)
        for batch in batches:
            batch.hidden = batch.run(block, index)
        progress.update()
    progress.close()


def packed(documents: Sequence[Sequence[int]], *, tokens: int = BATCH_TOKENS) -> list[list[list[int]]]:
    """Documents in batches of about that many tokens, in their order."""
    batches: list[list[list[int]]] = []
    room = 0
    for document in documents:
        if not batches or len(document) > room:
            batches.append([])
            room = tokens
        batches[-1].append(list(document))
        room -= len(document)
    return batches


def inputs_of(documents: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """(tokens_T, positions_T, starts) of documents in one row."""
    starts = [0]
    for document in documents[:-1]:
        starts.append(starts[-1] + len(document))
    tokens_T = torch.tensor([token for document in documents for token in document], device=device)
    positions_T = torch.cat([torch.arange(len(document)) for document in documents]).to(device)
    return tokens_T, positions_T, starts


@dataclass
class _Batch:
    """Hidden states before the next block, and what each block takes besides."""

    hidden: Tensor
    others: list[tuple[Any, ...]]

    def run(self, block: nn.Module, index: int) -> Tensor:
        found: Tensor = block(self.hidden, *self.others[index])
        return found


def _entered(model: CausalLM, documents: list[list[int]]) -> _Batch:
    """Run the trunk once, to learn what goes into its blocks, however it prepares that."""
    calls: list[tuple[Any, ...]] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, arguments: calls.append(arguments)) for block in model.trunk.layers
    ]
    tokens_T, positions_T, starts = inputs_of(documents, model.trunk.device)
    model.trunk(tokens_T, positions_T, PackedPlan.build(starts, len(tokens_T), tokens_T.device))
    for hook in hooks:
        hook.remove()
    return _Batch(calls[0][0], [arguments[1:] for arguments in calls])


def _adder(seen: Seen) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _, arguments: seen.add(arguments[0])
