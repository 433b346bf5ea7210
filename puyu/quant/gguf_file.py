"""The GGUF container, version 3: typed metadata, then tensors, each at a multiple of 32 bytes. Little endian.

After the description in llama.cpp's docs (ggml/docs/gguf.md). Values: bool, int (u32), float (f32), str, and lists of
one of them (a list of ints is i32, of floats f32). Knows no model.

    write_gguf(path, {"general.architecture": "llama"}, [GGUFTensor("output_norm.weight", (256,), "f32", make)])
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from puyu.files import atomic_write
from puyu.quant.gguf_blocks import TYPE_IDS, GGUFType, encode, encoded_bytes

ALIGNMENT = 32
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_VERSION = 3


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """`make` gives the numbers, fp32 of `shape` (rows first), when they are written."""

    name: str
    shape: tuple[int, ...]
    kind: GGUFType
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return encoded_bytes(int(np.prod(self.shape)), self.kind)


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Sequence[GGUFTensor]) -> None:
    """Write the file by rename; tensors are made and written one after another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as stream:
        stream.write(b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
        for key, value in metadata.items():
            stream.write(_string(key) + _typed(value))
        offset = 0
        for tensor in tensors:
            stream.write(_info(tensor, offset))
            offset += tensor.size + _padding(tensor.size)
        stream.write(bytes(_padding(stream.tell())))
        for tensor in tensors:
            _write_data(stream, tensor)


def _write_data(stream: IO[Any], tensor: GGUFTensor) -> None:
    numbers = tensor.make()
    assert numbers.shape == tensor.shape, f"{tensor.name}: {numbers.shape} made, {tensor.shape} announced"
    stream.write(encode(numbers, tensor.kind).tobytes())
    stream.write(bytes(_padding(tensor.size)))


def _padding(size: int) -> int:
    return -size % ALIGNMENT


def _info(tensor: GGUFTensor, offset: int) -> bytes:
    dimensions = tensor.shape[::-1]  # the contiguous one first
    packed = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return _string(tensor.name) + packed + struct.pack("<IQ", TYPE_IDS[tensor.kind], offset)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> bytes:
    if isinstance(value, list):
        kind, items = _list(value)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + items
    kind = _kind(value)
    return struct.pack("<I", kind) + _plain(kind, value)


def _list(values: list[Any]) -> tuple[int, bytes]:
    kind = _kind(values[0]) if values else _STRING
    kind = _I32 if kind == _U32 else kind
    return kind, b"".join(_plain(kind, value) for value in values)


def _kind(value: Any) -> int:
    for types, kind in ((bool, _BOOL), (int, _U32), (float, _F32), (str, _STRING)):
        if isinstance(value, types):
            return kind
    raise AssertionError(f"no GGUF type for {type(value).__name__}")


def _plain(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _string(value)
    return struct.pack({_U32: "<I", _I32: "<i", _F32: "<f", _BOOL: "<?"}[kind], value)
