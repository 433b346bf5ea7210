"""Products of the blocks in float8: e4m3 for inputs and weights, e5m2 for gradients, one scale a tensor.

Micikevicius et al. 2022 (arXiv 2209.05433). A tensor is divided by its largest magnitude, so that the format's range is
filled; accumulation is wider. Master weights, attention, norms, embedding and head stay as they are. `emulated`
multiplies the rounded numbers in the dtype of the activations: the same values up to the order of sums, on any device.

    use_float8(model, emulated=False)
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from puyu.errors import ConfigError
from puyu.model.linear import Linear

_UNIT = 16
"""The product on the hardware wants sizes that are multiples of this."""


class Scaled(NamedTuple):
    """codes * scale."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def of(x: Tensor, dtype: torch.dtype) -> Scaled:
        """Rounded to float8, its largest magnitude at the end of the range."""
        scale = (x.abs().amax().float() / torch.finfo(dtype).max).clamp_min(1e-30)
        return Scaled((x.float() / scale).to(dtype), scale)

    @property
    def T(self) -> Scaled:
        return Scaled(self.codes.T, self.scale)

    def wide(self, dtype: torch.dtype) -> Tensor:
        return (self.codes.float() * self.scale).to(dtype)


def multiply(a_MK: Scaled, b_KN: Scaled, *, dtype: torch.dtype, emulated: bool) -> Tensor:
    """a b in `dtype`."""
    if emulated:
        return a_MK.wide(dtype) @ b_KN.wide(dtype)
    rows = a_MK.codes.contiguous()
    columns = b_KN.codes.T.contiguous().T  # the hardware reads the second factor by columns
    return torch._scaled_mm(rows, columns, a_MK.scale, b_KN.scale, out_dtype=dtype)


class _Float8Product(torch.autograd.Function):
    """x [T, I], weight [O, I] -> [T, O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, emulated: bool) -> Tensor:
        x8, w8 = Scaled.of(x, torch.float8_e4m3fn), Scaled.of(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(*x8, *w8)
        ctx.emulated, ctx.dtypes = emulated, (x.dtype, weight.dtype)
        return multiply(x8, w8.T, dtype=x.dtype, emulated=emulated)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x_codes, x_scale, w_codes, w_scale = ctx.saved_tensors
        dtype, master = ctx.dtypes
        g8 = Scaled.of(grad, torch.float8_e5m2)
        dx = multiply(g8, Scaled(w_codes, w_scale), dtype=dtype, emulated=ctx.emulated)
        dw = multiply(g8.T, Scaled(x_codes, x_scale), dtype=dtype, emulated=ctx.emulated)
        return dx, dw.to(master), None


def float8_forward(layer: Linear, emulated: bool, x: Tensor) -> Tensor:
    """A `Linear`'s forward pass in float8."""
    rows = x.flatten(0, -2)
    short = 0 if emulated else -len(rows) % _UNIT
    padded = torch.nn.functional.pad(rows, (0, 0, 0, short)) if short else rows
    y = _Float8Product.apply(padded, layer.weight, emulated)[: len(rows)].unflatten(0, x.shape[:-1])  # type: ignore[no-untyped-call]
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


def use_float8(model: nn.Module, *, emulated: bool, device: torch.device) -> None:
    """Have the blocks' `Linear` layers multiply in float8, in place; ConfigError where the device cannot."""
    if not emulated and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise ConfigError(
            f"precision float8: {device} has no products in float8 (Ada and Hopper GPUs have)",
            remedy="use precision: dtype with dtype: bfloat16, or precision: float8-emulated to try it out slowly",
        )
    trunk = model.trunk
    assert isinstance(trunk, nn.Module) and isinstance(trunk.layers, nn.Module)
    for name, layer in trunk.layers.named_modules():
        if type(layer) is not Linear:
            continue
        if not emulated and (layer.in_features % _UNIT or layer.out_features % _UNIT):
            size = f"{layer.out_features} x {layer.in_features}"
            raise ConfigError(f"precision float8: {name} is {size}", remedy=f"choose sizes that {_UNIT} divides")
        layer.forward = partial(float8_forward, layer, emulated)  # type: ignore[method-assign]
