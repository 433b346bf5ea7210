"""The sampler against a naive twin in plain Python."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from puyu.engine.sampler import Choice, sample
from puyu.types import SamplingParams


def naive(logits: list[float], params: SamplingParams, uniform: float) -> int:
    """Sort, filter, walk the cumulative sum."""
    if params.temperature == 0:
        return logits.index(max(logits))
    top = max(logits)
    weights = [math.exp((x - top) / params.temperature) for x in logits]
    order = list(range(len(logits)))
    filtered = params.top_p < 1 or 0 < params.top_k < len(logits)
    if filtered:
        order.sort(key=lambda i: -weights[i])
        order = order[: params.top_k or None]
        mass, kept, total = 0.0, [], sum(weights[i] for i in order)
        for i in order:
            if kept and mass >= params.top_p * total:
                break
            kept.append(i)
            mass += weights[i]
        order = kept
    target, total = uniform * sum(weights[i] for i in order), 0.0
    for i in order:
        total += weights[i]
        if total > target:
            return i
    return order[-1]


def _params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0, 2.0]),
        top_p=rng.choice([1.0, 0.9, 0.5, 0.01]),
        top_k=rng.choice([0, 1, 3, 7, 100]),
        logprobs=rng.random() < 0.5,
    )


@pytest.mark.parametrize("seed", range(30))
def test_a_mixed_batch_equals_the_naive_twin_row_by_row(seed: int) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rng.randrange(1, 9), 23, generator=generator, dtype=torch.float64) * 3
    choices = [Choice(_params(rng), rng.random()) for _ in range(len(logits))]
    result = sample(logits, choices)
    rows = logits.tolist()
    assert result.tokens == [naive(r, c.params, c.uniform) for r, c in zip(rows, choices, strict=True)]
    if result.logprobs is not None:
        expected = logits.log_softmax(-1)
        for row, (token, logprob) in enumerate(zip(result.tokens, result.logprobs, strict=True)):
            assert logprob == pytest.approx(float(expected[row, token]), abs=1e-12)
    for row, choice in enumerate(choices):
        alone = sample(logits[row : row + 1], [choice])
        assert alone.tokens == result.tokens[row : row + 1], "batch mates change nothing"


@pytest.mark.parametrize("seed", range(8))
def test_ids_beyond_the_tokenizer_are_never_chosen_but_counted(seed: int) -> None:
    rng = random.Random(seed)
    logits = torch.randn(6, 23, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits[:, 17:] += 5  # the padding looks best
    choices = [Choice(replace(_params(rng), logprobs=True), rng.random()) for _ in range(len(logits))]
    found, cut = sample(logits, choices, num_ids=17), sample(logits[:, :17], choices)
    assert found.tokens == cut.tokens and found.logprobs is not None
    expected = logits.log_softmax(-1)
    for row, (token, logprob) in enumerate(zip(found.tokens, found.logprobs, strict=True)):
        assert logprob == pytest.approx(float(expected[row, token]), abs=1e-12)


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    count = 4000
    uniforms = [(i + 0.5) / count for i in range(count)]
    choices = [Choice(SamplingParams(temperature=1.0), u) for u in uniforms]
    tokens = sample(logits.expand(count, 4), choices).tokens
    for token, probability in enumerate(logits.softmax(-1)[0].tolist()):
        assert tokens.count(token) / count == pytest.approx(probability, abs=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_gives_no_token_and_leaves_the_others(bad: float) -> None:
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(0))
    choices = [
        Choice(SamplingParams(temperature=t, top_k=k, logprobs=True), 0.4) for t, k in ((0, 0), (1, 0), (1, 3), (0, 0))
    ]
    clean = sample(logits, choices)
    for row in range(4):
        torn = logits.clone()
        torn[row, 5] = bad
        result = sample(torn, choices)
        assert result.tokens[row] is None
        others = [i for i in range(4) if i != row]
        assert [result.tokens[i] for i in others] == [clean.tokens[i] for i in others]
    empty = torch.full((1, 11), -math.inf)
    assert sample(empty, choices[1:2]).tokens == [None]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("temperature", [1e-30, 1.0, 1e6])
def test_extremes_stay_in_the_allowed_set(uniform: float, temperature: float) -> None:
    logits = torch.tensor([[50.0, 49.0, -math.inf, -1e30, -math.inf]])
    for top_k in (0, 1, 2):
        params = SamplingParams(temperature=temperature, top_k=top_k)
        token = sample(logits, [Choice(params, uniform)]).tokens[0]
        assert token in {0: (0, 1, 3), 1: (0,), 2: (0, 1)}[top_k]
        if temperature == 1e-30:
            assert token == 0
