"""The native half of NF4 bases: values of the codes in one pass on a CPU.

    values = nf4_values(weight, torch.bfloat16)      # None where it was not built

Its twin in torch is in `puyu.model.nf4`; tests compare them, bit for bit.

    python -m puyu.model.native       # build, print the path of the library
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from puyu.native import Library, Loader

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from puyu.model.nf4 import NF4

SOURCE = Path(__file__).parent / "cpu" / "nf4.cpp"
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off"]
LIBRARY = Library("nf4", SOURCE, FLAGS, without="torch makes the values of NF4 bases, many times more slowly")


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    place, number = ctypes.c_void_p, ctypes.c_int64
    found.puyu_nf4.restype = None
    found.puyu_nf4.argtypes = [place, place, place, ctypes.c_float, place, place, place, number, number, number]
    return found


load = Loader(LIBRARY, _declared)


def nf4_values(weight: NF4, dtype: torch.dtype, *, dynamic: Tensor, table: Tensor) -> Tensor | None:
    """The matrix [O, I]; None where the library is not there or does not know the dtype or the device. `dynamic` and
    `table` are what the codes of scales and of weights stand for, fp32."""
    import torch

    narrow = dtype == torch.bfloat16
    known = weight.codes.device.type == "cpu" and (narrow or dtype == torch.float32)
    library = load() if known else None
    if library is None:
        return None
    parts = (weight.codes, weight.scale_codes, weight.scales)
    assert all(part.is_contiguous() for part in parts) and weight.scales.dtype == torch.float32
    found = torch.empty(weight.shape, dtype=dtype)
    places = [part.data_ptr() for part in parts]
    tables = dynamic.data_ptr(), table.data_ptr(), found.data_ptr()
    blocks = len(weight.scale_codes)
    library.puyu_nf4(*places, float(weight.offset), *tables, narrow, blocks, torch.get_num_threads())
    return found


if __name__ == "__main__":
    print(load.build(), file=sys.stdout)
