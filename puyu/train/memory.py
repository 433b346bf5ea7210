"""Keep freed pages: training on a CPU allocates the same large tensors in every step.

glibc gives large blocks back to the system at once, so that each step pays for fresh, zeroed pages again. With
`mallopt` the heap keeps them. Linux with glibc only; elsewhere this does nothing.
"""

from __future__ import annotations

import ctypes
import platform

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_pages(device: torch.device) -> bool:
    """Ask the allocator to hold on to freed memory while this process lives; returns whether it agreed."""
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    asked = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    return all(libc.mallopt(name, value) == 1 for name, value in asked)
