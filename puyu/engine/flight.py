"""What was asked for with one call, on its way: which requests of the engine belong to it and who is told.

Callbacks run in the pumping thread and must be quick. Knows no scheduler and no tensors.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from puyu.engine.beam import BeamSearch, Finished
from puyu.engine.reader import Piece, Reader
from puyu.engine.request import Request, Running
from puyu.types import CallPart, Completion, Delta, FinishReason, Message, SamplingParams, Times, Usage

T = TypeVar("T")
logger = logging.getLogger(__name__)
_NOTHING = Piece()


@dataclass(eq=False, slots=True)
class Answers:
    """One or several answers to a prompt, told together when the last has come."""

    params: SamplingParams
    count: int
    done: Callable[[Completion], None]
    show: Callable[[Delta], None] | None = None
    found: dict[int, Completion] = field(default_factory=dict)
    first_id: str = ""

    @property
    def is_complete(self) -> bool:
        return len(self.found) == self.count

    @property
    def is_streamed(self) -> bool:
        """Whether pieces are shown as they come: not while it is open which answers will be given."""
        return self.show is not None and self.params.best_of <= self.params.n

    def add(self, index: int, completion: Completion) -> None:
        """Take one answer; the last one sets off `done`."""
        self.found[index] = completion
        if not self.is_complete:
            return
        ordered = [self.found[index] for index in range(self.count)]
        if self.params.best_of > self.params.n:
            ordered = sorted(ordered, key=_worst_last)[: self.params.n]
            ordered[0] = replace(ordered[0], prompt_logprobs=self.found[0].prompt_logprobs)
            for index, answer in enumerate(ordered if self.show is not None else ()):
                assert self.show is not None
                self.show(whole_delta(index, answer, logprobs=self.params.logprobs))
        if not self.params.logprobs:
            ordered = [replace(answer, logprobs=()) for answer in ordered]
        self.done(joined(ordered, usage=_sum(answer.usage for answer in self.found.values())))


@dataclass(eq=False, slots=True)
class Flight:
    """One answer under way."""

    reader: Reader
    index: int
    answers: Answers
    is_broken: bool = False
    """Whether reading its tokens has failed: that costs this request, and no other of the step."""
    queued: float = field(default_factory=time.monotonic)
    first_token: float = 0.0

    def push(self, running: Running, token: int) -> None:
        """Read a token at once where its text is needed: shown, or searched for a stop string."""
        if not self.first_token:
            self.first_token = time.monotonic()
        if not self._is_watched:
            return
        was_stopped = self.reader.stopped
        piece = self._read(lambda: self.reader.push(token), _NOTHING)
        if self.answers.is_streamed:
            self._show(piece, None if was_stopped else running)

    def land(self, running: Running) -> None:
        """Build the completion and hand it over; a request nobody watched is read here in one go."""
        if not self._is_watched:
            self._read(lambda: self.reader.push_all(running.generated), _NOTHING)
        piece = self._read(self.reader.close, _NOTHING)
        if self.answers.is_streamed:
            self._show(piece, None)
        completion = self._read(lambda: self._finished(running), None)
        self.answers.add(self.index, completion or _unread(running, self.reader.text))

    def _finished(self, running: Running) -> Completion:
        reason = running.finish_reason
        assert reason is not None
        if self.reader.stopped and reason == "length":
            reason = "stop"
        completion = self.reader.completion(running, reason=reason)
        return replace(completion, usage=replace(completion.usage, times=self._times(running)))

    def _times(self, running: Running) -> Times:
        """Of a request that never began, all are the time of its end."""
        ended = time.monotonic() - self.queued
        began = running.began - self.queued if running.began else ended
        return Times(began, self.first_token - self.queued if self.first_token else ended, ended)

    def _read(self, read: Callable[[], T], otherwise: T) -> T:
        if self.is_broken:
            return otherwise
        try:
            return read()
        except Exception:
            logger.exception("the tokens of request %s cannot be read", self.reader.request.id)
            self.is_broken = True
            return otherwise

    @property
    def _is_watched(self) -> bool:
        return self.answers.is_streamed or bool(self.answers.params.stop)

    def _show(self, piece: Piece, sampled: Running | None) -> None:
        """Tell a piece, and with it the newest token of `sampled` where its log-probability is wanted."""
        assert self.answers.show is not None
        if sampled is not None and sampled.request.params.logprobs:
            at = self.reader.num_read - 1
            self.answers.show(
                Delta(
                    piece.text,
                    index=self.index,
                    call_parts=piece.calls,
                    token_ids=(sampled.generated[at],),
                    logprobs=(sampled.logprobs[at],),
                    top_logprobs=tuple(sampled.top_logprobs[at : at + 1]),
                )
            )
        elif piece.text or piece.calls:
            self.answers.show(Delta(piece.text, index=self.index, call_parts=piece.calls))


@dataclass(eq=False, slots=True)
class Pooled:
    """A request for an embedding or a reward."""

    done: Callable[[Running], None]

    def land(self, running: Running) -> None:
        """Hand it over."""
        self.done(running)


@dataclass(eq=False, slots=True)
class BeamFlight:
    """A beam search: `round` holds one request of one token for each beam, `got` what has come back."""

    request: Request
    search: BeamSearch
    reader: Callable[[], Reader]
    done: Callable[[Completion], None]
    show: Callable[[Delta], None] | None = None
    round: list[Request] = field(default_factory=list)
    got: dict[str, Running] = field(default_factory=dict)
    num_cached: int | None = None

    def next_round(self, new_id: Callable[[], str]) -> list[Request]:
        """A request for the likeliest next tokens of each beam; the first beam computes what all have in common."""
        params = SamplingParams(max_tokens=1, top_logprobs=self.search.num_candidates)
        self.got, self.round = {}, []
        for beam in self.search.beams:
            ids = (*self.request.prompt_ids, *beam.ids)
            none: frozenset[int] = frozenset()
            self.round.append(
                replace(self.request, id=new_id(), prompt_ids=ids, max_tokens=1, params=params, stop_ids=none)
            )
        self.request = replace(self.request, queue_deadline=math.inf)  # it has begun
        return self.round

    def take(self, running: Running) -> bool:
        """One beam's answer; True when the round is complete and the search goes on."""
        self.got[running.request.id] = running
        if self.num_cached is None:
            self.num_cached = running.num_cached
        if len(self.got) < len(self.round):
            return False
        self.search.advance([self.got[request.id].top_logprobs[0] for request in self.round])
        if not self.search.beams:
            self._hand_over()
        return bool(self.search.beams)

    def end(self, reason: FinishReason) -> None:
        """Stop where it stands; what has been found so far is handed over."""
        self.search.end(reason)
        self._hand_over()

    def _hand_over(self) -> None:
        found = [self._completion(item) for item in self.search.best(self.request.params.n)]
        for index, answer in enumerate(found if self.show is not None else ()):
            assert self.show is not None
            self.show(whole_delta(index, answer, logprobs=False))
        self.done(joined(found, usage=_sum(answer.usage for answer in found)))

    def _completion(self, item: Finished) -> Completion:
        running = Running(self.request, 0)
        running.tokens += item.beam.ids
        running.num_cached = self.num_cached or 0
        reader = self.reader()
        for token in item.beam.ids:
            reader.push(token)
        reader.close()
        running.logprobs = list(item.beam.logprobs)
        return reader.completion(running, reason=item.reason)


