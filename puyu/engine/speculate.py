"""Guesses of the next tokens, which the model then checks all at once (Leviathan et al. 2023, arXiv 2211.17192).

A drafter only proposes. A guess is kept when it is what sampling gives at that place anyway, so a drafter changes
the number of steps and never a token; that holds for greedy and for seeded sampling alike.

`LookupDrafter` finds the last tokens earlier in the same text (prompt lookup: Saxena 2023): free, and good where
answers repeat their prompt. `ModelDrafter` lets a small model with the same tokenizer write ahead; it keeps keys
and values in a cache of its own, in the blocks of the request.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

import torch

from puyu.engine.request import Running
from puyu.engine.runner import Runner, Span
from puyu.model.heads import CausalLM
from puyu.model.paged import KVCache

Wanted = Sequence[tuple[Running, int]]
"""Decoding requests, and how many tokens to guess for each at most; their blocks have room for them."""

CATCH_UP = 2048
"""Tokens that a draft model reads in one step; a longer prompt is guessed at a little later."""


class Drafter(Protocol):
    """Proposes tokens for requests that decode."""

    def attach(self, cache: KVCache) -> None:
        """Told which blocks the engine has, before the first guess."""
        ...

    def detach(self) -> None:
        """Give memory back until `attach` is called again."""
        ...

    def block_bytes(self, block_size: int) -> int:
        """Memory that it takes for each block of the engine's."""
        ...

    def propose(self, wanted: Wanted) -> list[list[int]]:
        """Guesses for each request, none where it has no idea."""
        ...


class LookupDrafter:
    """The tokens that followed the last time the text ended like this; the longest match of `longest` to
    `shortest` tokens counts, the most recent one of equals."""

    def __init__(self, *, longest: int = 4, shortest: int = 2) -> None:
        assert 1 <= shortest <= longest
        self.longest, self.shortest = longest, shortest

    def attach(self, cache: KVCache) -> None:
        """Needs no cache."""

    def detach(self) -> None:
        """Holds no memory."""

    def block_bytes(self, block_size: int) -> int:
        """None."""
        return 0

    def propose(self, wanted: Wanted) -> list[list[int]]:
        return [self.look_up(running.tokens, count) for running, count in wanted]

    def look_up(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that may follow."""
        text = array("i", tokens)
        data, width = text.tobytes(), text.itemsize
        for size in range(min(self.longest, len(tokens) - 1), self.shortest - 1, -1):
            end, at = data[-size * width :], len(data) - size * width
            while (at := data.rfind(end, 0, at + size * width - 1)) >= 0:
                if at % width == 0:
                    return _copied(tokens, at // width + size, count)
        return []


def _copied(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start` on; past the end, those that were copied are copied again."""
    period = len(tokens) - start
    return [tokens[start + index % period] for index in range(count)]


class ModelDrafter:
    """A small model that decodes greedily ahead of the large one, in a cache with the same block numbers.

    Blocks that requests share are written for the first of them; where that has not happened, a guess is bad and
    nothing else.
    """

    def __init__(self, model: CausalLM, *, num_ids: int | None = None) -> None:
        """`num_ids`: it guesses only ids below; its vocabulary may be padded further than the large model's."""
        self.model, self.num_ids = model, num_ids
        self._runner: Runner | None = None

    def attach(self, cache: KVCache) -> None:
        """Make a cache with as many blocks as the engine's."""
        own = KVCache(
            self.model.config,
            num_blocks=cache.num_blocks,
            block_size=cache.block_size,
            device=self.model.trunk.device,
            dtype=self._dtype,
        )
        own.rows.zero_()  # what was never written is a bad guess, not NaN
        self._runner = Runner(self.model, own, num_ids=self.num_ids)

    def detach(self) -> None:
        """Give the cache back."""
        self._runner = None

    def block_bytes(self, block_size: int) -> int:
        """Keys and values of the draft model."""
        return KVCache.block_bytes(self.model.config, block_size=block_size, dtype=self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.trunk.compute_dtype or self.model.trunk.embedding.weight.dtype

    def propose(self, wanted: Wanted) -> list[list[int]]:
        """Nothing for a request that has outgrown the draft model's context."""
        for running, _ in wanted:
            # guesses that were kept are tokens now, and their keys are right; what follows them is not
            running.num_drafted = min(running.num_drafted, len(running.tokens) - 1)
        guesses: list[list[int]] = [[] for _ in wanted]
        longest = self.model.config.max_positions
        places = [at for at, (running, count) in enumerate(wanted) if len(running.tokens) + count <= longest]
        while places:
            spans = [self._next(wanted[at][0], guesses[at]) for at in places]
            best = self._run(spans)
            for at, span, token in zip(places, spans, best, strict=True):
                running = wanted[at][0]
                running.num_drafted = span.context + len(span.tokens)
                if running.num_drafted >= len(running.tokens):
                    guesses[at].append(token)
            places = [at for at in places if 0 < len(guesses[at]) < wanted[at][1]]
        return guesses

    def _next(self, running: Running, guess: list[int]) -> Span:
        """What the draft model reads next: what it has not seen of the text, or its own last guess."""
        text = running.tokens if not guess else [*running.tokens, *guess]
        start = running.num_drafted
        return Span(text[start : start + CATCH_UP], start, running.blocks)

    def _run(self, spans: Sequence[Span]) -> list[int]:
        assert self._runner is not None, "attach the drafter first"
        output = self._runner.run(spans)
        if output.best is not None:
            return [max(token, 0) for token in output.best]
        return output.logits_SV[:, : self.num_ids].argmax(dim=-1).tolist()
