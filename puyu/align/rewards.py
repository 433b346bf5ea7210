"""What an answer is worth: a reward model and a verifiable check, drawn apart and then added.

    total = model_weight * clamp(score, -bound, bound) + check_weight * check

The check is the fraction of a prompt's stated conditions that the answer meets (`puyu.eval.scorers.check`), so a
policy that learns to please the reward model alone shows in the numbers. Prompts are JSONL records
{"id", "messages", "tools"?, "check", "domain"?}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puyu.errors import InputError
from puyu.eval.scorers import check
from puyu.files import read_jsonl_lines
from puyu.train.scoring import RewardModel
from puyu.types import Completion, Conversation


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt with the conditions that a good answer meets."""

    id: str
    conversation: Conversation
    check: Mapping[str, Any]
    domain: str


@dataclass(frozen=True, slots=True)
class Reward:
    """The parts of one answer's reward: the reward model's score, the check in [0, 1], and their weighted sum."""

    score: float
    check: float
    total: float


def read_prompts(path: Path, *, domain: str) -> list[Prompt]:
    """Read a file of prompts; InputError names the line and the field."""
    prompts = []
    for number, value in read_jsonl_lines(path):
        where = f"{path}, line {number}"
        if not isinstance(value, Mapping) or not isinstance(value.get("check"), Mapping):
            raise InputError(f"{where}: a prompt needs the fields 'messages' and 'check'")
        try:
            conversation = Conversation.from_openai(value)
        except InputError as error:
            raise InputError(f"{where}: {error.message}", remedy=error.remedy) from error
        name = str(value.get("id") or number)
        prompts.append(Prompt(name, conversation, value["check"], str(value.get("domain") or domain)))
    if not prompts:
        raise InputError(f"{path} holds no prompt")
    return prompts


@dataclass(frozen=True)
class Scorer:
    """Reward model and check together."""

    model: RewardModel
    model_weight: float
    check_weight: float
    bound: float

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> list[Reward]:
        """The reward of each answer to its prompt."""
        pairs = list(zip(prompts, answers, strict=True))
        scores = self.model.score([(prompt.conversation, answer.message, prompt.domain) for prompt, answer in pairs])
        return [
            self._sum(score, check(answer.message, prompt.check))
            for score, (prompt, answer) in zip(scores, pairs, strict=True)
        ]

    def _sum(self, score: float, checked: float) -> Reward:
        clamped = min(max(score, -self.bound), self.bound)
        return Reward(score, checked, self.model_weight * clamped + self.check_weight * checked)


@dataclass(slots=True)
class Moments:
    """Mean and variance of everything seen so far (Welford 1962; batches by Chan et al. 1983)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: Sequence[float]) -> None:
        """Take in a batch."""
        size = len(values)
        mean = math.fsum(values) / size
        squares = math.fsum((value - mean) ** 2 for value in values)
        delta, total = mean - self.mean, self.count + size
        self.squares += squares + delta**2 * self.count * size / total
        self.mean += delta * size / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation of all values (0 before the first)."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def normalized(self, value: float) -> float:
        """(value - mean) / std."""
        return (value - self.mean) / (self.std + 1e-8)
