"""Whether Triton kernels can run on a device, and the few sizes that their launches share. Imports no Triton.

With TRITON_INTERPRET=1, set before Triton is imported, they run on a CPU too, slowly: that is how they are tested.

    >>> can_launch(torch.device("cpu"))
    False
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def can_launch(device: torch.device) -> bool:
    """A GPU of NVIDIA's Ampere generation or newer, or the interpreter; and Triton is installed."""
    if device.type == "cuda":
        return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and interpreting() and find_spec("triton") is not None


@lru_cache(maxsize=8)
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a small number in the interpreter, so that splits are tested."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is not below `number` and `least`."""
    return max(1 << max(number - 1, 0).bit_length(), least)


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """int32 tensors of these arrays, through one copy that does not wait for the device."""
    flat = torch.from_numpy(np.concatenate([np.ravel(array) for array in arrays]).astype(np.int32))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
