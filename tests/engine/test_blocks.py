"""The block pool against a naive picture of who holds what."""

from __future__ import annotations

import random

import pytest

from puyu.engine.blocks import BlockPool, block_keys


def test_keys_are_equal_exactly_for_equal_prefixes() -> None:
    a, b = [1, 2, 3, 4, 5, 6], [1, 2, 9, 4, 5, 6]
    assert block_keys(a, 2)[:1] == block_keys(b, 2)[:1]
    assert not set(block_keys(a, 2)[1:]) & set(block_keys(b, 2)[1:]), "a later block knows what came before it"
    assert block_keys(a, 4) == block_keys(a[:5], 4), "only full blocks have keys"
    assert block_keys(a, 2, block_keys(a[:4], 2)) == block_keys(a, 2)


def test_a_released_block_is_found_until_it_is_needed() -> None:
    pool = BlockPool(num_blocks=3, block_size=2)
    keys, blocks = block_keys([1, 2, 3, 4], 2), pool.allocate(2)
    assert pool.match(keys) == [], "not shared before it is written"
    pool.seal(keys, blocks)
    pool.release(blocks)
    assert pool.match(keys) == blocks and pool.num_free == 3
    other = pool.allocate(2)
    assert blocks[0] not in other, "the end of a table is reused before its beginning"
    assert pool.match(keys) == blocks[:1]
    pool.share(pool.match(keys))
    pool.audit([other, blocks[:1]])
    pool.reset()
    assert pool.match(keys) == []
    pool.audit([other, blocks[:1]])


def test_misuse_is_caught() -> None:
    pool = BlockPool(num_blocks=2, block_size=2)
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError, match="references"):
        pool.audit([])
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)
    with pytest.raises(AssertionError, match="free"):
        BlockPool(num_blocks=2, block_size=2).allocate(3)


@pytest.mark.parametrize("seed", range(20))
def test_random_use_never_leaks(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(num_blocks=12, block_size=2)
    tables: list[list[int]] = []
    written: dict[int, tuple[int, ...]] = {}  # the naive twin: what each block holds, from its first token on
    for _ in range(200):
        if tables and rng.random() < 0.4:
            pool.release(tables.pop(rng.randrange(len(tables))))
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(2, 12))]
            keys = block_keys(tokens, 2)
            found = pool.match(keys)
            for index, block in enumerate(found):
                assert written[block] == tuple(tokens[: 2 * index + 2]), "a block with other content was given out"
            missing = pool.blocks_for(len(tokens)) - len(found)
            if missing > pool.num_free_after(found):
                continue
            pool.share(found)
            table = found + pool.allocate(missing)
            for index in range(len(found), len(keys)):
                written[table[index]] = tuple(tokens[: 2 * index + 2])
            pool.seal(keys, table[: len(keys)])
            tables.append(table)
        pool.audit(tables)
