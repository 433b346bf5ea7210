"""The cold tier: states in a directory or an object store that outlive the machine (any URL that fsspec opens).

A state is uploaded under a name of its own, `step-00000100-ATTEMPT/`, every process its part; the first process writes
`state.json` when all parts are there: a state without it was not finished and is never read. One run a URL. Reading
fetches ranges, so a process of another layout takes only what it needs. Knows no tensor.

    cold: s3://bucket/runs/7b          # needs s3fs; file:///archive/7b and memory:// need fsspec alone
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from puyu.dist import World
from puyu.errors import CheckpointError, ConfigError, DependencyError, PuyuError
from puyu.train.state import STATE, part_name

_BLOCK = 16 << 20
_POLL = 0.2


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What a store raises (botocore, aiohttp, ... have classes of their own) is an OSError."""
    try:
        yield
    except (OSError, PuyuError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class Uploaded(NamedTuple):
    """An uploaded state as it is read."""

    files: Any
    path: str

    def __str__(self) -> str:
        return f"{self.files.unstrip_protocol(self.path)}"

    def span(self, name: str, start: int, stop: int) -> memoryview:
        with _as_os_error():
            return memoryview(bytearray(self.files.cat_file(f"{self.path}/{name}", start=start, end=stop)))

    def whole(self, name: str) -> bytes:
        with _as_os_error():
            return self.files.cat_file(f"{self.path}/{name}")


class ColdTier:
    """States under one URL."""

    def __init__(self, url: str, *, keep: int) -> None:
        """DependencyError where fsspec, or its part for this kind of URL, is not installed."""
        try:
            import fsspec

            self.files, self.root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            kind = url.partition("://")[0]
            package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}.get(kind, "fsspec")
            raise DependencyError(f"cold: {url} needs {package}", remedy=f"pip install {package}") from error
        except ValueError as error:
            raise ConfigError(f"cold: {url}: {error}", remedy="for example s3://bucket/run or /archive/run") from error
        self.keep = keep

    def names(self) -> list[str]:
        """Uploaded states that are whole, newest first; OSError when the store cannot be read."""
        with _as_os_error():
            return [name for name in self._all() if self.files.exists(f"{self.root}/{name}/{STATE}")]

    def _all(self) -> list[str]:
        self.files.invalidate_cache()
        try:
            found = self.files.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        names = (path.rstrip("/").rpartition("/")[2] for path in found)
        return sorted((name for name in names if name.startswith("step-")), reverse=True)

    def shelf(self, name: str) -> Uploaded:
        return Uploaded(self.files, f"{self.root}/{name}")

    def upload(self, name: str, world: World) -> Upload:
        return Upload(self, name, world)

    def sweep(self) -> None:
        """Remove what a killed run left half-uploaded."""
        whole = set(self.names())
        with _as_os_error():
            self.drop([name for name in self._all() if name not in whole])

    def trim(self, newest: str) -> None:
        """Keep this one and the last ones before it; newer ones are of a run that went back, and do not count."""
        older = [name for name in self.names() if name[:13] <= newest[:13] and name != newest]
        self.drop(older[self.keep - 1 :] if self.keep else [])

    def drop(self, names: Sequence[str]) -> None:
        """Remove; state.json goes first, so that a half-removed state is never read."""
        with _as_os_error():
            for name in names:
                state = f"{self.root}/{name}/{STATE}"
                if self.files.exists(state):
                    self.files.rm_file(state)
                self.files.rm(f"{self.root}/{name}", recursive=True)


class Upload:
    """One state on its way up. The part stays open, so its folder may be renamed or removed meanwhile."""

    def __init__(self, tier: ColdTier, name: str, world: World) -> None:
        self.tier, self.world, self.path = tier, world, f"{tier.root}/{name}"
        self.cancelled = threading.Event()
        self._stream: IO[bytes] | None = None
        self._index = b""
        self._size = self._sent = 0

    def __str__(self) -> str:
        """How far it is."""
        part = f"{self._sent:,} of {self._size:,} bytes of part {self.world.rank} are sent"
        waits = ", its end or the parts of others are awaited" if self._sent == self._size else ""
        return f"{self.path}: {part}{waits}; it is not whole, and will not be read"

    def open(self, part: Path, index: bytes) -> None:
        """Hold on to this process's part."""
        self._stream, self._index, self._size = part.open("rb"), index, part.stat().st_size

    def run(self, text: bytes) -> None:
        """Send the part, then its mark; the first process waits for those of the others and commits."""
        assert self._stream is not None, "the part is opened when it is written"
        name, files = f"{self.path}/{part_name(self.world.rank)}", self.tier.files
        with _named(self.path), self._stream as stream:
            files.makedirs(self.path, exist_ok=True)
            with files.open(f"{name}.safetensors", "wb") as target:
                while (block := stream.read(_BLOCK)) and not self.cancelled.is_set():
                    target.write(block)
                    self._sent += len(block)
            if self.cancelled.is_set():
                raise CheckpointError(f"{self.path} was given up")
            files.pipe_file(f"{name}.json", self._index)
        if self.world.is_main:
            self.commit(text)

    def commit(self, text: bytes) -> None:
        """Write state.json once all marks are there; then drop the states beyond `keep`."""
        with _named(self.path):
            for rank in range(self.world.size):
                while not self.tier.files.exists(f"{self.path}/{part_name(rank)}.json"):
                    if self.cancelled.wait(_POLL):
                        raise CheckpointError(f"{self.path} was given up: a part of it is missing")
                    self.tier.files.invalidate_cache()
            self.tier.files.pipe_file(f"{self.path}/{STATE}", text)
            self.tier.trim(self.path.rpartition("/")[2])


@contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        with _as_os_error():
            yield
    except OSError as error:
        raise CheckpointError(f"{path} could not be uploaded: {error}", remedy="see that the store is there") from error
