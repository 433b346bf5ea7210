"""A function in a child process: what hangs, crashes or eats memory there costs its caller one answer.

    read = Killable(pages, Limits(seconds=10, memory_mib=2048))
    read(data)                 # what the function returns, or Failed: timeout, crashed, memory

The child is a fresh interpreter (never a fork), kept alive from call to call and replaced when it fails. A crash or a
lack of memory in a child that has served before is tried once more in a fresh one, so that the answer depends on the
argument alone. A timeout counts wall-clock seconds: it is the only answer that depends on the machine.
A child never outlives its parent: an idle one sees its socket close, a busy one is killed by the kernel (Linux, at
once) or by its own alarm (everywhere, a second after its time). Memory is bounded by RLIMIT_DATA, which Linux enforces.
It knows nothing of pages: functions are any that a module has at its top level.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any, Generic, Literal, TypeVar

Reason = Literal["timeout", "crashed", "memory"]
A = TypeVar("A")
R = TypeVar("R")

START_SECONDS = 120.0
"""How long a child may take to start and to import what it needs."""
_GRACE = 1.0
_TOO_MUCH = "more than its limit"
_KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may use."""

    seconds: float = 10.0
    """Wall-clock time of a call."""
    memory_mib: int = 2048
    """Data of the child, in MiB."""


class Failed(Exception):
    """The function gave no answer: why, and what is known of it."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class Killable(Generic[A, R]):
    """Calls `function` in a child. `prepare` runs there first (imports, tables), without a limit of memory.

    Exceptions among `passes` are the function's own answers and are raised here; any other counts as a crash.
    Calls from several threads wait for each other.
    """

    def __init__(
        self,
        function: Callable[[A], R],
        limits: Limits = Limits(),
        *,
        prepare: Callable[[], object] | None = None,
        passes: tuple[type[Exception], ...] = (),
    ) -> None:
        self._job = (function, prepare, passes, limits)
        self._limits = limits
        self._child: _Child | None = None
        self._lock = threading.Lock()

    def __call__(self, argument: A, *, seconds: float | None = None) -> R:
        """The function's answer. `seconds` takes the place of the usual limit. Raises Failed."""
        limit = self._limits.seconds if seconds is None else seconds
        with self._lock:
            fresh = self._child is None or not self._child.is_ours()
            try:
                return self._ask(argument, limit)
            except Failed as failure:
                if fresh or failure.reason == "timeout":
                    raise
            return self._ask(argument, limit)

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.stop()
            self._child = None

    def _ask(self, argument: A, seconds: float) -> R:
        """One try. A child that failed is ended."""
        if self._child is None or not self._child.is_ours():
            self._child = _Child(self._job)
        try:
            kind, value = self._child.ask((argument, seconds), seconds)
        except Failed:
            self.close()
            raise
        if kind == "answer":
            found: R = value
            return found
        if kind == "raised":
            raise value
        self.close()
        raise Failed(kind, value)


class _Child:
    """A process that answers, and our end of the socket to it."""

    def __init__(self, job: tuple[Any, ...]) -> None:
        self._ours, theirs = Pipe()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from puyu.documents.killable import serve; serve({theirs.fileno()}, {os.getpid()})"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()]
            )
        self._owner = os.getpid()
        self.stop = weakref.finalize(self, _end, self._process, self._ours, self._owner)
        kind, value = self.ask(job, START_SECONDS)
        if kind != "answer":
            self.stop()
            raise value if kind == "raised" else Failed(kind, value)

    def is_ours(self) -> bool:
        """Whether it lives, and was started by this process and not by the one that it was forked from."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, message: object, seconds: float) -> tuple[Any, Any]:
        """(answer, raised, crashed or memory; value). Raises Failed when there is none."""
        try:
            self._ours.send(message)
            if not self._ours.poll(seconds):
                raise Failed("timeout", f"no answer within {seconds:g} s")
            kind, value = self._ours.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        return kind, value

    def _death(self) -> Failed:
        """Why a child closed its socket."""
        try:
            code = self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            return Failed("crashed", "it closed its socket")
        if code == -signal.SIGALRM:
            return Failed("timeout", "no answer before its alarm")
        return Failed("crashed", signal.Signals(-code).name if code < 0 else f"exit code {code}")


def _end(process: subprocess.Popen[bytes], ours: Connection, owner: int) -> None:
    if os.getpid() == owner:  # and not in a fork, whose copy of the process belongs to the parent
        ours.close()
        process.kill()
        process.wait()


# ---- in the child


def serve(descriptor: int, parent: int) -> None:
    """A child's life: prepare, then answer until the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end ends this process too
    _die_with(parent)
    channel = Connection(descriptor)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        function, prepare, passes, limits = channel.recv()
        channel.send(_answer(_prepared, prepare, passes))
        _limit(limits.memory_mib)
        while True:
            _serve_one(channel, function, passes)


def _prepared(prepare: Callable[[], object] | None) -> None:
    if prepare is not None:
        prepare()


def _serve_one(channel: Connection, function: Callable[[Any], Any], passes: tuple[type[Exception], ...]) -> None:
    try:
        argument, seconds = channel.recv()
        signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE)
        answer = _answer(function, argument, passes)
        signal.setitimer(signal.ITIMER_REAL, 0)
        channel.send(answer)
    except MemoryError:  # the argument or the answer itself was too large
        channel.send(("memory", _TOO_MUCH))


def _answer(function: Callable[[Any], Any], argument: Any, passes: tuple[type[Exception], ...]) -> tuple[str, Any]:
    try:
        return "answer", function(argument)
    except passes as error:
        return "raised", error
    except MemoryError:
        return "memory", _TOO_MUCH
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller hears of it
        return "crashed", f"{type(error).__name__}: {error}"[:300]


def _limit(memory_mib: int) -> None:
    """Bound the process's data and write no core files."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = memory_mib * 2**20
    with contextlib.suppress(ValueError, OSError):  # systems that cannot bound it
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if most < 0 else min(wanted, most), most))


def _die_with(parent: int) -> None:
    """Ask the kernel to end this process with its parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)
