"""The sampling kernel against sorting in fp64, and what it shares with the engine's own sampler."""

from __future__ import annotations

import random

import pytest
import torch

from puyu.engine.kernels.sampling import Knobs, sample_rows, sample_rows_reference
from puyu.engine.sampler import Choice, sample
from puyu.types import SamplingParams

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
GREEDY = (0.0, 0.0, 1.0, 0.0, 0.0)


def logits_of(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_equals_sorting(dtype: torch.dtype) -> None:
    """All combinations of filters; the padded end of the vocabulary counts in the log-probability alone."""
    rng = random.Random(0)
    rows = [
        GREEDY,
        (0.7, 0.0, 1.0, 0.0, rng.random()),
        (1.3, 5.0, 1.0, 0.0, rng.random()),
        (1.0, 0.0, 0.8, 0.0, rng.random()),
        (1.0, 0.0, 1.0, 0.05, rng.random()),
        (0.9, 40.0, 0.9, 0.01, rng.random()),
        (1e-3, 0.0, 0.5, 0.0, 0.999),
        (1.0, 1.0, 1.0, 0.0, 0.999),
        (1.0, 0.0, 1.0, 0.0, 1.0),
    ]
    logits = logits_of(len(rows), 300, dtype)
    logits[:, 295:] = 30.0
    logits[0, 9] = logits[0, 4] = 20.0
    ours = sample_rows(logits, Knobs.of(rows, CPU), num_ids=295)
    theirs = sample_rows_reference(logits, Knobs.of(rows, CPU), num_ids=295)
    assert ours[0].tolist() == theirs[0].tolist()
    assert ours[0][0] == 4, "the first of equals"
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=2e-5)


def test_rows_that_are_not_finite() -> None:
    logits = logits_of(4, 50)
    logits[0, 3], logits[1, 7], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3, :49] = float("-inf")
    tokens, _ = sample_rows(logits, Knobs.of([(1.0, 3.0, 0.9, 0.0, 0.5)] * 4, CPU), num_ids=50)
    assert tokens.tolist() == [-1, -1, -1, 49]


def test_equal_logits_are_drawn_in_the_order_of_ids() -> None:
    logits = torch.zeros(8, 20)
    logits[:, 5:] = -5.0
    knobs = [(1.0, 5.0, 1.0, 0.0, (i + 0.5) / 8) for i in range(8)]
    tokens, _ = sample_rows(logits, Knobs.of(knobs, CPU), num_ids=20)
    assert tokens.tolist() == [int(5 * (i + 0.5) / 8) for i in range(8)]


def test_the_same_uniform_number_gives_the_same_token_as_the_engine() -> None:
    rng, logits = random.Random(4), logits_of(12, 64)
    params = [
        SamplingParams(temperature=0.0 if i == 0 else 0.8, top_k=i % 3 * 7, top_p=(1.0, 0.9)[i % 2], logprobs=True)
        for i in range(12)
    ]
    uniforms = [rng.random() for _ in params]
    theirs = sample(logits, [Choice(p, u) for p, u in zip(params, uniforms, strict=True)])
    knobs = [(p.temperature, float(p.top_k), p.top_p, 0.0, u) for p, u in zip(params, uniforms, strict=True)]
    tokens, logprobs = sample_rows(logits, Knobs.of(knobs, CPU), num_ids=64)
    assert tokens.tolist() == theirs.tokens
    assert theirs.logprobs == pytest.approx(logprobs.tolist(), abs=1e-5)
