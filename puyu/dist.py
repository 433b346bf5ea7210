"""Rank and mesh words for torch.distributed under torchrun; one process is the same code with world 1."""

from __future__ import annotations

import atexit
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from puyu.errors import RetryError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

SUPERVISED = "PUYU_AUTO_RESUME"
"""Set in the environment by `--auto-resume`: somebody starts this process again."""
FATAL = "PUYU_FATAL"
"""Names a file: a process with an error that another start would meet again leaves its exit code there."""
_PATIENCE = 1800.0


@dataclass(frozen=True, slots=True)
class World:
    """This process among its peers."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def world(device: torch.device) -> Iterator[World]:
    """Join the process group that torchrun announces (gloo on CPU, nccl on GPU), leave it at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=_fresh(store, rank, size), rank=rank, world_size=size)
    atexit.register(_settle)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _settle(patience: float = 5.0) -> None:
    """Wait until gloo's threads have nothing left to do (Linux).

    They free the tensors that they were the last to hold, for which they need the interpreter; one that still does so
    while the interpreter is taken down ends the process with SIGABRT. Caches of DTensor's hold on to the groups, so
    leaving the group does not end the threads.
    """
    until = time.monotonic() + patience
    while time.monotonic() < until:
        time.sleep(0.002)  # a thread that waits for the interpreter gets it, and is seen at work
        if not any(_works(task) for task in Path("/proc/self/task").glob("*/stat")):
            return


def _works(task: Path) -> bool:
    with suppress(OSError):  # it may have ended
        name, _, state = task.read_text().partition(") ")
        return name.endswith("(pt_gloo_runloop") and not state.startswith("S")
    return False


def _fresh(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of the store that no earlier attempt has written to.

    torchrun keeps one store over its restarts; a process that is quicker than its peer would read the address that the
    peer's dead predecessor left there. Rank 0 names the attempt; whoever finds that its rank has joined it before waits
    for the next name, and none goes on before all have joined.
    """
    import torch.distributed as dist

    key, until = "puyu/attempt", time.monotonic() + _PATIENCE
    if rank == 0:
        store.set(key, uuid.uuid4().hex)
    while time.monotonic() < until:
        name = store.get(key).decode()
        if store.add(f"puyu/{name}/{rank}", 1) == 1:
            store.add(f"puyu/{name}", 1)
            while store.get(key).decode() == name and time.monotonic() < until:
                if store.add(f"puyu/{name}", 0) == size:
                    return dist.PrefixStore(name, store)
                time.sleep(0.02)
        time.sleep(0.02)
    raise RetryError(
        f"rank {rank} waited {_PATIENCE:.0f} s for all {size} processes", remedy="look for one that is gone"
    )


def current_world() -> World:
    """This process among its peers, when a group has been joined; else alone."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def barrier() -> None:
    """Wait for all ranks; nothing in one process."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
