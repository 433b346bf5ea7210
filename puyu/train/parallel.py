"""Words for several processes that every stage uses: joining the group, adding numbers over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from puyu.dist import World, current_world, world
from puyu.train.health.stop import as_retry


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Be part of the group of processes; a group that a caller has joined is used, and left to the caller."""
    if dist.is_available() and dist.is_initialized():
        yield current_world()
        return
    try:
        with world(device) as found:
            yield found
    except RuntimeError as error:
        if retry := as_retry(error):
            raise retry from error
        raise


def agree(values: list[float], device: torch.device) -> list[float]:
    """Sums over all ranks, in float64."""
    if current_world().size == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()
