"""Whether a model has seen a test set, by its losses: train, test and a reference that it cannot have seen.

    found = asyncio.run(loss_gaps(model.score, train=[...], test=[...], reference=[...]))
    found.leak, found.fitted                       # L_test - L_reference, L_test - L_train, nats per token

From InternLM2 (2024, its discussion of data contamination, after Skywork, Wei et al. 2023): the reference are items
that were written anew in the form of the test's. Delta 1 = L_test - L_reference near 0 or above says that the test is
as new as the reference, well below 0 that it leaked. Delta 2 = L_test - L_train well above 0 says that the model was
trained on the train part. Any `score` of the LanguageModel protocol will do: our engine, our server, any endpoint.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from puyu.errors import InputError
from puyu.types import Scored

Score = Callable[[Sequence[tuple[str, str]]], Awaitable[Sequence[Scored]]]
BATCH = 32


@dataclass(frozen=True, slots=True)
class Loss:
    """The mean loss of some texts, in nats per token and bits per byte, and its standard error over texts."""

    texts: int
    tokens: int
    nats: float
    stderr: float
    bits_per_byte: float

    def to_json(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("texts", "tokens", "nats", "stderr", "bits_per_byte")}


@dataclass(frozen=True, slots=True)
class LossGaps:
    """The three losses and their differences."""

    train: Loss
    test: Loss
    reference: Loss

    @property
    def leak(self) -> float:
        """Delta 1: low means that the test leaked."""
        return self.test.nats - self.reference.nats

    @property
    def fitted(self) -> float:
        """Delta 2: high means that the model was trained on the train part."""
        return self.test.nats - self.train.nats

    def to_json(self) -> dict[str, Any]:
        """What `contamination.json` holds as `losses`."""
        parts = {name: getattr(self, name).to_json() for name in ("train", "test", "reference")}
        errors = {
            "delta1_stderr": math.hypot(self.test.stderr, self.reference.stderr),
            "delta2_stderr": math.hypot(self.test.stderr, self.train.stderr),
        }
        deltas = {"delta1": self.leak, "delta2": self.fitted, **errors}
        return {**parts, **{name: round(value, 6) for name, value in deltas.items()}}


async def loss_gaps(score: Score, *, train: Sequence[str], test: Sequence[str], reference: Sequence[str]) -> LossGaps:
    """Score all three sets. InputError for a set without texts or tokens."""
    sets = {"train": train, "test": test, "reference": reference}
    losses = {name: await _loss(score, texts, name) for name, texts in sets.items()}
    return LossGaps(**losses)


async def _loss(score: Score, texts: Sequence[str], name: str) -> Loss:
    found: list[Scored] = []
    for start in range(0, len(texts), BATCH):
        found += await score([("", text) for text in texts[start : start + BATCH]])
    tokens, size = sum(row.num_tokens for row in found), sum(row.num_bytes for row in found)
    if not tokens:
        raise InputError(f"the {name} set has no text to score")
    total = -sum(row.logprob for row in found)
    mean = total / tokens
    # of a ratio of sums, over texts
    spread = sum((-row.logprob - mean * row.num_tokens) ** 2 for row in found)
    stderr = math.sqrt(spread * len(found) / max(len(found) - 1, 1)) / tokens
    bits = total / math.log(2) / max(size, 1)
    return Loss(len(found), tokens, round(mean, 6), round(stderr, 6), round(bits, 6))
