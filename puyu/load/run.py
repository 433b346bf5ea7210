"""Load on an OpenAI-compatible server: requests that arrive by the clock, and what came back when.

    result = asyncio.run(load(LoadConfig(url="http://127.0.0.1:8000", requests=50, rate=2.0)))

Arrivals are Poisson at `rate` a second, or all at once; at most `concurrency` are in flight. Nothing is asked again:
429 and 503 count as refused, everything else that did not end with a finish reason as failed, by its reason. Answers
are counted by the server's `usage`, never by chunks. It knows nothing of percentiles; `report.py` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path
from typing import Any

from pydantic import Field

from puyu.configure import Config
from puyu.errors import ConfigError, ResourceError
from puyu.load.http import Endpoint, Response, Torn
from puyu.load.workload import LONGEST_PAIR, Ask, Kind, Ruler, Sizes, Workload, measured, read_turns
from puyu.wire import SseDecoder, read_models

REFUSED = (429, 503)
OPTIONAL = ("ignore_eos", "stream_options", "temperature")
"""Fields that some servers refuse; they are then left out, and the report says so."""

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


class LoadConfig(Config):
    """Load on a server, ours or any that speaks OpenAI's protocol, and how it bears it."""

    url: str = "http://127.0.0.1:8000"
    """Address of the server, with or without /v1."""
    model: str = ""
    """Name of the model; empty takes the first that the server lists."""
    api_key: str = ""
    """Bearer token."""
    workload: Kind = "sharegpt"
    """sharegpt, fixed, random, prefix, or conversations FILE.jsonl."""
    file: Path | None = None
    """Conversations, one JSON object a line."""
    prompt: str = "256"
    """Tokens of a prompt: 256, or 64-512 for any length between."""
    output: str = "128"
    """Tokens of an answer, in the same way."""
    prefixes: int = Field(default=4, ge=1)
    """Different system prompts of the workload `prefix`."""
    prefix_tokens: int = Field(default=512, ge=1)
    """Tokens of each of them."""
    requests: int = Field(default=0, ge=0)
    """How many are sent; 0 with no `seconds` is 100."""
    seconds: float = Field(default=0.0, ge=0)
    """For how long requests are sent; those in flight may finish."""
    rate: float = Field(default=math.inf, gt=0)
    """Requests a second, as a Poisson process; inf sends all at once."""
    concurrency: int = Field(default=0, ge=0)
    """Requests in flight at most; 0 is no limit."""
    warmup: int = Field(default=2, ge=0)
    """Requests before the clock starts; not counted."""
    seed: int = 0
    """Of prompts, lengths and arrivals."""
    chat: bool = False
    """Chat completions instead of completions; the template's tokens come on top."""
    ignore_eos: bool = True
    """Ask for answers of full length; left out where the server refuses the field."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    body: dict[str, Any] = Field(default_factory=dict)
    """More fields for each request: '{"top_k": 5}'."""
    context: int = Field(default=0, ge=0)
    """Tokens that prompt and answer may have together; 0 is what the server says."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds until a request is given up."""
    slo_ttft_ms: float = Field(default=0.0, ge=0)
    """Time to the first token that counts as good; 0 asks for none."""
    slo_tpot_ms: float = Field(default=0.0, ge=0)
    """Time for each further token that counts as good."""

    @property
    def wanted(self) -> int:
        """Requests to send, 0 when the clock decides."""
        return self.requests or (0 if self.seconds else 100)

    def drawn(self, limit: int, *, seed: int) -> Workload:
        """The workload; ConfigError for lengths that cannot be read."""
        sizes = Sizes.read(self.prompt, "prompt"), Sizes.read(self.output, "output")
        if self.workload == "fixed" and any(size.low != size.high for size in sizes):
            raise ConfigError("workload: fixed has one length, not a range", remedy="use --workload random")
        return Workload(self.workload, *sizes, seed, limit, self.prefixes, self.prefix_tokens)


