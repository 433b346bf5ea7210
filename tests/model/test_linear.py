"""QuantLinear against exact arithmetic: every path, every shape, every format; two codes a byte."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puyu.model.linear import (
    QuantFormat,
    QuantLinear,
    QuantWeight,
    integer_product,
    pack_int4,
    quantize_tokens,
    unpack_int4,
)

INT8, INT4 = QuantFormat(8), QuantFormat(4, 32, symmetric=False)
FORMS = [
    INT8,
    INT4,
    QuantFormat(4, 64),
    QuantFormat(4),
    QuantFormat(8, 32, symmetric=False),
    QuantFormat(4, 32, symmetric=False, permuted=True),
]


def random_codes(rows: int, columns: int, form: QuantFormat, seed: int = 0) -> QuantWeight:
    """Codes of the whole range with scales that bf16 holds, so that no kernel may round them."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (0, 16) if form.bits == 4 else (-128, 128)
    codes = torch.randint(low, high, (rows, columns), generator=generator)
    groups = columns // (form.group or columns)
    scales = (torch.rand(rows, groups, generator=generator) * 0.01 + 0.01).bfloat16().half()
    zeros = None if form.symmetric else torch.randint(low, high, (rows, groups), generator=generator).short()
    perm = torch.randperm(columns, generator=generator) if form.permuted else None
    kind = torch.uint8 if form.bits == 4 else torch.int8
    return QuantWeight.of(codes.to(kind), scales, zeros, bits=form.bits, perm=perm, activations=form.activations)


def exact(found: QuantWeight, row: int, column: int) -> Fraction:
    """What one code stands for, in rational numbers."""
    width = found.shape[1] // found.scales.shape[1]
    group = column // width
    zero = (8 if found.bits == 4 else 0) if found.zeros is None else int(found.zeros[row, group])
    return (int(found.numbers[row, column]) - zero) * Fraction(found.scales[row, group].item())


@pytest.mark.parametrize("form", FORMS)
def test_dequantized_weights_are_the_exact_numbers(form: QuantFormat) -> None:
    found = random_codes(5, 128, form)
    assert found.form == form
    layer = QuantLinear.of(found)
    wide = layer.weight(torch.float64)
    order = range(128) if found.perm is None else found.perm.tolist()
    for row in range(5):
        for column, place in enumerate(order):
            assert wide[row, place].item() == float(exact(found, row, column))
    plain = layer.matrix()
    assert torch.equal(plain.codes, found.codes) and torch.equal(plain.scales, found.scales)


SHAPES = [
    *((64, 16), (256, 1408), (704, 256), (96, 80)),  # in, out: what torch's kernels take
    *((64, 17), (96, 8), (32, 1), (40, 16), (33, 32)),  # what they do not
]


@pytest.mark.parametrize("rows", [1, 3, 31, 120])
@pytest.mark.parametrize(("columns", "outputs"), SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_path_gives_the_dequantized_product(form: QuantFormat, columns: int, outputs: int, rows: int) -> None:
    if not form.fits(columns):
        with pytest.raises(AssertionError, match="do not split"):
            QuantLinear(columns, outputs, form=form)
        return
    found = random_codes(outputs, columns, form)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(1))
    layer = QuantLinear.of(found, bias=bias)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 0.01), (torch.bfloat16, 0.02)):
        typed = x.to(dtype)
        true = typed.double() @ found.dequantized(torch.float64).T + bias.double()
        y = layer(typed)
        assert y.dtype == dtype and y.shape == (rows, outputs)
        assert (y.double() - true).norm() <= tolerance * true.norm()


@pytest.mark.parametrize("form", FORMS)
def test_codes_that_were_lent_are_asked_for(form: QuantFormat) -> None:
    """The layer holds none, computes as before on every path, and saves, loads and takes back what the holder has."""
    layer, twin = (QuantLinear.of(random_codes(32, 64, form)) for _ in range(2))
    lent = layer.codes
    layer.lend(lambda: lent)
    assert layer.codes.numel() == 0
    for rows in (3, 200):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
        assert torch.equal(layer(x), twin(x))
    assert torch.equal(layer.weight(torch.float64), twin.weight(torch.float64))
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in twin.state_dict().items())
    other = QuantLinear.of(random_codes(32, 64, form, seed=1))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.codes, other.codes) and torch.equal(layer(x), other(x))
    layer.lend(lambda: lent)
    layer.take_back()
    assert layer.codes is lent


