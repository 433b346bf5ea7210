"""Every kernel against its torch reference, in Triton's interpreter: sizes that no block divides, padding, strangers'
leftovers in the cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from puyu.engine.kernels import attention, fp8, matmul, norm, rope
from puyu.engine.kernels.launch import upload
from puyu.errors import ConfigError
from puyu.model.linear import Linear, QuantFormat, QuantLinear, pack_int4
from puyu.model.rope import rotation
from tests.engine.conftest import tiny_model

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # silu of -100 is 0, as it should


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [64, 48, 130])
def test_norm_and_activation(size: int, dtype: torch.dtype) -> None:
    x, weight = randn(3, size, dtype=dtype), randn(size, seed=1, dtype=dtype)
    limit = 1e-6 if dtype == torch.float32 else 1e-3
    assert relative(norm.rms_norm(x, weight, eps=1e-5), norm.rms_norm_reference(x, weight, eps=1e-5)) < limit
    assert relative(norm.silu_mul(x), norm.silu_mul_reference(x)) < limit


@pytest.mark.parametrize(("heads", "group", "head_dim"), [(2, 4, 16), (3, 1, 6), (1, 3, 24)])
def test_rope_and_cache(heads: int, group: int, head_dim: int) -> None:
    slots, tokens = 12, 5
    turn = rotation(torch.arange(64), theta=1e4, head_dim=head_dim, dtype=torch.float32)
    angles = rope.Angles(*(x.flatten(1)[:, : head_dim // 2].contiguous() for x in turn))
    qkv = randn(tokens, heads * (group + 2) * head_dim)
    places = rope.Places(*upload([np.array([0, 7, 63, 5, 6]), np.array([3, -1, 0, 11, 4])], CPU))
    ours, theirs = (torch.full((2 * heads * slots, head_dim), float("nan")) for _ in range(2))
    q = rope.rope_and_cache(qkv, ours, angles, places, num_kv_heads=heads)
    expected = rope.rope_and_cache_reference(qkv, theirs, angles, places, num_kv_heads=heads)
    torch.testing.assert_close(q, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, equal_nan=True)


def paged(lengths: list[int], *, heads: int, head_dim: int, block_size: int) -> tuple[Tensor, attention.Pages]:
    """A cache with NaN wherever no sequence has written, and shuffled blocks."""
    width = max(-(-max(lengths) // block_size), 1)
    order = torch.randperm(len(lengths) * width, generator=torch.Generator().manual_seed(3)).view(len(lengths), width)
    slots = order.numel() * block_size
    rows = torch.full((2, heads, slots, head_dim), float("nan"))
    for row, length in enumerate(lengths):
        at = torch.arange(length)
        where = order[row][at // block_size] * block_size + at % block_size
        rows[:, :, where] = randn(2, heads, length, head_dim, seed=row)
    tables, sizes = upload([order.numpy(), np.array(lengths)], CPU)
    return rows.view(-1, head_dim), attention.Pages(tables, sizes, block_size)


@pytest.mark.parametrize(("heads", "group", "head_dim", "block_size"), [(2, 4, 16, 4), (1, 3, 24, 16), (3, 1, 8, 1)])
def test_decode_attention(heads: int, group: int, head_dim: int, block_size: int) -> None:
    lengths = [1, 70, 0, 129]
    rows, pages = paged(lengths, heads=heads, head_dim=head_dim, block_size=block_size)
    q = randn(len(lengths), heads * group, head_dim, seed=9)
    ours = attention.decode_attention(q, rows, pages, num_kv_heads=heads)
    expected = attention.decode_attention_reference(q, rows, pages, num_kv_heads=heads)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
    assert not ours[2].any(), "a row that only fills up a batch"


@pytest.mark.parametrize("splits", [1, 4, 64])
def test_splits_change_nothing(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, pages = paged([200, 3], heads=1, head_dim=16, block_size=8)
    q = randn(2, 2, 16, seed=4)
    monkeypatch.setattr(attention, "num_splits", lambda *_: splits)
    ours = attention.decode_attention(q, rows, pages, num_kv_heads=1)
    expected = attention.decode_attention_reference(q, rows, pages, num_kv_heads=1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("heads", "group", "head_dim"), [(2, 4, 16), (1, 3, 24)])
@pytest.mark.parametrize("height", [4, 16])
def test_prefill_attention(heads: int, group: int, head_dim: int, height: int) -> None:
    """A fresh prompt, one continued after 70 cached tokens, and one of a single token after 64."""
    lengths, contexts = [37, 21, 1], [0, 70, 64]
    totals = [length + context for length, context in zip(lengths, contexts, strict=True)]
    rows, pages = paged(totals, heads=heads, head_dim=head_dim, block_size=4)
    starts = np.cumsum([0, *lengths])
    spans = [(i, int(starts[i]), lengths[i], contexts[i]) for i in range(3)]
    tiles = attention.Tiles(*upload(attention.tile_arrays(spans, height), CPU), height)
    q = randn(int(starts[-1]), heads * group, head_dim, seed=9)
    ours = attention.prefill_attention(q, rows, pages, tiles, num_kv_heads=heads)
    expected = attention.prefill_attention_reference(q, rows, pages, tiles, num_kv_heads=heads)
    torch.testing.assert_close(ours, expected, rtol=0, atol=3e-6)


def layer_of(bits: int, outputs: int, inputs: int, *, bias: bool = False, zeros: bool = True) -> Linear | QuantLinear:
    generator = torch.Generator().manual_seed(bits)
    if bits == 16:
        linear = Linear(inputs, outputs, bias=bias)
        linear.weight.data = randn(outputs, inputs, seed=2) * inputs**-0.5
    else:
        form = QuantFormat(8) if bits == 8 else QuantFormat(4, 32, symmetric=not zeros)
        linear = QuantLinear(inputs, outputs, form=form, bias=bias)
        if bits == 8:
            linear.codes.copy_(torch.randint(-127, 128, (outputs, inputs), generator=generator))
        else:
            codes = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.uint8)
            linear.codes.copy_(pack_int4(codes))
            if linear.zeros is not None:
                linear.zeros.copy_(torch.randint(0, 16, linear.zeros.shape, generator=generator))
        size = 0.0007 if bits == 8 else 0.01
        linear.scales.copy_((randn(*linear.scales.shape, seed=4).abs() * size).bfloat16())
    if bias:
        linear.bias.data = randn(outputs, seed=6)
    return linear


def weight_of(bits: int, outputs: int, inputs: int, *, bias: bool = False) -> matmul.Weight:
    return matmul.Weight.of(layer_of(bits, outputs, inputs, bias=bias))


@torch.no_grad()
@pytest.mark.parametrize(("bits", "zeros"), [(8, True), (4, True), (4, False)])
def test_weights_are_those_of_the_layer(bits: int, zeros: bool) -> None:
    """What zeros add is rounded to the dtype of the scales, which is fp32 here."""
    layer = layer_of(bits, 24, 96, zeros=zeros)
    assert isinstance(layer, QuantLinear)
    weight = matmul.Weight.of(layer)
    assert (weight.zeros is None) == (bits == 8 or not zeros)
    torch.testing.assert_close(matmul.dense(weight, torch.float32), layer.weight(torch.float32), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(matmul.unpack(weight, torch.float32), layer.weight(torch.float32), rtol=1e-6, atol=1e-6)
    for rows in (1, 3):
        x = randn(rows, 96, seed=7)
        torch.testing.assert_close(matmul.multiply(x, weight), x @ layer.weight(x.dtype).T, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_products(bits: int, rows: int) -> None:
    """Plain with bias; norm before and gate after; residual after. 352 inputs are no multiple of any block."""
    x = randn(rows, 352, seed=7)
    plain = weight_of(bits, 37, 352, bias=True)
    wide = weight_of(bits, 2 * 19, 352)
    cases = [
        (plain, matmul.NOTHING),
        (wide, matmul.Around(norm_K=randn(352, seed=8), eps=1e-5, gated=True)),
        (plain, matmul.Around(residual_MN=randn(rows, 37, seed=9))),
    ]
    for weight, around in cases:
        ours = matmul.multiply(x, weight, around)
        torch.testing.assert_close(ours, matmul.multiply_reference(x, weight, around), rtol=1e-5, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_products_in_half_precision_round_once(bits: int) -> None:
    """fp16, because the interpreter cannot multiply bf16."""
    weight = weight_of(bits, 33, 256)
    for rows in (1, 5):
        x = randn(rows, 256, seed=7, dtype=torch.float16)
        exact = x.double() @ matmul.dense(weight, torch.float64).T
        data = weight.data.half() if bits == 16 else weight.data
        ours = matmul.multiply(x, matmul.Weight(data, bits, weight.group, weight.scales, weight.zeros))
        assert relative(ours, exact) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_many_rows_take_a_dense_product(bits: int) -> None:
    weight = weight_of(bits, 38, 96, bias=bits == 8)
    torch.testing.assert_close(matmul.unpack(weight, torch.float32), matmul.dense(weight, torch.float32))
    x, residual = randn(130, 96, seed=1), randn(130, 38, seed=2)
    for around in (matmul.Around(randn(96, seed=3), 1e-5, gated=bits != 8), matmul.Around(residual_MN=residual)):
        expected = matmul.multiply_reference(x, weight, around)
        torch.testing.assert_close(matmul.project(x, weight, around), expected, rtol=1e-5, atol=2e-5)


def test_more_rows_than_one_tile() -> None:
    weight = weight_of(4, 70, 160)
    x = randn(41, 160, seed=1)
    tile = matmul.choose_tile(41, weight)
    assert tile is not None and tile.rows == 64
    torch.testing.assert_close(
        matmul.multiply(x, weight, tile=tile._replace(rows=16)),
        matmul.multiply_reference(x, weight),
        rtol=1e-5,
        atol=2e-5,
    )
    assert matmul.choose_tile(41, weight_of(16, 8, 128)) is None, "torch's own product"


def test_rows_become_e4m3() -> None:
    """Numbers that e4m3 holds exactly: the interpreter's own rounding loses carries, the hardware's does not."""
    codes = torch.randint(0, 256, (5, 200), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    x = codes.view(torch.float8_e4m3fn).float().nan_to_num(1.0)
    x[:, 7] = -448.0
    x[4] = 0.0
    x *= torch.tensor([1.0, 2.0**-9, 2.0**7, 0.25, 1.0])[:, None]
    (ours, scales), (values, expected) = fp8.to_rows(x), fp8.to_rows_reference(x)
    assert torch.equal(scales, expected)
    assert torch.equal(ours.float(), values.float())
    assert torch.equal(values.float() * expected, x)
    y = randn(5, 200, seed=3)
    values, expected = fp8.to_rows_reference(y)
    assert relative(values.float() * expected, y) < 0.03, "a step is at most 1/8 of a value"


@torch.no_grad()
def test_fp8_products_are_the_dequantized_ones() -> None:
    linear = Linear(96, 48, bias=True)
    linear.weight.data, linear.bias.data = randn(48, 96, seed=2) * 0.1, randn(48, seed=6)
    layer, x = fp8.Fp8Linear(linear), randn(7, 96, seed=1)
    assert relative(layer(x), linear(x)) < 0.05
    weight = matmul.Weight.of(layer)
    assert matmul.choose_tile(40, weight) is None, "torch's own product in e4m3"
    expected = x.double() @ (layer.values.double() * layer.scales.double()).T + linear.bias.double()
    assert relative(matmul.multiply(x, weight), expected) < 1e-5, "few rows: e4m3 weights, activations as they are"
    assert relative(matmul.project(randn(130, 96, seed=1), weight), layer(randn(130, 96, seed=1))) < 0.05


def test_fp8_refuses_what_it_cannot_do() -> None:
    model = tiny_model(0)
    fp8.to_fp8(model)
    with pytest.raises(ConfigError, match="fp8 needs full-precision layers"):
        fp8.to_fp8(model)
