"""One token for each row of logits, on the device and without sorting: nothing waits for the host.

B rows, V vocabulary. As `engine/sampler.py`: temperature 0 is greedy; a row without filters inverts the cumulative
distribution in the order of ids; with filters in the order of probability, over what top-k, top-p and min-p all keep.
"The most likely tokens that together weigh w" end at a threshold, and the threshold is found digit by digit: logits
as integers of the same order, two bits a pass, so bf16 needs eight passes over a row that the cache holds. Tokens of
equal logits are kept or dropped together and drawn in the order of ids. A row that is not finite gives -1.

    tokens_B, logprobs_B = sample_rows(logits_BV, Knobs.of([(0.8, 40, 0.95, 0.0, 0.31)], device), num_ids=V)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

_BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


class Knobs(NamedTuple):
    """Of each row, fp32 [B]: temperature, top_k (0: all), top_p, min_p, and a uniform number in [0, 1)."""

    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    uniform_B: Tensor

    @staticmethod
    def of(rows: Sequence[tuple[float, float, float, float, float]], device: torch.device) -> Knobs:
        """One copy that does not wait. A uniform number that fp32 rounds to 1 becomes the largest below it."""
        table = np.array(rows, dtype=np.float32).T.copy()
        table[4] = np.minimum(table[4], np.float32(_BELOW_ONE))
        both = torch.from_numpy(table)
        if device.type == "cuda":
            both = both.pin_memory().to(device, non_blocking=True)
        return Knobs(*both)


def sample_rows_reference(logits_BV: Tensor, knobs: Knobs, *, num_ids: int) -> tuple[Tensor, Tensor]:
    """Row by row, by sorting, in fp64."""
    tokens, logprobs = [], []
    for row, (temperature, top_k, top_p, min_p, uniform) in enumerate(zip(*(x.tolist() for x in knobs), strict=True)):
        all_V = logits_BV[row].double()
        logits_V = all_V[:num_ids]
        if not logits_V.max().isfinite():
            tokens.append(-1)
            logprobs.append(math.nan)
            continue
        token = int(logits_V.argmax())
        if temperature > 0:
            filtered = 0 < top_k < num_ids or top_p < 1 or min_p > 0
            token = _draw(logits_V, temperature, (top_k, top_p, min_p) if filtered else None, uniform)
        tokens.append(token)
        logprobs.append(float(all_V[token] - all_V.logsumexp(0)))
    return torch.tensor(tokens, dtype=torch.int32), torch.tensor(logprobs)


def _draw(logits_V: Tensor, temperature: float, filters: tuple[float, float, float] | None, uniform: float) -> int:
    weights_V = ((logits_V - logits_V.max()) / temperature).exp()
    order = torch.arange(len(logits_V))
    if filters is not None:
        order = logits_V.argsort(descending=True, stable=True)
        top_k, top_p, min_p = filters
        sorted_V = logits_V[order]
        keep = torch.ones(len(order), dtype=torch.bool)
        if 0 < top_k < len(order):
            keep &= sorted_V >= sorted_V[int(top_k) - 1]
        mass_V = (weights_V[order] * keep).cumsum(0)
        reached = int((mass_V < top_p * mass_V[-1]).sum())
        keep &= sorted_V >= sorted_V[min(reached, len(order) - 1)]
        keep &= weights_V[order] >= min_p
        order = order[keep]
    mass_V = weights_V[order].cumsum(0)
    return int(order[min(int((mass_V <= uniform * mass_V[-1]).sum()), len(order) - 1)])


def sample_rows(logits_BV: Tensor, knobs: Knobs, *, num_ids: int) -> tuple[Tensor, Tensor]:
    """Tokens int32 [B] (-1: the row is not finite) and their log-probabilities under the model itself, fp32 [B]."""
    rows, vocab = logits_BV.shape
    tokens_B = torch.empty(rows, dtype=torch.int32, device=logits_BV.device)
    logprobs_B = torch.empty(rows, dtype=torch.float32, device=logits_BV.device)
    block = 2048 if vocab > 1024 else 256
    _sample[(rows,)](
        *(logits_BV, *knobs, tokens_B, logprobs_B, logits_BV.stride(0), vocab, num_ids),
        BITS=8 * logits_BV.element_size(),
        BLOCK=block,
        num_warps=16 if block == 2048 else 2,
    )
    return tokens_B, logprobs_B


@triton.jit
def _key(x, BITS: tl.constexpr):
    """Unsigned integers in the falling order of floats: the likeliest token has the smallest. -0 counts as 0."""
    x = tl.where(x == 0, tl.zeros_like(x), x)
    if BITS == 16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        key = 0x7FFF - (bits ^ ((bits >> 31) & 0x7FFF))
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) ^ 0x7FFFFFFF
    return key.to(tl.uint32, bitcast=True)


@triton.jit
def _weights(x, live, best, inverse, COUNT: tl.constexpr):
    """exp((x - best) / temperature), or 1 for each token that is counted."""
    if COUNT:
        return live.to(tl.float32)
    return tl.where(live, tl.exp((x.to(tl.float32) - best) * inverse), 0.0)


@triton.jit
def _mass(row_ptr, size, best, inverse, least, limit, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The weight of all tokens up to the key `limit` that weigh at least `least`."""
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + at, mask=at < size, other=float("-inf"))
        weight = _weights(x, (at < size) & (_key(x, BITS) <= limit), best, inverse, False)
        sums += tl.where(weight >= least, weight, 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _crossing(
    row_ptr, size, best, inverse, least, limit, target,
    COUNT: tl.constexpr, STRICT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The smallest key up to which tokens weigh `target` (more than it when STRICT); at most `limit`."""
    found = limit * 0
    for step in tl.static_range(BITS // 2):
        first = found | ((1 << (BITS - 2 - 2 * step)) - 1)
        second, third = first | (1 << (BITS - 2 - 2 * step)), first | (2 << (BITS - 2 - 2 * step))
        sums_1 = tl.zeros((BLOCK,), tl.float32)
        sums_2 = tl.zeros((BLOCK,), tl.float32)
        sums_3 = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + at, mask=at < size, other=float("-inf"))
            key = _key(x, BITS)
            weight = _weights(x, (at < size) & (key <= limit), best, inverse, COUNT)
            weight = tl.where(weight >= least, weight, 0.0)
            sums_1 += tl.where(key <= first, weight, 0.0)
            sums_2 += tl.where(key <= second, weight, 0.0)
            sums_3 += tl.where(key <= third, weight, 0.0)
        a, b, c = tl.sum(sums_1, axis=0), tl.sum(sums_2, axis=0), tl.sum(sums_3, axis=0)
        if STRICT:
            digit = (a <= target).to(tl.uint32) + (b <= target).to(tl.uint32) + (c <= target).to(tl.uint32)
        else:
            digit = (a < target).to(tl.uint32) + (b < target).to(tl.uint32) + (c < target).to(tl.uint32)
        found = found | (digit << (BITS - 2 - 2 * step))
    return tl.minimum(found, limit)


@triton.jit
def _rank(row_ptr, size, key, wanted, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The id of token number `wanted` among those of one key, the last one if there are fewer."""
    before = wanted * 0
    found = size * 0 - 1
    for start in tl.range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + at, mask=at < size, other=float("-inf"))
        equal = ((at < size) & (_key(x, BITS) == key)).to(tl.int32)
        number = before + tl.cumsum(equal, axis=0) - 1
        hit = (equal > 0) & (number <= wanted)
        found = tl.maximum(found, tl.max(tl.where(hit, at, -1), axis=0))
        before += tl.sum(equal, axis=0)
    return found


@triton.jit
def _invert(row_ptr, size, best, inverse, target, BLOCK: tl.constexpr):
    """The first id up to which, in the order of ids, tokens weigh more than `target`."""
    before = target * 0.0
    found, last = size * 0 + 2147483647, size * 0
    for start in tl.range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + at, mask=at < size, other=float("-inf"))
        weight = _weights(x, at < size, best, inverse, False)
        reached = before + tl.cumsum(weight, axis=0)
        found = tl.minimum(found, tl.min(tl.where((reached > target) & (weight > 0), at, 2147483647), axis=0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, at, 0), axis=0))
        before += tl.sum(weight, axis=0)
    return tl.minimum(found, last)


