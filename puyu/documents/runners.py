"""Where work runs: in this process, or in a pool of processes. Results come in the order of the jobs.

    for result in in_order(function, jobs, workers=2): ...

A function and its jobs can be pickled; jobs are made while earlier ones run, a few ahead at most, so that memory stays
bounded however many there are. What an exception or a killed worker leaves undone is for the caller's commits to know.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Literal, TypeVar

from puyu.device import num_cores
from puyu.errors import ResourceError

J = TypeVar("J")
R = TypeVar("R")


Engine = Literal["local", "daft", "ray"]


def run_jobs(function: Callable[[J], R], jobs: Iterable[J], *, engine: Engine, workers: int) -> Iterator[R]:
    """`function` of each job on an engine: processes of this machine, Daft, or Daft on Ray."""
    if engine == "local":
        return in_order(function, jobs, workers=workers)
    from puyu.documents.daft_runner import on_daft

    return on_daft(function, jobs, ray=engine == "ray", cores=max(workers, num_cores()))


def in_order(function: Callable[[J], R], jobs: Iterable[J], *, workers: int) -> Iterator[R]:
    """`function` of each job; with one worker here, else in processes. ResourceError when a worker is killed."""
    if workers <= 1:
        yield from map(function, jobs)
        return
    waiting: deque[Future[R]] = deque()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(function, job))
                if len(waiting) > 2 * workers:
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
