"""What changes a row of logits before a token is chosen from it: penalties, biases, forbidden ids, a grammar.

A row's edits depend on its own request and tokens alone. They are few numbers, made with numpy on the host; the
logits stay where they are. Repetition penalty: Keskar et al. 2019 (arXiv 1909.05858), over prompt and answer;
presence and frequency penalties, and the logit bias: OpenAI's API reference, over the answer.

    rows = row_edits(running, drafts=(7, 8))     # one for each of 1 + 2 tokens to choose
    rows[0].apply(logits_V)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from puyu.engine.request import Matcher, Request, Running
from puyu.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Edits:
    """Changes to one row of logits, in the order of the fields."""

    scaled: np.ndarray | None = None
    """Ids whose logits are divided by `scale` when positive, multiplied when negative."""
    scale: float = 1.0
    subtracted: tuple[np.ndarray, np.ndarray] | None = None
    """Ids and what is subtracted from their logits."""
    added: Mapping[int, float] | None = None
    banned: Sequence[int] = ()
    allowed: bytes | None = None
    """One bit for each id, the lowest first; only these may be chosen."""

    def apply(self, logits_V: Tensor) -> None:
        """Change a row [V] in place; banned ids beyond its end, which nothing can choose, are left out."""
        vocab, device = logits_V.shape[0], logits_V.device
        if self.scaled is not None:
            ids = torch.from_numpy(self.scaled).to(device)
            values = logits_V[ids]
            logits_V[ids] = torch.where(values > 0, values / self.scale, values * self.scale)
        if self.subtracted is not None:
            ids, amounts = (torch.from_numpy(array).to(device) for array in self.subtracted)
            logits_V[ids] -= amounts.to(logits_V.dtype)
        if self.added:
            ids = torch.tensor(list(self.added), device=device)
            logits_V[ids] += torch.tensor(list(self.added.values()), device=device, dtype=logits_V.dtype)
        if banned := [id for id in self.banned if id < vocab]:
            logits_V[torch.tensor(banned, device=device)] = float("-inf")
        if self.allowed is not None:
            bits = np.unpackbits(np.frombuffer(self.allowed, np.uint8), bitorder="little")[:vocab]
            allowed_V = torch.from_numpy(bits.astype(bool)).to(device)
            logits_V[: len(bits)].masked_fill_(~allowed_V, float("-inf"))
            logits_V[len(bits) :] = float("-inf")


def row_edits(running: Running, drafts: Sequence[int]) -> list[Edits | None]:
    """The edits of the token after `tokens`, and after each of the drafts."""
    if not needs_edits(running.request):
        return [None] * (1 + len(drafts))
    masks = _masks(running.guide, drafts)
    return [_edits(running, list(drafts[:count]), mask) for count, mask in enumerate(masks)]


def needs_edits(request: Request) -> bool:
    """Whether anything but temperature and filters stands between the logits and the choice."""
    params = request.params
    plain = params.repetition_penalty == 1 and not params.presence_penalty and not params.frequency_penalty
    plain = plain and not params.logit_bias and not params.min_tokens
    return not plain or bool(request.bad_words) or request.guide is not None


def _edits(running: Running, drafts: list[int], mask: bytes | None) -> Edits:
    request, params = running.request, running.request.params
    answer = [*running.generated, *drafts]
    scaled = None
    if params.repetition_penalty != 1:
        scaled = np.unique(np.array([*running.tokens, *drafts], dtype=np.int64))
    banned = _banned(request, answer)
    return Edits(
        scaled=scaled,
        scale=params.repetition_penalty,
        added=params.logit_bias,
        subtracted=_penalties(params, answer),
        banned=banned if mask is None else (),
        allowed=None if mask is None else _without(mask, banned),
    )


def _penalties(params: SamplingParams, answer: Sequence[int]) -> tuple[np.ndarray, np.ndarray] | None:
    if not answer or not (params.presence_penalty or params.frequency_penalty):
        return None
    ids, counts = np.unique(np.array(answer, dtype=np.int64), return_counts=True)
    return ids, params.presence_penalty + params.frequency_penalty * counts


def _banned(request: Request, answer: Sequence[int]) -> list[int]:
    """Ends that come too early, and the last ids of bad words whose first ids have just been written."""
    early = sorted(request.stop_ids) if len(answer) < request.params.min_tokens else []
    return early + [word[-1] for word in request.bad_words if _ends_with(answer, word[:-1])]


def _ends_with(answer: Sequence[int], ids: Sequence[int]) -> bool:
    return len(answer) >= len(ids) and tuple(answer[len(answer) - len(ids) :]) == tuple(ids)


def _masks(guide: Matcher | None, drafts: Sequence[int]) -> Iterator[bytes | None]:
    """What the grammar allows after each draft; after a draft that it forbids, anything: that row is never used."""
    if guide is None:
        yield from [None] * (1 + len(drafts))
        return
    yield _mask(guide)
    guide = guide.deep_copy() if drafts else guide  # a draft that turns out wrong leaves no trace
    for draft in drafts:
        useful = not guide.is_stopped() and guide.consume_token(draft)
        yield _mask(guide) if useful else None


def _mask(guide: Matcher) -> bytes:
    """One bit for each id; a grammar that has failed allows none, so that its request ends."""
    bits = guide.compute_bitmask()
    return bytes(len(bits)) if guide.is_error() else bits


def _without(mask: bytes, banned: Sequence[int]) -> bytes:
    """The mask less what is banned; the grammar has the last word where nothing else would be left."""
    bits = bytearray(mask)
    for id in (id for id in banned if id < 8 * len(bits)):
        bits[id // 8] &= ~(1 << id % 8) & 0xFF
    return bytes(bits) if any(bits) else mask
