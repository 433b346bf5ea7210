"""Packed documents against one by one, the paged cache against the full forward, bf16 against fp32."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
