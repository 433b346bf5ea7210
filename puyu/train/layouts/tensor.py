"""Tensor parallel with sequence parallel between the matrices: each process has a slice of every matrix.

Shoeybi et al. 2019 (arXiv 1909.08053); Korthikanti et al. 2022 (arXiv 2205.05198). Between the matrices a process has
its share of the tokens, t = T / size. Queries, keys and values are cut by groups of heads, gate and up each in parts,
what follows them by columns; embedding and head by rows of the vocabulary. Norms and experts are whole everywhere and
see the process's tokens, so their gradients are summed over the group.

    cuts = slice_model(model, Dim(rank, size, group))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puyu.errors import ConfigError
from puyu.model.heads import CausalLM
from puyu.model.layers import GatedMLP, RMSNorm
from puyu.model.linear import Linear, product
from puyu.model.transformer import Block
from puyu.train.layouts.comm import Group, gather_tokens, row_range, scatter_tokens
from puyu.train.layouts.shares import Cut, Dim


class GatherLinear(Linear):
    """Tokens of this process -> all tokens, by its rows of the matrix."""

    group: Group = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(gather_tokens(x, self.group))


class ScatterLinear(Linear):
    """All tokens, by its columns of the matrix -> this process's tokens of the sum."""

    group: Group = None

    def forward(self, x: Tensor) -> Tensor:
        y = scatter_tokens(product(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class SlicedEmbedding(nn.Module):
    """Ids [T] -> embeddings of this process's tokens, from rows [first, first + n) of the table."""

    def __init__(self, weight: nn.Parameter, first: int, group: Group) -> None:
        super().__init__()
        self.weight, self.first, self.group = weight, first, group

    def forward(self, tokens_T: Tensor) -> Tensor:
        at_T = tokens_T - self.first
        here_T = (at_T >= 0) & (at_T < len(self.weight))
        found_TD = F.embedding(at_T.clamp(0, len(self.weight) - 1), self.weight) * here_T[:, None]
        return scatter_tokens(found_TD, self.group)


class GatherNorm(nn.Module):
    """A norm of this process's tokens, then all tokens: what a head needs that has a part of the vocabulary."""

    def __init__(self, norm: RMSNorm, group: Group) -> None:
        super().__init__()
        self.weight, self.eps, self.group = norm.weight, norm.eps, group

    def forward(self, x_tD: Tensor) -> Tensor:
        y_tD = F.rms_norm(x_tD, x_tD.shape[-1:], None, self.eps) * self.weight.to(x_tD.dtype)
        return gather_tokens(y_tD, self.group)


def slice_model(model: CausalLM, dim: Dim) -> dict[str, Cut]:
    """Leave only this process's slices in the model; returns where they lie, by name."""
    slicer = _Slicer(dim)
    trunk = model.trunk
    for index, block in enumerate(trunk.layers):
        assert isinstance(block, Block)
        slicer.block(f"trunk.layers.{index}", block)
    first, _ = row_range(len(trunk.embedding.weight), dim.rank, dim.size)
    weight = slicer.parameter("trunk.embedding.weight", trunk.embedding.weight)
    trunk.embedding = SlicedEmbedding(weight, first, dim.group)  # type: ignore[assignment]
    trunk.norm = GatherNorm(trunk.norm, dim.group)  # type: ignore[assignment]
    if model.head is not None:
        model.head = slicer.linear("head", model.head, Linear)
    return slicer.cuts


class _Slicer:
    """Makes slices and remembers where they lie."""

    def __init__(self, dim: Dim) -> None:
        self.dim = dim
        self.cuts: dict[str, Cut] = {}

    def block(self, name: str, block: Block) -> None:
        attention, mlp = block.attention, block.mlp
        attention.qkv = self.linear(f"{name}.attention.qkv", attention.qkv, GatherLinear)
        attention.out = self.linear(f"{name}.attention.out", attention.out, ScatterLinear)
        if isinstance(mlp, GatedMLP):
            mlp.gate_up = self.linear(f"{name}.mlp.gate_up", mlp.gate_up, GatherLinear, halves=2)
            mlp.down = self.linear(f"{name}.mlp.down", mlp.down, ScatterLinear)

    def linear(self, name: str, linear: Linear, kind: type[Linear], *, halves: int = 1) -> Linear:
        """The same layer with a slice of its matrix: rows, or columns where the result is summed."""
        if type(linear) is not Linear:
            raise ConfigError(
                f"layout.tensor: {name} is a {type(linear).__name__}, which cannot be sliced", remedy="set tensor=1"
            )
        columns = kind is ScatterLinear
        with torch.device("meta"):
            made = kind(linear.in_features, linear.out_features, bias=linear.bias is not None)
        made.weight = self.parameter(f"{name}.weight", linear.weight, dim=int(columns), halves=halves)
        if linear.bias is not None:
            rows = nn.Parameter(linear.bias.detach(), requires_grad=linear.bias.requires_grad)
            made.bias = rows if columns else self.parameter(f"{name}.bias", linear.bias, halves=halves)
        made.out_features, made.in_features = made.weight.shape
        if isinstance(made, GatherLinear | ScatterLinear):
            made.group = self.dim.group
        return made

    def parameter(self, name: str, whole: Tensor, *, dim: int = 0, halves: int = 1) -> nn.Parameter:
        cut = Cut.even(whole, self.dim.rank, self.dim.size, dim=dim, halves=halves)
        self.cuts[name] = cut
        return nn.Parameter(cut.of(whole), requires_grad=whole.requires_grad)
