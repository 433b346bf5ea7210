"""Between a step's chunks and its rows of logits: which are sampled and how, which are only scored, whose is what.

    sampled = sample_plan(plan, output, num_ids=None, alone=False)
    for chunk, rows in zip(plan.chunks, by_chunk(plan, sampled)): ...

`alone` computes every row by itself, so that its numbers do not depend on how many others there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from puyu.engine.edits import row_edits
from puyu.engine.request import Running
from puyu.engine.runner import Output, Span
from puyu.engine.sampler import Choice, Sampled, sample, sample_alone
from puyu.engine.scheduler import Chunk, Plan
from puyu.types import FinishReason, TopLogprobs


class Row(NamedTuple):
    """What sampling gave for one row."""

    token: int | None
    logprob: float | None
    top: TopLogprobs


def span_of(chunk: Chunk) -> Span:
    """A chunk as the runner sees it."""
    running, request = chunk.running, chunk.running.request
    return Span(chunk.tokens, chunk.start, running.blocks, chunk.num_rows, bool(request.pool), request.adapter)


@torch.inference_mode()
def sample_plan(plan: Plan, output: Output, *, num_ids: int | None, alone: bool) -> Sampled:
    """Tokens of all rows that are sampled from; the rows of prompts are only scored."""
    logits_SV = output.logits_SV
    rows: list[int] = []
    choices: list[Choice] = []
    start = 0
    for chunk in plan.chunks:
        if chunk.running.request.params.prompt_logprobs:
            _score_prompt(chunk, logits_SV[start : start + chunk.num_rows], alone=alone)
        start += chunk.num_rows
        rows += range(start - _num_sampled(chunk), start)
        choices += _choices(chunk)
    if not choices:
        return Sampled([], None, {})
    if output.best is not None and all(_takes_the_best(choice) for choice in choices):
        best = output.best
        return Sampled([best[row] if best[row] >= 0 else None for row in rows], None, {})
    if len(rows) < start:
        logits_SV = logits_SV[rows]
    return (sample_alone if alone else sample)(logits_SV, choices, num_ids=num_ids)


def by_chunk(plan: Plan, sampled: Sampled) -> Iterator[list[Row]]:
    """The sampled rows of each chunk."""
    start = 0
    for chunk in plan.chunks:
        stop = start + _num_sampled(chunk)
        logprobs = sampled.logprobs
        yield [
            Row(sampled.tokens[at], logprobs[at] if logprobs else None, sampled.tops.get(at, ()))
            for at in range(start, stop)
        ]
        start = stop


def append(running: Running, row: Row) -> FinishReason | None:
    """Add a row's token, and what is to be told of it; returns why the request ends with it, if it does."""
    params = running.request.params
    if params.logprobs and row.logprob is not None:
        running.logprobs.append(row.logprob)
    if params.top_logprobs:
        running.top_logprobs.append(row.top)
    assert row.token is not None
    return running.append(row.token)


def _num_sampled(chunk: Chunk) -> int:
    return 1 + len(chunk.drafts) if chunk.samples else 0


def _choices(chunk: Chunk) -> list[Choice]:
    """How the rows of a chunk are sampled: after its tokens, and after each of its drafts."""
    if not chunk.samples:
        return []
    running, params = chunk.running, chunk.running.request.params
    first = running.num_generated
    return [
        Choice(params, running.draw(first + index) if params.temperature > 0 else 0.0, edits)
        for index, edits in enumerate(row_edits(running, chunk.drafts))
    ]


def _takes_the_best(choice: Choice) -> bool:
    """Whether the likeliest id is all that is asked for."""
    params = choice.params
    return choice.edits is None and params.temperature == 0 and not (params.logprobs or params.top_logprobs)


def _score_prompt(chunk: Chunk, logits_LV: Tensor, *, alone: bool) -> None:
    """Log-probabilities of the prompt's tokens that follow those of the chunk."""
    running = chunk.running
    known = len(running.prompt_logprobs)
    first, last = max(known - 1, chunk.start), min(chunk.start + chunk.length, running.num_prompt - 1)
    if first >= last:
        return
    rows = logits_LV[first - chunk.start : last - chunk.start]
    rows = rows if rows.dtype == torch.float64 else rows.float()
    targets = torch.tensor(running.tokens[first + 1 : last + 1], device=rows.device)
    totals = torch.cat([row.logsumexp(dim=-1) for row in rows.split(1)]) if alone else rows.logsumexp(dim=-1)
    running.prompt_logprobs += (rows.gather(-1, targets[:, None])[:, 0] - totals).tolist()
