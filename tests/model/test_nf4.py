"""NF4 against its definition, and against what bitsandbytes 0.50.2 gave for the same matrices on a CPU."""

import hashlib

import pytest
import torch
from torch import Tensor

from puyu.model import native, nf4
from puyu.model.nf4 import BLOCK, NF4, TABLE, dequantize_dynamic, dynamic_table, quantize_dynamic

THEIRS = {
    (96, 512, torch.float32): ("c3ad0a6891f5dcd8", "7d5b715f7c6d1b6c", "57683352da40d173", "d56d9d49831a680c"),
    (40, 192, torch.bfloat16): ("475942c637d61aea", "9d4d343be534c1a4", "0fa722fef9dfd695", "8570698466a7e72a"),
}
"""Rows, inputs, dtype -> the beginning of SHA-256 of codes, codes of scales, scales of scales, values."""


def matrix(rows: int, columns: int) -> Tensor:
    """The same numbers on every machine, mostly small, the later rows larger."""
    n = (torch.arange(rows * columns) * 1103515245 + 12345) % (1 << 31)
    n = (n * 69069 + 1) % (1 << 31)
    cubes = (n.double() / (1 << 30) - 1).view(rows, columns) ** 3
    return (cubes * (torch.arange(1, rows + 1)[:, None] / rows)).float()


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("case", THEIRS)
def test_codes_scales_and_values_are_those_of_bitsandbytes(case):
    rows, columns, dtype = case
    made = NF4.of(matrix(rows, columns).to(dtype))
    found = (made.codes, made.scale_codes, made.scales, made.dequantized(dtype))
    assert tuple(map(digest, found)) == THEIRS[case]


def test_each_code_is_the_nearest_value_of_the_table():
    weight = matrix(8, 128)
    made = NF4.of(weight)
    numbers = torch.stack((made.codes >> 4, made.codes & 15), dim=-1).view(-1, BLOCK)
    blocks = weight.view(-1, BLOCK)
    shares = blocks / blocks.abs().amax(1, keepdim=True)
    nearest = (shares[..., None] - torch.tensor(TABLE)).abs().argmin(-1)
    assert torch.equal(numbers.long(), nearest)
    assert made.shape == (8, 128) and made.codes.shape == (8, 64)


def test_zeros_stay_zeros_and_the_largest_stays_itself_but_for_its_scale():
    weight = torch.zeros(4, 64)
    weight[1, 5] = 3.0
    values = NF4.of(weight).dequantized()
    assert values[1, 5] == pytest.approx(3.0, rel=0.02)
    assert bool((values[weight == 0] == 0).all())


def test_scales_keep_their_order_and_are_near():
    values = torch.linspace(-2, 5, 700)
    codes, scales = quantize_dynamic(values)
    found = dequantize_dynamic(codes, scales)
    assert len(codes) == 700 and len(scales) == 3
    assert float((found - values).abs().max()) < 5 * 0.01
    table = dynamic_table()
    assert len(table) == 256 and bool((table[1:] > table[:-1]).all()) and table[127] == 0 and table[-1] == 1


def test_a_single_block_has_no_deviation_and_the_code_of_bitsandbytes_for_that():
    made = NF4.of(matrix(1, 64))
    assert made.scale_codes.tolist() == [0] and made.scales.tolist() == [0.0]
    assert float(made.block_scales()) == float(matrix(1, 64).abs().max())


def test_a_matrix_takes_about_a_quarter_of_its_bytes_in_bf16():
    made = NF4.of(matrix(512, 1024))
    size = sum(tensor.nbytes for tensor in (made.codes, made.scale_codes, made.scales, made.offset))
    assert size / (512 * 1024 * 2) <= 0.27


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_values_are_those_of_torch(dtype, monkeypatch):
    """Many shapes, codes and scales of all kinds, bit for bit; other dtypes are torch's."""
    if native.load() is None:
        pytest.skip("not built: make setup builds it where there is a C++ compiler")
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 64), (3, 128), (65, 320), (300, 1024)):
        made = NF4.of(torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator) ** 4)
        fast = made.dequantized(dtype)
        with monkeypatch.context() as patch:
            patch.setattr(nf4, "nf4_values", lambda *_, **__: None)
            slow = made.dequantized(dtype)
        assert torch.equal(fast.view(torch.uint8), slow.view(torch.uint8))
        assert made.dequantized(torch.float64).dtype == torch.float64
