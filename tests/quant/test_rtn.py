"""Codes against exact rational arithmetic and a plain search; QuantLinear's kernels against the dequantized product."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puyu.model.linear import QuantFormat, QuantLinear, pack_int4, unpack_int4
from puyu.quant.rtn import Quantized, int4, int8, quantize_weight

INT8 = QuantFormat(8)


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Normal weights with a few outliers and an offset in some rows, as trained models have them."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * 0.05
    w[torch.rand(w.shape, generator=generator) < 0.01] *= 6
    w[::3] += 0.02
    return w


def exact(found: Quantized, row: int, column: int) -> Fraction:
    """What one code stands for, in rational numbers."""
    code = Fraction(int(found.codes[row, column]))
    if found.zeros is None:
        return code * Fraction(found.scales[row, 0].item())
    group = column // found.form.group
    return (code - 8) * Fraction(found.scales[row, group].item()) + Fraction(found.zeros[row, group].item())


@pytest.mark.parametrize("form", [INT8, QuantFormat(4, 32), QuantFormat(4, 64)])
def test_dequantized_weights_are_the_exact_numbers(form: QuantFormat) -> None:
    found = quantize_weight(weights(5, 128), form)
    ours, layer = found.dequantized(), found.layer()
    for row in range(5):
        for column in range(128):
            true = float(exact(found, row, column))
            assert ours[row, column].item() == pytest.approx(true, rel=1e-6, abs=1e-9)
    assert torch.equal(layer.weight(torch.float32), ours)
    wide = layer.weight(torch.float64)
    assert all(wide[r, c].item() == float(exact(found, r, c)) for r in range(5) for c in range(0, 128, 7))


def test_int8_is_within_half_a_step() -> None:
    w = weights(20, 96)
    found = int8(w)
    assert (found.dequantized() - w).abs().le(found.scales.float() * 0.5001).all()
    assert found.codes.abs().amax(dim=1).eq(127).all()


def test_int4_without_clipping_would_be_within_half_a_step() -> None:
    """Weights that lie on 16 even levels lose nothing, whatever the search tries."""
    levels = (torch.arange(64) % 16 - 8).float()[None] * 0.25 + 1.0
    assert torch.equal(int4(levels, group=32).dequantized(), levels)


def plain_search(group: list[float]) -> float:
    """The least squared error over shrunk ranges, one number at a time."""
    best = float("inf")
    low, high = min(group), max(group)
    for step in range(21):
        half = (high - low) / 2 * (1 - 0.4 * step / 20)
        scale = torch.tensor(2 * half / 15).bfloat16().item()
        zero = torch.tensor((low + high) / 2 + scale / 2).bfloat16().item()
        error = 0.0
        for value in group:
            code = min(max(round((value - zero) / scale), -8), 7)
            error += (code * scale + zero - value) ** 2
        best = min(best, error)
    return best


def test_int4_finds_the_best_range() -> None:
    w = weights(6, 64, seed=4)
    found = (int4(w, group=32).dequantized() - w).square().unflatten(1, (-1, 32)).sum(-1)
    for row in range(6):
        for group in range(2):
            best = plain_search(w[row, group * 32 : group * 32 + 32].tolist())
            assert found[row, group].item() == pytest.approx(best, rel=1e-3)


def test_the_search_pays() -> None:
    w = weights(64, 256)
    low, high = w.unflatten(1, (-1, 64)).aminmax(dim=-1)
    step = ((high - low) / 15)[..., None]
    naive = ((w.unflatten(1, (-1, 64)) - low[..., None]) / step).round() * step + low[..., None]
    searched = (int4(w, group=64).dequantized() - w).square().sum()
    assert searched < 0.95 * (naive.flatten(1) - w).square().sum()


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
@pytest.mark.parametrize("form", [INT8, QuantFormat(4, 32)])
def test_constant_weights(value: float, form: QuantFormat) -> None:
    w = torch.full((3, 32), value)
    torch.testing.assert_close(quantize_weight(w, form).dequantized(), w, rtol=0.005, atol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_two_codes_a_byte(rows: int, pairs: int, random: object) -> None:
    codes = torch.tensor([[random.randrange(16) for _ in range(2 * pairs)] for _ in range(rows)], dtype=torch.uint8)  # type: ignore[attr-defined]
    packed = pack_int4(codes)
    assert packed.shape == (rows, pairs)
    by_hand = [[codes[r, 2 * p].item() + 16 * codes[r, 2 * p + 1].item() for p in range(pairs)] for r in range(rows)]
    assert packed.tolist() == by_hand
    assert torch.equal(unpack_int4(packed), codes)


SHAPES = [
    # in, out: what the kernels take
    (64, 16),
    (256, 1408),
    (704, 256),
    (96, 80),
    # what they do not: outputs not by 16 (int4), inputs not by 16 (int8)
    (64, 17),
    (96, 8),
    (32, 1),
    (40, 16),
    (33, 32),
]


@pytest.mark.parametrize("rows", [1, 3, 31, 120])
@pytest.mark.parametrize(("columns", "outputs"), SHAPES)
@pytest.mark.parametrize("form", [INT8, QuantFormat(4, 32)])
def test_every_path_gives_the_dequantized_product(form: QuantFormat, columns: int, outputs: int, rows: int) -> None:
    if not form.fits(columns):
        with pytest.raises(AssertionError, match="groups of 32"):
            QuantLinear(columns, outputs, form=form)
        return
    found = quantize_weight(weights(outputs, columns), form)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(1))
    layer = found.layer(bias=bias)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 0.01), (torch.bfloat16, 0.02)):
        typed = x.to(dtype)
        true = typed.double() @ found.dequantized().double().T + bias.double()
        y = layer(typed)
        assert y.dtype == dtype and y.shape == (rows, outputs)
        assert (y.double() - true).norm() <= tolerance * true.norm()


def test_leading_dimensions_and_empty_batches() -> None:
    layer = int8(weights(16, 32)).layer()
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    assert layer(x).shape == (2, 3, 16)
    torch.testing.assert_close(layer(x)[1, 2], layer(x[1, 2]), rtol=0.01, atol=0.01)
    assert layer(x[:0]).shape == (0, 3, 16)


@pytest.mark.parametrize("form", [INT8, QuantFormat(4, 32)])
def test_new_codes_replace_the_packed_ones(form: QuantFormat) -> None:
    """The kernel's copy of the codes must not outlive them."""
    x = torch.ones(1, 64)
    layer, other = (quantize_weight(weights(16, 64, seed), form).layer() for seed in (0, 1))
    before = layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x)) and not torch.equal(layer(x), before)


@pytest.mark.parametrize("offset", [0, 1, 8, 16, 40])
@pytest.mark.parametrize("rows", [1, 20])
def test_codes_need_not_be_aligned(offset: int, rows: int) -> None:
    """Tensors of a memory-mapped file start anywhere; the native kernel would crash on some of them."""
    found = int8(weights(64, 64))
    room = torch.zeros(64 * 64 + 64, dtype=torch.int8)
    moved = room[offset : offset + 64 * 64].view(64, 64)
    moved.copy_(found.codes)
    layer = Quantized(found.form, moved, found.scales).layer()
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ found.dequantized().T, rtol=0.05, atol=0.05)
