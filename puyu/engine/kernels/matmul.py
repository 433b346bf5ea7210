"""Products of few rows with big weights: dense, int8 and int4, with norm, gate and residual inside.

M rows, K inputs, N outputs. A decoding step reads every weight once for a handful of rows, so what counts is reading
them at the speed of the memory: each program streams whole rows of the weight, one row of x is multiplied in plain
fp32, more rows on the tensor cores. `rms_norm` before, `silu(gate) * up` and `residual +` after cost no pass of their
own. Codes are those of `model/linear.py`: int8 with a scale per output; int4, two a byte, with a scale per group and,
unless symmetric, what the zero adds. Int4 codes become floats by bit patterns (2^23 + code), because conversions run
at a quarter of the speed (Kim et al. 2022, arXiv 2211.10017).

    y_MN = multiply(x_MK, Weight.of(linear), Around(norm_K, eps=1e-5))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from puyu.engine.kernels import fp8
from puyu.engine.kernels.launch import power_of_two
from puyu.engine.kernels.norm import rms_norm, rms_norm_reference, silu_mul
from puyu.model.linear import Linear, QuantLinear, unpack_int4

_MAGIC_INT = tl.constexpr(0x4B000000)
_MAGIC = tl.constexpr(8388608.0)  # 2^23, whose float has the bits above; a code in its last bits adds itself


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix [N, K] as the kernels read it: `data` is [N, K] (dense, int8, e4m3) or int32 [N, K / 8] (int4)."""

    data: Tensor
    bits: int = 16
    """16: dense of any dtype; 8: int8 codes, or e4m3 values where `data` has that dtype; 4: int4 codes."""
    group: int = 0
    scales: Tensor | None = None
    zeros: Tensor | None = None
    """[N, K / group]: what is added to (code - 8) * scale; None where that is nothing."""
    bias: Tensor | None = None

    @staticmethod
    def of(layer: Linear | QuantLinear | fp8.Fp8Linear) -> Weight:
        """Holds the layer's own tensors, so that changed weights count at once; only what zeros add is made anew,
        and int4 codes that stand at an odd address are copied."""
        bias = layer.bias
        if isinstance(layer, Linear):
            return Weight(layer.weight, bias=bias)
        if isinstance(layer, fp8.Fp8Linear):
            return Weight(layer.values, 8, 0, layer.scales, bias=bias)
        assert Weight.knows(layer), "a format for the torch modules"
        codes, scales = layer.matrix().codes, layer.scales.contiguous()
        if layer.form.bits == 8:
            return Weight(codes, 8, 0, scales, bias=bias)
        codes = codes if codes.data_ptr() % 16 == 0 else codes.clone()
        zeros = None if layer.zeros is None else (scales.float() * (8 - layer.zeros)).to(scales.dtype)
        return Weight(codes.view(torch.int32), 4, layer.form.group or layer.in_features, scales, zeros, bias)

    @staticmethod
    def knows(layer: QuantLinear) -> bool:
        """Whether the kernels read the layer's format: inputs in order, whole words of int4, int8 with plain rows."""
        form, group = layer.form, layer.form.group or layer.in_features
        if form.activations or layer.perm is not None:
            return False
        return group % 8 == 0 if form.bits == 4 else form.group == 0 and layer.zeros is None

    def tensors(self) -> Iterator[Tensor]:
        """All that the kernels read."""
        yield from (part for part in (self.data, self.scales, self.zeros, self.bias) if part is not None)

    @property
    def is_float(self) -> bool:
        """Whether the eight bits are floats."""
        return self.data.dtype == torch.float8_e4m3fn

    @property
    def bytes(self) -> Tensor:
        """The data as kernels load it: 8-bit floats as integers, which can be masked."""
        return self.data.view(torch.int8) if self.is_float else self.data

    @property
    def num_outputs(self) -> int:
        return self.data.shape[0]

    @property
    def num_inputs(self) -> int:
        return self.data.shape[1] * (8 if self.bits == 4 else 1)


class Around(NamedTuple):
    """What is computed with the product: `norm_K` before it; after it the gate (the first half of the outputs gates
    the second), then `residual_MN` added."""

    norm_K: Tensor | None = None
    eps: float = 0.0
    gated: bool = False
    residual_MN: Tensor | None = None


NOTHING = Around()


class Tile(NamedTuple):
    """One way to launch the kernel: outputs, inputs and rows of x a program, warps, loads in flight."""

    outputs: int
    inputs: int
    rows: int
    warps: int
    stages: int


