"""What was asked (`Request`, frozen) and how far it has come (`Running`, the one mutable thing in the engine).

A request is token ids and limits; text, messages and tools are the business of `front.py`. Of a running request
only `tokens`, `blocks` and `num_computed` are stored; everything else is derived from them, so that two counts
can never disagree. No torch here.

    >>> request = Request("a", (5, 6, 7), max_tokens=2)
    >>> Running(request, order=0).num_remaining
    3
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from puyu.types import FinishReason, SamplingParams, Usage


class Status(Enum):
    """Where a request stands. WAITING may come back after RUNNING (preemption); FINISHED is final."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Request:
    """Prompt ids and how to continue them. `stop_ids` end the text and are kept in the generated ids."""

    id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()


@dataclass(eq=False, slots=True)
class Running:
    """The progress of one request."""

    request: Request
    order: int
    """Arrival number: the older goes first."""
    tokens: list[int] = field(default_factory=list)
    """Prompt and generated ids."""
    logprobs: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose keys and values stand in `blocks`."""
    num_cached: int = 0
    """Prompt tokens that the prefix cache gave at the first admission."""
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0
    keys: list[bytes] = field(default_factory=list)
    """Content keys of the full blocks, computed once; a function of `tokens` alone."""
    draws: random.Random = field(default_factory=random.Random)
    """Uniform numbers for sampling: a stream of its own, so that batch mates change nothing."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)
        if self.request.params.seed is not None:
            self.draws = random.Random(self.request.params.seed)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Tokens still to compute before the next one can be sampled; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def generated(self) -> Sequence[int]:
        return self.tokens[self.num_prompt :]

    @property
    def usage(self) -> Usage:
        return Usage(self.num_prompt, self.num_generated, self.num_cached)

    def append(self, token: int, logprob: float | None) -> FinishReason | None:
        """Add a sampled token; returns why the request ends with it, if it does."""
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token in self.request.stop_ids:
            return "stop"
        return "length" if self.num_generated >= self.request.max_tokens else None