@pytest.mark.parametrize("form", [INT8, INT4, QuantFormat(4), QuantFormat(4, 256)])
def test_usual_formats_have_a_kernel(form: QuantFormat) -> None:
    assert QuantLinear(512, 64, form=form).kernel_group > 0


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize(("columns", "outputs"), [(64, 16), (33, 7), (700, 48)])
def test_int8_activations_are_exact_integer_arithmetic(rows: int, columns: int, outputs: int) -> None:
    form = QuantFormat(8, activations=True)
    found = random_codes(outputs, columns, form)
    layer = QuantLinear.of(found)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = layer(x)
    for row in range(rows):
        scale = x[row].abs().max().item() / 127
        codes = [min(max(round(value / scale), -127), 127) for value in x[row].tolist()]
        for output in (0, outputs // 2, outputs - 1):
            total = sum(a * b for a, b in zip(codes, found.codes[output].tolist(), strict=True))
            true = total * Fraction(scale) * Fraction(found.scales[output, 0].item())
            assert y[row, output].item() == pytest.approx(float(true), rel=1e-12)
    assert layer(x.float()).dtype == torch.float32
    torch.testing.assert_close(layer(x.float()).double(), y, rtol=0.02, atol=0.02 * y.abs().max().item())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 20), st.integers(0, 2**31))
def test_integer_products(rows: int, inputs: int, outputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-128, 128, (n, inputs), generator=generator).to(torch.int8) for n in (rows, outputs))
    assert torch.equal(integer_product(a, b).long(), a.long() @ b.long().T)


def test_the_largest_integer_sums_do_not_saturate() -> None:
    a, b = torch.full((3, 4096), -128, dtype=torch.int8), torch.full((16, 4096), -128, dtype=torch.int8)
    assert (integer_product(a, b).long() == 128 * 128 * 4096).all()


def test_tokens_of_zeros_stay_zeros() -> None:
    codes, scales = quantize_tokens(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert codes.tolist() == [[0, 0], [64, -127]]
    assert torch.equal(scales, torch.tensor([[0.0], [2 / 127]]))


def test_leading_dimensions_and_empty_batches() -> None:
    for form in (INT8, QuantFormat(8, activations=True)):
        layer = QuantLinear.of(random_codes(16, 32, form))
        x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
        assert layer(x).shape == (2, 3, 16)
        torch.testing.assert_close(layer(x)[1, 2], layer(x[1, 2]), rtol=0.01, atol=0.01)
        assert layer(x[:0]).shape == (0, 3, 16)


@pytest.mark.parametrize("form", [INT8, INT4])
def test_new_codes_replace_the_packed_ones(form: QuantFormat) -> None:
    """The kernel's copy of the codes must not outlive them."""
    x = torch.ones(1, 64)
    layer, other = (QuantLinear.of(random_codes(16, 64, form, seed)) for seed in (0, 1))
    before = layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x)) and not torch.equal(layer(x), before)


@pytest.mark.parametrize("offset", [0, 1, 8, 16, 40])
@pytest.mark.parametrize("rows", [1, 20])
def test_codes_need_not_be_aligned(offset: int, rows: int) -> None:
    """Tensors of a memory-mapped file start anywhere; the native kernel would crash on some of them."""
    found = random_codes(64, 64, INT8)
    room = torch.zeros(64 * 64 + 64, dtype=torch.int8)
    moved = room[offset : offset + 64 * 64].view(64, 64)
    moved.copy_(found.codes)
    layer = QuantLinear.of(QuantWeight(moved, found.scales, bits=8))
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    true = x @ found.dequantized().T
    assert (layer(x) - true).norm() < 0.01 * true.norm()


def test_what_says_nothing_is_left_out() -> None:
    found = random_codes(4, 64, INT4)
    plain = QuantWeight(found.codes, found.scales, torch.full_like(found.zeros, 8), torch.arange(64))  # type: ignore[arg-type]
    assert plain.simplified().form == QuantFormat(4, 32)
    assert torch.equal(plain.simplified().dequantized(), plain.dequantized())
    assert found.simplified().zeros is found.zeros


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_two_codes_a_byte(rows: int, pairs: int, seed: int) -> None:
    codes: Tensor = torch.randint(0, 16, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed)).byte()
    packed = pack_int4(codes)
    by_hand = [[codes[r, 2 * p].item() + 16 * codes[r, 2 * p + 1].item() for p in range(pairs)] for r in range(rows)]
    assert packed.tolist() == by_hand
    assert torch.equal(unpack_int4(packed), codes)