@dataclass(slots=True)
class Row:
    """What became of one request. `due` and `sent` count from the run's start, `chunks` and `ended` from `sent`."""

    index: int
    asked_prompt: int
    asked_output: int
    due: float = 0.0
    sent: float = 0.0
    ended: float = 0.0
    chunks: list[float] = field(default_factory=list)
    """When each piece of text arrived."""
    status: str = ""
    """`ok`, or why not: `refused 429`, `http 400`, `error event`, `cut`, `torn`, `no connection`, `timeout`."""
    detail: str = ""
    finish_reason: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    has_usage: bool = False

    @property
    def is_ok(self) -> bool:
        return self.status == "ok"

    @property
    def ttft(self) -> float | None:
        """Seconds until the first text."""
        return self.chunks[0] if self.chunks else None

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first."""
        if not self.chunks or not self.output_tokens or self.output_tokens < 2:
            return None
        return (self.ended - self.chunks[0]) / (self.output_tokens - 1)


@dataclass(slots=True)
class Result:
    """All requests of a run and what is to be said about it."""

    rows: list[Row]
    seconds: float
    """From the first request to the last answer's end."""
    model: str
    context: int
    exact_lengths: bool
    notes: list[str]
    client_cpu: float
    """Share of one core that this process took meanwhile."""


class Answer:
    """The pieces of one streamed answer as they arrive."""

    def __init__(self) -> None:
        self._sse = SseDecoder()
        self.times: list[float] = []
        self.status, self.finish_reason, self.error = 0, "", ""
        self.usage: dict[str, Any] = {}
        self.raw = bytearray()

    def push(self, response: Response, data: bytes, now: float) -> None:
        """New bytes of the body; ResourceError for a stream that is not JSON."""
        self.status = response.status
        if response.status != 200:
            self.raw += data
            return
        for event in self._sse.push(data):
            self._take(event, now)

    def _take(self, event: dict[str, Any], now: float) -> None:
        self.usage = event.get("usage") or self.usage
        if "error" in event:
            self.error = _message(event)
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            if choice.get("text") or any(delta.get(name) for name in ("content", "reasoning_content", "tool_calls")):
                self.times.append(now)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def verdict(self) -> tuple[str, str]:
        """Status and detail of an exchange that came to its end."""
        if self.status in REFUSED:
            return f"refused {self.status}", _error_text(self.raw)
        if self.status != 200:
            return f"http {self.status}", _error_text(self.raw)
        if self.error:
            return "error event", self.error
        return ("ok", "") if self.finish_reason else ("cut", "the stream ended without a finish reason")


def _error_text(raw: bytes | bytearray) -> str:
    with contextlib.suppress(ValueError):
        value = SseDecoder().push(b"data: " + bytes(raw).replace(b"\n", b" ") + b"\n")
        return _message(value[0]) if value else ""
    return bytes(raw[:300]).decode("utf-8", "replace")


def _message(value: dict[str, Any]) -> str:
    """The server's own words."""
    error = value.get("error", value.get("detail", value))
    return str(error.get("message") or error if isinstance(error, dict) else error)[:300]


