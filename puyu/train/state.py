"""Training state on disk: weights, moments, data cursor and step, in a folder that a kill cannot tear.

`train_state/step-00000100/` holds `model.safetensors`, `optimizer.safetensors` and `state.json` with their checksums.
It is written under another name and renamed when it is whole; a folder that fails its checksums is passed over for
the one before. Random streams are functions of (seed, step, rank), so there is no generator to save. All tensors are
whole, so the state fits any number of processes. No pickle.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from puyu.dist import barrier, current_world
from puyu.errors import CheckpointError, InputError
from puyu.files import clear_folder, disk_errors, hash_file, read_json, write_json
from puyu.log import logger
from puyu.train.layouts import Layout
from puyu.train.pieces import Piece, gather_whole

FOLDER = "train_state"
_PARTS = ("model.safetensors", "optimizer.safetensors")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: completed steps, tokens seen, the source's cursor, what its watch has seen and skipped."""

    step: int
    tokens: int
    source: Mapping[str, Any]
    health: Mapping[str, Any] = field(default_factory=dict)


def save_state(out: Path, progress: Progress, *, layout: Layout, identity: str, keep: int = 2) -> Path:
    """Write one state; every rank must call it, rank 0 writes. Older ones beyond `keep` are removed."""
    weights, moments = gather_whole(layout.pieces()), gather_whole(layout.moments())
    folder = out / FOLDER / f"step-{progress.step:08d}"
    if current_world().is_main:
        _write(folder, (weights, moments), progress, identity)
        for old in sorted(folder.parent.glob("step-????????"))[:-keep]:
            clear_folder(old)
    barrier()
    return folder


def _write(folder: Path, parts: tuple[dict[str, Tensor], ...], progress: Progress, identity: str) -> None:
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    clear_folder(temporary)
    with disk_errors(folder):
        temporary.mkdir(parents=True)
        for name, tensors in zip(_PARTS, parts, strict=True):
            _save_tensors(temporary / name, tensors)
    value = {
        "step": progress.step,
        "tokens": progress.tokens,
        "identity": identity,
        "source": dict(progress.source),
        "health": dict(progress.health),
        "checksums": {name: hash_file(temporary / name) for name in _PARTS},
    }
    write_json(temporary / "state.json", value)
    if folder.exists():
        clear_folder(folder)
    temporary.rename(folder)


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # I/O failures come as text: "... (os error 28)"
        number = str(error).rpartition("os error ")[2].rstrip(')" ')
        raise OSError(int(number) if number.isdigit() else 5, str(error)) from error
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def find_state(out: Path, *, before: int | None = None) -> Path | None:
    """The newest state (of fewer than `before` steps) whose checksums hold; torn ones are named and passed over."""
    for folder in sorted((out / FOLDER).glob("step-????????"), reverse=True):
        if before is not None and step_of(folder) >= before:
            continue
        if problem := _problem(folder):
            logger.warning("%s is torn (%s): going on from the state before it", folder, problem)
            continue
        return folder
    return None


def step_of(folder: Path) -> int:
    """The steps that a state has behind it."""
    return int(folder.name.removeprefix("step-"))


def drop_after(out: Path, step: int) -> None:
    """Remove the states of more than `step` steps: the run has gone back."""
    for folder in (out / FOLDER).glob("step-????????"):
        if step_of(folder) > step:
            clear_folder(folder)


def _problem(folder: Path) -> str:
    try:
        value = read_json(folder / "state.json")
        for name, checksum in value["checksums"].items():
            if hash_file(folder / name) != checksum:
                return f"{name} does not match its checksum"
    except (InputError, OSError, KeyError, TypeError, AttributeError) as error:
        return str(error).splitlines()[0]
    return ""


def load_state(folder: Path, *, layout: Layout, identity: str) -> Progress:
    """Restore weights and moments in place; CheckpointError when the state is of another run."""
    value = read_json(folder / "state.json")
    if value["identity"] != identity:
        raise CheckpointError(
            f"{folder} was saved by a run with another config or other inputs",
            remedy=f"choose another --out, or remove {folder.parent} to start over",
        )
    for name, pieces in zip(_PARTS, (layout.pieces(), layout.moments()), strict=True):
        _fill(pieces, load_file(folder / name))
    return Progress(value["step"], value["tokens"], value["source"], value.get("health", {}))


@torch.no_grad()
def _fill(pieces: Iterable[Piece], saved: Mapping[str, Tensor]) -> None:
    for piece in pieces:
        piece.tensor.copy_(saved[piece.name][piece.window])
