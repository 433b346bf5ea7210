"""Sequence parallel: the tokens of a batch are cut into equal runs, and attention alone crosses them.

Ulysses (Jacobs et al. 2023, arXiv 2309.14509): before attention the processes exchange heads for tokens, so that each
has some heads of all tokens; after it, back. Where there are fewer key heads than processes, they are repeated. The
ring is in ring.py. Positions, targets and weights were made before the cut and stay as they are; all parameters see
sequence peers as data-parallel ones.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from puyu.data.packing import Batch
from puyu.model.attention import Plan
from puyu.model.packed import PackedPlan
from puyu.train.layouts.comm import Group, exchange
from puyu.train.layouts.mesh import Mesh
from puyu.train.layouts.ring import RingPlan
from puyu.train.objectives import SharedBatch, Vocabulary


@dataclass(frozen=True, slots=True)
class UlyssesPlan:
    """Heads are exchanged for tokens around a plan of the whole row. t tokens here, T = t * size."""

    whole: PackedPlan
    size: int
    group: Group

    def attend(self, q_tNH: Tensor, k_tKH: Tensor, v_tKH: Tensor, layer: int, *, window: int = 0) -> Tensor:
        size, count = self.size, len(q_tNH)
        if (repeat := size // k_tKH.shape[1]) > 1:
            k_tKH, v_tKH = (x.repeat_interleave(repeat, dim=1) for x in (k_tKH, v_tKH))
        parts = [x.unflatten(1, (size, -1)) for x in (q_tNH, k_tKH, v_tKH)]
        given = torch.cat(parts, dim=2).movedim(1, 0).flatten(0, 1)  # for each process: its heads of these tokens
        even = [count] * size
        q, k, v = exchange(given, even, even, self.group).split([x.shape[2] for x in parts], dim=1)
        o_TnH = self.whole.attend(q, k, v, layer, window=window)
        return exchange(o_TnH, even, even, self.group).unflatten(0, (size, count)).movedim(0, 1).flatten(1, 2)


def part(batch: Batch, mesh: Mesh, *, words: int) -> Batch:
    """What this process computes of a batch that sequence and tensor peers read too, with its plan.

    Padding, a document of weight 0 behind the others, makes the parts equal. `words`: size of the vocabulary.
    """
    config = mesh.config
    if config.sequence == config.tensor == 1:
        return batch
    batch = _padded(batch, config.sequence * config.tensor)
    count, group = batch.num_tokens // config.sequence, mesh.group("sequence")
    first = mesh.sequence_rank * count
    plan: Plan
    if config.sequence > 1 and config.attention == "ring":
        plan = RingPlan.build(batch.starts_S, batch.num_tokens, rank=mesh.sequence_rank, group=group)
    else:
        plan = PackedPlan.build(batch.starts_S, batch.num_tokens, batch.tokens_T.device)
        plan = UlyssesPlan(plan, config.sequence, group) if config.sequence > 1 else plan
    cut = _cut(batch, first, first + count)
    values: dict[str, Any] = {item.name: getattr(cut, item.name) for item in fields(cut)}
    group = mesh.group("tensor")
    vocabulary = None if group is None else Vocabulary(group, -(-words // config.tensor))
    return SharedBatch(**values, plan=plan, vocabulary=vocabulary)


def _padded(batch: Batch, multiple: int) -> Batch:
    missing = -batch.num_tokens % multiple
    if not missing:
        return batch
    names = ("tokens_T", "positions_T", "targets_T", "weights_T")
    longer: dict[str, Any] = {name: F.pad(getattr(batch, name), (0, missing)) for name in names}
    extras = {name: F.pad(x, (0, missing)) if name.endswith("_T") else x for name, x in batch.extras.items()}
    return replace(batch, **longer, extras=extras, starts_S=(*batch.starts_S, batch.num_tokens))


def _cut(batch: Batch, first: int, last: int) -> Batch:
    """Tokens [first, last) of a batch; documents are cut where they cross."""
    cut = slice(first, last)
    whole = [i for i, (start, end) in enumerate(zip(batch.starts_S, batch.ends_S, strict=True)) if last > start < end]
    seen = [i for i in whole if batch.ends_S[i] > first]
    starts_S = tuple(max(batch.starts_S[i] - first, 0) for i in seen)
    extras = {name: x[cut] if name.endswith("_T") else x[seen[0] : seen[-1] + 1] for name, x in batch.extras.items()}
    names = ("tokens_T", "positions_T", "targets_T", "weights_T")
    return replace(batch, **{name: getattr(batch, name)[cut] for name in names}, extras=extras, starts_S=starts_S)
