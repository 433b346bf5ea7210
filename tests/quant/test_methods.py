"""Grids, RTN, GPTQ, AWQ, SmoothQuant on single matrices and blocks, against plain searches and naive twins in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puyu.errors import ConfigError
from puyu.model.linear import QuantFormat, QuantWeight
from puyu.model.transformer import Block
from puyu.quant import gptq as gptq_module
from puyu.quant.awq import awq, awq_scales, output_error
from puyu.quant.calibrate import Seen, block_by_block, linears, packed
from puyu.quant.folding import fold, pairs_of
from puyu.quant.gptq import damped, gptq
from puyu.quant.grid import best_grid, full_grid, grouped, rounded
from puyu.quant.rtn import rtn
from puyu.quant.smooth import smooth, smoothing
from tests.model.reference import our_logits, small_model, tokens

INT8, INT4 = QuantFormat(8), QuantFormat(4, 32, symmetric=False)
FORMS = [INT8, INT4, QuantFormat(4, 64), QuantFormat(4, symmetric=False)]


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Normal weights with a few outliers and an offset in some rows, as trained models have them."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * 0.05
    w[torch.rand(w.shape, generator=generator) < 0.01] *= 6
    w[::3] += 0.02
    return w


def inputs(count: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated activations, a few channels much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * 0.3 + torch.eye(columns)
    x = torch.randn(count, columns, generator=generator) @ mix
    x[:, :: max(columns // 6, 1)] *= 8
    return x


def output_errors(weight: Tensor, found: QuantWeight, x: Tensor) -> float:
    return (x.double() @ (found.dequantized(torch.float64) - weight.double()).T).square().sum().item()


# --- grids and rtn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [INT8, QuantFormat(8, 32)])
def test_int8_is_within_half_a_step(form: QuantFormat) -> None:
    w = weights(20, 96)
    found = rtn(w, form)
    step = found.scales.float().repeat_interleave(96 // found.scales.shape[1], dim=1)
    assert ((found.dequantized() - w).abs() <= step * 0.505).all()


def plain_search(group: list[float]) -> float:
    """The least squared error over shrunk ranges, one number at a time."""
    low, high = min(0.0, *group), max(0.0, *group)
    zero = min(max(round(-low / (high - low) * 15), 1), 15)
    full = torch.tensor(max(-low / zero, high / max(15 - zero, 1) if zero < 15 else 0.0)).bfloat16().item()
    best = float("inf")
    for step in range(21):
        scale = torch.tensor(full * (1 - 0.4 * step / 20)).bfloat16().item()
        codes = [min(max(round(value / scale) + zero, 0), 15) for value in group]
        best = min(best, sum(((c - zero) * scale - v) ** 2 for c, v in zip(codes, group, strict=True)))
    return best


def test_int4_finds_the_best_range() -> None:
    w = weights(6, 64, seed=4)
    found = (rtn(w, INT4).dequantized() - w).square().unflatten(1, (-1, 32)).sum(-1)
    for row in range(6):
        for group in range(2):
            best = plain_search(w[row, group * 32 : group * 32 + 32].tolist())
            assert found[row, group].item() == pytest.approx(best, rel=0.01)


def test_the_search_pays() -> None:
    w = grouped(weights(64, 256), INT4)
    full = full_grid(w, INT4)
    naive = (full.values(full.codes(w)) - w).square().sum()
    best = best_grid(w, INT4)
    assert (best.values(best.codes(w)) - w).square().sum() < 0.95 * naive


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMS), st.integers(0, 2**31), st.floats(1e-4, 100.0), st.floats(-3.0, 3.0))
def test_full_grids_clip_nothing_and_hold_zero(form: QuantFormat, seed: int, size: float, shift: float) -> None:
    w = grouped((torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) + shift) * size, form)
    grid = full_grid(w, form)
    codes = grid.codes(w)
    assert codes.min() >= grid.first and codes.max() <= grid.last
    assert (grid.zeros >= grid.first + (0 if form.symmetric else 1)).all() and (grid.zeros <= grid.last).all()
    # half a step, half a step of the rounded zero point at either end, the mantissa of the scale
    reach = 1.02 + (grid.last - grid.first) / 256
    assert ((grid.values(codes) - w).abs() <= grid.scales[..., None] * reach).all()


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
@pytest.mark.parametrize("form", FORMS)
def test_constant_weights(value: float, form: QuantFormat) -> None:
    w = torch.full((3, 64), value)
    tolerance = 0.07 if form.symmetric and form.bits == 4 else 0.005
    torch.testing.assert_close(rtn(w, form).dequantized(), w, rtol=tolerance, atol=0)


def test_scales_are_numbers_of_fp16_and_bf16() -> None:
    scales = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 0.1 + 1e-4
    found = rounded(scales)
    assert torch.equal(found.half().float(), found) and torch.equal(found.bfloat16().float(), found)
    assert ((found - scales).abs() <= scales / 256).all()
    tiny = rtn(weights(4, 64) * 1e-7, INT4)  # steps that fp16 does not hold
    assert tiny.scales.dtype == torch.bfloat16 and rtn(weights(4, 64), INT4).scales.dtype == torch.float16
    assert (tiny.dequantized() * 1e7 - weights(4, 64)).norm() < 0.15 * weights(4, 64).norm()


# --- gptq ----------------------------------------------------------------------------------------------------------


def naive_gptq(weight: Tensor, hessian: Tensor, form: QuantFormat, order: list[int], fresh: bool) -> Tensor:
    """Optimal brain quantization in a fixed order, with the inverse of H shrunk explicitly after each column."""
    w, inverse = weight.double().clone(), torch.linalg.inv(hessian)
    size = form.group or w.shape[1]
    importance = hessian.diagonal().view(-1, size)
    loss = lambda d: (d.square() * importance).sum(-1)  # noqa: E731
    grid = best_grid(grouped(weight.double(), form), form, loss)
    result, left = torch.zeros_like(w), list(range(w.shape[1]))
    for column in order:
        group = column // size
        if fresh and column % size == 0:
            only = lambda d, g=group: (d.square() * importance[g]).sum(-1)  # type: ignore[misc]  # noqa: E731
            current = best_grid(w[:, None, column : column + size], form, only)
        else:
            current = current if fresh else grid.group(group)  # type: ignore[has-type]
        value = current.values(current.codes(w[:, column, None, None]))[:, 0, 0]
        result[:, column] = value
        at = left.index(column)
        error = (w[:, column] - value) / inverse[at, at]
        for place, other in enumerate(left):
            if other != column:
                w[:, other] -= error * inverse[at, place]
        keep = [i for i in range(len(left)) if i != at]
        row = inverse[at]
        inverse = (inverse - torch.outer(row, row) / row[at])[keep][:, keep]
        left.remove(column)
    return result


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("form", [INT4, INT8, QuantFormat(4, 64)])
def test_gptq_is_its_naive_twin(form: QuantFormat, act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_module, "BLOCK", 32)  # several blocks, so that late updates count
    w, x = weights(7, 128), inputs(300, 128)
    gram = x.double().T @ x.double()
    found = gptq(w, gram, form, act_order=act_order).dequantized(torch.float64)
    hessian = damped(gram, 0.01)
    order = hessian.diagonal().argsort(descending=True, stable=True).tolist() if act_order else list(range(128))
    true = naive_gptq(w, hessian, form, order, fresh=not act_order and form.group > 0)
    torch.testing.assert_close(found, true, rtol=0, atol=1e-6)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_gptq_with_unrelated_inputs_is_rtn(form: QuantFormat, act_order: bool) -> None:
    w = weights(9, 128)
    found = gptq(w.double(), 3.0 * torch.eye(128), form, act_order=act_order)
    torch.testing.assert_close(found.dequantized(), rtn(w.double(), form).dequantized(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_outputs_are_closer_than_with_rtn(form: QuantFormat, seed: int) -> None:
    w, x = weights(24, 128, seed), inputs(400, 128, seed)
    gram = x.double().T @ x.double()
    nearest = output_errors(w, rtn(w, form), x)
    assert output_errors(w, gptq(w, gram, form), x) < 0.8 * nearest
    assert output_errors(w, gptq(w, gram, form, act_order=False), x) < 0.8 * nearest


def test_inputs_that_are_always_zero_and_few_tokens() -> None:
    w, x = weights(8, 128), inputs(5, 128)
    x[:, 10:20] = 0.0
    found = gptq(w, x.double().T @ x.double(), INT4)
    assert found.dequantized().isfinite().all()
    # nothing makes up for what is never seen
    dead = (found.dequantized() - w)[:, 10:20].norm()
    assert dead <= 1.6 * (rtn(w, INT4).dequantized() - w)[:, 10:20].norm()
    assert gptq(w, torch.zeros(128, 128), INT4).dequantized().isfinite().all()


# --- folding, awq, smoothquant -------------------------------------------------------------------------------------


def seen_by(model: object, documents: list[list[int]]) -> list[dict[str, Seen]]:
    found: list[dict[str, Seen]] = []
    block_by_block(model, documents, lambda index, block, seen: found.append(seen))  # type: ignore[arg-type]
    return found


DOCUMENTS = [tokens(40, seed=s).tolist() for s in range(6)]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_folding_changes_nothing(kv_heads: int, biased: bool) -> None:
    model = small_model(num_kv_heads=kv_heads, qkv_bias=biased, out_bias=biased, std=0.1)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    row = tokens(30)
    before = our_logits(model, row)
    generator = torch.Generator().manual_seed(0)
    for block in model.trunk.layers:
        assert isinstance(block, Block)
        assert [pair.name for pair in pairs_of(block)] == ["mlp.down", "mlp.gate_up", "attention.out", "attention.qkv"]
        for pair in pairs_of(block):
            fold(pair, pair.free(torch.rand(pair.layer.in_features, generator=generator) * 3 + 0.2))
    torch.testing.assert_close(our_logits(model, row), before, rtol=0, atol=1e-5 * before.abs().max().item())
    assert not torch.equal(our_logits(model, row), before)


@pytest.mark.parametrize("name", ["awq", "smooth"])
def test_methods_keep_the_model_before_rounding(name: str) -> None:
    model = small_model(std=0.1)
    row = tokens(30)
    before = our_logits(model, row)

    def visit(index: int, block: Block, seen: dict[str, Seen]) -> None:
        if name == "awq":
            after = awq_scales(block, seen, INT4)
            assert all(after[key].tokens == seen[key].tokens for key in seen)
        else:
            smooth(block, seen, alpha=0.5)

    block_by_block(model, DOCUMENTS, visit)
    torch.testing.assert_close(our_logits(model, row), before, rtol=0, atol=1e-5 * before.abs().max().item())


def test_awq_knows_what_layers_see_after_folding() -> None:
    model = small_model(std=0.1)
    copied = copy.deepcopy(model)
    before = seen_by(model, DOCUMENTS)[0]
    block = copied.trunk.layers[0]
    after = awq_scales(block, before, INT4)  # type: ignore[arg-type]
    true = seen_by(copied, DOCUMENTS)[0]
    for name, seen in after.items():
        torch.testing.assert_close(seen.gram_II, true[name].gram_II, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(seen.mean_I, true[name].mean_I, rtol=1e-3, atol=1e-5)


def test_awq_outputs_are_closer_than_with_rtn() -> None:
    model = small_model(std=0.1)
    seen, block = seen_by(model, DOCUMENTS)[0], model.trunk.layers[0]
    original = {name: layer.weight.detach().clone() for name, layer in linears(block).items()}
    after = awq_scales(block, seen, INT4)  # type: ignore[arg-type]
    for name in ("attention.qkv", "mlp.gate_up"):
        weight = dict(linears(block))[name].weight.detach()
        ours = awq(weight, after[name].gram_II, INT4).dequantized(torch.float64) - weight
        nearest = rtn(original[name], INT4).dequantized(torch.float64) - original[name]
        assert output_error(ours, after[name].gram_II) < output_error(nearest, seen[name].gram_II)


def test_awq_clips_for_the_outputs_of_a_group() -> None:
    w, x = weights(12, 64), inputs(200, 64)
    gram = x.double().T @ x.double()
    found = awq(w, gram, INT4).dequantized(torch.float64) - w
    full = full_grid(grouped(w.double(), INT4), INT4)
    naive = full.values(full.codes(grouped(w.double(), INT4))).flatten(1) - w
    for difference_of_group in (slice(0, 32), slice(32, 64)):
        parts = [
            (d[:, difference_of_group] @ x[:, difference_of_group].double().T).square().sum(1) for d in (found, naive)
        ]
        assert (parts[0] <= parts[1] + 1e-9).all() and parts[0].sum() < parts[1].sum()


def test_smoothing_by_hand() -> None:
    weight = torch.tensor([[1.0, -4.0, 0.0], [0.5, 2.0, 0.0]])
    found = smoothing(weight, torch.tensor([16.0, 1.0, 5.0]), alpha=0.5)
    assert found.tolist() == [4.0, 0.5, 1.0]


def test_smoothing_evens_out_activations() -> None:
    model = small_model(std=0.1)
    norm = model.trunk.layers[0].mlp_norm.weight
    with torch.no_grad():
        norm[::9] *= 30  # outlier channels, as large models have them
    spread = lambda seen: (seen.largest_I.max() / seen.largest_I.median()).item()  # noqa: E731
    before = spread(seen_by(model, DOCUMENTS)[0]["mlp.gate_up"])
    block_by_block(model, DOCUMENTS, lambda index, block, seen: smooth(block, seen, alpha=0.5))
    assert spread(seen_by(model, DOCUMENTS)[0]["mlp.gate_up"]) < before / 3


# --- calibration ---------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_inputs() -> None:
    model = small_model(std=0.1)
    found, caught = seen_by(model, DOCUMENTS), []
    handle = model.trunk.layers[1].mlp.down.register_forward_pre_hook(lambda _, a: caught.append(a[0].detach()))
    for document in DOCUMENTS:
        our_logits(model, torch.tensor(document))
    handle.remove()
    x = torch.cat(caught).double()
    seen = found[1]["mlp.down"]
    assert seen.tokens == len(x) == 240
    torch.testing.assert_close(seen.gram_II, x.T @ x, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen.mean_I, x.abs().mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen.largest_I, x.abs().amax(0), rtol=1e-4, atol=1e-6)


def test_later_blocks_see_what_earlier_ones_make_now() -> None:
    model, silent = small_model(std=0.1), small_model(std=0.1)

    def visit(index: int, block: Block, seen: dict[str, Seen]) -> None:
        if index == 0:
            torch.nn.init.zeros_(block.attention.out.weight)
            torch.nn.init.zeros_(block.mlp.down.weight)
        else:
            found.update(seen)

    found: dict[str, Seen] = {}
    block_by_block(model, DOCUMENTS, visit)
    torch.nn.init.zeros_(silent.trunk.layers[0].attention.out.weight)
    torch.nn.init.zeros_(silent.trunk.layers[0].mlp.down.weight)
    true = seen_by(silent, DOCUMENTS)[1]
    torch.testing.assert_close(found["attention.qkv"].gram_II, true["attention.qkv"].gram_II)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 60))
def test_batches_hold_every_document_in_order(lengths: list[int], room: int) -> None:
    documents = [[index] * length for index, length in enumerate(lengths)]
    batches = packed(documents, tokens=room)
    assert [document for batch in batches for document in batch] == documents
    assert all(sum(map(len, batch)) <= room or len(batch) == 1 for batch in batches)


def test_a_damping_too_small_for_its_inputs_is_named() -> None:
    x = weights(3, 128).double()  # three directions for 128 inputs
    with pytest.raises(ConfigError, match=r"damping: .*128 columns.*\n.*larger damping"):
        gptq(weights(8, 128), x.T @ x, INT4, damping=1e-30)
    assert gptq(weights(8, 128), x.T @ x, INT4).dequantized().isfinite().all()
