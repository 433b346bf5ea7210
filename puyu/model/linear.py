"""The one seam for matrix products: full precision here, packed int8 and int4 weights beside it.

`Linear` casts its fp32 master weight to the dtype of its input, so that mixed precision needs no autocast:
activations in bf16 make the product run in bf16, gradients come back in fp32.
`QuantLinear` holds integer codes and per-group scales; how they were chosen is the business of `quant/`.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """Weight-only integer format: `bits` per code, one scale (and for int4 a zero point) per `group` inputs.

    int8: symmetric, one scale per output row (group 0). int4: asymmetric, code 0..15, w = (code - 8) * scale + zero.
    """

    bits: int
    group: int = 0

    @staticmethod
    def from_config(value: dict[str, object]) -> QuantFormat:
        """Read `quantization_config`; CheckpointError for a method that is not ours."""
        if value.get("quant_method") != "puyu":
            raise CheckpointError(
                f"quantization method {value.get('quant_method')!r} is not supported",
                remedy="quantize the full-precision checkpoint with `puyu quantize`",
            )
        return QuantFormat(int(str(value["bits"])), int(str(value.get("group", 0))))

    def to_config(self) -> dict[str, object]:
        return {"quant_method": "puyu", "bits": self.bits, "group": self.group}


class QuantLinear(nn.Module):
    """Weight-only quantized linear layer.

    Buffers as stored: int8 `codes` [out, in] and `scales` [out, 1]; int4 `codes` uint8 [out, in / 2] (low nibble
    first) with `scales` and `zeros` [out, in / group]. On a CPU the codes are repacked once for torch's
    native kernels; few rows use the integer kernel, many rows use dequantized weights and a dense product,
    which is faster from about 16 rows on.
    """

    dense_rows = 16

    def __init__(self, in_features: int, out_features: int, *, form: QuantFormat, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form = in_features, out_features, form
        columns = in_features if form.bits == 8 else in_features // 2
        groups = 1 if form.bits == 8 else in_features // form.group
        code_type = torch.int8 if form.bits == 8 else torch.uint8
        self.register_buffer("codes", torch.zeros(out_features, columns, dtype=code_type))
        self.register_buffer("scales", torch.zeros(out_features, groups))
        if form.bits == 4:
            self.register_buffer("zeros", torch.zeros(out_features, groups))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self._packed: tuple[Tensor, Tensor] | None = None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight [out, in]."""
        if self.form.bits == 8:
            return self.codes.to(dtype) * self.scales.to(dtype)
        codes = torch.stack((self.codes & 15, self.codes >> 4), dim=-1).flatten(1)
        grouped = codes.reshape(self.out_features, -1, self.form.group).float() - 8.0
        return (grouped * self.scales.float()[..., None] + self.zeros.float()[..., None]).flatten(1).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        if rows < self.dense_rows and x.device.type == "cpu":
            y = self._integer(x.reshape(-1, self.in_features).bfloat16()).to(x.dtype)
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
            return self.codes, self.scales.flatten().bfloat16()
        codes = torch.stack((self.codes & 15, self.codes >> 4), dim=-1).flatten(1).int()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        both = torch.stack((self.scales.T, self.zeros.T), dim=-1).bfloat16().contiguous()
        return packed, both