def whole_delta(index: int, answer: Completion, *, logprobs: bool) -> Delta:
    """A whole answer as one piece, for those that are chosen at the end."""
    calls = tuple(CallPart(at, call.arguments, call.name, call.id) for at, call in enumerate(answer.message.tool_calls))
    if not logprobs:
        return Delta(answer.text, index=index, call_parts=calls)
    return Delta(
        answer.text,
        index=index,
        call_parts=calls,
        token_ids=answer.token_ids,
        logprobs=answer.logprobs,
        top_logprobs=answer.top_logprobs,
    )


def _unread(running: Running, text: str) -> Completion:
    """What is left of a request whose tokens could not be read."""
    ids, usage = tuple(running.generated), running.usage
    return Completion(Message("assistant", text), finish_reason="error", usage=usage, token_ids=ids)


def joined(answers: list[Completion], *, usage: Usage) -> Completion:
    """The first answer with the others beside it."""
    return replace(answers[0], usage=usage, alternatives=tuple(answers[1:]))


def _sum(usages: Iterator[Usage]) -> Usage:
    """One prompt, all generated tokens."""
    parts = list(usages)
    times = [part.times for part in parts if part.times is not None]
    first = min(times, key=lambda item: item.first_token, default=None)
    if first is not None:
        first = replace(first, ended=max(item.ended for item in times))
    tokens = sum(part.completion_tokens for part in parts)
    return replace(parts[0], completion_tokens=tokens, times=first)


def _worst_last(answer: Completion) -> tuple[bool, float]:
    """Answers that came to their end first, of these the likeliest a token."""
    count = len(answer.logprobs)
    return answer.finish_reason in ("error", "abort", "timeout"), -sum(answer.logprobs) / max(count, 1)
