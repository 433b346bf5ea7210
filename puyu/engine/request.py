"""What was asked (`Request`, frozen) and how far it has come (`Running`, the one mutable thing in the engine).

A request is token ids and limits; text, messages and tools are the business of `front.py`. How far a running request
is stands in `tokens`, `blocks` and `num_computed` alone; every other count is derived from them, so that two can
never disagree. No torch here.

    >>> request = Request("a", (5, 6, 7), max_tokens=2)
    >>> Running(request, order=0).num_remaining
    3
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol

from puyu.types import FinishReason, SamplingParams, TopLogprobs, Usage


class Matcher(Protocol):
    """Where in a grammar an answer stands (llguidance's LLMatcher)."""

    def deep_copy(self) -> Matcher: ...
    def consume_token(self, token: int) -> bool: ...
    def compute_bitmask(self) -> bytes: ...
    def is_stopped(self) -> bool: ...
    def is_error(self) -> bool: ...
    def get_error(self) -> str: ...


class Status(Enum):
    """Where a request stands. WAITING may come back after RUNNING (preemption); FINISHED is final."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Request:
    """Prompt ids and how to continue them. `stop_ids` end the text and are kept in the generated ids.

    Deadlines are seconds of `time.monotonic`: after `queue_deadline` a request that has not begun is ended, after
    `deadline` any. The prompt of a request with a `leader` is computed once, by the request of that id.
    """

    id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0
    deadline: float = math.inf
    queue_deadline: float = math.inf
    adapter: str = ""
    leader: str = ""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Ids that must not follow each other, one row for each word."""
    guide: Matcher | None = None
    """Where the answer's grammar begins; a request that runs has a copy of its own."""
    pool: Literal["", "last", "mean"] = ""
    """Not empty: nothing is generated, the hidden states of the prompt are wanted, pooled in this way."""


@dataclass(eq=False, slots=True)
class Running:
    """The progress of one request."""

    request: Request
    order: int
    """Arrival number: of equal priority, the older goes first."""
    tokens: list[int] = field(default_factory=list)
    """Prompt and generated ids."""
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    """Of the prompt's first tokens, as far as they are known."""
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose keys and values stand in `blocks`."""
    num_cached: int = 0
    """Prompt tokens that the prefix cache gave at the first admission."""
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0
    began: float = 0.0
    """When it was first admitted, in seconds of `time.monotonic`."""
    keys: list[bytes] = field(default_factory=list)
    """Content keys of the full blocks, computed once; a function of `tokens` and the adapter alone."""
    drafts: list[int] = field(default_factory=list)
    """Guesses of the next tokens, checked in the next step and then forgotten."""
    num_drafted: int = 0
    """Tokens, guesses included, that a draft model has keys and values of; shared blocks count as written."""
    guide: Matcher | None = None
    """The grammar after all generated tokens."""
    pooled: list[float] = field(default_factory=list)
    """The embedding, or the reward, once it is known."""
    _random: random.Random = field(default_factory=random.Random)
    _draws: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)
        if self.request.params.prompt_logprobs:
            self.prompt_logprobs.append(None)
        if self.request.guide is not None:
            self.guide = self.request.guide.deep_copy()
        if self.request.params.seed is not None:
            self._random = random.Random(self.request.params.seed)

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: the smaller one."""
        return (-self.request.priority, self.order)

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
    def is_shareable(self) -> bool:
        """Whether cached blocks may stand for the prompt's beginning: not while something of each token is wanted."""
        return not self.request.params.prompt_logprobs and self.request.pool != "mean"

    @property
    def generated(self) -> Sequence[int]:
        return self.tokens[self.num_prompt :]

    @property
    def usage(self) -> Usage:
        return Usage(self.num_prompt, self.num_generated, self.num_cached)

    def draw(self, index: int) -> float:
        """The uniform number in [0, 1) that decides generated token `index`: a stream of its own, which neither
        batch mates nor rejected drafts move on."""
        while len(self._draws) <= index:
            self._draws.append(self._random.random())
        return self._draws[index]

    def append(self, token: int) -> FinishReason | None:
        """Add a sampled token; returns why the request ends with it, if it does."""
        self.tokens.append(token)
        if self.guide is not None and (self.guide.is_error() or not self.guide.consume_token(token)):
            return "error"
        if token in self.request.stop_ids or (self.guide is not None and self.guide.is_stopped()):
            return "stop"
        return "length" if self.num_generated >= self.request.max_tokens else None
