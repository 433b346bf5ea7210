"""Servers as the benches of this room start them, the clocks of their threads, and load on them.

    with servers.ours(folder, max_running=16) as server:
        result = servers.fire(server.url, requests=16, output="64")

Ours is `puyu serve` as it comes; the peers are llama-cpp-python's server and, in the prebuilt package xllamacpp,
llama.cpp's own. As a script it is one of those processes: `python bench/servers.py ours|engine|xllama ...`. Standard
library only until a function needs more: the peers' interpreters run this file too.

Which CPU time is the engine's: Python does not tell the kernel the names of its threads, so our process names the
engine's thread itself, by prctl, when it starts to work. OpenMP's workers inherit the name of the thread that makes
them, and each thread that computes makes its own. All that is not so named is the server: event loop, HTTP, JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness

if TYPE_CHECKING:
    from puyu.load.run import Result
    from puyu.load.workload import Ask

HERE = Path(__file__).resolve().parent
ENGINE = "puyu-engine"
PATIENCE = 180.0
CACHE_TOKENS, CONTEXT, STREAMS = 8192, 4096, 16
PROMPT, OUTPUT = 64, 64


@dataclass
class Server:
    """A server process and its address."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    spawned: float
    """When it was started, by time.perf_counter."""

    @property
    def pid(self) -> int:
        return self.process.pid

    def clocks(self) -> dict[str, float]:
        """CPU seconds so far: of the whole process, and of the engine's threads."""
        found = {"all": 0.0, "engine": 0.0}
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
                seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
                found["all"] += seconds
                found["engine"] += seconds if (task / "comm").read_text().strip() == ENGINE else 0.0
        return found

    def resident(self) -> int:
        """Resident bytes."""
        line = next(x for x in Path(f"/proc/{self.pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    def descriptors(self) -> int:
        """Open files and sockets."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def wait_until_ready(self, path: str = "/health") -> float:
        """Seconds from the start of the process to the first 200."""
        host, port = self.url.removeprefix("http://").split(":")
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
                connection.request("GET", path)
                if connection.getresponse().status == 200:
                    return time.perf_counter() - self.spawned
            time.sleep(0.005)
        raise SystemExit(f"{self.process.args} did not get ready:\n{self.log.read_text(errors='replace')[-2000:]}")

    def stop(self, patience: float = 60.0) -> float:
        """SIGTERM; seconds until the process has ended."""
        began = time.perf_counter()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return time.perf_counter() - began


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def spawn(command: Sequence[str | Path], port: int) -> Server:
    """Start a process; its words go to a temporary file."""
    with tempfile.NamedTemporaryFile(prefix="server-", suffix=".log", delete=False) as log:
        threads = {"OMP_NUM_THREADS": str(harness.cores()), "PYTHONPATH": str(harness.ROOT)}
        spawned = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=harness.ROOT,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **threads},
        )
    return Server(f"http://127.0.0.1:{port}", process, Path(log.name), spawned)


@contextlib.contextmanager
def running(command: Sequence[str | Path], port: int, *, health: str = "/health") -> Iterator[Server]:
    """A server that is ready; stopped at the end."""
    server = spawn(command, port)
    try:
        server.wait_until_ready(health)
        yield server
    finally:
        server.stop()
        server.log.unlink(missing_ok=True)


def flags(**options: object) -> list[str]:
    """Options of `puyu serve`, as all benches of this room want them."""
    given = {"device": "cpu", "dtype": "bfloat16", "cache_tokens": CACHE_TOKENS, **options}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


@contextlib.contextmanager
def ours(folder: Path, **options: object) -> Iterator[Server]:
    """Our server, whose engine thread has a name."""
    port = free_port()
    command = [sys.executable, HERE / "servers.py", "ours", folder, *flags(port=port, **options)]
    with running(command, port) as server:
        yield server


@contextlib.contextmanager
def llama(python: Path, file: Path) -> Iterator[Server]:
    """llama-cpp-python's server. `interrupt_requests` would cut every answer when the next request comes."""
    port = free_port()
    command = [python, "-m", "llama_cpp.server", "--model", file, "--port", port, "--n_ctx", CONTEXT]
    command += ["--n_threads", harness.cores(), "--n_threads_batch", harness.cores(), "--logits_all", "false"]
    command += ["--interrupt_requests", "false", "--verbose", "false"]
    with running(command, port, health="/v1/models") as server:
        yield server


@contextlib.contextmanager
def xllama(python: Path, file: Path) -> Iterator[Server]:
    """llama.cpp's own server with a slot for each stream, from a wheel."""
    port = free_port()
    with running([python, HERE / "servers.py", "xllama", file, port], port) as server:
        yield server


# --- load ------------------------------------------------------------------------------------------------------------


def fire(url: str, **options: Any) -> Result:
    """One run of the load generator; the bench's tokenizer has a token a byte, so lengths are the same for all."""
    from puyu.load.run import LoadConfig, Session, send

    async def main() -> Result:
        sizes = {"workload": "fixed", "prompt": str(PROMPT), "output": str(OUTPUT), "warmup": 0}
        session = Session(LoadConfig(url=url, **{**sizes, **options}), clock=time.perf_counter)
        session.ruler, session.context = byte_ruler(), CONTEXT
        try:
            return await send(session)
        finally:
            await session.endpoint.close()

    return asyncio.run(main())


def byte_ruler() -> Any:
    """Lengths in the tokens of cpu_shape's models: one a byte, and one to begin with."""
    from puyu.load.workload import FIRST, WORDS, Ruler

    return Ruler(1.0 + len(FIRST), {word: 1.0 + len(word) for word in WORDS}, True)


def prompts(seed: int, count: int = STREAMS) -> list[Ask]:
    """What `fire` sends with this seed."""
    from itertools import islice

    from puyu.load.workload import Sizes, Workload

    sizes = Sizes(PROMPT, PROMPT), Sizes(OUTPUT, OUTPUT)
    return list(islice(Workload("fixed", *sizes, seed, CONTEXT).draw(byte_ruler()), count))


def checked(result: Result) -> Result:
    """All answers were completed, and as long as they were asked for."""
    wrong = [row for row in result.rows if not row.is_ok or row.output_tokens != row.asked_output]
    if wrong:
        row = wrong[0]
        raise SystemExit(f"{len(wrong)} answers are not as asked for: {row.status} {row.detail} {row.output_tokens}")
    return result


def gauges(page: str) -> dict[str, float]:
    """The values of /metrics by name, without prefix; those that differ in labels only are added."""
    found: dict[str, float] = {}
    for line in page.splitlines():
        if not line.startswith("#") and " " in line:
            name = line.partition("{")[0].split()[0].rpartition(":")[2]
            found[name] = found.get(name, 0.0) + float(line.rsplit(None, 1)[1])
    return found


def output_rate(result: Result) -> float:
    """Output tokens a second."""
    return sum(row.output_tokens or 0 for row in checked(result).rows) / result.seconds


@dataclass(eq=False)
class Streams:
    """A side of a comparison: sixteen streams at once, another seed each time."""

    server: Server
    value: str
    """`rate`: output tokens a second; `seconds`: how long all of them took."""
    turn: int = 0
    shares: list[float] = field(default_factory=list)
    """CPU seconds outside the engine over all CPU seconds of the process, a number for each turn."""
    client: list[float] = field(default_factory=list)

    def measure(self) -> float:
        before = self.server.clocks()
        result = checked(fire(self.server.url, requests=STREAMS, seed=self.turn))
        spent = {name: value - before[name] for name, value in self.server.clocks().items()}
        self.turn += 1
        self.shares.append(1 - spent["engine"] / max(spent["all"], 1e-9))
        self.client.append(result.client_cpu)
        return output_rate(result) if self.value == "rate" else result.seconds


# --- the processes ---------------------------------------------------------------------------------------------------


def serve_ours(arguments: Sequence[str]) -> int:
    """`puyu serve`, with the engine's thread named."""
    from puyu.cli.serve import main
    from puyu.engine.loop import AsyncEngine

    work = AsyncEngine._work

    def named(self: AsyncEngine) -> None:
        ctypes.CDLL(None).prctl(15, ENGINE.encode(), 0, 0, 0)  # PR_SET_NAME
        work(self)

    AsyncEngine._work = named  # type: ignore[method-assign]
    return main(arguments)


def engine_alone(folder: Path) -> None:
    """Worker: the same prompts without a server, as one batch; seconds for all."""
    import torch
    import worker

    from puyu.engine.core import EngineConfig
    from puyu.engine.llm import LLM
    from puyu.types import GenerateRequest, SamplingParams

    torch.set_num_threads(harness.cores())
    llm = LLM(folder, device="cpu", dtype="bfloat16", config=EngineConfig(cache_tokens=CACHE_TOKENS))
    params = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)

    def measure(seed: int) -> float:
        asks = prompts(seed)
        requests = [GenerateRequest(ask.prompt, params) for ask in asks]
        began = time.perf_counter()
        answers = llm.generate_all(requests)
        seconds = time.perf_counter() - began
        for ask, answer in zip(asks, answers, strict=True):
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (ask.prompt_tokens, OUTPUT)
        return seconds

    measure(-1)
    worker.ready(versions={"torch": torch.__version__})
    turn = 0
    while worker.told():
        worker.answer(measure(turn))
        turn += 1


def serve_xllama(file: Path, port: int) -> None:
    """llama.cpp's server inside this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.hostnames = str(file), port, ["127.0.0.1"]
    params.n_ctx, params.n_parallel, params.cont_batching = CACHE_TOKENS, STREAMS, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.sigwait([signal.SIGTERM])


def versions(python: Path, names: Mapping[str, str]) -> dict[str, str]:
    """Versions of a peer's packages, by the names that results use."""
    code = (
        "import sys, json; from importlib.metadata import version as v; print(json.dumps([v(n) for n in sys.argv[1:]]))"
    )
    done = subprocess.run([python, "-c", code, *names.values()], capture_output=True, text=True, check=True)
    return dict(zip(names, json.loads(done.stdout), strict=True))


if __name__ == "__main__":
    kind, rest = sys.argv[1], sys.argv[2:]
    if kind == "ours":
        sys.exit(serve_ours(rest))
    elif kind == "engine":
        engine_alone(Path(rest[0]))
    elif kind == "xllama":
        serve_xllama(Path(rest[0]), int(rest[1]))
