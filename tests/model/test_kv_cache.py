"""Quantized keys and values: codes against a naive twin; any chunking reads the same; bytes."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.model.kv_cache import CacheStorage, KVCache
from puyu.model.paged import PagedPlan, PagedSequence
from tests.model.reference import our_logits, small_config, small_model, tokens


def cache_of(storage: CacheStorage, **changes: int) -> KVCache:
    sizes = {"num_blocks": 32, "block_size": 4} | changes
    return KVCache(small_config(), **sizes, device="cpu", dtype=torch.float32, storage=storage)  # type: ignore[arg-type]


def naive(row: list[float], last: int) -> list[float]:
    """One head of one token: scale and offset in fp16, then the nearest code of each number."""
    low, high = min(row), max(row)
    scale = torch.tensor((high - low) / last).half().item()
    offset = torch.tensor(low).half().item()
    codes = [min(max(round((value - offset) / (scale or 1.0)), 0), last) for value in row]
    return [code * scale + offset for code in codes]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["int8", "int4"]), st.integers(0, 2**31), st.floats(0.01, 30.0))
def test_what_is_read_is_what_the_naive_twin_keeps(storage: CacheStorage, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    cache = cache_of(storage)
    new = torch.randn(6, 16, generator=generator) * size + torch.randn(6, 1, generator=generator)
    new[0] = 0.0
    index = torch.randperm(200, generator=generator)[:6]
    cache.write(1, index, new)
    found = cache.read(1, index, torch.float32)
    last = 255 if storage == "int8" else 15
    true = torch.tensor([naive(row, last) for row in new.tolist()])
    step = ((new.amax(1) - new.amin(1)) / last)[:, None]
    # a number halfway between two codes may take either, everything else is the twin's
    assert ((found - true).abs() <= 1e-5 * size + 1.01 * step * ((found - true).abs() > 1e-5 * size)).all()
    assert ((found - true).abs() < 1e-4 * (size + 1)).float().mean() > 0.95
    assert torch.equal(cache.seen(new), found)
    assert ((found - new).abs() <= 0.51 * step + 0.002 * (new.abs().amax(1, keepdim=True))).all()


@torch.no_grad()
@pytest.mark.parametrize("storage", ["auto", "int8", "int4"])
@pytest.mark.parametrize("seed", range(3))
def test_chunking_changes_nothing(storage: CacheStorage, seed: int) -> None:
    """A prompt at once, in chunks, and token by token: each token sees the same keys and values."""
    rng, model = random.Random(seed), small_model(std=0.1).double()
    row = tokens(24, seed=seed)
    results = []
    for sizes in ([24], [5, 1, 11, 7], [1] * 24):
        cache = KVCache(model.config, num_blocks=32, block_size=4, device="cpu", dtype=torch.float64, storage=storage)
        table, done, parts = tuple(rng.sample(range(32), 6)), 0, []
        for size in sizes:
            plan = PagedPlan.build(cache, [PagedSequence(0, size, done, table)])
            parts.append(model(row[done : done + size], torch.arange(done, done + size), plan))
            done += size
        results.append(torch.cat(parts))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-6)
    distance = (results[0] - our_logits(model, row)).norm() / results[0].norm()
    assert (
        {"auto": 0.0, "int8": 1e-5, "int4": 1e-3}[storage]
        <= distance
        < {"auto": 1e-9, "int8": 0.02, "int4": 0.3}[storage]
    )


def test_bytes_of_a_block_are_those_of_the_tensors() -> None:
    config = small_config()
    for storage, share in (("auto", 1.0), ("int8", (16 + 4) / 64), ("int4", (8 + 4) / 64)):
        cache = cache_of(storage)  # type: ignore[arg-type]
        held = cache.rows.nbytes + (0 if cache.sides is None else cache.sides.nbytes)
        size = KVCache.block_bytes(config, block_size=4, dtype=torch.float32, storage=storage)  # type: ignore[arg-type]
        assert held == 32 * size
        assert size == share * KVCache.block_bytes(config, block_size=4, dtype=torch.float32)
