"""What made this directory: inputs, config, code version, numbers. One `lineage.json` per artifact.

It is written last, so a directory that has one is complete. `trace` walks from any artifact back to the raw
files and forward to its evaluations, by the `inputs` that each lineage names.

    $ puyu trace runs/nano/ppo
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from puyu.errors import InputError
from puyu.files import hash_path, read_json, write_json

FILE = "lineage.json"


@dataclass(frozen=True, slots=True)
class Input:
    """One thing that a stage read. `key` is the stage key of an artifact, or the content hash of a file."""

    name: str
    path: str
    key: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """The receipt of one stage. `key` covers config and inputs; times and code version stand beside it."""

    stage: str
    key: str
    version: int
    config: Mapping[str, Any]
    inputs: tuple[Input, ...]
    numbers: Mapping[str, Any]
    outputs: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    finished: str = ""
    code: str = ""
    machine: str = ""


def write_lineage(folder: Path, lineage: Lineage) -> None:
    """Write the receipt atomically; the artifact is complete from here on."""
    write_json(folder / FILE, asdict(lineage))


def read_lineage(folder: Path) -> Lineage:
    """Read a receipt; InputError when there is none or it is torn."""
    if not (folder / FILE).is_file():
        raise InputError(f"{folder} has no {FILE}", remedy="it was not made by puyu, or its stage has not finished")
    value = read_json(folder / FILE)
    try:
        inputs = tuple(Input(**item) for item in value.pop("inputs"))
        return Lineage(inputs=inputs, **value)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{folder / FILE} does not hold a lineage: {error}") from error


def find_lineage(folder: Path) -> Lineage | None:
    """The receipt of a finished artifact, or None."""
    return read_lineage(folder) if (folder / FILE).is_file() else None


def input_of(name: str, path: Path) -> Input:
    """Describe an input: an artifact, or a file that its stage wrote, by the stage key; all else by its content."""
    found = find_lineage(path) if path.is_dir() else None
    if found is None and path.is_file() and (made := find_lineage(path.parent)) and path.name in made.outputs:
        found = made
    return Input(name, str(path), found.key if found else hash_path(path))


def without_paths(value: Any, keys: Mapping[str, str]) -> Any:
    """A dumped config with each input's path replaced by its key, so that moving files changes no identity."""
    if isinstance(value, Mapping):
        return {name: without_paths(item, keys) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, keys) for item in value]
    return keys.get(value, value) if isinstance(value, str) else value


@cache
def code_version() -> str:
    """The git commit of the package's own checkout (with `+changes` when dirty), else the version."""
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        try:
            commit = _git(root, "rev-parse", "--short=12", "HEAD")
            return commit + ("+changes" if _git(root, "status", "--porcelain", "--", "puyu") else "")
        except (OSError, subprocess.CalledProcessError):
            pass  # git is missing or there is no commit yet: the package version says enough
    from puyu import __version__

    return f"puyu {__version__}"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def now() -> str:
    """UTC time, to the second, ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def machine() -> str:
    """One line about the machine, without names that identify it."""
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


@dataclass(frozen=True, slots=True)
class Node:
    """A step of the lineage graph; `lineage` is None for a plain file or folder."""

    path: Path
    lineage: Lineage | None
    parents: tuple[tuple[str, Node], ...] = ()


def ancestors(folder: Path, _seen: frozenset[Path] = frozenset()) -> Node:
    """The graph back to raw files, as a tree (a shared ancestor appears under each of its children)."""
    folder = folder.resolve()
    if folder in _seen:
        return Node(folder, None)
    found = read_lineage(folder)
    parents = []
    for item in found.inputs:
        path = artifact_folder(Path(item.path))
        if find_lineage(path) is not None:
            parents.append((item.name, ancestors(path, _seen | {folder})))
        else:
            parents.append((item.name, Node(path, None)))
    return Node(folder, found, tuple(parents))


def artifact_folder(path: Path) -> Path:
    """The artifact that a path belongs to: a file inside one stands for its folder."""
    if path.is_file() and (path.parent / FILE).is_file():
        return path.parent
    return path


def descendants(folder: Path) -> list[tuple[Path, Lineage]]:
    """Sibling artifacts that name `folder` among their inputs, directly or through others."""
    folder = folder.resolve()
    siblings = [(p.parent, read_lineage(p.parent)) for p in sorted(folder.parent.glob(f"*/{FILE}"))]
    reached, found, grew = {folder}, [], True
    while grew:
        grew = False
        for path, lineage in siblings:
            sources = {artifact_folder(Path(item.path)).resolve() for item in lineage.inputs}
            if path.resolve() not in reached and sources & reached:
                reached.add(path.resolve())
                found.append((path, lineage))
                grew = True
    return found
