"""Do replicas still hold the same weights? A bit that flips in silence shows late in a loss, or never.

Processes hold the same rows of a parameter wherever it is not sharded (data-parallel replicas, tensor peers of what is
not sliced), and update them alike, bit for bit. Each takes a checksum of its rows; where a group does not agree, the
parameter is named, with the ranks that stand against a majority (of two: both). One pass over the weights and one small
reduction per dimension. Not seen: what a single process holds, and what the next update of its owner mends.

    found = differing(layout.shares, device)     # Difference("rank 1 ...", (1,), ("trunk.norm.weight",)) or None
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from puyu.dist import current_world
from puyu.train.layouts.comm import all_reduce
from puyu.train.layouts.shares import Share
from puyu.train.parallel import agree

_WORDS = {1: torch.int8, 2: torch.int16}
_SHOWN = 3

Place = tuple[str, str]
"""A parameter, and which rows of it."""


class Difference(NamedTuple):
    """Replicas that do not agree: the ranks in question and the parameters that differ."""

    text: str
    ranks: tuple[int, ...]
    parameters: tuple[str, ...]


def differing(shares: Sequence[Share], device: torch.device) -> Difference | None:
    """What replicas do not agree in, the same on every process; None where all is well. Every process must call it."""
    groups: dict[tuple[dist.ProcessGroup, ...], list[Share]] = {}
    for share in shares:
        spread = share.spread
        every = (*(dim.group for dim in (*spread.sums, *spread.copies)), spread.tensor)
        if held := tuple(group for group in every if group is not None):
            groups.setdefault(held, []).append(share)
    odd: dict[Place, int] = {}
    for held, members in groups.items():
        sums = torch.stack([checksum(share.held) for share in members])
        ends = torch.stack([sums, -sums])
        for group in held:
            all_reduce(ends, group, op=dist.ReduceOp.MAX)
        uneven = ends[0] != -ends[1]
        for at in uneven.nonzero().flatten().tolist() if bool(uneven.any()) else ():
            share = members[at]
            odd[share.name, f"{share.first} {share.cut.runs}"] = int(sums[at])
    if not agree([float(len(odd))], device)[0]:
        return None
    tables: list[dict[Place, int]] = [{}] * current_world().size
    dist.all_gather_object(tables, odd)
    return judge(tables)


def checksum(tensor: Tensor) -> Tensor:
    """Sum of the bits of a tensor as integers: no single flip leaves it as it is."""
    words = _WORDS.get(tensor.element_size(), torch.int32)
    return tensor.detach().contiguous().flatten().view(words).sum(dtype=torch.int64)


def judge(tables: Sequence[Mapping[Place, int]]) -> Difference:
    """Name ranks and parameters, from the checksums by rank of all places where replicas differ."""
    ranks: set[int] = set()
    for place in dict.fromkeys(place for table in tables for place in table):
        found = {rank: table[place] for rank, table in enumerate(tables) if place in table}
        (most, count), *_ = Counter(found.values()).most_common()
        majority = count > len(found) / 2
        ranks |= {rank for rank, value in found.items() if not majority or value != most}
    names = tuple(dict.fromkeys(name for table in tables for name, _ in table))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    who = tuple(sorted(ranks))
    listed = f"{'rank' if len(who) == 1 else 'ranks'} {', '.join(map(str, who))}"
    return Difference(f"replicas differ: {listed} in {', '.join(names[:_SHOWN])}{more}", who, names)
