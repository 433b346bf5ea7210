"""Replicas as child processes of the router, on loopback ports of their own.

A child is the server of `server.py`: its config comes through standard input, which stays open as its life line, and
what it writes appears on the router's standard error behind its number. It has a process group of its own, so that
Ctrl-C reaches the router alone, which lets requests finish first. Cores, memory for the cache and GPUs are divided
among the replicas of a machine. Imports no torch.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from puyu.device import num_cores
from puyu.log import say
from puyu.serve.config import ServeConfig
from puyu.serve.fleet import Launch, control_key
from puyu.serve.server import bind, child_command, child_environment, child_input
from puyu.serve.upstream import Address

TAIL_LINES = 20
LINE_BYTES = 1 << 16


class LocalProcess:
    """One child; see `fleet.Process`."""

    def __init__(self, child: asyncio.subprocess.Process, address: Address, name: str) -> None:
        self.address = address
        self._child, self._name = child, name
        self._last: deque[str] = deque(maxlen=TAIL_LINES)
        self._reading = asyncio.create_task(self._show())

    @property
    def pid(self) -> int:
        return self._child.pid

    async def wait(self) -> str:
        code = await self._child.wait()
        await asyncio.wait({self._reading}, timeout=1.0)
        return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"

    async def stop(self, seconds: float) -> None:
        if self._child.returncode is None and seconds > 0:
            self._child.terminate()
            await asyncio.wait({asyncio.ensure_future(self._child.wait())}, timeout=seconds)
        if self._child.returncode is None:
            self._child.kill()
        await self._child.wait()
        assert self._child.stdin is not None
        self._child.stdin.close()
        await self._reading

    def tail(self) -> str:
        return "\n".join(self._last)

    async def _show(self) -> None:
        """Pass the child's lines on; a pipe that nobody reads would stop it."""
        assert self._child.stdout is not None
        while line := await self._line(self._child.stdout):
            self._last.append(line.rstrip("\n"))
            say(f"[{self._name}] {self._last[-1]}")

    async def _line(self, source: asyncio.StreamReader) -> str:
        try:
            return (await source.readline()).decode("utf-8", "replace")
        except ValueError:  # longer than the reader's limit; the rest of the line comes as the next one
            return "(a line too long to show)\n"


def launcher(config: ServeConfig, *, key: str) -> Launch:
    """How to start replica `index` of `config`, for `Fleet`."""

    async def launch(index: int) -> LocalProcess:
        own = replica_config(config, key=key, host="127.0.0.1", sharers=_sharers(config))
        return await start(own, environment(config, index=index), name=f"replica {index}")

    return launch


async def start(config: ServeConfig, own: Mapping[str, str], *, name: str) -> LocalProcess:
    """A child that will answer at the returned address once its model is loaded."""
    with bind(config) as listener:
        host, port = listener.getsockname()[:2]
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(
            *child_command(listener.fileno()),
            stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.STDOUT,
            pass_fds=[listener.fileno()], env=own, start_new_session=True, limit=LINE_BYTES,
        )  # fmt: skip
    assert child.stdin is not None
    child.stdin.write(child_input(config))
    return LocalProcess(child, (host, port), name)


def replica_config(config: ServeConfig, *, key: str, host: str, sharers: int) -> ServeConfig:
    """A replica's own config: any port, the inner keys, its share of the memory; the router keeps the door."""
    place = {"host": host, "port": 0, "replicas": 1, "engine": "local"}
    door = {"api_key": key, "control_key": control_key(key), "keys_file": "", "tls_cert": "", "tls_key": ""}
    share = {"cors_origins": (), "cache_fraction": config.cache_fraction / sharers}
    return config.model_copy(update={**place, **door, **share})


def environment(config: ServeConfig, *, index: int) -> dict[str, str]:
    """What a child finds: its share of the cores, unless OMP_NUM_THREADS says otherwise, and one of the GPUs."""
    own = child_environment()
    if config.device != "cuda":
        own.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // config.replicas)))
    if config.device != "cpu" and (gpus := visible_gpus()):
        own["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
    return own


def _sharers(config: ServeConfig) -> int:
    """How many replicas take their caches from the same memory."""
    places = len(visible_gpus()) if config.device != "cpu" else 0
    return -(-config.replicas // max(1, places))


def visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES, found without torch: the variable itself, or what the driver lists."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number, _ in enumerate(folder.iterdir())] if folder.is_dir() else []
