"""The one seam for matrix products: full precision here, packed int8 and int4 weights beside it.

`Linear` casts its fp32 master weight to the dtype of its input, so that mixed precision needs no autocast:
activations in bf16 make the product run in bf16, gradients come back in fp32.
`QuantLinear` holds integer codes and per-group scales; how they were chosen is the business of `quant/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puyu.errors import CheckpointError


class Linear(nn.Module):
    """y = x W^T + b, with W [out, in] cast to the dtype of x."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


GROUPS = (32, 64, 128, 256)
"""Inputs that may share a scale in int4: what the native kernel takes."""


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """Weight-only integer format: `bits` per code, one scale (and for int4 a zero point) per `group` inputs.

    int8: symmetric, one scale per output row (group 0). int4: asymmetric, code 0..15, w = (code - 8) * scale + zero.
    """

    bits: int
    group: int = 0

    @staticmethod
    def from_config(value: Mapping[str, object]) -> QuantFormat:
        """Read `quantization_config`; CheckpointError for a method or a format that is not ours."""
        if value.get("quant_method") != "puyu":
            raise CheckpointError(
                f"quantization method {value.get('quant_method')!r} is not supported",
                remedy="quantize the full-precision checkpoint with `puyu quantize`",
            )
        form = (value.get("bits"), value.get("group", 0))
        if form != (8, 0) and form not in [(4, group) for group in GROUPS]:
            known = f"bits 8 with group 0, or bits 4 with group {', '.join(map(str, GROUPS))}"
            raise CheckpointError(f"quantization_config has bits {form[0]!r} and group {form[1]!r}", remedy=known)
        return QuantFormat(int(str(form[0])), int(str(form[1])))

    def to_config(self) -> dict[str, object]:
        return {"quant_method": "puyu", "bits": self.bits, "group": self.group}

    def fits(self, in_features: int) -> bool:
        """Whether a layer with that many inputs splits into whole groups."""
        return self.bits == 8 or in_features % self.group == 0


class QuantLinear(nn.Module):
    """Weight-only quantized linear layer; inference only.

    Buffers as stored: int8 `codes` [out, in] and `scales` [out, 1]; int4 `codes` uint8 [out, in / 2] (low nibble
    first) with `scales` and `zeros` [out, in / group]. Scales and zeros hold bf16 values whatever their dtype,
    because torch's native CPU kernels compute with those. Few rows use the integer kernel (activations rounded to
    bf16); more than `dense_rows`, and shapes that the kernel does not take, use dequantized weights and a dense
    product.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, in_features: int, out_features: int, *, form: QuantFormat, bias: bool = False) -> None:
        super().__init__()
        assert form.fits(in_features), f"{in_features} inputs do not split into groups of {form.group}"
        self.in_features, self.out_features, self.form = in_features, out_features, form
        columns = in_features if form.bits == 8 else in_features // 2
        groups = 1 if form.bits == 8 else in_features // form.group
        code_type = torch.int8 if form.bits == 8 else torch.uint8
        self.register_buffer("codes", torch.zeros(out_features, columns, dtype=code_type))
        self.register_buffer("scales", torch.zeros(out_features, groups))
        if form.bits == 4:
            self.register_buffer("zeros", torch.zeros(out_features, groups))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        # the int8 kernel reads whole vectors of 16 inputs, past the end of a row that is shorter
        self.has_kernel = in_features % 16 == 0 if form.bits == 8 else out_features % 16 == 0
        # int4 costs about three times as much to dequantize, so its kernel pays up to more rows
        self.dense_rows = 32 if form.bits == 8 else 96
        self._packed: tuple[Tensor, Tensor] | None = None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight [out, in]."""
        scales = self.scales.to(dtype)
        if self.form.bits == 8:
            return self.codes.to(dtype).mul_(scales)
        grouped = unpack_int4(self.codes).to(dtype).sub_(8).unflatten(1, (-1, self.form.group))
        return grouped.mul_(scales[..., None]).add_(self.zeros.to(dtype)[..., None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        if self.has_kernel and 0 < rows < self.dense_rows and x.device.type == "cpu" and x.dtype != torch.float64:
            y = self._integer(x.reshape(-1, self.in_features).bfloat16().contiguous()).to(x.dtype)
            y = y.reshape(*x.shape[:-1], self.out_features)
        else:
            y = F.linear(x, self.weight(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _integer(self, x: Tensor) -> Tensor:
        if self._packed is None:
            self._packed = self._pack()
        codes, scales = self._packed
        if self.form.bits == 8:
            return torch._weight_int8pack_mm(x, codes, scales)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, self.form.group, scales)

    def _pack(self) -> tuple[Tensor, Tensor]:
        if self.form.bits == 8:
            # the kernel's aligned loads crash on codes that are mapped from a file at an odd offset
            aligned = self.codes if self.codes.data_ptr() % 64 == 0 else self.codes.clone()
            return aligned, self.scales.flatten().bfloat16()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_int4(self.codes).int(), 1)
        both = torch.stack((self.scales.T, self.zeros.T), dim=-1).bfloat16().contiguous()
        return packed, both

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*arguments)


def pack_int4(codes: Tensor) -> Tensor:
    """Codes 0..15, uint8 [out, in] -> two a byte [out, in / 2], the even input in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4` in whole 16-bit words, which vectorizes; little-endian machines only."""
    words = packed.to(torch.int16)
    return words.bitwise_or_(words << 4).bitwise_and_(0x0F0F).view(torch.uint8)
