"""Weight files written one tensor at a time, so that memory holds no more than that one.

Both kinds of file name all their tensors before the first of their numbers, so a writer gets outlines (tensors on the
meta device) and then the tensors in the same order:

    with SafetensorsWriter(path, {"norm.weight": torch.empty(64, device="meta")}) as file:
        file.add(torch.ones(64))

Formats: safetensors (huggingface.co/docs/safetensors), and torch's zip of a pickled state dict, which `torch.load`
maps and reads with `weights_only=True`. Equal tensors give equal bytes. The caller sees to it that half a file is
never taken for a whole one.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from torch import Tensor

from puyu.files import disk_errors

_SAFE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
ALIGNMENT = 64


class _Writer:
    """What both writers share: the file, the outlines, and which tensor comes next."""

    def __init__(self, path: Path, outlines: Mapping[str, Tensor]) -> None:
        self.path, self._outlines = path, dict(outlines)
        self._waiting = list(outlines.items())[::-1]
        self._stack = ExitStack()
        self._file: IO[bytes]

    def __enter__(self) -> Self:
        with ExitStack() as self._stack:
            self._stack.enter_context(disk_errors(self.path))
            self._file = self._stack.enter_context(open(self.path, "wb"))
            self._begin()
            self._stack = self._stack.pop_all()
        return self

    def add(self, tensor: Tensor) -> None:
        """The next tensor."""
        name, outline = self._waiting.pop()
        fits = (tensor.shape, tensor.dtype) == (outline.shape, outline.dtype)
        assert fits, f"{name}: {tuple(tensor.shape)} {tensor.dtype} is not what was announced"
        self._write(tensor.detach().contiguous().view(torch.uint8).numpy().data.cast("B"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            assert not self._waiting, f"{self.path}: {len(self._waiting)} tensors were not written"
            self._end()

    def _begin(self) -> None:
        """What stands before the numbers."""

    def _write(self, data: memoryview) -> None:
        """The numbers of one tensor."""
        self._file.write(data)

    def _end(self) -> None:
        """What stands behind the numbers."""


class SafetensorsWriter(_Writer):
    """A .safetensors file; outlines of wider numbers come first, so that all tensors are aligned."""

    def _begin(self) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, outline in self._outlines.items():
            end = start + outline.nbytes
            kind = _SAFE_NAMES[outline.dtype]
            header[name] = {"dtype": kind, "shape": list(outline.shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._file.write(len(text).to_bytes(8, "little") + text)


@dataclass(frozen=True, slots=True)
class _Storage:
    """The numbers of one tensor, as the pickle names them: a record of the archive."""

    key: int
    outline: Tensor


@dataclass(frozen=True, slots=True)
class _Stored:
    storage: _Storage


class _StatePickler(pickle.Pickler):
    """A state dict whose numbers stand elsewhere in the archive."""

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        return ("storage", _STORAGES[value.outline.dtype], str(value.key), "cpu", value.outline.numel())

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Stored):
            return NotImplemented
        shape, stride = tuple(value.storage.outline.shape), tuple(value.storage.outline.stride())
        return torch._utils._rebuild_tensor_v2, (value.storage, 0, shape, stride, False, OrderedDict())


class PickleWriter(_Writer):
    """A .pt file as `torch.save` writes a state dict: an archive without compression, a record a tensor."""

    def _begin(self) -> None:
        self._zip = self._stack.enter_context(zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED))
        self._count = 0
        state = {name: _Stored(_Storage(key, outline)) for key, (name, outline) in enumerate(self._outlines.items())}
        stream = io.BytesIO()
        _StatePickler(stream, protocol=2).dump(state)
        self._record("data.pkl", stream.getbuffer())
        self._record(".format_version", b"1")
        self._record(".storage_alignment", str(ALIGNMENT).encode())
        self._record("byteorder", b"little")

    def _write(self, data: memoryview) -> None:
        self._record(f"data/{self._count}", data)
        self._count += 1

    def _end(self) -> None:
        self._record("version", b"3\n")

    def _record(self, name: str, data: bytes | memoryview) -> None:
        """One member, its data aligned by a field of padding in its header, as torch does it."""
        info = zipfile.ZipInfo(f"{self.path.stem}/{name}")
        header = 30 + len(info.filename.encode()) + 20  # with the field of 64-bit sizes
        padding = -(self._file.tell() + header + 4) % ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        with self._zip.open(info, "w", force_zip64=True) as member:
            member.write(data)
