"""The native half of the loss: softmax, weighted loss and gradient of rows of logits in one pass on a CPU.

    done = softmax_step(logits_CV, targets_C, weights_C, learns=True)     # None where it was not built

Its twin in torch is in `puyu.train.objectives`; tests compare them.

    python -m puyu.train.native       # build, print the path of the library
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from puyu.native import Library, Loader

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Path(__file__).parent / "cpu" / "softmax.cpp"
_MATH = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp-simd", *_MATH]
LIBRARY = Library("softmax", SOURCE, FLAGS, without="torch computes the loss, a fifth of a step more slowly")


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    place, number = ctypes.c_void_p, ctypes.c_int64
    found.puyu_softmax_step.restype = None
    found.puyu_softmax_step.argtypes = [place, number, number, number, place, place, place, number, number]
    return found


load = Loader(LIBRARY, _declared)


def softmax_step(logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor, *, learns: bool) -> Tensor | None:
    """Weighted losses [C] in fp32, the logits overwritten by their weighted gradient if it `learns`.

    None, and nothing is done, where the library is not there or does not know the tensors.
    """
    import torch

    narrow = logits_CV.dtype == torch.bfloat16
    known = logits_CV.device.type == "cpu" and (narrow or logits_CV.dtype == torch.float32)
    library = load() if known and logits_CV.is_contiguous() else None
    if library is None or not len(logits_CV):
        return None
    targets, weights = targets_C.contiguous(), weights_C.float().contiguous()
    assert targets.dtype == torch.int64 and int(targets.min()) >= 0 and int(targets.max()) < logits_CV.shape[1]
    losses = torch.empty(len(targets))
    places = [tensor.data_ptr() for tensor in (targets, weights, losses)]
    library.puyu_softmax_step(logits_CV.data_ptr(), narrow, *logits_CV.shape, *places, learns, torch.get_num_threads())
    return losses


if __name__ == "__main__":
    print(load.build(), file=sys.stdout)
