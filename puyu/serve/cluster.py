"""Replicas as actors on a Ray cluster: the same servers behind the same router, on whatever nodes Ray finds.

    puyu serve DIR --replicas 4 --engine ray          # RAY_ADDRESS names the cluster; without it a local Ray starts

Ray places an actor for each replica, spread over the nodes, and gives it its share of the cores or one GPU; the actor
runs the server of `local.py` on its node and tells the router its address. Watching, choosing, sending again and
starting again are `fleet.py`'s, as for local replicas. The actors belong to the router's job, so that Ray ends them
when the router is gone, however it ended; Ray Serve's replicas would outlive it, and its own proxy would answer 500
where the router asks another replica. Every node needs this package and the model under the same path (or a hub id).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import Any

from puyu.configure import build, dump
from puyu.errors import DependencyError, ResourceError
from puyu.serve.config import ServeConfig
from puyu.serve.fleet import Launch
from puyu.serve.local import LocalProcess, environment, replica_config, start
from puyu.serve.server import child_environment
from puyu.serve.upstream import Address

PLACE_SECONDS = 300.0
LOCAL = "127.0.0.1"


class Host:
    """The actor: one server process on its node, which ends when the actor does."""

    async def start(self, values: dict[str, Any], index: int, home: str) -> Address:
        """The address at which the router, which runs on node `home`, will reach the server."""
        config = build(ServeConfig, values)
        here, ip = _place()
        own = replica_config(config, key=config.api_key, host=LOCAL if here == home else ip, sharers=1)
        self.process: LocalProcess = await start(own, environment(config, index=index), name=f"replica {index}")
        return self.process.address

    async def wait(self) -> tuple[str, str]:
        """How the server has ended, and the end of its log."""
        return await self.process.wait(), self.process.tail()

    async def stop(self, seconds: float) -> None:
        await self.process.stop(seconds)


class RayProcess:
    """The router's view of one actor; see `fleet.Process`."""

    def __init__(self, actor: Any, address: Address) -> None:
        self.address = address
        self._actor, self._tail = actor, ""

    async def wait(self) -> str:
        try:
            why, self._tail = await self._actor.wait.remote()
        except _ray().exceptions.RayError as error:
            return f"was lost with its actor ({type(error).__name__})"
        return str(why)

    async def stop(self, seconds: float) -> None:
        """By force also where the node does not answer."""
        with contextlib.suppress(_ray().exceptions.RayError, TimeoutError):
            async with asyncio.timeout(seconds + 1):
                await self._actor.stop.remote(seconds)
        _ray().kill(self._actor)

    def tail(self) -> str:
        return self._tail


@contextlib.contextmanager
def on_ray(config: ServeConfig, *, key: str) -> Iterator[Launch]:
    """Connected to Ray: how to start replica `index` there, for `Fleet`."""
    ray = _ray()
    paths = {"env_vars": {"PYTHONPATH": child_environment()["PYTHONPATH"]}}
    ray.init(runtime_env=paths, include_dashboard=False, logging_level="warning")
    try:
        values = dump(config.model_copy(update={"api_key": key}))
        wants = shares(config, ray.cluster_resources())
        hosts = ray.remote(Host).options(scheduling_strategy="SPREAD", max_restarts=0, **wants)

        async def launch(index: int) -> RayProcess:
            actor = hosts.remote()
            try:
                async with asyncio.timeout(PLACE_SECONDS):
                    address = await actor.start.remote(values, index, _place()[0])
            except (ray.exceptions.RayError, TimeoutError) as error:
                ray.kill(actor)
                message = f"Ray has no place for replica {index}, or lost it: {type(error).__name__} {error}"
                raise ResourceError(message, remedy="look at `ray status`") from error
            return RayProcess(actor, tuple(address))

        yield launch
    finally:
        ray.shutdown()


def shares(config: ServeConfig, resources: dict[str, float]) -> dict[str, float]:
    """What one actor asks for: a GPU where the model shall run on one, else its part of the cluster's cores."""
    if config.device == "cuda" or (config.device == "auto" and resources.get("GPU", 0) > 0):
        return {"num_gpus": 1, "num_cpus": 1}
    cores = resources.get("CPU", 1)
    part = cores / config.replicas
    return {"num_gpus": 0, "num_cpus": int(part) if part >= 1 else part}


def _place() -> tuple[str, str]:
    """Node id and address of this process's node."""
    ray = _ray()
    return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()


def _ray() -> Any:
    # Read when Ray is imported: no reports to its makers, and no line of a log left out.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    try:
        import ray
    except ImportError as error:
        raise DependencyError("--engine ray needs Ray", remedy="pip install 'puyu-llm[ray]'") from error
    return ray
