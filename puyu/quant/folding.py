"""Scaling input channels of linear layers without changing the model: what divides them goes into what comes before.

A `Pair` is one place where that is possible: the layers that read an activation, and the way to divide the activation
by s. Known are norm -> qkv, v -> out (equal s for the query heads that share a value head), norm -> gate_up and
up -> down; other layers are left as they are. Used by AWQ and SmoothQuant.

    for pair in pairs_of(block):
        fold(pair, scales_I)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from puyu.model.attention import Attention
from puyu.model.layers import GatedMLP, RMSNorm
from puyu.model.linear import Linear
from puyu.model.transformer import Block


@dataclass(frozen=True)
class Pair:
    """`layer` reads what `divide(s)` divides by s [I], s made of `free(x_I)`: channels that must be equal are."""

    name: str
    layer: Linear
    divide: Callable[[Tensor], None]
    free: Callable[[Tensor], Tensor]


def pairs_of(block: Block) -> list[Pair]:
    """The pairs of a block, those whose first part is itself a quantized layer before the others."""
    pairs: list[Pair] = []
    mlp, attention = block.mlp, block.attention
    if isinstance(mlp, GatedMLP) and isinstance(mlp.gate_up, Linear) and isinstance(mlp.down, Linear):
        pairs += [Pair("mlp.down", mlp.down, lambda s, up=mlp.gate_up: _divide_up(up, s), _all)]  # type: ignore[misc]
        if isinstance(block.mlp_norm, RMSNorm):
            pairs.append(Pair("mlp.gate_up", mlp.gate_up, lambda s: _divide_norm(block.mlp_norm, s), _all))
    if isinstance(attention, Attention) and isinstance(attention.qkv, Linear) and isinstance(attention.out, Linear):
        pairs += [_value_pair(attention)]
        if isinstance(block.attention_norm, RMSNorm):
            pairs.append(Pair("attention.qkv", attention.qkv, lambda s: _divide_norm(block.attention_norm, s), _all))
    return pairs


@torch.no_grad()
def fold(pair: Pair, scales_I: Tensor) -> None:
    """Divide the activation by `scales_I`, multiply the layer's columns by it: the same outputs."""
    pair.divide(scales_I)
    pair.layer.weight.mul_(scales_I.to(pair.layer.weight.dtype))


def _all(x_I: Tensor) -> Tensor:
    return x_I


def _divide_norm(norm: RMSNorm, scales_D: Tensor) -> None:
    norm.weight.div_(scales_D.to(norm.weight.dtype))


def _divide_rows(layer: Linear, divisor: Tensor) -> None:
    layer.weight.div_(divisor.to(layer.weight.dtype)[:, None])
    if layer.bias is not None:
        layer.bias.div_(divisor.to(layer.bias.dtype))


def _divide_up(gate_up: Linear, scales_I: Tensor) -> None:
    """The upper half of the rows is the gate, whose activation is not linear."""
    _divide_rows(gate_up, torch.cat((torch.ones_like(scales_I), scales_I)))


def _value_pair(attention: Attention) -> Pair:
    """Inputs of `out` are (value head, query head of the group, head_dim); the value rows are (head, head_dim)."""
    group, head_dim = attention.group, attention.head_dim

    def free(x_I: Tensor) -> Tensor:
        x_KgH = x_I.view(-1, group, head_dim)
        return x_KgH.mean(dim=1, keepdim=True).expand_as(x_KgH).reshape(-1)

    def divide(scales_I: Tensor) -> None:
        scales_KH = scales_I.view(-1, group, head_dim)[:, 0]
        divisor = torch.ones(len(scales_KH), group + 2, head_dim, dtype=scales_I.dtype, device=scales_I.device)
        divisor[:, -1] = scales_KH
        _divide_rows(attention.qkv, divisor.flatten())

    return Pair("attention.out", attention.out, divide, free)
