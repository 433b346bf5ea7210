"""Where work runs: in this process, or in a pool of processes. Results come in the order of the jobs.

    with open_engine(engine="local", workers=2) as run_jobs:
        for result in run_jobs(function, jobs): ...

A function and its jobs can be pickled; jobs are made while earlier ones run, a few ahead at most, so that memory stays
bounded however many there are. What an exception or a killed worker leaves undone is for the caller's commits to know.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Literal, Protocol, TypeVar

from puyu.device import num_cores
from puyu.errors import ResourceError

J = TypeVar("J")
R = TypeVar("R")


Engine = Literal["local", "daft", "ray"]


class RunJobs(Protocol):
    """`function` of each job, in their order."""

    def __call__(self, function: Callable[[J], R], jobs: Iterable[J], /) -> Iterator[R]: ...


@contextlib.contextmanager
def open_engine(*, engine: Engine, workers: int) -> Iterator[RunJobs]:
    """What runs jobs: processes of this machine, which stay for all calls (with one worker this one), Daft, or Daft on
    Ray. ResourceError when a worker is killed."""
    if engine == "local":
        with _processes(workers) as run_jobs:
            yield run_jobs
    else:
        from puyu.documents.daft_runner import on_daft

        yield functools.partial(on_daft, ray=engine == "ray", cores=max(workers, num_cores()))


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[RunJobs]:
    if workers <= 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start) as pool:
        yield functools.partial(_in_pool, pool, 2 * workers)


def _in_pool(pool: ProcessPoolExecutor, ahead: int, function: Callable[[J], R], jobs: Iterable[J]) -> Iterator[R]:
    waiting: deque[Future[R]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        remedy = "run the same command again: finished blocks are kept; with less memory set workers: 1"
        raise ResourceError("a worker process was killed, perhaps for want of memory", remedy=remedy) from error
    finally:
        for future in waiting:
            future.cancel()


def _start() -> None:
    """A worker makes many small objects that die in order: walking all of them ever so often is wasted."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
