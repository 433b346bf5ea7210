"""Initial weights that depend only on the seed and a parameter's name, never on layout, order or rank.

InternEvo's scheme: N(0, initializer_range) everywhere, and the output projections of layer i further divided
by sqrt(2 (i + 1)). Norms start at one, biases and scalar heads at zero.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from puyu.files import hash_json


def init_weights(model: nn.Module, *, seed: int, std: float = 0.02) -> None:
    """Fill every parameter in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, tuple(parameter.shape), seed=seed, std=std))


def initial_value(name: str, shape: tuple[int, ...], *, seed: int, std: float = 0.02) -> Tensor:
    """The initial value of one parameter, fp32, drawn from a generator of its own."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias") or (name == "head.weight" and shape[0] == 1):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(int(hash_json([seed, name])[:15], 16))
    value = torch.randn(shape, generator=generator) * std
    if match := re.search(r"layers\.(\d+)\.(attention\.out|mlp\.(?:experts\.\d+\.|shared\.)?down)\.", name):
        value /= math.sqrt(2 * (int(match.group(1)) + 1))
    return value


def lora_value(name: str, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """A new A [rank, inputs] of an adapter: uniform in +-1 / sqrt(inputs), as torch's Kaiming with a = sqrt 5."""
    generator = torch.Generator().manual_seed(int(hash_json([seed, name])[:15], 16))
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])
