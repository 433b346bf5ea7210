"""Beam search over a language model that gives the likeliest next tokens. Plain Python; knows no engine and no text.

Every step, all beams are continued by their likeliest tokens and the best `width` stay; one that ends is set aside
with its score, logprob / length ** length_penalty (Wu et al. 2016, arXiv 1609.08144, without coverage). The search
ends when no beam can still become better than the worst of `width` finished ones, or when the length is reached. The
order of events is that of transformers' `generate(num_beams=..., early_stopping=False)`, so results can be compared.

    search = BeamSearch(params, stop_ids=frozenset({2}), max_tokens=8)
    while search.beams: search.advance([likeliest next tokens of each beam])
    search.best(1)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from puyu.types import FinishReason, SamplingParams, TopLogprobs


class Beam(NamedTuple):
    """Generated ids, and the sum of their log-probabilities."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        return sum(self.logprobs)


class Finished(NamedTuple):
    """A beam that has ended, with its score."""

    beam: Beam
    score: float
    reason: FinishReason


class BeamSearch:
    """The beams that go on, and those that have ended."""

    def __init__(self, params: SamplingParams, *, stop_ids: frozenset[int], max_tokens: int) -> None:
        self.width, self.penalty = params.beam_width, params.length_penalty
        self.stop_ids, self.max_tokens = stop_ids, max_tokens
        self.beams = [Beam((), ())]
        self.finished: list[Finished] = []

    @property
    def num_candidates(self) -> int:
        """Likeliest tokens that each beam needs: even if all that can end do, `width` of them go on."""
        return max(2, 1 + len(self.stop_ids)) * self.width

    def advance(self, nexts: Sequence[TopLogprobs]) -> None:
        """Continue each beam; `nexts` has its likeliest tokens in order."""
        grown = [
            Beam((*beam.ids, token), (*beam.logprobs, logprob))
            for beam, tokens in zip(self.beams, nexts, strict=True)
            for token, logprob in tokens
        ]
        grown.sort(key=lambda beam: -beam.total)
        is_last = len(grown[0].ids) >= self.max_tokens
        going: list[Beam] = []
        for rank, beam in enumerate(grown[: self.num_candidates]):
            stops = beam.ids[-1] in self.stop_ids
            if not stops and not is_last:
                going.append(beam)
            elif rank < self.width:
                self._finish(beam, "stop" if stops else "length")
        self.beams = going[: self.width] if self._can_improve(going) else []

    def end(self, reason: FinishReason) -> None:
        """End all beams now; what the search would have found is unknown, so all answers say why."""
        for beam in self.beams:
            self._finish(beam, reason)
        self.beams = []
        self.finished = [item._replace(reason=reason) for item in self.finished]

    def best(self, count: int) -> list[Finished]:
        """The highest scores first."""
        return self.finished[:count]

    def _can_improve(self, beams: Sequence[Beam]) -> bool:
        """Whether the best of the beams, as it is, stands among the best that have ended."""
        if not beams or len(self.finished) < self.width:
            return True
        return self._score(beams[0]) > self.finished[-1].score

    def _finish(self, beam: Beam, reason: FinishReason) -> None:
        self.finished.append(Finished(beam, self._score(beam), reason))
        self.finished.sort(key=lambda item: -item.score)
        del self.finished[self.width :]

    def _score(self, beam: Beam) -> float:
        return beam.total / len(beam.ids) ** self.penalty if beam.ids else 0.0
