"""Who owns which block of the KV cache: reference counts, a prefix cache over full blocks, and an audit.

Pure Python over block numbers; knows no tensors and no requests. A full block is found again by a key that hashes
its tokens and the key of the block before it, so equal keys mean equal prefixes (Kwon et al. 2023, arXiv
2309.06180). A block is shared only after its keys and values were written (`seal`). A released block keeps its
content until it is needed: the least recently released goes first.

    >>> pool = BlockPool(num_blocks=4, block_size=2)
    >>> blocks = pool.allocate(2)
    >>> pool.seal(block_keys([1, 2, 3, 4], 2), blocks)
    >>> pool.release(blocks); pool.match(block_keys([1, 2, 9], 2))
    [0]
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def block_keys(
    tokens: Sequence[int], block_size: int, known: Sequence[bytes] = (), *, salt: bytes = b""
) -> list[bytes]:
    """Content keys of the full blocks of `tokens`; `known` are those of its first blocks, not computed again.

    Equal tokens with another `salt` (an adapter's name) have other keys, because they have other values.
    """
    keys = list(known)
    for start in range(len(keys) * block_size, len(tokens) - block_size + 1, block_size):
        parent = keys[-1] if keys else salt
        content = array("q", tokens[start : start + block_size]).tobytes()
        keys.append(blake2b(parent + content, digest_size=16).digest())
    return keys


class BlockPool:
    """Blocks 0 .. num_blocks - 1, each free, or held by one or more block tables."""

    def __init__(self, *, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks, self.block_size, self.prefix_cache = num_blocks, block_size, prefix_cache
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, those with cached content included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks whose content can be found again."""
        return len(self._key_of)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take free blocks; what they cached is forgotten."""
        assert self.can_allocate(count), f"{count} blocks asked for, {len(self._free)} free"
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self._references[block] = 1
        return blocks

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The cached blocks of the longest known prefix; nothing is taken."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_after(self, blocks: Sequence[int]) -> int:
        """Free blocks that would remain if `blocks`, found by `match`, were shared."""
        return len(self._free) - sum(self._references[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Hold blocks found by `match` once more."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give a table back; its end is reused before its beginning, unsealed blocks before all."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} was released twice"
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)

    def seal(self, keys: Sequence[bytes], blocks: Sequence[int]) -> None:
        """Make written full blocks findable; a key that is known already keeps its first block."""
        if not self.prefix_cache:
            return
        for key, block in zip(keys, blocks, strict=True):
            if key not in self._block_of and block not in self._key_of:
                self._block_of[key] = block
                self._key_of[block] = key

    def unseal(self, blocks: Sequence[int]) -> None:
        """Forget the content of blocks that cannot be trusted."""
        for block in blocks:
            self._forget(block)

    def reset(self) -> None:
        """Forget all cached content (the weights have changed); tables in use stay."""
        self._block_of.clear()
        self._key_of.clear()

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]

    def audit(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that references equal the tables in use, the rest is free, and the cache maps agree."""
        tables = list(tables)
        for table in tables:
            assert len(set(table)) == len(table), f"a table holds a block twice: {table}"
        held = Counter(block for table in tables for block in table)
        for block, count in enumerate(self._references):
            assert held[block] == count, f"block {block}: {count} references, {held[block]} tables"
            assert (block in self._free) == (count == 0), f"block {block}: {count} references, free list disagrees"
        assert len(self._free) + len(held) == self.num_blocks, "free and held blocks do not add up"
        assert {key: block for block, key in self._key_of.items()} == self._block_of, "cache maps disagree"
