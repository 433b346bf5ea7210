"""Libraries in C++ with a plain C interface, built once for this machine's processor where a compiler is found.

    library = Library("texts", Path("puyu/documents/cpp/texts.cpp"), flags=["-O3"])
    library.build()                    # at set-up
    handle = library.open()            # None where it was not built: who asks has a slower way

What a library is named by are its sources, flags and the processor, so that a stale one is never loaded.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from puyu.device import cpu_flags
from puyu.errors import DependencyError
from puyu.files import hash_json

logger = logging.getLogger(__name__)

COMPILERS = ("g++", "clang++", "c++")


def native_folder() -> Path:
    """Where built libraries and their tables are kept."""
    return Path(os.environ.get("PUYU_NATIVE_DIR") or Path.home() / ".cache" / "puyu" / "native")


def pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    """Where an array lies, for a call that the array outlives."""
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def argument(value: Any) -> Any:
    """A value as a call takes it: arrays and structures by their place."""
    if isinstance(value, np.ndarray):
        return pointer(value)
    return ctypes.byref(value) if isinstance(value, ctypes.Structure) else value


@dataclass(frozen=True)
class Library:
    """One library: its main source, whose folder holds all others, and how it is compiled."""

    name: str
    source: Path
    flags: Sequence[str]
    without: str = "without it the work is done more slowly"
    """What it means when it is not there."""
    includes: Sequence[Path] = ()
    """Folders of other libraries whose headers it includes."""

    def path(self) -> Path:
        """Where the library for these sources and this processor belongs."""
        texts = [
            path.read_text(encoding="utf-8")
            for folder in (self.source.parent, *self.includes)
            for path in sorted(folder.iterdir())
            if path.suffix in (".cpp", ".h")
        ]
        key = hash_json([texts, list(self.flags), platform.machine(), sorted(cpu_flags())])
        return native_folder() / f"{self.name}-{key[:16]}.so"

    def build(self) -> Path:
        """Compile, unless it is there; DependencyError when there is no compiler or it fails."""
        path = self.path()
        if path.is_file():
            return path
        compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
        if compiler is None:
            raise DependencyError("no C++ compiler was found", remedy=f"install g++; {self.without}")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        for threads in (["-fopenmp"], []):  # some compilers come without OpenMP; one thread is better than none
            command = [compiler, *self.flags, *threads, str(self.source), "-o", str(temporary)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode == 0:
                os.replace(temporary, path)
                return path
        raise DependencyError(f"{compiler} cannot build {self.source.name}: {result.stderr.strip()[-500:]}")

    def open(self) -> ctypes.CDLL | None:
        """The library, when it has been built for this machine."""
        path = self.path()
        if not path.is_file():
            return None
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:  # a home folder shared with another system
            logger.warning("%s cannot be loaded, %s: %s", path, self.without, error)
            return None


T = TypeVar("T")


class Loader(Generic[T]):
    """A library as its callers want it, opened once in a process.

    load = Loader(LIBRARY, declared)
    load()                              # None where it was not built
    """

    def __init__(self, library: Library, wrap: Callable[[ctypes.CDLL], T]) -> None:
        self._library, self._wrap = library, wrap
        self._found: list[T | None] = []

    def __call__(self) -> T | None:
        """The library, when it has been built for this machine."""
        if not self._found:
            handle = self._library.open()
            self._found = [None if handle is None else self._wrap(handle)]
        return self._found[0]

    def build(self) -> Path:
        """Compile, unless it is there; DependencyError when there is no compiler or it fails."""
        path = self._library.build()
        self._found = []
        return path
