"""Starting and stopping a server: `run(config)` in this process, `running_server(config)` as a child of this one.

    with running_server(ServeConfig(model="runs/nano/ppo", port=0)) as url:
        print(Client(url).chat("Who are you?").text)

The port is taken before the model is loaded, so that a port in use is said at once. SIGTERM and Ctrl-C stop taking
connections, let requests under way finish for `drain_seconds`, and end with exit code 0. A child also stops when
its parent is gone, however that ended. This module imports torch only inside `run`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, NoReturn

from puyu.configure import build, dump
from puyu.errors import DependencyError, ResourceError
from puyu.files import read_json
from puyu.log import logger, say
from puyu.serve.config import ServeConfig
from puyu.types import SamplingParams

if TYPE_CHECKING:
    from puyu.engine.llm import LLM
    from puyu.serve.drain import DrainingServer

__all__ = ["ServeConfig", "bind", "run", "running_server"]

BACKLOG = 512
M_ARENA_MAX = -8
"""`mallopt`'s name for the number of places that memory is taken from (glibc's malloc.h)."""
START_SECONDS = 600.0


def bind(config: ServeConfig) -> socket.socket:
    """A listening socket; ResourceError names the flag that helps."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # by name: asyncio sends small pieces at once (TCP_NODELAY) only where a socket says that it is TCP, and without
    # that every answer on a kept connection waits 40 ms for the client's acknowledgment
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _bind_error(config, error) from error
    return listener


def _bind_error(config: ServeConfig, error: OSError) -> ResourceError:
    if error.errno == errno.EADDRINUSE:
        remedy = f"choose another, for example --port {config.port + 1}, or --port 0 for any free one"
        return ResourceError(f"port {config.port} of {config.host} is in use", remedy=remedy)
    if error.errno == errno.EACCES:
        remedy = "ports below 1024 need rights that you do not have; choose another with --port"
        return ResourceError(f"port {config.port} of {config.host} may not be used", remedy=remedy)
    remedy = "--host must be an address of this machine, for example 127.0.0.1"
    return ResourceError(f"cannot listen on {config.host}: {error}", remedy=remedy)


def address(listener: socket.socket, *, scheme: str = "http") -> str:
    """The base URL of a listening socket; one that listens everywhere is reached by loopback."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def run(config: ServeConfig, *, listener: socket.socket | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; returns after draining."""
    config = _with_secrets(config)
    config.check_open()
    _require_web()
    with contextlib.closing(listener or bind(config)) as listening:
        url = address(listening, scheme="https" if config.tls_cert else "http")
        show_log()
        if config.is_routed:
            from puyu.serve.routed import run as run_routed

            run_routed(config, listening, url)
            return
        say(f"loading {config.model} ...")
        share_memory()
        server, name = _load(config)
        say(f"serving {name} at {url}   (OpenAI clients: base_url={url}/v1)   Ctrl-C stops")
        outlive_signals()
        server.run(sockets=[listening])
        if server.llm.loop.failure is not None:
            message = f"the engine has stopped: {server.llm.loop.failure!r}"
            raise ResourceError(message, remedy="start it again; its log says more")
        say("stopped")


def show_log() -> None:
    """Requests and warnings on standard error, one line each, unless the process has a log of its own."""
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def leave(code: int) -> NoReturn:
    """End this process now. Unloading torch takes the interpreter a second, in which nothing is left to do."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def share_memory() -> None:
    """Let threads take memory from the same two places. glibc gives each thread one of its own, up to eight for a core,
    and keeps there what was freed, which large requests make a lot of (docs/log.md)."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


@contextlib.contextmanager
def untroubled() -> Iterator[None]:
    """No search for garbage while modules are imported; what they have made stays and is never looked through again,
    while no stream would go on."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def outlive_signals() -> None:
    """uvicorn drains on these signals and then raises them again; by then the work is done."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _already_handled)


def _with_secrets(config: ServeConfig) -> ServeConfig:
    """Keys from the environment, where the configuration has none."""
    found = {"api_key": os.environ.get("PUYU_API_KEY", ""), "control_key": os.environ.get("PUYU_CONTROL_KEY", "")}
    return config.model_copy(update={name: getattr(config, name) or value for name, value in found.items()})


def _already_handled(number: int, frame: FrameType | None) -> None:
    """The signal has led to a clean shutdown."""


def _require_web() -> None:
    if not all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn")):
        raise DependencyError("serving needs FastAPI and uvicorn", remedy="pip install 'puyu-llm[serve]'")


