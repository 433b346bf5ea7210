"""Leaves while a thread of gloo is freeing a tensor: `torchrun -m tests.train.run_leaving`, for test_world.py."""

import sys
import threading
import time
import weakref
from pathlib import Path

import torch
import torch.distributed as dist

from puyu.dist import world

_MOST = 20_000
"""Sums; gloo's thread is the last to hold one of five."""


def spin(found):
    """Called where a tensor is freed: takes its time there, if that is a thread of gloo."""
    name = Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text()
    if name.startswith("pt_gloo") and not found:
        found.append(name)
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            pass


def main():
    """Whoever has a tensor that gloo frees leaves at once; its peer, which has no one to add with, does so, too."""
    found = []
    for _ in range(_MOST):
        total = torch.ones(1)
        weakref.finalize(total, spin, found)
        try:
            dist.all_reduce(total)
        except RuntimeError:
            return
        del total
        time.sleep(0.001)
        if found:
            return
    sys.exit("no tensor was freed by a thread of gloo")


if __name__ == "__main__":
    with world(torch.device("cpu")):
        held = dist.group.WORLD  # as caches of DTensor's hold it: leaving does not end the threads
        main()