@triton.jit
def _scan(row_ptr, vocab, size, BLOCK: tl.constexpr):
    """The best logit among `size` ids and the first id that has it; log of the sum over all of `vocab`; health."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        chosen = tl.where(at < size, x, float("-inf"))
        bad += ((chosen != chosen) | (chosen == float("inf"))).to(tl.int32)
        where = tl.where(chosen > best, at, where)
        best = tl.maximum(best, chosen)
        higher = tl.maximum(top, x)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp(tl.where(top == higher, 0.0, top - safe)) + tl.exp(x - safe)
        top = higher
    peak = tl.max(best, axis=0)
    first = tl.min(tl.where(best == peak, where, 2147483647), axis=0)
    high = tl.max(top, axis=0)
    safe_high = tl.where(high == float("-inf"), 0.0, high)
    total = tl.sum(tl.where(top > float("-inf"), sums * tl.exp(top - safe_high), 0.0), axis=0)
    healthy = (tl.sum(bad, axis=0) == 0) & (peak > float("-inf"))
    return peak, first, safe_high + tl.log(tl.where(total > 0, total, 1.0)), healthy


@triton.jit
def _sample(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    uniform_ptr,
    tokens_ptr,
    logprobs_ptr,
    stride,
    vocab,
    size,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + b * stride
    temperature = tl.load(temperature_ptr + b)
    top_k, top_p, min_p = tl.load(top_k_ptr + b), tl.load(top_p_ptr + b), tl.load(min_p_ptr + b)
    uniform = tl.load(uniform_ptr + b)
    best, token, log_sum, healthy = _scan(row_ptr, vocab, size, BLOCK)
    if (temperature > 0) & healthy:
        inverse = 1.0 / temperature
        limit = _key(tl.full((1,), float("-inf"), logits_ptr.dtype.element_ty), BITS)
        limit = tl.max(limit, axis=0)
        by_count = (top_k > 0) & (top_k < size)
        if by_count | (top_p < 1) | (min_p > 0):
            if by_count:
                limit = _crossing(row_ptr, size, best, inverse, 0.0, limit, top_k, True, False, BITS, BLOCK)
            if top_p < 1:
                mass = _mass(row_ptr, size, best, inverse, 0.0, limit, BITS, BLOCK)
                limit = _crossing(
                    row_ptr, size, best, inverse, 0.0, limit, top_p * mass, False, False, BITS, BLOCK
                )  # fmt: skip
            target = uniform * _mass(row_ptr, size, best, inverse, min_p, limit, BITS, BLOCK)
            key = _crossing(row_ptr, size, best, inverse, min_p, limit, target, False, True, BITS, BLOCK)
            before = _mass(row_ptr, size, best, inverse, min_p, key - 1, BITS, BLOCK)
            before = tl.where(key == 0, 0.0, before)
            each = _mass(row_ptr, size, best, inverse, min_p, key, BITS, BLOCK) - before
            count = _equal(row_ptr, size, key, BITS, BLOCK)
            share = tl.where(each > 0, (target - before) / tl.where(each > 0, each, 1.0), 0.0)
            wanted = tl.minimum(tl.maximum(share, 0.0) * count, count - 1).to(tl.int32)
            token = _rank(row_ptr, size, key, wanted, BITS, BLOCK)
        else:
            target = uniform * _mass(row_ptr, size, best, inverse, 0.0, limit, BITS, BLOCK)
            token = _invert(row_ptr, size, best, inverse, target, BLOCK)
    tl.store(tokens_ptr + b, tl.where(healthy, token, -1))
    chosen = tl.load(row_ptr + token).to(tl.float32)
    tl.store(logprobs_ptr + b, tl.where(healthy, chosen - log_sum, float("nan")))


@triton.jit
def _equal(row_ptr, size, key, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens have this key."""
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + at, mask=at < size, other=float("-inf"))
        sums += ((at < size) & (_key(x, BITS) == key)).to(tl.float32)
    return tl.sum(sums, axis=0)