def choose_tile(rows: int, weight: Weight) -> Tile | None:
    """The one table of which kernel takes which shape; None: a dense product by torch (cuBLAS).

    One row: 16 outputs a program fill the processors even for the smallest matrices; inputs are chosen so that a warp
    reads 512 bytes of each row at once. Rows up to 16 wait for memory as one row does; more rows pay only where the
    codes are a fraction of the dense weight.
    """
    if rows == 1:
        return Tile(16, {16: 256, 8: 512, 4: 1024}[weight.bits], 1, 4, 4)
    if rows <= 16:
        return Tile(16, {16: 256, 8: 256, 4: 256}[weight.bits], 16, 4, 4)
    if weight.bits < 16 and not weight.is_float and rows <= 128:
        return Tile(64, 128, 32 if rows <= 32 else 64, 4, 3)
    return None


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`, plainly."""
    if weight.bits == 16:
        return weight.data.to(dtype)
    assert weight.scales is not None
    if weight.bits == 8:
        return weight.data.to(dtype) * weight.scales.to(dtype)
    codes = unpack_int4(weight.data.view(torch.uint8)).to(dtype).sub_(8).unflatten(1, (-1, weight.group))
    scaled = codes * weight.scales.to(dtype)[..., None]
    return (scaled if weight.zeros is None else scaled + weight.zeros.to(dtype)[..., None]).flatten(1)


def unpack(weight: Weight, dtype: torch.dtype) -> Tensor:
    """As `dense`, in one pass over the codes, for products of so many rows that torch's own are the fastest."""
    if weight.bits == 16:
        return weight.data.to(dtype)
    outputs, inputs = weight.num_outputs, weight.num_inputs
    out_NK = torch.empty(outputs, inputs, dtype=dtype, device=weight.data.device)
    block = min(power_of_two(inputs), 2048)
    _unpack[(outputs, triton.cdiv(inputs, block))](
        *(weight.bytes, weight.scales, weight.scales if weight.zeros is None else weight.zeros, out_NK, inputs),
        BITS=weight.bits,
        E4M3=weight.is_float,
        GROUP=weight.group or 1,
        ZEROS=weight.zeros is not None,
        BLOCK=block,
        num_warps=4,
    )
    return out_NK


@triton.jit
def _numbers(codes, E4M3: tl.constexpr):
    """Bytes that are bits of floats become floats; integers and dense weights stay what they are."""
    if E4M3:
        numbers = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        numbers = codes
    return numbers


@triton.jit
def _unpack(
    w_ptr, scales_ptr, zeros_ptr, out_ptr, size,
    BITS: tl.constexpr, E4M3: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < size
    if BITS == 8:
        w = _numbers(tl.load(w_ptr + n * size + k, mask=inside, other=0), E4M3).to(tl.float32)
        w *= tl.load(scales_ptr + n).to(tl.float32)
    else:
        codes = (tl.load(w_ptr + n * (size // 8) + k // 8, mask=inside, other=0) >> (4 * (k % 8))) & 15
        scale = tl.load(scales_ptr + n * (size // GROUP) + k // GROUP, mask=inside, other=0.0).to(tl.float32)
        w = (codes - 8).to(tl.float32) * scale
        if ZEROS:
            w += tl.load(zeros_ptr + n * (size // GROUP) + k // GROUP, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * size + k, w.to(out_ptr.dtype.element_ty), mask=inside)


def multiply_reference(x_MK: Tensor, weight: Weight, around: Around = NOTHING) -> Tensor:
    """The same in torch's own words."""
    if around.norm_K is not None:
        x_MK = rms_norm_reference(x_MK, around.norm_K, eps=around.eps)
    y_MN = F.linear(x_MK, dense(weight, x_MK.dtype), None if weight.bias is None else weight.bias.to(x_MK.dtype))
    if around.gated:
        gate, up = y_MN.chunk(2, dim=-1)
        y_MN = F.silu(gate) * up
    return y_MN if around.residual_MN is None else around.residual_MN + y_MN


def multiply(x_MK: Tensor, weight: Weight, around: Around = NOTHING, *, tile: Tile | None = None) -> Tensor:
    """y [M, N] (N / 2 when gated). `tile` None asks the table, which must know the shape."""
    tile = tile or choose_tile(len(x_MK), weight)
    assert tile is not None and x_MK.stride(1) == 1, "a shape for a dense product"
    assert not (around.gated and weight.bias is not None), "no family has biases in its gate"
    outputs = weight.num_outputs // (2 if around.gated else 1)
    y_MN = torch.empty(len(x_MK), outputs, dtype=x_MK.dtype, device=x_MK.device)
    unused = y_MN
    _multiply[(triton.cdiv(outputs, tile.outputs), triton.cdiv(len(x_MK), tile.rows))](
        *(x_MK, around.norm_K if around.norm_K is not None else unused, weight.bytes),
        *(weight.scales if weight.scales is not None else unused, weight.zeros if weight.zeros is not None else unused),
        *(weight.bias if weight.bias is not None else unused, y_MN),
        around.residual_MN if around.residual_MN is not None else unused,
        *(len(x_MK), outputs, weight.num_inputs, x_MK.stride(0), around.eps),
        BITS=weight.bits,
        E4M3=weight.is_float,
        GROUP=weight.group or 1,
        ZEROS=weight.zeros is not None,
        NORM=around.norm_K is not None,
        GATED=around.gated,
        BIAS=weight.bias is not None,
        RESIDUAL=around.residual_MN is not None,
        BLOCK_N=tile.outputs,
        BLOCK_K=min(tile.inputs, power_of_two(weight.num_inputs, 128)),
        BLOCK_M=tile.rows,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return y_MN


def project(x_MK: Tensor, weight: Weight, around: Around = NOTHING) -> Tensor:
    """The product by whatever is fastest for its shape. May add to the residual in place."""
    if choose_tile(len(x_MK), weight) is not None:
        return multiply(x_MK, weight, around)
    if around.norm_K is not None:
        x_MK = rms_norm(x_MK, around.norm_K, eps=around.eps)
    if weight.is_float and fp8.has_fp8(x_MK.device):
        return _project_fp8(x_MK, weight, around)
    w_NK = unpack(weight, x_MK.dtype)
    if around.residual_MN is not None:
        y_MN = around.residual_MN.addmm_(x_MK, w_NK.T)
        return y_MN if weight.bias is None else y_MN.add_(weight.bias)
    y_MN = F.linear(x_MK, w_NK, weight.bias)
    return silu_mul(y_MN) if around.gated else y_MN


def _project_fp8(x_MK: Tensor, weight: Weight, around: Around) -> Tensor:
    """Many rows by the tensor cores' 8-bit floats; the norm has been done."""
    assert weight.scales is not None
    y_MN = fp8.multiply(x_MK, weight.data, weight.scales, dtype=x_MK.dtype)
    if weight.bias is not None:
        y_MN = y_MN.add_(weight.bias)
    if around.gated:
        y_MN = silu_mul(y_MN)
    return y_MN if around.residual_MN is None else around.residual_MN.add_(y_MN)


@triton.jit
def _inputs(x_ptr, norm_ptr, m, k, size, rows, stride, NORM: tl.constexpr):
    """x at [k, m] times the norm's weight, and x itself, both fp32."""
    inside = (k < size)[:, None] & (m < rows)[None, :]
    x = tl.load(x_ptr + m[None, :].to(tl.int64) * stride + k[:, None], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        weight = tl.load(norm_ptr + k, mask=k < size, other=0.0).to(tl.float32)
        return x * weight[:, None], x
    return x, x


@triton.jit
def _summed(acc, BLOCK_M: tl.constexpr):
    """Products [BLOCK_N, BLOCK_M]; a single row's still stand apart by input."""
    if BLOCK_M == 1:
        found = tl.sum(acc, axis=1)[:, None]
    else:
        found = acc
    return found


@triton.jit
def _dense_rows(
    x_ptr, norm_ptr, w_ptr, n, n_inside, m, rows, size, stride,
    E4M3: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sums [n, m] over all inputs of w[n] * x[m], and of x[m]^2. Dense weights or int8 codes."""
    WIDE: tl.constexpr = BLOCK_K if BLOCK_M == 1 else BLOCK_M
    acc = tl.zeros((BLOCK_N, WIDE), tl.float32)
    squares = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    for k0 in tl.range(0, size, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        inside = n_inside[:, None] & (k < size)[None, :]
        w = tl.load(w_ptr + n[:, None].to(tl.int64) * size + k[None, :], mask=inside, other=0.0)
        w = _numbers(w, E4M3)
        scaled, x = _inputs(x_ptr, norm_ptr, m, k, size, rows, stride, NORM)
        if NORM:
            squares += x * x
        if BLOCK_M == 1:
            acc += w.to(dtype).to(tl.float32) * tl.trans(scaled)
        else:
            acc = tl.dot(w.to(dtype), scaled.to(dtype), acc, input_precision="ieee")
    return _summed(acc, BLOCK_M), tl.sum(squares, axis=0)


@triton.jit
def _int4_rows(
    x_ptr, norm_ptr, w_ptr, scales_ptr, zeros_ptr, n, n_inside, m, rows, size, stride,
    GROUP: tl.constexpr, ZEROS: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `_dense_rows`, from words of eight codes; the code of input 8 i + j stands in the j-th four bits of word i.

    A group has whole words, so one scale and one zero serve all codes of a word.
    """
    WORDS: tl.constexpr = BLOCK_K // 8
    WIDE: tl.constexpr = WORDS if BLOCK_M == 1 else BLOCK_M
    acc = tl.zeros((BLOCK_N, WIDE), tl.float32)
    squares = tl.zeros((WORDS, BLOCK_M), tl.float32)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    for k0 in tl.range(0, size, BLOCK_K, num_stages=STAGES):
        word = k0 // 8 + tl.arange(0, WORDS)
        inside = n_inside[:, None] & (word * 8 < size)[None, :]
        codes = tl.load(w_ptr + n[:, None].to(tl.int64) * (size // 8) + word[None, :], mask=inside, other=0)
        of_group = n[:, None] * (size // GROUP) + (word * 8 // GROUP)[None, :]
        scale = tl.load(scales_ptr + of_group, mask=inside, other=0.0).to(tl.float32)
        if ZEROS:
            zero = tl.load(zeros_ptr + of_group, mask=inside, other=0.0).to(tl.float32)
        if BLOCK_M == 1:
            products = tl.zeros((BLOCK_N, WORDS), tl.float32)
            sums = tl.zeros((1, WORDS), tl.float32)
            for j in tl.static_range(8):
                scaled, x = _inputs(x_ptr, norm_ptr, m, word * 8 + j, size, rows, stride, NORM)
                if NORM:
                    squares += x * x
                # codes 0 to 4 are read where they stand, as multiples of 16^j; the others after one shift
                moved = codes if j < 5 else codes >> 20
                bits = (moved & (15 << (4 * (j % 5)))) | _MAGIC_INT
                one = tl.trans(scaled)
                products += (bits.to(tl.float32, bitcast=True) - _MAGIC) * (one * (1.0 / (1 << (4 * (j % 5)))))
                sums += one
            acc += scale * (products - 8.0 * sums)
            if ZEROS:
                acc += zero * sums
        else:
            for j in tl.static_range(8):
                scaled, x = _inputs(x_ptr, norm_ptr, m, word * 8 + j, size, rows, stride, NORM)
                if NORM:
                    squares += x * x
                bits = ((codes >> (4 * j)) & 15) | _MAGIC_INT
                w = (bits.to(tl.float32, bitcast=True) - (_MAGIC + 8.0)) * scale
                if ZEROS:
                    w += zero
                acc = tl.dot(w.to(dtype), scaled.to(dtype), acc, input_precision="ieee")
    return _summed(acc, BLOCK_M), tl.sum(squares, axis=0)


@triton.jit
def _any_rows(
    x_ptr, norm_ptr, w_ptr, scales_ptr, zeros_ptr, n, n_inside, m, rows, size, stride,
    BITS: tl.constexpr, E4M3: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if BITS == 4:
        acc, squares = _int4_rows(
            x_ptr, norm_ptr, w_ptr, scales_ptr, zeros_ptr, n, n_inside, m, rows, size, stride,
            GROUP, ZEROS, NORM, BLOCK_N, BLOCK_K, BLOCK_M, STAGES,
        )  # fmt: skip
    else:
        acc, squares = _dense_rows(
            x_ptr, norm_ptr, w_ptr, n, n_inside, m, rows, size, stride, E4M3, NORM, BLOCK_N, BLOCK_K, BLOCK_M, STAGES
        )
        if BITS == 8:
            acc *= tl.load(scales_ptr + n, mask=n_inside, other=0.0).to(tl.float32)[:, None]
    return acc, squares


@triton.jit
def _multiply(
    x_ptr,
    norm_ptr,
    w_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    residual_ptr,
    rows,
    outputs,
    size,
    stride,
    eps,
    BITS: tl.constexpr,
    E4M3: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_inside = n < outputs
    y, squares = _any_rows(
        x_ptr, norm_ptr, w_ptr, scales_ptr, zeros_ptr, n, n_inside, m, rows, size, stride,
        BITS, E4M3, GROUP, ZEROS, NORM, BLOCK_N, BLOCK_K, BLOCK_M, STAGES,
    )  # fmt: skip
    if NORM:
        rms = 1.0 / tl.sqrt(squares / size + eps)
        y *= rms[None, :]
    if GATED:
        up, _ = _any_rows(
            x_ptr, norm_ptr, w_ptr, scales_ptr, zeros_ptr, n + outputs, n_inside, m, rows, size, stride,
            BITS, E4M3, GROUP, ZEROS, NORM, BLOCK_N, BLOCK_K, BLOCK_M, STAGES,
        )  # fmt: skip
        if NORM:
            up *= rms[None, :]
        y = y * tl.sigmoid(y) * up
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n_inside, other=0.0).to(tl.float32)[:, None]
    inside = n_inside[:, None] & (m < rows)[None, :]
    place = m[None, :].to(tl.int64) * outputs + n[:, None]
    if RESIDUAL:
        y += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