def _load(config: ServeConfig) -> tuple[DrainingServer, str]:
    """The server, ready to run, and the model's name in the API."""
    from puyu.hub import resolve

    folder = resolve(config.model)
    with untroubled(), ThreadPoolExecutor(1) as beside:  # weights are read while modules are imported
        loading = beside.submit(_engine(config, folder))
        from puyu.serve.app import build_app
        from puyu.serve.drain import DrainingServer

        llm = loading.result()
    llm.name = Path(config.model).name
    app = build_app(llm, config, defaults=read_defaults(folder))
    return DrainingServer(app, llm, config), app.state.service.name


def _engine(config: ServeConfig, folder: Path) -> Callable[[], LLM]:
    """What loads the model; its modules are imported."""
    from puyu.engine.core import EngineConfig
    from puyu.engine.llm import LLM

    shared = EngineConfig.model_fields.keys() & ServeConfig.model_fields.keys()
    engine = EngineConfig(**{name: getattr(config, name) for name in shared})
    draft = config.draft_model or None
    places: dict[str, Any] = {"device": config.device, "dtype": config.dtype}
    return partial(LLM, folder, **places, config=engine, draft_model=draft, adapters=config.adapters)


def read_defaults(folder: Path) -> SamplingParams:
    """What a request leaves out, from generation_config.json: greedy unless the model's makers say `do_sample`."""
    path = folder / "generation_config.json"
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict) or not values.get("do_sample"):
        return SamplingParams()
    return SamplingParams(
        temperature=float(values.get("temperature", 1.0)),
        top_p=float(values.get("top_p", 1.0)),
        top_k=int(values.get("top_k", 0)),
    )


# -- as a child process ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def running_server(config: ServeConfig, *, log: Path | None = None) -> Iterator[str]:
    """Start a server, wait until it answers, give its base URL; stop it on leaving.

    The child writes to `log` (a temporary file by default), whose end is shown when it does not start.
    """
    with contextlib.closing(bind(config)) as listener, open(log, "w+b") if log else tempfile.TemporaryFile() as output:
        child = _start(config, listener, output)
        try:
            url = address(listener, scheme="https" if config.tls_cert else "http")
            listener.close()
            _wait_until_up(child, url, output)
            yield url
        finally:
            _stop(child, config.drain_seconds)


def _start(config: ServeConfig, listener: socket.socket, output: IO[bytes]) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        child_command(listener.fileno()),
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=[listener.fileno()],
        env=child_environment(),
    )
    assert child.stdin is not None
    child.stdin.write(child_input(config))
    child.stdin.flush()
    return child


def child_command(descriptor: int) -> list[str]:
    """Starts a server on an inherited listening socket."""
    return [sys.executable, "-m", "puyu.serve.server", str(descriptor)]


def child_environment() -> dict[str, str]:
    """Ours, where the child also finds this package."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}


def child_input(config: ServeConfig) -> bytes:
    """What the child reads first: a key must not stand in the process list. Then its stdin is its life line."""
    return json.dumps(dump(config)).encode() + b"\n"


def _wait_until_up(child: subprocess.Popen[bytes], url: str, output: IO[bytes]) -> None:
    import httpx  # here, since a server that starts does without

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            break
        with contextlib.suppress(httpx.TransportError):
            # our own child on our own socket: its certificate need not be one for this name
            if httpx.get(f"{url}/health", timeout=1.0, trust_env=False, verify=False).status_code == 200:
                return
        time.sleep(0.05)
    output.seek(0)
    tail = output.read().decode("utf-8", "replace").strip()[-2000:]
    raise ResourceError(f"the server did not start (exit code {child.poll()}): {tail}", remedy="mend what its log says")


def _stop(child: subprocess.Popen[bytes], drain_seconds: int) -> None:
    child.terminate()
    try:
        child.wait(drain_seconds + 10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    assert child.stdin is not None
    child.stdin.close()


def _child(descriptor: int) -> int:
    """The child's side of `running_server`."""
    from puyu.errors import PuyuError

    config = build(ServeConfig, json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_parent, name="life-line", daemon=True).start()
    try:
        run(config, listener=socket.socket(fileno=descriptor))
    except PuyuError as error:
        say(f"error: {error}")
        return error.exit_code
    return 0


def _end_with_parent() -> None:
    """The pipe ends when the parent does, even by SIGKILL."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    leave(_child(int(sys.argv[1])))
