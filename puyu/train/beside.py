"""One piece of work at a time beside the training, in a thread that gives way. Knows no state and no store.

beside = Beside()
beside.start(work, cancelled)        # `work` looks at `cancelled` now and then
error = beside.end(30)               # gives it half a minute, then cancels it
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

GRACE = 30.0
"""Seconds that work which was cancelled has to notice it."""


def give_way() -> None:
    """Let the calling thread run only where the training leaves a processor idle (Linux; elsewhere nothing)."""
    if hasattr(os, "sched_setscheduler"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _work(work: Callable[[], None], future: Future[None]) -> None:
    give_way()
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - kept until it is taken, and raised there
        future.set_exception(error)
    else:
        future.set_result(None)


class Beside:
    """One piece of work at a time beside the training; what it raised stays until it is taken."""

    def __init__(self) -> None:
        self._future: Future[None] | None = None
        self._cancelled = threading.Event()

    def start(self, work: Callable[[], None], cancelled: threading.Event) -> None:
        assert self.idle(), "one at a time"
        self._future, self._cancelled = Future(), cancelled
        # A daemon: a store that does not answer keeps no process from ending.
        threading.Thread(target=_work, args=(work, self._future), daemon=True).start()

    def idle(self, seconds: float | None = 0.0) -> bool:
        """Whether nothing is being done, after at most that time (None: however long it takes)."""
        return self._future is None or not wait([self._future], seconds).not_done

    @property
    def failed(self) -> bool:
        return self._future is not None and self._future.done() and self._future.exception() is not None

    def end(self, seconds: float | None = 0.0) -> BaseException | None:
        """Give it that time, then cancel it; returns what it raised, once (TimeoutError: it has not noticed)."""
        if not self.idle(seconds):
            self._cancelled.set()
        stuck = not self.idle(GRACE)
        future, self._future = self._future, None
        if stuck:
            return TimeoutError("it does not end, and was left to itself")
        return future.exception() if future else None
