"""Bytes of live tensors and work done, operation by operation: what `puyu plan` predicts from, and its measure.

Counts storages, so views cost nothing; freed, resized (as FSDP does) and fake tensors count as they are. What a kernel
allocates inside itself is no tensor and is not seen. Follows one thread, which on a CPU is also the backward pass's.

    with LiveBytes(model.parameters()) as live: step()
    live.peak
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


class Work(NamedTuple):
    """FLOPs of products and attention, bytes read and written by all other operations, operations."""

    products: float = 0.0
    attention: float = 0.0
    traffic: float = 0.0
    calls: float = 0.0

    def plus(self, other: Work, times: float = 1.0) -> Work:
        """This and `times` another."""
        return Work(*(a + times * b for a, b in zip(self, other, strict=True)))


class Stretch(NamedTuple):
    """What happened between two marks: bytes above the live ones at its start, at most and at its end."""

    peak: int
    stays: int
    work: Work

    def towards(self, other: Stretch, share: float) -> Stretch:
        """On the line through both: 0 is this one, 1 the other."""
        peak, stays = (round(a + (b - a) * share) for a, b in zip(self[:2], other[:2], strict=True))
        return Stretch(peak, stays, self.work.plus(other.work, share).plus(self.work, -share))


class LiveBytes(TorchDispatchMode):
    """While active, knows every storage that an operation has read or made, until it is freed."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in tensors:
            self._see(tensor)
        self._start = self.peak = self.now()
        """`peak`: the most bytes at once since the last mark."""
        self._work = Work()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls the same on its local part
        read = [item for item in tree_iter((args, kwargs or {})) if isinstance(item, Tensor)]
        for tensor in read:
            self._see(tensor)
        result = func(*args, **(kwargs or {}))
        made = [item for item in tree_iter(result) if isinstance(item, Tensor)]
        for tensor in made:
            self._see(tensor)
        self.peak = max(self.peak, self.now())
        if not func.is_view:
            self._work = self._work.plus(_work(func, args, kwargs or {}, read, made))
        return result

    def now(self) -> int:
        """Bytes that are live."""
        total = 0
        for key, found in list(self._storages.items()):
            storage = found()
            if storage is None:
                del self._storages[key]
            else:
                total += storage.nbytes()
        return total

    def mark(self) -> Stretch:
        """The stretch since the last mark; a new one begins."""
        now = self.now()
        stretch = Stretch(max(now, self.peak) - self._start, now - self._start, self._work)
        self._start, self.peak, self._work = now, now, Work()
        return stretch

    def _see(self, tensor: Tensor) -> None:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is None or known() is None:  # an address may be used again
            self._storages[storage._cdata] = weakref.ref(storage)


def _work(func: Any, args: Any, kwargs: Any, read: list[Tensor], made: list[Tensor]) -> Work:
    """Of one operation. Attention of a CPU is not in torch's table of FLOPs: two products forward, five backward, half
    of each below the diagonal."""
    name = func._schema.name
    if "attention" in name:
        q, k = (read[1], read[2]) if "backward" in name else (read[0], read[1])
        return Work(attention=(5 if "backward" in name else 2) * q.numel() * k.shape[-2], calls=1)
    if func._overloadpacket in flop_registry:
        flops = float(flop_registry[func._overloadpacket](*args, **kwargs, out_val=made[0]))
        return Work(products=flops / 2 if "scaled_mm" in name else flops, calls=1)  # float8 runs at twice the rate
    return Work(traffic=float(sum(tensor.nbytes for tensor in (*read, *made))), calls=1)
