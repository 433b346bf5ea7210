"""Packed documents against one by one, the paged cache against the full forward, bf16 against fp32."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from puyu.model import packed
from puyu.model.attention import KVCache, PackedPlan, PagedPlan, PagedSequence
from puyu.model.heads import CausalLM
from tests.model.reference import our_logits, small_model, tokens

MODEL = small_model()
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_packed_documents_do_not_see_each_other(lengths: list[int]) -> None:
    starts = (0, *itertools.accumulate(lengths[:-1]))
    row = tokens(sum(lengths))
    alone = [our_logits(MODEL, part) for part in row.split(lengths)]
    torch.testing.assert_close(our_logits(MODEL, row, starts), torch.cat(alone), **CLOSE)


def test_packed_gradients_equal_one_by_one() -> None:
    lengths, model = [3, 17, 9, 9], small_model()
    row = tokens(sum(lengths))
    weights = torch.randn(len(row), 97, generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(n) for n in lengths])

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters())))

    packed = model(row, positions, PackedPlan.build((0, 3, 20, 29), len(row)))
    alone = [model(part, torch.arange(len(part)), PackedPlan.build((0,), len(part))) for part in row.split(lengths)]
    for ours, theirs in zip(
        gradients((packed * weights).sum()), gradients((torch.cat(alone) * weights).sum()), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def cache_of(model: CausalLM, *, num_blocks: int, block_size: int) -> KVCache:
    return KVCache(model.config, num_blocks=num_blocks, block_size=block_size, device="cpu", dtype=torch.float32)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), block_size=st.integers(1, 7), length=st.integers(1, 40))
def test_paged_chunks_give_the_full_forward(data: st.DataObject, block_size: int, length: int) -> None:
    """Any split into chunks over any block table; slots are computed here, by their definition."""
    needed = -(-length // block_size)
    table = tuple(data.draw(st.permutations(range(needed + 3))))[:needed]
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=6))) if length > 1 else []
    row, cache = tokens(length), cache_of(MODEL, num_blocks=needed + 3, block_size=block_size)
    parts = []
    for start, end in itertools.pairwise([0, *cuts, length]):
        slots = torch.tensor([table[i // block_size] * block_size + i % block_size for i in range(start, end)])
        covering = table[: -(-end // block_size)]
        plan = PagedPlan(cache, slots, (PagedSequence(0, end - start, start, covering),))
        with torch.no_grad():
            parts.append(MODEL(row[start:end], torch.arange(start, end), plan))
    torch.testing.assert_close(torch.cat(parts), our_logits(MODEL, row), **CLOSE)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_mixed_steps_of_several_sequences(kv_heads: int) -> None:
    """Prefill of one, a later chunk of another and decode of a third, in one step; then one token each."""
    model = small_model(num_kv_heads=kv_heads)
    rows = [tokens(12, seed=5), tokens(20, seed=6), tokens(9, seed=7)]
    tables = [(4, 0, 9), (2, 7, 1, 5, 3), (8, 6, 10)]
    cache, done = cache_of(model, num_blocks=11, block_size=4), [0, 0, 0]
    logits: list[list[torch.Tensor]] = [[], [], []]
    for takes in ({1: 7, 2: 8}, {2: 1, 1: 6, 0: 11}, {0: 1, 1: 1}, {1: 6}):
        sequences, chunk, positions, start = [], [], [], 0
        for index, count in takes.items():
            at = done[index]
            sequences.append(PagedSequence(start, count, at, tables[index][: -(-(at + count) // 4)]))
            chunk.append(rows[index][at : at + count])
            positions.append(torch.arange(at, at + count))
            start += count
        with torch.no_grad():
            out = model(torch.cat(chunk), torch.cat(positions), PagedPlan.build(cache, sequences))
        for index, part in zip(takes, out.split(list(takes.values())), strict=True):
            logits[index].append(part)
            done[index] += len(part)
    assert done == [12, 20, 9]
    for row, parts in zip(rows, logits, strict=True):
        torch.testing.assert_close(torch.cat(parts), our_logits(model, row), **CLOSE)


def test_bf16_compute_is_close_to_fp32() -> None:
    """Master weights stay fp32; activations in bf16 keep about eight bits."""
    model, row = small_model(std=0.05), tokens(60)
    wide = our_logits(model, row, (0, 25))
    model.set_compute_dtype(torch.bfloat16)
    narrow = our_logits(model, row, (0, 25))
    assert narrow.dtype == torch.bfloat16 and model.head is not None and model.head.weight.dtype == torch.float32
    error = (narrow.float() - wide).norm() / wide.norm()
    assert 0 < error < 0.02


def test_rope_theta_can_change_for_a_longer_phase() -> None:
    model, changed, row = small_model(), small_model(rope_theta=1e6), tokens(30)
    before = our_logits(model, row)
    model.set_rope_theta(1e6)
    assert model.config.rope_theta == 1e6
    assert torch.equal(our_logits(model, row), our_logits(changed, row))
    assert not torch.equal(our_logits(model, row), before)


@settings(max_examples=30, deadline=None)
@given(window=st.integers(1, 300), length=st.integers(1, 300), block=st.integers(1, 40), seed=st.integers(0, 99))
def test_windows_in_blocks_equal_one_mask(window: int, length: int, block: int, seed: int) -> None:
    """Long rows are computed in blocks of queries; the twin has the whole mask. Blocks made small on purpose."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, length, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_WINDOW_BLOCK", block)
        ours = packed._causal(q, k, v, window=window)
    places = torch.arange(length)
    seen = (places <= places[:, None]) & (places > places[:, None] - window)
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), block_size=st.integers(1, 7), length=st.integers(1, 40), window=st.integers(1, 45))
def test_paged_chunks_with_windows_give_the_full_forward(
    data: st.DataObject, block_size: int, length: int, window: int
) -> None:
    """One layer slides, one sees all; any split into chunks, and a second sequence that decodes beside them."""
    model, needed = small_model(family="mistral", windows=(window, 0)), -(-length // block_size)
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=6))) if length > 1 else []
    row, cache = tokens(length), cache_of(model, num_blocks=needed + 9, block_size=block_size)
    cache.rows.fill_(float("nan"))  # nothing that was not written may be read
    table, other = tuple(reversed(range(needed))), tuple(range(needed, needed + 9))
    parts = []
    for step, (start, end) in enumerate(itertools.pairwise([0, *cuts, length])):
        sequences = [PagedSequence(0, 1, step, other), PagedSequence(1, end - start, start, table)]
        ids, places = torch.cat((row[:1], row[start:end])), torch.cat((torch.tensor([step]), torch.arange(start, end)))
        with torch.no_grad():
            parts.append(model(ids, places, PagedPlan.build(cache, sequences))[1:])
    torch.testing.assert_close(torch.cat(parts), our_logits(model, row), **CLOSE)


def test_gradients_with_windows_equal_a_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 50, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    places = torch.arange(50)
    seen = (places <= places[:, None]) & (places > places[:, None] - 6)
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), attn_mask=seen).transpose(1, 2)
    ours = packed._causal(*inputs, window=6)
    weight = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), inputs) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
