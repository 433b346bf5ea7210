"""Integer grids: which scale and zero a group of weights gets, and the code of a weight on that grid.

Scales are rounded to numbers that bf16 and fp16 both hold, before any code is chosen: files keep them in fp16, torch's
kernels compute with bf16, and neither changes them again. A range always holds 0. 4-bit grids are shrunk in a few
steps and the one with the least loss is kept, because a smaller step often gains more than the clipped extremes
lose; what loss means is the caller's (squared weights here, squared outputs in GPTQ and AWQ).

    grid = best_grid(weight_OGg, form)
    codes_OGg = grid.codes(weight_OGg)

O rows, G groups, g inputs a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from puyu.model.linear import QuantFormat, QuantWeight

SHRINK_STEPS = 20
SMALLEST_RANGE = 0.6
"""The search tries ranges from the full one down to this share of it."""

Loss = Callable[[Tensor], Tensor]
"""Differences [O, G, g] -> what they cost, [O, G]."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zeros [O, G]; weight = (code - zero) * scale, codes `first` to `last`."""

    scales: Tensor
    zeros: Tensor
    first: int
    last: int

    def codes(self, w_OGg: Tensor) -> Tensor:
        """The nearest codes, in the dtype of the weights."""
        scales, zeros = self.scales[..., None].to(w_OGg.dtype), self.zeros[..., None].to(w_OGg.dtype)
        return ((w_OGg / _divisor(scales)).round_() + zeros).clamp_(self.first, self.last)

    def values(self, codes_OGg: Tensor) -> Tensor:
        """What codes stand for."""
        scales, zeros = self.scales[..., None].to(codes_OGg.dtype), self.zeros[..., None].to(codes_OGg.dtype)
        return (codes_OGg - zeros) * scales

    def group(self, index: int) -> Grid:
        """The grid of one group, G = 1."""
        cut = slice(index, index + 1)
        return Grid(self.scales[:, cut], self.zeros[:, cut], self.first, self.last)

    def weight(self, codes_OGg: Tensor, form: QuantFormat) -> QuantWeight:
        """The codes as a matrix."""
        numbers = codes_OGg.flatten(1).to(torch.int8 if form.bits == 8 else torch.uint8)
        zeros = None if form.symmetric else self.zeros.short()
        # bf16 where steps are so small that fp16 would lose digits
        kind = torch.float16 if torch.equal(self.scales.half().to(self.scales.dtype), self.scales) else torch.bfloat16
        return QuantWeight.of(numbers, self.scales.to(kind), zeros, bits=form.bits, activations=form.activations)


def grouped(weight_OI: Tensor, form: QuantFormat) -> Tensor:
    """[O, I] -> [O, G, g]."""
    return weight_OI.unflatten(1, (-1, form.group or weight_OI.shape[1]))


def squares(difference_OGg: Tensor) -> Tensor:
    """The plain loss: the sum of squares."""
    return difference_OGg.square().sum(dim=-1)


def best_grid(w_OGg: Tensor, form: QuantFormat, loss: Loss = squares, *, smallest: float = SMALLEST_RANGE) -> Grid:
    """The grid of the least loss among the shrunk ones; 8 bits keep the full range."""
    grid = full_grid(w_OGg, form)
    if form.bits == 8:
        return grid
    full, best = grid.scales, loss(grid.values(grid.codes(w_OGg)) - w_OGg)
    for step in range(1, SHRINK_STEPS + 1):
        tried = Grid(rounded(full * (1 - (1 - smallest) * step / SHRINK_STEPS)), grid.zeros, grid.first, grid.last)
        found = loss(tried.values(tried.codes(w_OGg)) - w_OGg)
        scales = torch.where(found < best, tried.scales, grid.scales)
        grid, best = Grid(scales, grid.zeros, grid.first, grid.last), torch.minimum(found, best)
    return grid


def full_grid(w_OGg: Tensor, form: QuantFormat) -> Grid:
    """The grid that clips nothing. 8 bits use codes -127..127, so that both signs reach equally far; a zero of 0 is
    left out, which the GPTQ format cannot store."""
    low, high = w_OGg.amin(dim=-1).clamp(max=0), w_OGg.amax(dim=-1).clamp(min=0)
    if form.symmetric:
        reach, middle = torch.maximum(-low, high), float(form.middle)
        first, steps = (-127, 127.0) if form.bits == 8 else (0, 7.5)
        return Grid(rounded(reach / steps), torch.full_like(reach, middle), first, 127 if form.bits == 8 else 15)
    first = 0 if form.bits == 4 else -128
    last = first + 2**form.bits - 1
    below = (-low / _divisor(high - low) * (last - first)).round().clamp(1, last - first)
    above = (last - first) - below
    scales = torch.maximum(-low / below, torch.where(above > 0, high / above.clamp(min=1), 0.0))
    return Grid(rounded(scales), first + below, first, last)


def rounded(scales: Tensor) -> Tensor:
    """The nearest numbers that bf16 holds; fp16 holds them too, unless they are smaller than 2^-14."""
    return scales.bfloat16().to(scales.dtype)


def _divisor(scales: Tensor) -> Tensor:
    """The scale, or 1 where there is nothing to divide."""
    return torch.where(scales > 0, scales, 1.0)
