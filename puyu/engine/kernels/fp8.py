"""Products in 8-bit floats (e4m3) on Hopper: twice the arithmetic and half the bytes of bf16, for prompts and batches.

M rows, K inputs, N outputs. Weights get one scale per output, once; activations one scale per row, in one pass over
them (Micikevicius et al. 2022, arXiv 2209.05433). The product is torch's `_scaled_mm`
where the GPU has it, else the same numbers in fp32: e4m3 values are exact there.

    to_fp8(model)      # replaces the products of all blocks; the head stays as it is
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from puyu.engine.kernels.launch import can_launch, power_of_two
from puyu.errors import ConfigError
from puyu.model.heads import CausalLM
from puyu.model.layers import GatedMLP
from puyu.model.linear import Linear
from puyu.model.transformer import Block

LARGEST = 448.0
"""The largest number of e4m3."""

TINY = 1e-12
_LARGEST, _TINY = tl.constexpr(LARGEST), tl.constexpr(TINY)


def to_rows_reference(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values [M, K] and fp32 scales [M, 1], the largest value of each row at the end of the range."""
    scales_M1 = x_MK.float().abs().amax(dim=-1, keepdim=True).clamp(min=TINY) / LARGEST
    return (x_MK.float() / scales_M1).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales_M1


def to_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """The same in one pass, one program a row."""
    rows, size = x_MK.shape
    values_MK = torch.empty(rows, size, dtype=torch.float8_e4m3fn, device=x_MK.device)
    scales_M1 = torch.empty(rows, 1, dtype=torch.float32, device=x_MK.device)
    block = power_of_two(size)
    warps = 4 if block <= 2048 else 8
    _to_rows[(rows,)](x_MK, values_MK, scales_M1, x_MK.stride(0), size, BLOCK=block, num_warps=warps)
    return values_MK, scales_M1


@triton.jit
def _to_rows(x_ptr, values_ptr, scales_ptr, stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(x_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), _TINY) / _LARGEST
    tl.store(scales_ptr + row, scale)
    values = tl.minimum(tl.maximum(x / scale, -_LARGEST), _LARGEST)
    tl.store(values_ptr + row * size + columns, values.to(values_ptr.dtype.element_ty), mask=inside)


def multiply_reference(x_MK: Tensor, values_NK: Tensor, scales_N1: Tensor, *, dtype: torch.dtype) -> Tensor:
    """y [M, N], the e4m3 values multiplied in fp32."""
    values_MK, scales_M1 = to_rows_reference(x_MK)
    return (values_MK.float() @ values_NK.float().T * scales_M1 * scales_N1.T).to(dtype)


def multiply(x_MK: Tensor, values_NK: Tensor, scales_N1: Tensor, *, dtype: torch.dtype) -> Tensor:
    """y [M, N] by the tensor cores of a Hopper GPU, bf16 out (its one format with a scale per row)."""
    values_MK, scales_M1 = to_rows(x_MK)
    y_MN = torch._scaled_mm(
        values_MK, values_NK.T, scale_a=scales_M1, scale_b=scales_N1.T, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return y_MN.to(dtype)


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies e4m3 with a scale per row: Hopper and newer."""
    return device.type == "cuda" and can_launch(device) and torch.cuda.get_device_capability(device) >= (9, 0)


class Fp8Linear(nn.Module):
    """y = x W^T + b with W in e4m3, one scale per output; inference only."""

    values: Tensor
    scales: Tensor

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        values_NK, scales_N1 = to_rows_reference(layer.weight.detach())
        self.register_buffer("values", values_NK)
        self.register_buffer("scales", scales_N1)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        x_MK = x.reshape(-1, self.in_features)
        product = multiply if has_fp8(x.device) else multiply_reference
        y = product(x_MK, self.values, self.scales, dtype=x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def to_fp8(model: CausalLM) -> None:
    """Replace the products of all blocks, one after another, so that no more than one matrix stands twice. Where one
    cannot be, ConfigError before any is."""
    places = [place for block in model.trunk.layers for place in _products(block)]
    for parent, name in places:
        layer = getattr(parent, name)
        if not isinstance(layer, Linear) or layer.in_features % 16 or layer.out_features % 16:
            raise ConfigError(
                f"fp8 needs full-precision layers whose sizes are multiples of 16, and {name} is not one",
                remedy="load the checkpoint that was not quantized, or leave fp8 off",
            )
    for parent, name in places:
        setattr(parent, name, Fp8Linear(getattr(parent, name)))


def _products(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the products of a block stand."""
    assert isinstance(block, Block)
    if not isinstance(block.mlp, GatedMLP):
        raise ConfigError("fp8 knows no layers of experts", remedy="leave fp8 off for this model")
    attention, mlp = block.attention, block.mlp
    return [(attention, "qkv"), (attention, "out"), (mlp, "gate_up"), (mlp, "down")]