class Session:
    """One server, ready to be asked: its model, limits, and the fields that it takes."""

    def __init__(self, config: LoadConfig, *, clock: Clock) -> None:
        self.config, self.clock = config, clock
        self.endpoint = Endpoint(config.url, api_key=config.api_key, clock=clock)
        self.model, self.context = config.model, config.context or LONGEST_PAIR
        self.ruler, self.left_out = Ruler(), set[str]()
        self.notes: list[str] = []

    async def prepare(self) -> None:
        """Learn what the server is; ResourceError where it does not answer a first small request."""
        status, models = await self.endpoint.ask("GET", "/v1/models")
        if status == 200:
            self.model = self.model or next(iter(read_models(models)), "")
            row: dict[str, Any] = next((row for row in models["data"] if row["id"] == self.model), {})
            self.context = self.config.context or int(row.get("max_model_len") or LONGEST_PAIR)
        elif not self.model:
            remedy = "name it: --model NAME; a key is given with --api-key"
            raise ResourceError(f"{self.endpoint.url} answered {status} to /v1/models: {models}", remedy=remedy)
        self.ruler = await Ruler.learn(self.count)
        if not self.ruler.is_exact:
            self.notes.append("the server does not count tokens (/tokenize): lengths of prompts are estimates")
        await self._probe()

    async def count(self, text: str) -> int | None:
        """Tokens of a text, by the route of ours and vLLM's, or llama.cpp's."""
        for name in ("prompt", "content"):
            status, answer = await self.endpoint.ask("POST", "/tokenize", {name: text})
            if status == 200 and isinstance(answer, dict) and isinstance(answer.get("tokens"), list):
                return len(answer["tokens"])
        return None

    async def _probe(self) -> None:
        """Find out what the server takes: a field that its 400 names is left out from then on."""
        while True:
            row = await self.run(Row(-1, 8, 4), Ask(self.ruler.text(random.Random(0), 8)[0], 8, 4))
            named = [name for name in OPTIONAL if name in row.detail and name not in self.left_out]
            if row.status not in ("http 400", "http 422") or not named:
                break
            self.left_out.add(named[0])
            self.notes.append(f"the server does not take {named[0]}: it was left out")
        if not row.is_ok:
            remedy = "try --chat true" if row.status == "http 404" and not self.config.chat else "look into its log"
            where = f"{self.endpoint.url} did not answer a first request"
            raise ResourceError(f"{where}: {row.status} {row.detail}".strip(), remedy=remedy)

    def body(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        """Path and body of a request."""
        fields: dict[str, Any] = {"max_tokens": ask.max_tokens, "temperature": self.config.temperature}
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
        fields |= {"ignore_eos": True} if self.config.ignore_eos else {}
        kept = {name: value for name, value in fields.items() if name not in self.left_out}
        whole = ({"model": self.model} if self.model else {}) | kept | self.config.body
        if not self.config.chat:
            return "/v1/completions", whole | {"prompt": "\n\n".join(filter(None, (ask.system, ask.prompt)))}
        system = [{"role": "system", "content": ask.system}] if ask.system else []
        return "/v1/chat/completions", whole | {"messages": [*system, {"role": "user", "content": ask.prompt}]}

    async def run(self, row: Row, ask: Ask, *, began: float = 0.0) -> Row:
        """One request to its end, whatever that is; fills the row."""
        request, answer = self.endpoint.request("POST", *self.body(ask)), Answer()
        sent = self.clock()
        row.sent = sent - began
        try:
            async with asyncio.timeout(self.config.timeout):
                await self.endpoint.send(request, answer.push)
            row.status, row.detail = answer.verdict()
        except TimeoutError:
            row.status = "timeout"
        except Torn as error:
            row.status, row.detail = "torn", error.message
        except ResourceError as error:
            row.status, row.detail = "not JSON", error.message
        except OSError as error:
            row.status, row.detail = "no connection", str(error)
        row.ended = self.clock() - sent
        row.chunks = [at - sent for at in answer.times]
        row.finish_reason = answer.finish_reason
        _count(row, answer.usage)
        return row


def _count(row: Row, usage: dict[str, Any]) -> None:
    """Tokens by the server's word. An answer that ended at its limit has as many as were asked for."""
    row.has_usage = isinstance(usage.get("completion_tokens"), int)
    if row.has_usage:
        row.prompt_tokens, row.output_tokens = usage.get("prompt_tokens"), usage["completion_tokens"]
    elif row.finish_reason == "length":
        row.output_tokens = row.asked_output


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds after the start: a Poisson process of `rate` a second, or all at once."""
    rng, at = random.Random(f"arrivals {seed}"), 0.0
    while True:
        yield at
        at += 0.0 if math.isinf(rate) else rng.expovariate(rate)


async def drive(session: Session, asks: Iterator[Ask], *, sleep: Sleep, told: Callable[[Row], None]) -> list[Row]:
    """Send by the clock, wait for all; rows in the order of sending."""
    config, clock, began = session.config, session.clock, session.clock()
    seats = asyncio.Semaphore(config.concurrency) if config.concurrency else None
    tasks: list[asyncio.Task[Row]] = []

    async def one(row: Row, ask: Ask) -> Row:
        try:
            await session.run(row, ask, began=began)
        finally:
            if seats is not None:
                seats.release()
        told(row)
        return row

    try:
        for index, ask, due in zip(count(), asks, arrivals(config.rate, config.seed), strict=False):
            if config.seconds and due >= config.seconds:
                break
            if (wait := began + due - clock()) > 0:
                await sleep(wait)
            if seats is not None:
                await seats.acquire()
            if config.seconds and clock() - began >= config.seconds:
                break
            row = Row(index, ask.prompt_tokens, ask.max_tokens, due)
            tasks.append(asyncio.create_task(one(row, ask)))
            await asyncio.sleep(0)  # so that a long list of prompts does not keep the first ones waiting
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def requests_of(session: Session) -> tuple[list[Ask], Iterator[Ask]]:
    """Those of the warm-up, drawn with another seed, and those that count."""
    config = session.config
    if config.workload == "conversations":
        if config.file is None:
            raise ConfigError(
                "file: the workload conversations needs one", remedy="--workload conversations FILE.jsonl"
            )
        pairs = read_turns(config.file)
        limits = {"limit": session.context, "wanted": config.wanted}
        asks, dropped = await measured(pairs, session.count, session.ruler, **limits)
        session.notes.append(f"{dropped} conversations were left out: too short or too long")
        if config.wanted > len(asks):
            session.notes.append(f"the file has {len(asks)} conversations that fit: some were sent more than once")
        return (asks * config.warmup)[: config.warmup], _first(cycle(asks), config.wanted)
    warm = config.drawn(session.context, seed=config.seed + 1_000_003).draw(session.ruler)
    own = config.drawn(session.context, seed=config.seed).draw(session.ruler)
    return list(_first(warm, config.warmup)) if config.warmup else [], _first(own, config.wanted)


def _first(asks: Iterator[Ask], wanted: int) -> Iterator[Ask]:
    """The first `wanted`, made before the clock starts; without a number, all as they are needed."""
    return iter([next(asks) for _ in range(wanted)]) if wanted else asks


@contextlib.asynccontextmanager
async def session_with(config: LoadConfig, *, clock: Clock = time.perf_counter) -> AsyncIterator[Session]:
    """A server that has answered once."""
    session = Session(config, clock=clock)
    try:
        await session.prepare()
        yield session
    finally:
        await session.endpoint.close()


def _quiet(row: Row) -> None:
    """Nobody watches."""


async def load(config: LoadConfig, *, clock: Clock = time.perf_counter, sleep: Sleep = asyncio.sleep) -> Result:
    """A whole run: prepare, warm up, send, wait."""
    async with session_with(config, clock=clock) as session:
        return await send(session, sleep=sleep)


async def send(session: Session, *, sleep: Sleep = asyncio.sleep, told: Callable[[Row], None] = _quiet) -> Result:
    """Warm up, send, wait; `told` hears of each request as it ends."""
    warm, asks = await requests_of(session)
    for ask in warm:
        await session.run(Row(-1, ask.prompt_tokens, ask.max_tokens), ask)
    cpu, began = time.process_time(), time.perf_counter()
    rows = await drive(session, asks, sleep=sleep, told=told)
    share = (time.process_time() - cpu) / max(time.perf_counter() - began, 1e-9)
    seconds = max((row.sent + row.ended for row in rows), default=0.0)
    notes = [*session.notes, *remarks(rows, session.config)]
    return Result(rows, seconds, session.model, session.context, session.ruler.is_exact, notes, share)


def remarks(rows: list[Row], config: LoadConfig) -> list[str]:
    """What a reader of the numbers has to know."""
    done = [row for row in rows if row.is_ok]
    notes = []
    if mute := [row for row in done if not row.has_usage]:
        known = sum(row.output_tokens is not None for row in mute)
        notes.append(
            f"{len(mute)} answers came without usage: {known} of them ended at their limit and count as that long, "
            f"{len(mute) - known} are not in the token numbers"
        )
    if config.ignore_eos and (short := sum((row.output_tokens or row.asked_output) < row.asked_output for row in done)):
        notes.append(f"{short} answers ended before the length that was asked for")
    late = max((row.sent - row.due for row in rows), default=0.0)
    if math.isfinite(config.rate) and late > 1.0:
        notes.append(f"requests were sent up to {late:.1f} s after their time: concurrency held them back")
    return notes
