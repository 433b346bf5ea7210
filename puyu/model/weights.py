"""Weight files of a Hugging Face directory: safetensors, one or several with an index; pickles when asked for.

    with open_weights(folder) as stored: tensor = stored.take("model.norm.weight")
    save_weights(folder, tensors, max_shard_bytes=5 << 30)

Tensors are memory-mapped and read one by one. A pickle is opened by torch's restricted reader, which builds tensors
only; it is refused all the same until the caller says `allow_pickle=True`. Files appear by rename; the index of a
sharded checkpoint appears last, so that a kill never leaves one that mixes old and new shards.
"""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from puyu.errors import CheckpointError, ConfigError
from puyu.files import disk_errors, read_object, write_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


class Stored:
    """All tensors of a checkpoint by name, memory-mapped; remembers which were taken."""

    def __init__(self, folder: Path, files: Mapping[str, Any]) -> None:
        self.folder, self._files = folder, files
        self.unused = set(files)

    def take(self, name: str) -> Tensor:
        """One tensor; CheckpointError when it is not there or cannot be read."""
        return self._read(name, lambda file: file.get_tensor(name))

    def shape(self, name: str) -> list[int]:
        """The shape of one tensor in safetensors, which counts as taken."""
        return self._read(name, lambda file: file.get_slice(name).get_shape())

    def _read(self, name: str, look: Callable[[Any], Any]) -> Any:
        if name not in self._files:
            raise CheckpointError(f"{self.folder}: tensor {name!r} is missing", remedy="copy the checkpoint again")
        self.unused.discard(name)
        try:
            return look(self._files[name])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder}: tensor {name!r} cannot be read: {error}") from error


class PickleFile:
    """A pickled state dict with the two methods of an open safetensors file."""

    def __init__(self, path: Path) -> None:
        try:
            mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise CheckpointError(f"{path} is truncated or not a plain state dict: {error}") from error
        if not isinstance(state, Mapping) or not all(isinstance(item, Tensor) for item in state.values()):
            raise CheckpointError(f"{path} holds more than tensors by name", remedy="convert it to safetensors")
        self._state: Mapping[str, Tensor] = state

    def keys(self) -> list[str]:
        return list(self._state)

    def get_tensor(self, name: str) -> Tensor:
        return self._state[name]


@contextlib.contextmanager
def open_weights(folder: Path, *, allow_pickle: bool = False) -> Iterator[Stored]:
    """All weights of a directory; CheckpointError names a file that is missing or torn."""
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for path in _weight_files(folder, allow_pickle=allow_pickle):
            stream = PickleFile(path) if path.suffix == ".bin" else stack.enter_context(_open_safetensors(path))
            files |= dict.fromkeys(stream.keys(), stream)
        yield Stored(folder, files)


def _weight_files(folder: Path, *, allow_pickle: bool) -> list[Path]:
    """The files that an index lists, else the one file; safetensors before pickles."""
    if (folder / INDEX).is_file():
        return _listed(folder / INDEX)
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if (folder / WEIGHTS).is_file() or not pickles:
        return [folder / WEIGHTS]
    if not allow_pickle:
        remedy = f"convert {pickles[0]} to safetensors, or set allow_pickle=True if you trust its source"
        raise CheckpointError(f"{folder} has no {WEIGHTS}; pickle weights are not read unasked", remedy=remedy)
    return _listed(folder / PICKLE_INDEX) if (folder / PICKLE_INDEX).is_file() else [folder / PICKLE]


def _listed(index: Path) -> list[Path]:
    names = sorted(set(read_object(index).get("weight_map", {}).values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file beside it", remedy="copy it again")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent} has no {name}", remedy="copy it again")
    return [index.parent / name for name in names]


def _open_safetensors(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}", remedy="copy it again")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not safetensors: {error}", remedy="copy it again") from error


def save_weights(folder: Path, tensors: Mapping[str, Tensor], *, max_shard_bytes: int | None = None) -> None:
    """Write model.safetensors, or shards of at most `max_shard_bytes` (one tensor at least) and their index."""
    shards = shards_of(tensors, max_shard_bytes)
    if len(shards) == 1:
        _save_file(folder / WEIGHTS, shards[0])
        stale = [folder / INDEX, *folder.glob("model-*-of-*.safetensors")]
    else:
        names = shard_names(len(shards))
        (folder / INDEX).unlink(missing_ok=True)
        for name, shard in zip(names, shards, strict=True):
            _save_file(folder / name, shard)
        write_index(folder, shards)
        stale = [p for p in folder.glob("model*.safetensors") if p.name not in names]
    for path in stale:
        path.unlink(missing_ok=True)


def shard_names(count: int) -> list[str]:
    """Files of so many shards; of one it is model.safetensors."""
    several = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    return several if count > 1 else [WEIGHTS]


def write_index(folder: Path, shards: Sequence[Mapping[str, Tensor]]) -> None:
    """Which tensor stands in which file."""
    files = {key: name for name, shard in zip(shard_names(len(shards)), shards, strict=True) for key in shard}
    size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))})


def shards_of(tensors: Mapping[str, Tensor], limit: int | None) -> list[dict[str, Tensor]]:
    """Tensors in their order, a new shard where the next one would not fit."""
    if limit is not None and limit < 1:
        raise ConfigError(f"max_shard_bytes must be at least 1, got {limit}")
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if limit is not None and shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _save_file(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(path.name + ".partial")
    try:
        with disk_errors(path):
            try:
                save_file(tensors, temporary, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(*_errno_of(error)) from error
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _errno_of(error: SafetensorError) -> tuple[int, str]:
    """safetensors reports I/O failures as text ('... (os error 28)'); give them their number back."""
    text = str(error)
    number = text.rpartition("os error ")[2].rstrip(')" ')
    return (int(number) if number.isdigit() else 5, text)
