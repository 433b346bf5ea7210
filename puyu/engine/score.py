"""Log-likelihood of continuations, in lm-evaluation-harness's convention, by packed forwards without a cache.

The ids are those of context + continuation encoded as one text after <s>; the continuation's ids are what follows
the ids of the context alone. Spaces at the end of the context belong to the continuation. A pair that is longer
than the model's context loses the beginning of its context, and that is logged. An empty context leaves <s>.

    >>> pairs = [("2 + 2 =", " 4")]
    >>> score_encoded(model, encode_pairs(tokenizer, pairs), pairs)[0].is_greedy
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from puyu.errors import RequestError
from puyu.log import logger
from puyu.model.heads import CausalLM
from puyu.model.packed import PackedPlan
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Scored

TOKENS_PER_FORWARD = 4096
LOGITS_PER_PRODUCT = 1 << 24


class Pair(NamedTuple):
    """Ids of a context and its continuation; the last `num_scored` are the continuation."""

    ids: list[int]
    num_scored: int


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Pair]:
    """`encode_pair` of all."""
    return [encode_pair(tokenizer, context, continuation) for context, continuation in pairs]


def score_encoded(model: CausalLM, encoded: Sequence[Pair], pairs: Sequence[tuple[str, str]]) -> list[Scored]:
    """One result for each pair, in order; `encoded` is what `encode_pairs` gave for them. Long and short pairs are
    batched by length."""
    fitted = _fit(encoded, limit=model.config.max_positions)
    results: dict[int, Scored] = {}
    for batch in _batches(fitted):
        for index, (logprobs, greedy) in zip(batch, logprobs_of(model, [fitted[i] for i in batch]), strict=True):
            num_bytes = len(pairs[index][1].encode("utf-8"))
            results[index] = Scored(float(logprobs.double().sum()), len(logprobs), num_bytes, bool(greedy.all()))
    return [results[index] for index in range(len(pairs))]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Ids of both; RequestError for an empty continuation."""
    if not continuation:
        raise RequestError("the continuation is empty", param="continuation")
    context, spaces = context.rstrip(), context[len(context.rstrip()) :]
    whole = tokenizer.encode(context + spaces + continuation)
    num_context = len(tokenizer.encode(context))
    # a token may span the border; at least the last one belongs to the continuation
    num_scored = max(1, len(whole) - num_context)
    if not whole:
        raise RequestError(f"{context + spaces + continuation!r} is no token of this model", param="continuation")
    if tokenizer.bos_id is not None:
        return Pair([tokenizer.bos_id, *whole], num_scored)
    if num_scored == len(whole):
        raise RequestError("this tokenizer has no <s>, so the context must not be empty", param="context")
    return Pair(whole, num_scored)


def _fit(pairs: Sequence[Pair], *, limit: int) -> list[Pair]:
    """Cut contexts from the left so that all but the last token fit the model."""
    for pair in pairs:
        if pair.num_scored > limit:
            raise RequestError(
                f"a continuation of {pair.num_scored} tokens is longer than the context of {limit}",
                param="continuation",
                remedy="score it in windows",
            )
    cut = sum(len(pair.ids) > limit + 1 for pair in pairs)
    if cut:
        logger.warning("%d of %d contexts were cut from the left to %d tokens", cut, len(pairs), limit)
    return [Pair(pair.ids[-(limit + 1) :], pair.num_scored) for pair in pairs]


def _batches(pairs: Sequence[Pair]) -> Iterator[list[int]]:
    """Indices in groups of similar length, each within the token budget."""
    batch: list[int] = []
    total = 0
    for index in sorted(range(len(pairs)), key=lambda i: len(pairs[i].ids)):
        length = len(pairs[index].ids)
        if batch and total + length > TOKENS_PER_FORWARD:
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += length
    if batch:
        yield batch


@torch.inference_mode()
def logprobs_of(model: CausalLM, pairs: Sequence[Pair]) -> list[tuple[Tensor, Tensor]]:
    """(log-probability, is the most likely) of each scored id of each pair, from one forward."""
    device = model.trunk.device
    inputs = [pair.ids[:-1] for pair in pairs]
    starts = [0]
    for ids in inputs:
        starts.append(starts[-1] + len(ids))
    tokens_T = torch.tensor([id for ids in inputs for id in ids], device=device)
    positions_T = torch.cat([torch.arange(len(ids), device=device) for ids in inputs])
    hidden_TD = model.trunk(tokens_T, positions_T, PackedPlan.build(starts[:-1], starts[-1], device))
    picked = [at for end, pair in zip(starts[1:], pairs, strict=True) for at in range(end - pair.num_scored, end)]
    targets_C = torch.tensor([id for pair in pairs for id in pair.ids[-pair.num_scored :]], device=device)
    logprobs_C, greedy_C = _target_logprobs(model, hidden_TD[torch.tensor(picked, device=device)], targets_C)
    sizes = [pair.num_scored for pair in pairs]
    return list(zip(torch.split(logprobs_C, sizes), torch.split(greedy_C, sizes), strict=True))


def _target_logprobs(model: CausalLM, hidden_CD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax at the targets, a few rows at a time so that the logits stay small."""
    rows = max(1, LOGITS_PER_PRODUCT // model.config.vocab_size)
    logprobs, greedy = [], []
    for hidden, targets in zip(torch.split(hidden_CD, rows), torch.split(targets_C, rows), strict=True):
        logits = model.logits(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logprobs.append(logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(dim=-1))
        greedy.append(logits.argmax(dim=-1) == targets)
    return torch.cat(logprobs).cpu(), torch.cat(greedy).cpu()
