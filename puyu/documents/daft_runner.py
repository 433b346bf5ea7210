"""The same jobs on Daft: its native runner, or its Ray runner for a cluster.

    for result in on_daft(function, jobs, ray=True): ...

Function and jobs are those of `puyu.documents.runners`. Jobs are handed over a window at a time, so that they need not
fit into memory; what they write must lie on a file system that every node sees. A worker that dies has its job run
again, which is safe, since a job commits what it makes by a rename. Telemetry is switched off before Daft is imported.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from puyu.errors import ConfigError, DependencyError, PuyuError

J = TypeVar("J")
R = TypeVar("R")
_WINDOW = 32
"""Jobs of a window for each core."""


def on_daft(function: Callable[[J], R], jobs: Iterable[J], *, ray: bool, cores: int) -> Iterator[R]:
    """Results in the order of the jobs. DependencyError without Daft (and Ray)."""
    daft = _daft(ray=ray, cores=cores)

    def apply(pickled: Any) -> list[bytes]:
        return [pickle.dumps(_outcome(function, pickle.loads(job))) for job in pickled.to_pylist()]

    batched = daft.func.batch(return_dtype=daft.DataType.binary(), batch_size=1)(apply)
    todo = iter(jobs)
    while window := [pickle.dumps(job) for job in islice(todo, _WINDOW * cores)]:
        frame = daft.from_pydict({"number": list(range(len(window))), "job": window})
        if ray:
            frame = frame.into_partitions(min(len(window), 4 * cores))
        rows = frame.with_column("done", batched(frame["job"])).select("number", "done").to_pydict()
        for _, done in sorted(zip(rows["number"], rows["done"], strict=True)):
            result, error = pickle.loads(done)
            if error is not None:
                raise error
            yield result


def _outcome(function: Callable[[J], R], job: J) -> tuple[R | None, PuyuError | None]:
    """The result, or the error that a user is to see as it is, not wrapped in an engine's."""
    try:
        return function(job), None
    except PuyuError as error:
        return None, error


def _daft(*, ray: bool, cores: int) -> Any:
    kind = "ray" if ray else "native"
    os.environ.update(DO_NOT_TRACK="1", DAFT_ANALYTICS_ENABLED="0", RAY_USAGE_STATS_ENABLED="0", DAFT_RUNNER=kind)
    try:
        import daft
        from daft.runners import get_or_create_runner, get_or_infer_runner_type
    except ImportError as error:
        raise DependencyError("engine: daft needs Daft", remedy="pip install 'puyu-llm[cluster]'") from error
    if ray:
        _join_ray(cores)
    get_or_create_runner()
    if (found := get_or_infer_runner_type()) != kind:
        raise ConfigError(
            f"this process runs Daft's {found} runner already", remedy="start another for the other engine"
        )
    return daft


def _join_ray(cores: int) -> None:
    """The cluster that RAY_ADDRESS names, or one of this machine alone."""
    try:
        import ray
    except ImportError as error:
        raise DependencyError("engine: ray needs Ray", remedy="pip install 'puyu-llm[cluster]'") from error
    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, log_to_driver=False)
    else:
        ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
