"""The paged plan against the packed forward over whole sequences, for any mixture and order of chunks."""

from __future__ import annotations

import random

import pytest
import torch

from puyu.model.heads import CausalLM
from puyu.model.packed import PackedPlan
from puyu.model.paged import KVCache, PagedPlan, PagedSequence
from tests.engine.conftest import tiny_model


def whole(model: CausalLM, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor(ids), torch.arange(len(ids)), PackedPlan.build((0,), len(ids)))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_chunks_in_any_order_equal_the_whole(seed: int, num_kv_heads: int) -> None:
    rng = random.Random(seed)
    model = tiny_model(seed, num_kv_heads=num_kv_heads).double()
    cache = KVCache(model.config, num_blocks=64, block_size=4, device="cpu", dtype=torch.float64)
    cache.rows.fill_(float("nan"))  # whatever is read without having been written shows
    free = rng.sample(range(64), 64)
    sequences = [[rng.randrange(97) for _ in range(rng.randrange(1, 30))] for _ in range(6)]
    tables = [tuple(free.pop() for _ in range(-(-len(ids) // 4))) for ids in sequences]
    done = [0] * 6
    while any(d < len(ids) for d, ids in zip(done, sequences, strict=True)):
        chosen = [i for i in range(6) if done[i] < len(sequences[i]) and rng.random() < 0.7]
        lengths = [min(rng.choice([1, 1, 3, 9]), len(sequences[i]) - done[i]) for i in chosen]
        if not chosen:
            continue
        tokens = [t for i, n in zip(chosen, lengths, strict=True) for t in sequences[i][done[i] : done[i] + n]]
        positions = [p for i, n in zip(chosen, lengths, strict=True) for p in range(done[i], done[i] + n)]
        parts, start = [], 0
        for i, n in zip(chosen, lengths, strict=True):
            parts.append(PagedSequence(start, n, done[i], tables[i]))
            start += n
        logits = model(torch.tensor(tokens), torch.tensor(positions), PagedPlan.build(cache, parts))
        for i, part in zip(chosen, parts, strict=True):
            expected = whole(model, sequences[i][: done[i] + part.length])[done[i] :]
            torch.testing.assert_close(logits[part.start : part.start + part.length], expected, rtol=0, atol=1e-10)
            done[i] += part.length


@torch.no_grad()
def test_bf16_cache_stays_close_to_the_whole() -> None:
    model = tiny_model(1)
    exact = whole(model, list(range(20)))
    model.set_compute_dtype(torch.bfloat16)
    cache = KVCache(model.config, num_blocks=8, block_size=4, device="cpu", dtype=torch.bfloat16)
    rows = []
    for at in range(20):
        plan = PagedPlan.build(cache, [PagedSequence(0, 1, at, tuple(range(8)))])
        rows.append(model(torch.tensor([at]), torch.tensor([at]), plan))
    difference = (torch.cat(rows).float() - exact).abs().mean() / exact.abs().mean()
    assert difference < 0.03
