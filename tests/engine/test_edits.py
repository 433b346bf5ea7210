"""Penalties, biases, bans and filters against transformers' processors and a naive twin."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from puyu.engine.edits import row_edits
from puyu.engine.request import Request, Running
from puyu.engine.sampler import Choice, sample, sample_alone
from puyu.types import SamplingParams

VOCAB = 40


def running(params: SamplingParams, prompt: list[int], answer: list[int], **fields: object) -> Running:
    made = Running(Request("r", tuple(prompt), 99, params, **fields), 0)  # type: ignore[arg-type]
    made.tokens += answer
    return made


def edited(made: Running, logits_V: torch.Tensor, drafts: tuple[int, ...] = ()) -> list[torch.Tensor]:
    rows = []
    for edits in row_edits(made, drafts):
        rows.append(logits_V.clone())
        assert edits is not None
        edits.apply(rows[-1])
    return rows


def some(seed: int) -> tuple[torch.Tensor, list[int], list[int]]:
    rng = random.Random(seed)
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    return logits, [rng.randrange(VOCAB) for _ in range(9)], [rng.randrange(VOCAB) for _ in range(rng.randrange(9))]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_transformers(seed: int, penalty: float) -> None:
    logits, prompt, answer = some(seed)
    (ours,) = edited(running(SamplingParams(repetition_penalty=penalty), prompt, answer), logits)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + answer]), logits[None].clone())[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(8))
def test_presence_frequency_and_bias_equal_the_naive_twin(seed: int) -> None:
    logits, prompt, answer = some(seed)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=-0.25, logit_bias={3: 4.0, 7: -100.0})
    drafts = (prompt[0], prompt[0])
    rows = edited(running(params, prompt, answer), logits, drafts)
    for count, row in enumerate(rows):
        counts = Counter(answer + list(drafts[:count]))
        expected = [
            float(value) - (0.5 if counts[id] else 0.0) + 0.25 * counts[id] + params.logit_bias.get(id, 0.0)
            for id, value in enumerate(logits)
        ]
        assert row.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_bad_words_equal_transformers(seed: int) -> None:
    logits, _, answer = some(seed)
    words = [[answer[-1], 5] if answer else [5], [11], [1, 2, 3], [*answer[-2:], 9]]
    made = running(SamplingParams(), [1], answer, bad_words=tuple(map(tuple, words)))
    (ours,) = edited(made, logits)
    ids = torch.tensor([answer], dtype=torch.long) if answer else torch.zeros(1, 0, dtype=torch.long)
    theirs = NoBadWordsLogitsProcessor(words, eos_token_id=None)(ids, logits[None].clone())[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert ours[11] == -math.inf


def test_min_tokens_equal_transformers() -> None:
    logits, prompt, _ = some(1)
    for count in range(5):
        answer = [6] * count
        made = running(SamplingParams(min_tokens=3), prompt, answer, stop_ids=frozenset({2, 8}))
        (ours,) = edited(made, logits)
        processor = MinNewTokensLengthLogitsProcessor(len(prompt), 3, [2, 8])
        theirs = processor(torch.tensor([prompt + answer]), logits[None].clone())[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7, min_p=0.1),
        SamplingParams(temperature=1.5, top_k=7, min_p=0.3),
        SamplingParams(temperature=1.2, top_p=0.8, min_p=0.05),
        SamplingParams(temperature=1.0, top_k=12, top_p=0.7),
    ],
)
def test_filters_keep_the_tokens_that_transformers_keeps(params: SamplingParams) -> None:
    for seed in range(6):
        logits, *_ = some(seed)
        scores = TemperatureLogitsWarper(params.temperature)(None, logits[None].clone())
        if params.top_k:
            scores = TopKLogitsWarper(params.top_k)(None, scores)
        if params.top_p < 1:
            scores = TopPLogitsWarper(params.top_p)(None, scores)
        if params.min_p:
            scores = MinPLogitsWarper(params.min_p)(None, scores)
        probs = scores.softmax(-1)[0]
        points = [(i + 0.5) / 2000 for i in range(2000)]
        found = Counter(sample(logits.expand(2000, -1), [Choice(params, u) for u in points]).tokens)
        for id in range(VOCAB):
            assert found[id] / 2000 == pytest.approx(float(probs[id]), abs=1.1e-3), "the shares are the probabilities"
            assert bool(found[id]) <= bool(probs[id] > 0)


def test_top_logprobs_are_the_models_own_and_alone_is_the_same() -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(top_logprobs=row, logprobs=row % 2 == 1, temperature=row / 2) for row in range(5)]
    choices = [Choice(item, 0.3) for item in params]
    found, alone = sample(logits, choices, num_ids=30), sample_alone(logits, choices, num_ids=30)
    assert alone.tokens == found.tokens and set(alone.tops) == set(found.tops) == {1, 2, 3, 4}
    right = logits.log_softmax(-1)
    for row in range(1, 5):
        values, ids = right[row, :30].sort(descending=True)
        assert [id for id, _ in found.tops[row]] == ids[:row].tolist() == [id for id, _ in alone.tops[row]]
        assert [value for _, value in found.tops[row]] == pytest.approx(values[:row].tolist(), abs=1e-6)
        assert found.logprobs is not None and alone.logprobs is not None
        token = found.tokens[row]
        assert token is not None
        assert found.logprobs[row] == pytest.approx(float(right[row, token]), abs=1e-6)
        if params[row].logprobs:
            assert alone.logprobs[row] == pytest.approx(found.logprobs[row], abs=1e-6)


def test_a_row_that_nothing_may_follow_is_refused_alone() -> None:
    logits = torch.zeros(2, VOCAB)
    none = running(SamplingParams(), [1], [], bad_words=tuple((id,) for id in range(VOCAB)))
    assert sample(logits, [Choice(SamplingParams(), 0.0, row_edits(none, ())[0]), Choice(SamplingParams())]).tokens == [
        None,
        0,
    ]
