"""Files that a kill cannot tear: atomic write, JSONL streams, content hashes.

Everything that another process may read appears by rename: first `NAME.tmp-PID`, fsync, then `os.replace`.
A torn JSONL line is never lost in silence: `read_jsonl` hands it to the caller's quarantine, or raises.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from puyu.errors import DependencyError, InputError, ResourceError


@dataclass(frozen=True, slots=True)
class BadRecord:
    """Where a record could not be read: file, 1-based line, byte offset, reason, and the first bytes."""

    path: str
    line: int
    offset: int
    reason: str
    head: str


Quarantine = Callable[[BadRecord], None]
"""What takes the records that cannot be read."""


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w", *, durable: bool = True) -> Iterator[IO[Any]]:
    """Open a temporary sibling; on a clean exit rename it to `path`, else remove it.

    `durable`: it is on the disk before it has its name (fsync), for all that a run leaves behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    encoding = None if "b" in mode else "utf-8"
    try:
        with (
            disk_errors(path),
            open(temporary, mode, encoding=encoding, newline=None if "b" in mode else "\n") as stream,
        ):
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn 'no space left' and 'permission denied' into errors that name the path and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            folder = existing_parent(path)
            free = shutil.disk_usage(folder).free // 2**20
            remedy = f"free some space ({free} MiB left on {folder}) and run the same command again"
            raise ResourceError(f"disk full while writing {path}", remedy=remedy) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise ResourceError(f"cannot write {path}: {error.strerror}", remedy="choose another --out") from error
        raise


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold a lock file, waiting for whoever has it; a kill frees it."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "w")  # noqa: SIM115 - closed by the `with` below
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    for folder in (path, *path.resolve().parents):
        if folder.is_dir():
            return folder
    return Path("/")


def write_text(path: Path, text: str) -> None:
    """Write a whole text file atomically."""
    with atomic_write(path) as stream:
        stream.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: two spaces, keys in their order, UTF-8, a newline at the end."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; errors name the file and the position."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not valid JSON: {error}", remedy="the file may be truncated; write it again"
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; InputError for any other value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def write_jsonl(path: Path, rows: Iterable[Any]) -> int:
    """Write rows atomically (`.gz`, `.zst` by suffix, byte-identical for equal rows); returns the count."""
    count = 0
    with atomic_write(path, "wb") as raw, _compressor(path, raw) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            count += 1
    return count


@contextlib.contextmanager
def _compressor(path: Path, raw: IO[bytes]) -> Iterator[IO[bytes]]:
    if path.suffix == ".gz":
        with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as stream:
            yield stream  # type: ignore[misc]
    elif path.suffix == ".zst":
        with _zstandard().ZstdCompressor(level=6).stream_writer(raw, closefd=False) as stream:
            yield stream
    else:
        yield raw


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open for reading, decompressing `.gz` and `.zst`."""
    try:
        raw = open(path, "rb")  # noqa: SIM115 - closed by the `with` below
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    with raw:
        if path.suffix == ".gz":
            with gzip.open(raw) as stream:
                yield stream  # type: ignore[misc]
        elif path.suffix == ".zst":
            with io.BufferedReader(_ZstdStream(raw), 1 << 20) as stream:
                yield stream
        else:
            yield raw


class _ZstdStream(io.RawIOBase):
    """Frames of a .zst one after the other; a truncated one raises EOFError (the library's reader just ends)."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._ready, self._rest = raw, b"", b""
        self._frame = _zstandard().ZstdDecompressor().decompressobj()
        self._open = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._advance():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _advance(self) -> bool:
        """Decompress one more block; False at the end."""
        block = self._rest or self._raw.read(1 << 18)
        if not block:
            if self._open:
                raise EOFError("the compressed stream ends early")
            return False
        if not self._open:
            self._frame, self._open = _zstandard().ZstdDecompressor().decompressobj(), True
        self._ready = self._frame.decompress(block)
        self._open, self._rest = not self._frame.eof, self._frame.unused_data
        return True


def torn_errors() -> tuple[type[Exception], ...]:
    """What a truncated or damaged .gz or .zst raises while it is read."""
    try:
        import zstandard
    except ImportError:
        return (EOFError, gzip.BadGzipFile, zlib.error)
    return (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


def archive_errors() -> tuple[type[Exception], ...]:
    """What a damaged archive of files raises; RuntimeError is a password, or a compression that is not known."""
    named = (UnicodeDecodeError,)  # a name that is not in its encoding
    return (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, RuntimeError, *named, *torn_errors())


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise DependencyError("reading .zst needs zstandard", remedy="pip install 'puyu-llm[data]'") from error
    return zstandard


def read_jsonl(path: Path, *, quarantine: Quarantine | None = None) -> Iterator[Any]:
    """Yield one value a line. A torn line goes to `quarantine` (file, line, offset) or raises InputError."""
    for _, value in read_jsonl_lines(path, quarantine=quarantine):
        yield value


def decode_json(line: bytes) -> Any:
    """The value of a line."""
    return json.loads(line.decode("utf-8"))


def read_jsonl_lines(
    path: Path, *, quarantine: Quarantine | None = None, decode: Callable[[bytes], Any] = decode_json
) -> Iterator[tuple[int, Any]]:
    """Like `read_jsonl`, with the 1-based line number. A torn archive ends the reading in the same way.

    `decode` raises what `decode_json` raises.
    """
    number, offset = 0, 0
    try:
        with open_bytes(path) as stream:
            for number, line in enumerate(stream, 1):
                start, offset = offset, offset + len(line)
                if not line.strip():
                    continue
                try:
                    value = decode(line)
                except (ValueError, RecursionError) as error:  # a number of too many digits is a plain ValueError
                    bad = BadRecord(str(path), number, start, str(error), line[:80].decode("utf-8", "replace"))
                    if quarantine is None:
                        raise InputError(f"{path}, line {number} (byte {start}) is not valid JSON: {error}") from error
                    quarantine(bad)
                    continue
                yield number, value
    except torn_errors() as error:
        if quarantine is None:
            remedy = "copy or download it again"
            raise InputError(f"{path} is a damaged archive after line {number}: {error}", remedy=remedy) from error
        quarantine(BadRecord(str(path), number + 1, offset, f"archive: {error}", ""))


def hash_bytes(data: bytes) -> str:
    """BLAKE2b, 128 bits, as hex: enough to name content, quick on any CPU."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def hash_json(value: Any) -> str:
    """Hash of a JSON-able value, independent of the order of keys."""
    return hash_bytes(json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode())


def hash_file(path: Path) -> str:
    """Content hash of one file."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_path(path: Path) -> str:
    """Content hash of a file, or of a folder: relative names and contents, in sorted order."""
    if path.is_file():
        return hash_file(path)
    if not path.is_dir():
        raise InputError(f"no such file or folder: {path}")
    members = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return hash_json([[p.relative_to(path).as_posix(), hash_file(p)] for p in members])


def clear_folder(path: Path) -> None:
    """Remove a folder and all in it; no error when it is not there."""
    shutil.rmtree(path, ignore_errors=False) if path.exists() else None
