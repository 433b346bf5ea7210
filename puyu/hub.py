"""A model's name -> a folder here: a path, `owner/name` on the Hugging Face hub, or `ms:owner/name` on ModelScope.

    folder = resolve("internlm/internlm2_5-1_8b-chat")

Nothing is downloaded unless the caller names a hub model. Only one process downloads a model at a time; the others
wait and find it in the cache. HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are honoured by the hub's own client. Code and
pickles that lie in a repository are left there; pickles are fetched when asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from puyu.errors import DependencyError, InputError
from puyu.files import file_lock, hash_bytes, read_object

_HUB_ID = re.compile(r"(ms:)?(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]
DUPLICATES = ["consolidated*", "original/*", "onnx/*", "checkpoint-*/*"]
"""The same weights again, in other formats or from earlier."""


def resolve(path: str | Path, *, allow_pickle: bool = False) -> Path:
    """A model folder; what is no folder but looks like a hub id is fetched, `@revision` included.

    InputError when there is no such model; DependencyError names the client that is missing.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    found = _HUB_ID.fullmatch(path) if isinstance(path, str) else None
    if found is None:
        remedy = "give a model directory, or a hub id: owner/name, or ms:owner/name on ModelScope"
        raise InputError(f"no such model folder: {path}", remedy=remedy)
    download = _modelscope() if found[1] else _hugging_face()
    patterns = [*FILES, "*.bin"] if allow_pickle else FILES
    with file_lock(_lock_path(found[0])):
        return _fetched(download, found[0], name=found[2], revision=found[3], patterns=patterns)


def base_of(folder: Path) -> Path:
    """The model that an adapter's directory (peft's) belongs to, fetched if it is named by a hub id; the folder itself
    when it holds a model."""
    settings = folder / "adapter_config.json"
    if not settings.is_file() or (folder / "config.json").is_file():
        return folder
    name = read_object(settings).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(f"{settings} names no base", remedy="write base_model_name_or_path into it")
    try:
        return resolve(folder / name if (folder / name).is_dir() else name)
    except InputError as error:
        raise InputError(f"{settings}: {error.message}", remedy="correct base_model_name_or_path in it") from error


def _fetched(download: Callable[..., str], shown: str, *, name: str, revision: str | None, patterns: list[str]) -> Path:
    which = {"revision": revision} if revision else {}
    try:
        return Path(download(name, allow_patterns=patterns, ignore_patterns=DUPLICATES, **which))
    except Exception as error:
        remedy = "check the name and the network; a gated model needs its hub's token"
        raise InputError(f"{shown} is no folder here and cannot be fetched: {error}", remedy=remedy) from error


def _lock_path(name: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "puyu" / "locks" / f"{hash_bytes(name.encode())}.lock"


def _hugging_face() -> Callable[..., str]:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise _missing("huggingface_hub") from error
    return snapshot_download


def _modelscope() -> Callable[..., str]:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise _missing("modelscope") from error
    found: Callable[..., str] = snapshot_download
    return found


def _missing(client: str) -> DependencyError:
    remedy = f"pip install {client}, or give a model directory"
    return DependencyError(f"fetching a model by name needs {client}", remedy=remedy)
