"""Weights in NF4: 4-bit codes of normal quantiles, one scale a block of 64, the scales in 8 bits (QLoRA, Dettmers et
al. 2023, arXiv 2305.14314). Codes and values are those of bitsandbytes, bit for bit.

    weight = NF4.of(matrix_OI)
    weight.dequantized(torch.bfloat16)      # [O, I]

For training adapters on a frozen base, not for inference (`quant/` has better codes for that). O outputs, I inputs,
N = O * I / 64 blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from puyu.model.native import nf4_values

BLOCK = 64
"""Weights that share a scale."""
_GROUP = 256
"""Scales that share a scale of their own."""
_STEPS = 65535
_CPU = torch.device("cpu")
TABLE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""What the codes stand for, times the block's scale: quantiles of the normal distribution (QLoRA, appendix E)."""


@dataclass(frozen=True, slots=True)
class NF4:
    """One matrix. `codes` uint8 [O, I / 2], the even input in the high nibble; `scale_codes` uint8 [N]; `scales` fp32
    [N / 256] of the scales, and their common `offset` fp32 []."""

    codes: Tensor
    scale_codes: Tensor
    scales: Tensor
    offset: Tensor

    @staticmethod
    def of(weight_OI: Tensor) -> NF4:
        """Quantize; the number of inputs must be a multiple of 64."""
        rows, columns = weight_OI.shape
        assert columns % BLOCK == 0, f"{columns} inputs are not blocks of {BLOCK}"
        blocks_N = weight_OI.float().reshape(-1, BLOCK)
        absmax_N = blocks_N.abs().amax(1)
        shares = (blocks_N * (1.0 / absmax_N.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
        table = _table(weight_OI.device)
        numbers = torch.bucketize(shares, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)
        pairs = numbers.view(rows, columns // 2, 2)
        offset = absmax_N.mean()
        scale_codes, scales = quantize_dynamic(absmax_N - offset)
        return NF4(pairs[..., 0] << 4 | pairs[..., 1], scale_codes, scales, offset)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.codes.shape[0], self.codes.shape[1] * 2

    def block_scales(self) -> Tensor:
        """The scale of each block, fp32 [N]."""
        return dequantize_dynamic(self.scale_codes, self.scales) + self.offset

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the codes stand for, [O, I]: the product of table and scale in fp32, rounded to `dtype`."""
        if (values := nf4_values(self, dtype, dynamic=dynamic_table(), table=_table())) is not None:
            return values
        table = _table(self.codes.device)
        if dtype in (torch.bfloat16, torch.float16, torch.float32) and _launches(self.codes.device):
            from puyu.model.nf4_triton import nf4_values as on_gpu

            return on_gpu(self.codes, self.block_scales(), table, dtype)
        numbers = torch.stack((self.codes >> 4, self.codes & 15), dim=-1)
        blocks_N = table[numbers.int()].view(-1, BLOCK) * self.block_scales()[:, None]
        return blocks_N.view(self.shape).to(dtype)


@cache
def _table(device: torch.device = _CPU) -> Tensor:
    return torch.tensor(TABLE, device=device)


@cache
def _launches(device: torch.device) -> bool:
    """Whether Triton's kernel runs there."""
    return device.type == "cuda" and find_spec("triton") is not None


@cache
def dynamic_table(device: torch.device = _CPU) -> Tensor:
    """The 256 values of the 8-bit format with a dynamic exponent, ascending in [-1, 1], fp32 (Dettmers 2016, arXiv
    1511.04561): for each power of ten from 1e-6 to 1 twice as many fractions as for the one below."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (bounds[:-1] + bounds[1:]) / 2
        found = (10.0 ** (exponent - 6) * means).tolist()
        values += found + [-value for value in found]
    return torch.tensor(sorted(values), device=device)


def quantize_dynamic(values_N: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N] and the largest magnitude of each 256 values, fp32.

    The share of a value is first rounded to one of 65,536 steps, as bitsandbytes does on a CPU: near the middle between
    two values that decides.
    """
    table, count = dynamic_table(values_N.device), len(values_N)
    blocks = torch.nn.functional.pad(values_N, (0, -count % _GROUP)).view(-1, _GROUP)
    scales = blocks.abs().amax(1)
    shares = blocks * (1 / torch.where(scales > 0, scales, 1.0))[:, None]
    shares = ((shares + 1) * (0.5 * _STEPS) + 0.5).floor_() / _STEPS * 2 - 1
    codes = torch.bucketize(shares, (table[1:] + table[:-1]) / 2, out_int32=True)
    codes *= scales[:, None] > 0  # where all are zero, bitsandbytes writes code 0
    return codes.to(torch.uint8).flatten()[:count], scales


def dequantize_dynamic(codes_N: Tensor, scales: Tensor) -> Tensor:
    """The values of the codes, fp32 [N]."""
    table = dynamic_table(codes_N.device)
    return table[codes_N.int()] * scales.repeat_interleave(_GROUP)[: len(codes_N)]
