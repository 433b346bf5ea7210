"""Quantized matrices in the order in which the native library reads them (`cpu/common.h`), and back.

One copy of the codes is enough: a layer lends its own to whoever packs them, and asks for them when it needs them.

    room = Room(Packed.size(layer))
    packed = Packed(library, layer, room)
    layer.lend(packed.codes)
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch
from torch import Tensor

from puyu.engine import native
from puyu.model.linear import QuantLinear, QuantWeight

WIDTH = 32
"""Outputs of a pair of panels."""
UNITS = (64, 32, 16)
"""Inputs that may share a scale of the activations; the largest that divides a layer's group."""
LINE, HUGE_PAGE = 64, 1 << 21
"""Bytes of a cache line, and of a large page."""

_INT8, _INT4 = 2, 3
KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""Numbers of dense weights, as the library names them."""


class Room:
    """Memory for all packed matrices, in pages as large as the system gives them: a token reads every byte, and small
    pages cost a look into the page table every 4 KB."""

    def __init__(self, size: int) -> None:
        held = mmap.mmap(-1, size + 2 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without large pages
                held.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(held, dtype=torch.uint8)
        self._next = -self._bytes.data_ptr() % HUGE_PAGE

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """`count` numbers that start at a cache line."""
        size = count * dtype.itemsize
        part = self._bytes[self._next : self._next + size].view(dtype)
        self._next += _whole(size, LINE)
        return part


class Packed:
    """One matrix in pairs of panels, with what must stay alive while the library reads it."""

    def __init__(self, library: ctypes.CDLL, layer: QuantLinear, room: Room, *, gated: bool = False) -> None:
        self._library, self._gated = library, gated
        form, out, inputs = layer.form, layer.out_features, layer.in_features
        four, group = form.bits == 4, form.group or layer.in_features
        groups, outputs = inputs // group, _whole(out, WIDTH)
        codes, scales, zeros = layer.matrix().codes.contiguous(), layer.scales.half().contiguous(), _offsets(layer)
        self.data = room.take(outputs * inputs * form.bits // 8, torch.uint8)
        self.scales = room.take(outputs * groups, torch.float16)
        self.zeros = None if zeros is None else room.take(outputs * groups, torch.float16)
        self.bias = None if layer.bias is None else layer.bias.detach().float()
        self.order = None if layer.perm is None else layer.perm.contiguous()
        job = native.Pack(
            *(int(four), int(gated), out, inputs, groups, codes.data_ptr(), scales.data_ptr(), pointer(zeros)),
            *(self.data.data_ptr(), self.scales.data_ptr(), pointer(self.zeros)),
        )
        library.puyu_pack(ctypes.byref(job))
        unit = next(unit for unit in UNITS if group % unit == 0)
        self.matrix = native.Matrix(
            *(_INT4 if four else _INT8, inputs, out, group, unit, self.data.data_ptr()),
            *(self.scales.data_ptr(), pointer(self.zeros), pointer(self.bias), pointer(self.order)),
        )

    @staticmethod
    def size(layer: QuantLinear) -> int:
        """Bytes that it takes of a Room."""
        outputs, inputs = _whole(layer.out_features, WIDTH), layer.in_features
        scales = _whole(outputs * inputs // (layer.form.group or inputs) * 2, LINE)
        return _whole(outputs * inputs * layer.form.bits // 8, LINE) + scales * (1 if layer.zeros is None else 2)

    def codes(self) -> Tensor:
        """The codes as the layer had them, unpacked."""
        four = self.matrix.kind == _INT4
        out, inputs = self.matrix.outputs, self.matrix.inputs
        codes = torch.empty(out, inputs // 2 if four else inputs, dtype=torch.uint8 if four else torch.int8)
        job = native.Pack(four, self._gated, out, inputs, 0, codes.data_ptr(), None, None, self.matrix.data, None, None)
        self._library.puyu_unpack(ctypes.byref(job))
        return codes

    def __deepcopy__(self, memo: object) -> Packed:
        """Never changes, so copies of a model share it."""
        return self

    @staticmethod
    def fits(layer: QuantLinear, *, gated: bool = False) -> bool:
        """Whether the layer's sizes fill vectors, and its scales are half floats."""
        group = layer.form.group or layer.in_features
        whole = group % UNITS[-1] == 0 and (not gated or layer.out_features % WIDTH == 0)
        asymmetric = layer.form.bits == 8 and layer.zeros is not None
        largest = layer.scales.abs().max().item()
        return whole and not asymmetric and (largest == 0 or 1e-5 < largest < 6e3)


def _whole(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def _offsets(layer: QuantLinear) -> Tensor | None:
    """What a group's weights are beside (code - 8) * scale, as half floats; None where that is nothing."""
    if layer.zeros is None:
        return None
    return ((8 - layer.zeros).float() * layer.scales.float()).half().contiguous()


def head_of(library: ctypes.CDLL, weight: Tensor) -> QuantLinear:
    """A language head [V, D], bfloat16 or float32, as int8 with one scale a row: a quantized model reads it for every
    token."""
    weight = weight.detach().contiguous()
    codes = torch.empty(weight.shape, dtype=torch.int8)
    low, high = torch.aminmax(weight, dim=1)
    scales = (torch.maximum(-low, high).float() / 127).half()
    steps = torch.where(scales > 0, scales, 1.0).float()
    kind = KINDS[weight.dtype]
    library.puyu_round_rows(kind, weight.data_ptr(), *weight.shape, steps.data_ptr(), codes.data_ptr())
    return QuantLinear.of(QuantWeight(codes, scales[:, None], bits=8))


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's data is, as ctypes wants it."""
    return None if tensor is None else tensor.data_ptr()
