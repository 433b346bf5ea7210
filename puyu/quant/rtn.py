"""Round-to-nearest: integer codes and scales for one weight matrix. No calibration data, no model, no files.

int8 is symmetric with one scale a row. int4 is asymmetric with a scale and a zero point a group of inputs; the
range of each group is shrunk by a few steps and the one with the least squared error is kept, because a smaller
step often gains more than the clipped extremes lose. Scales and zero points are rounded to bf16 before the codes
are chosen, so that the codes are the best ones for the numbers that the kernels use.

    codes = int4(weight, group=64)
    error = (codes.dequantized() - weight).norm()

`out` rows, `in` inputs; O rows, G groups, g inputs a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puyu.model.linear import QuantFormat, QuantLinear, pack_int4

SHRINK_STEPS = 20
SMALLEST_RANGE = 0.6
"""The search tries ranges from the full one down to this share of it."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """Codes [out, in] (int8, or 0..15 as uint8), scales and (int4 only) zeros [out, groups], all bf16 values."""

    form: QuantFormat
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def dequantized(self) -> Tensor:
        """What the codes stand for, fp32 [out, in]."""
        if self.zeros is None:
            return self.codes.float() * self.scales.float()
        steps_OGg = self.codes.float().unflatten(1, (-1, self.form.group)) - 8
        return (steps_OGg * self.scales.float()[..., None] + self.zeros.float()[..., None]).flatten(1)

    def layer(self, *, bias: Tensor | None = None) -> QuantLinear:
        """The layer that computes with these codes."""
        rows, columns = self.codes.shape
        layer = QuantLinear(columns, rows, form=self.form, bias=bias is not None)
        state = {"codes": self.codes if self.zeros is None else pack_int4(self.codes), "scales": self.scales}
        if self.zeros is not None:
            state["zeros"] = self.zeros
        if bias is not None:
            state["bias"] = bias
        layer.load_state_dict(state, assign=True)
        return layer


def quantize_weight(weight: Tensor, form: QuantFormat) -> Quantized:
    """Codes of a finite weight [out, in] in the given format."""
    return int8(weight) if form.bits == 8 else int4(weight, group=form.group)


def int8(weight: Tensor) -> Quantized:
    """Symmetric codes -127..127, one scale a row; an error of at most half a step each."""
    wide = weight.float()
    scales = (wide.abs().amax(dim=1, keepdim=True) / 127).bfloat16()
    codes = (wide / _divisor(scales)).round().clamp(-127, 127).to(torch.int8)
    return Quantized(QuantFormat(8), codes, scales)


def int4(weight: Tensor, *, group: int) -> Quantized:
    """Asymmetric codes 0..15 a group, over the range with the least squared error among the shrunk ones."""
    w_OGg = weight.float().unflatten(1, (-1, group))
    low, high = w_OGg.amin(dim=-1), w_OGg.amax(dim=-1)
    scales, zeros = _grid(low, high, 1.0)
    error = _squared_error(w_OGg, scales, zeros)
    for step in range(1, SHRINK_STEPS + 1):
        share = 1 - (1 - SMALLEST_RANGE) * step / SHRINK_STEPS
        candidate = _grid(low, high, share)
        tried = _squared_error(w_OGg, *candidate)
        better = tried < error
        scales, zeros = torch.where(better, candidate[0], scales), torch.where(better, candidate[1], zeros)
        error = torch.where(better, tried, error)
    codes = _codes(w_OGg, scales, zeros).to(torch.uint8).flatten(1)
    return Quantized(QuantFormat(4, group), codes, scales, zeros)


def _grid(low: Tensor, high: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point, bf16, of 16 levels over a share of [low, high] about its middle."""
    middle, half = (low + high) / 2, (high - low) / 2 * share
    scales = (2 * half / 15).bfloat16()
    # level 8 stands half a step above the middle of 16 levels
    return scales, (middle + scales.float() / 2).bfloat16()


def _codes(w_OGg: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    steps = (w_OGg - zeros.float()[..., None]) / _divisor(scales)[..., None]
    return (steps.round() + 8).clamp(0, 15)


def _squared_error(w_OGg: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    stands_for = (_codes(w_OGg, scales, zeros) - 8) * scales.float()[..., None] + zeros.float()[..., None]
    return (stands_for - w_OGg).square().sum(dim=-1)


def _divisor(scales: Tensor) -> Tensor:
    """The scale, or 1 where all weights are equal and no step is needed."""
    wide = scales.float()
    return torch.where(wide > 0, wide, 1.0)
