"""The one seam for matrix products: full precision here, integer weights beside it.

`Linear` casts its fp32 master weight to the dtype of its input, so that mixed precision needs no autocast:
activations in bf16 make the product run in bf16, gradients come back in fp32.
`QuantLinear` computes with integer codes; how they were chosen is the business of `quant/`, how files pack them
that of `quant_files.py`. O outputs, I inputs, G groups of inputs that share a scale.

    layer = QuantLinear.of(QuantWeight.of(numbers_OI, scales_OG, zeros_OG, bits=4), bias=None)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Module):
    """y = x W^T + b, with W [out, in] cast to the dtype of x."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I], W [O, I] -> x W^T + b in the dtype of x; no copy of W in that dtype lives longer than the product."""
    bias = None if bias is None else bias.to(x.dtype)
    if weight.dtype == x.dtype or not torch.is_grad_enabled():
        return F.linear(x, weight.to(x.dtype), bias)
    found: Tensor = _CastProduct.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return found


class _CastProduct(torch.autograd.Function):
    """F.linear that casts W again for the backward pass: else all copies together would be a second model."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.shape = x.shape
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, (of_x, of_weight, of_bias) = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad
        grad_x = (rows @ weight.to(grad.dtype)).view(ctx.shape) if of_x else None
        grad_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if of_weight else None
        return grad_x, grad_weight, rows.sum(0) if of_bias else None


_KERNEL_GROUPS = (256, 128, 64, 32)
"""Inputs that may share a scale in torch's int4 kernel."""


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """What a quantized matrix is made of: w = (code - zero) * scale.

    `bits` 8: codes -128..127; 4: codes 0..15. `group` inputs share a scale, 0: the whole row does. Symmetric: the
    zero is 0 for 8 bits and 8 for 4 bits; else an integer a group. `activations`: inputs become int8 too, with one
    scale a token. `permuted`: groups are made of inputs in another order.
    """

    bits: int
    group: int = 0
    symmetric: bool = True
    activations: bool = False
    permuted: bool = False

    @property
    def middle(self) -> int:
        """The code of weight 0 in a symmetric format."""
        return 8 if self.bits == 4 else 0

    def fits(self, in_features: int) -> bool:
        """Whether a layer with that many inputs splits into whole groups (and, for 4 bits, whole bytes)."""
        return in_features % (self.group or 1) == 0 and in_features % (8 // self.bits) == 0


@dataclass(frozen=True, slots=True)
class QuantWeight:
    """One matrix in integers.

    `codes` int8 [O, I] for 8 bits; for 4 bits uint8 [O, I / 2], two numbers 0..15 a byte, the even column in the low
    nibble. `scales` [O, G] in the dtype of their file; `zeros` int16 [O, G] or None (symmetric); `perm` int64 [I]:
    column c of the codes belongs to input perm[c], or None where columns are in the order of the inputs.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    perm: Tensor | None = None
    bits: int = 4
    activations: bool = False

    @staticmethod
    def of(numbers: Tensor, scales: Tensor, zeros: Tensor | None = None, *, bits: int = 4, **rest: Any) -> QuantWeight:
        """From numbers one a cell, int8 [O, I] or uint8 [O, I]."""
        return QuantWeight(pack_int4(numbers) if bits == 4 else numbers, scales, zeros, bits=bits, **rest)

    @property
    def numbers(self) -> Tensor:
        """The codes one a cell, int8 [O, I] or uint8 [O, I]."""
        return unpack_int4(self.codes) if self.bits == 4 else self.codes

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    @property
    def form(self) -> QuantFormat:
        groups = self.scales.shape[1]
        group = 0 if groups == 1 else self.shape[1] // groups
        return QuantFormat(self.bits, group, self.zeros is None, self.activations, self.perm is not None)

    def rows(self, arrange: Callable[[Tensor], Tensor]) -> QuantWeight:
        """The same with rows moved, left out or taken by `arrange`."""
        zeros = None if self.zeros is None else arrange(self.zeros)
        return replace(self, codes=arrange(self.codes), scales=arrange(self.scales), zeros=zeros)

    @staticmethod
    def fused(parts: Sequence[QuantWeight], join: Callable[[list[Tensor]], Tensor]) -> QuantWeight:
        """One matrix of the rows of several, which agree in everything but their rows."""
        first, zeros = parts[0], [part.zeros for part in parts if part.zeros is not None]
        assert len(zeros) in (0, len(parts)), "parts with zeros and parts without"
        codes, scales = join([part.codes for part in parts]), join([part.scales for part in parts])
        return replace(first, codes=codes, scales=scales, zeros=join(zeros) if zeros else None)

    def simplified(self) -> QuantWeight:
        """Without zeros that are all those of the symmetric format, without a permutation that moves nothing."""
        zeros, perm = self.zeros, self.perm
        if zeros is not None and bool((zeros == self.form.middle).all()):
            zeros = None
        if perm is not None and torch.equal(perm, torch.arange(len(perm), device=perm.device)):
            perm = None
        return replace(self, zeros=zeros, perm=perm)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the codes stand for, [O, I] in the order of the inputs."""
        weight = self.in_their_order(dtype)
        return weight if self.perm is None else weight[:, self.perm.argsort()]

    def in_their_order(self, dtype: torch.dtype) -> Tensor:
        """What the codes stand for, [O, I] in the order of the columns: (code - zero) * scale, whose difference is
        exact in every dtype."""
        grouped = self.numbers.to(dtype).unflatten(1, (self.scales.shape[1], -1))
        if self.zeros is not None:
            grouped.sub_(self.zeros.to(dtype)[..., None])
        elif self.form.middle:
            grouped.sub_(self.form.middle)
        return grouped.mul_(self.scales.to(dtype)[..., None]).flatten(1)


class QuantLinear(nn.Module):
    """A linear layer on integer codes; inference only.

    Buffers: `codes` int8 [O, I], or for 4 bits uint8 [O, I / 2] with the even column in the low nibble; `scales`
    [O, G] as stored; `zeros` int16 [O, G] unless symmetric; `perm` int64 [I] when permuted. Dequantizing and a
    dense product is the reference. On a CPU few rows use torch's integer kernels, which round activations, scales
    and zeros * scales to bf16; more than `dense_rows`, and shapes that the kernels do not take, use the reference.
    With int8 activations the sums are exact integers on every path.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, form: QuantFormat, bias: bool = False) -> None:
        super().__init__()
        assert form.fits(in_features), f"{in_features} inputs do not split into groups of {form.group}"
        self.in_features, self.out_features, self.form = in_features, out_features, form
        columns = in_features * form.bits // 8
        groups = in_features // form.group if form.group else 1
        code_type = torch.int8 if form.bits == 8 else torch.uint8
        self.register_buffer("codes", torch.zeros(out_features, columns, dtype=code_type))
        self.register_buffer("scales", torch.zeros(out_features, groups))
        zeros = None if form.symmetric else torch.zeros(out_features, groups, dtype=torch.int16)
        self.register_buffer("zeros", zeros)
        self.register_buffer("perm", torch.arange(in_features) if form.permuted else None)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        # int4 costs about three times as much to dequantize, so its kernel pays up to more rows
        self.dense_rows = 32 if form.bits == 8 else 96
        self.kernel_group = _kernel_group(form, in_features, out_features)
        self._packed: tuple[Tensor, Tensor] | None = None
        self._holder: Callable[[], Tensor] | None = None

    @staticmethod
    def of(weight: QuantWeight, *, bias: Tensor | None = None) -> QuantLinear:
        """The layer that computes with these codes."""
        rows, columns = weight.shape
        with torch.device("meta"):  # buffers that are replaced at once need no memory
            layer = QuantLinear(columns, rows, form=weight.form, bias=bias is not None)
        found = {
            "codes": weight.codes,
            "scales": weight.scales,
            "zeros": weight.zeros,
            "perm": weight.perm,
            "bias": bias,
        }
        layer.load_state_dict({name: value for name, value in found.items() if value is not None}, assign=True)
        return layer

    def matrix(self) -> QuantWeight:
        """The codes with all that belongs to them."""
        codes = self.codes if self._holder is None else self._holder()
        form = self.form
        return QuantWeight(codes, self.scales, self.zeros, self.perm, bits=form.bits, activations=form.activations)

    def lend(self, holder: Callable[[], Tensor]) -> None:
        """Keep no codes: `holder` has them in a form of its own, and gives them whenever they are needed here."""
        self._holder, self.codes = holder, self.codes.new_empty(0)

    def take_back(self) -> None:
        """Hold the codes again."""
        self.codes, self._holder = self.matrix().codes, None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight [out, in]."""
        return self.matrix().dequantized(dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.perm is not None:
            rows = rows[:, self.perm]
        if self.form.activations:
            y = self._integer_sums(rows)
        elif self._uses_kernel(rows):
            y = self._kernel(rows.bfloat16().contiguous()).to(x.dtype)
        else:
            y = F.linear(rows, self.matrix().in_their_order(x.dtype))
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _uses_kernel(self, rows: Tensor) -> bool:
        few = self.kernel_group > 0 and 0 < rows.shape[0] < self.dense_rows
        return few and rows.device.type == "cpu" and rows.dtype != torch.float64

    def _integer_sums(self, x: Tensor) -> Tensor:
        codes, scales = quantize_tokens(x)
        sums = integer_product(codes, self.matrix().codes).to(scales.dtype)
        return sums.mul_(scales).mul_(self.scales.to(scales.dtype).T).to(x.dtype)

    def _kernel(self, x: Tensor) -> Tensor:
        if self._packed is None:
            self._packed = self._pack()
        codes, scales = self._packed
        if self.form.bits == 8:
            return torch._weight_int8pack_mm(x, codes, scales)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, self.kernel_group, scales)

    def _pack(self) -> tuple[Tensor, Tensor]:
        matrix = self.matrix()
        if self.form.bits == 8:
            # the kernel's aligned loads crash on codes that are mapped from a file at an odd offset
            aligned = matrix.codes if matrix.codes.data_ptr() % 64 == 0 else matrix.codes.clone()
            return aligned, self.scales.flatten().bfloat16()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(matrix.numbers.int(), 1)
        scales = self.scales.float()
        # the kernel's weight is (code - 8) * scale + offset
        offsets = torch.zeros_like(scales) if self.zeros is None else scales * (8 - self.zeros)
        both = torch.stack((scales.T, offsets.T), dim=-1)
        repeat = self.in_features // self.kernel_group // both.shape[0]
        return packed, both.repeat_interleave(repeat, dim=0).bfloat16().contiguous()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._holder is not None:
            destination[f"{prefix}codes"] = self._holder()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._packed = None
        self.take_back()
        super()._load_from_state_dict(*arguments)


def _kernel_group(form: QuantFormat, in_features: int, out_features: int) -> int:
    """The group that torch's kernel is told, 0 where there is no kernel."""
    if form.activations:
        return 0
    if form.bits == 8:
        # the kernel reads whole vectors of 16 inputs, past the end of a row that is shorter
        plain = form.group == 0 and form.symmetric and in_features % 16 == 0
        return in_features if plain else 0
    size = form.group or in_features
    fitting = [group for group in _KERNEL_GROUPS if size % group == 0]
    return fitting[0] if fitting and out_features % 16 == 0 else 0


def quantize_tokens(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes -127..127 of each token, and their scales [T, 1] (fp32, or fp64 for fp64)."""
    wide = x_TI if x_TI.dtype == torch.float64 else x_TI.float()
    scales = wide.abs().amax(dim=1, keepdim=True) / 127
    codes = (wide / torch.where(scales > 0, scales, 1.0)).round().clamp_(-127, 127).to(torch.int8)
    return codes, scales


def integer_product(a_TI: Tensor, b_OI: Tensor) -> Tensor:
    """a b^T of int8 matrices, exact: int32 sums on a CPU, else fp64 sums, which hold every one up to 2^38 inputs."""
    # torch 2.13 gives zeros for a single input
    if a_TI.device.type == "cpu" and a_TI.shape[0] > 0 and a_TI.shape[1] > 1:
        return torch._int_mm(a_TI, b_OI.T)
    return a_TI.double() @ b_OI.double().T


def pack_int4(codes: Tensor) -> Tensor:
    """Codes 0..15, uint8 [out, in] -> two a byte [out, in / 2], the even input in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4` in whole 16-bit words, which vectorizes; little-endian machines only."""
    words = packed.to(torch.int16)
    return words.bitwise_or_(words << 4).bitwise_and_(0x0F0F).view(torch.uint8)
