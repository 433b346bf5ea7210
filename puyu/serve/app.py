"""The routes: OpenAI's chat, completions and models; scoring, tokens, health, metrics. A thin user of the engine.

    app = build_app(LLM("runs/nano/ppo"), ServeConfig())

Every request ends in a stated way: an answer with its finish reason, a refusal that names the field (400), 429 when
the queue is full, 503 when the engine has stopped. A client that goes away aborts its request within one step.
Logs hold ids, counts and times, never text.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from puyu.engine.llm import LLM
from puyu.errors import InputError, PuyuError, RequestError, ResourceError
from puyu.serve.config import ServeConfig
from puyu.serve.guard import Guard
from puyu.serve.metrics import Metrics, Watch
from puyu.serve.protocol import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ScoreBody,
    TokenizeBody,
    error_body,
    explain,
    read_messages,
)
from puyu.serve.stream import BROKEN, Head, chat_answer, events, text_answer
from puyu.types import Completion, Delta, GenerateRequest, SamplingParams, Usage

PAIRS_AT_ONCE = 64
T = TypeVar("T")


class Refused(PuyuError):
    """An answer other than 400 that the server gives on purpose."""

    def __init__(self, status: int, body: dict[str, Any], *, retry_after: int | None = None) -> None:
        super().__init__(body["error"]["message"])
        self.status, self.body, self.retry_after = status, body, retry_after


class Gone(PuyuError):
    """The client went away; nobody reads the answer."""


class Service:
    """One model behind the routes: admission, running, counting."""

    def __init__(self, llm: LLM, config: ServeConfig, defaults: SamplingParams) -> None:
        self.llm, self.defaults = llm, defaults
        self.name = config.served_name or llm.name
        self.limit = llm.driver.engine.config.max_running + config.max_queue
        self.metrics = Metrics()
        self.created = int(time.time())
        self.in_flight = 0

    def check(self, body: Body) -> None:
        """Refuse another model's name, and everything when the engine has stopped."""
        if not self.llm.loop.is_alive:
            raise Refused(503, error_body("the engine has stopped or is stopping", kind="server_error"))
        if body.model is not None and body.model != self.name:
            message = f"there is no model {body.model!r} here; this server has {self.name!r}"
            raise Refused(404, error_body(message, kind="invalid_request_error", param="model", code="model_not_found"))

    @contextlib.contextmanager
    def seat(self) -> Iterator[None]:
        """A place among the requests that run or wait; 429 when all are taken."""
        if self.in_flight >= self.limit:
            body = error_body("too many requests are waiting", kind="rate_limit_error", code="rate_limit_exceeded")
            raise Refused(429, body, retry_after=1)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    async def generate(self, request: GenerateRequest) -> Completion:
        """One request to its end; 500 when the engine failed on it."""
        with self.seat(), self._watched() as watch:
            completion = await self.llm.generate(request)
            watch.ended(completion.finish_reason, completion.usage)
        if completion.finish_reason in BROKEN:
            status = {"abort": 503, "timeout": 504}.get(completion.finish_reason, 500)
            raise Refused(status, error_body(BROKEN[completion.finish_reason], kind="server_error"))
        return completion

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """Deltas of one request; leaving early aborts it."""
        with self.seat(), self._watched() as watch:
            async with contextlib.aclosing(self.llm.loop.stream(request)) as deltas:
                async for delta in deltas:
                    watch.began_to_answer()
                    if delta.finish_reason is not None:
                        watch.ended(delta.finish_reason, delta.usage or Usage())
                    yield delta

    @contextlib.contextmanager
    def _watched(self) -> Iterator[Watch]:
        """Count a request however it ends; one that is left before its end counts as aborted."""
        watch = Watch(self.metrics)
        try:
            yield watch
        except (asyncio.CancelledError, GeneratorExit):
            watch.ended("abort", Usage())
            raise

    def prompt_texts(self, prompt: str | Sequence[str] | Sequence[int]) -> list[str]:
        """Texts of a completion's prompt. Ids are taken where their text gives the same ids again."""
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise RequestError("the prompt is empty", param="prompt")
        texts = [item for item in prompt if isinstance(item, str)]
        if texts:
            return texts
        ids = [item for item in prompt if isinstance(item, int)]
        self.check_ids(ids, param="prompt")
        tokenizer = self.llm.tokenizer
        bare = ids[1:] if ids[0] == tokenizer.bos_id else ids
        text = tokenizer.decode(bare)
        if tokenizer.encode(text) != bare:
            remedy = "send the text instead; special tokens inside a prompt are not accepted"
            raise RequestError("these ids are not those of their text", param="prompt", remedy=remedy)
        return [text]

    def check_ids(self, ids: Sequence[int], *, param: str) -> None:
        """RequestError for an id outside the vocabulary."""
        bad = next((id for id in ids if not 0 <= id < self.llm.tokenizer.vocab_size), None)
        if bad is not None:
            raise RequestError(f"id {bad} is not in the vocabulary of {self.llm.tokenizer.vocab_size}", param=param)


def build_app(llm: LLM, config: ServeConfig, *, defaults: SamplingParams | None = None) -> FastAPI:
    """The application; closing it (lifespan) stops the engine. `defaults` stand in for what a request leaves out."""
    service = Service(llm, config, defaults or SamplingParams())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(llm.close)

    # The documentation pages of FastAPI load scripts from the network; the schema itself stays at /openapi.json.
    app = FastAPI(title="Puyu", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    max_body = int(config.max_body_mb * 1e6)
    app.add_middleware(Guard, api_key=config.api_key, max_body=max_body, local_only=config.is_local)
    _add_errors(app, service)
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_care(app, service)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: Request) -> Response:
        """Answer a conversation."""
        service.check(body)
        request = body.to_request(service.defaults, context=service.llm.driver.engine.context)
        head = Head(service.name, chat=True)
        if body.stream:
            return await _streamed(service, request, head, http, include_usage=body.include_usage)
        completion = await until_gone(http, service.generate(request))
        return JSONResponse(chat_answer(head, completion, service.llm.tokenizer))

    @app.post("/v1/completions")
    async def complete(body: CompletionBody, http: Request) -> Response:
        """Continue plain text."""
        service.check(body)
        requests = body.to_requests(service.prompt_texts(body.prompt), service.defaults)
        head = Head(service.name, chat=False)
        if body.stream:
            return await _streamed(service, requests[0], head, http, include_usage=body.include_usage)
        completions = await until_gone(http, all_or_none([service.generate(request) for request in requests]))
        return JSONResponse(text_answer(head, completions, service.llm.tokenizer))

    @app.post("/score")
    async def score(body: ScoreBody, http: Request) -> Response:
        """Log-likelihoods, a few pairs at a time so that generation goes on in between."""
        service.check(body)
        pairs = body.to_pairs()

        async def work() -> list[dict[str, Any]]:
            rows = []
            with service.seat():
                for start in range(0, len(pairs), PAIRS_AT_ONCE):
                    rows += await service.llm.score(pairs[start : start + PAIRS_AT_ONCE])
            names = ("logprob", "num_tokens", "num_bytes", "is_greedy")
            return [{name: getattr(row, name) for name in names} for row in rows]

        return JSONResponse({"model": service.name, "scores": await until_gone(http, work())})


async def _streamed(
    service: Service, request: GenerateRequest, head: Head, http: Request, *, include_usage: bool
) -> Response:
    """Wait for the first delta, so that a refusal is still an HTTP status, then stream."""
    deltas = service.stream(request)
    first = await until_gone(http, anext(deltas))
    return EventResponse(events(head, _after(first, deltas), include_usage=include_usage))


async def _after(first: Delta, rest: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
    async with contextlib.aclosing(rest):
        yield first
        async for delta in rest:
            yield delta


class EventResponse(Response):
    """Server-sent events. Watches for the client's leaving while it writes: then the work is cancelled at once."""

    def __init__(self, chunks: AsyncGenerator[bytes, None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with contextlib.aclosing(self.chunks) as chunks:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        with contextlib.suppress(Gone):
            await race(write(), receive)


async def until_gone(http: Request, work: Awaitable[T]) -> T:
    """The work's result; when the client leaves first, the work is cancelled and Gone is raised."""
    return await race(work, http.receive)


async def race(work: Awaitable[T], receive: Callable[[], Any]) -> T:
    """See `until_gone`; whatever happens, both sides have ended on return."""

    async def leaving() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(leaving())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone("the client went away")
        return task.result()
    finally:
        for side in (task, watch):
            side.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def all_or_none(works: Sequence[Awaitable[T]]) -> list[T]:
    """All results in order; the first failure cancels the rest and is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        """Ids of a text, or of a chat as the model gets it."""
        service.check(body)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        if body.messages is not None:
            ids = service.llm.prompt_ids(GenerateRequest(read_messages(body.messages), tools=body.specs))
        elif body.add_special_tokens:
            ids = service.llm.driver.front.text_ids(body.prompt or "")
        else:
            ids = service.llm.tokenizer.encode(body.prompt or "")
        context = service.llm.driver.engine.context
        return JSONResponse({"count": len(ids), "max_model_len": context, "tokens": ids})

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        """Text of ids."""
        service.check(body)
        service.check_ids(body.tokens, param="tokens")
        return JSONResponse({"prompt": service.llm.tokenizer.decode(body.tokens)})


def _add_care(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        """The one model."""
        row = {"id": service.name, "object": "model", "created": service.created, "owned_by": "puyu"}
        row["max_model_len"] = service.llm.driver.engine.context
        return JSONResponse({"object": "list", "data": [row]})

    @app.get("/health")
    async def health() -> Response:
        """200 while requests are accepted."""
        alive = service.llm.loop.is_alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text."""
        page = service.metrics.render(service.llm.stats())
        return PlainTextResponse(page, media_type="text/plain; version=0.0.4")


_BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/score": ScoreBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}


def _add_errors(app: FastAPI, service: Service) -> None:
    """Every error is OpenAI's error object."""

    def answer(status: int, body: dict[str, Any], retry_after: int | None = None) -> Response:
        service.metrics.refused[status] += 1
        headers = {"Retry-After": str(retry_after)} if retry_after is not None else None
        return JSONResponse(body, status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        message, param = explain(error.errors(), _BODIES.get(http.url.path))
        return answer(400, error_body(message, kind="invalid_request_error", param=param))

    @app.exception_handler(RequestError)
    async def refused(http: Request, error: RequestError) -> Response:
        return answer(400, error_body(str(error), kind="invalid_request_error", param=error.param))

    @app.exception_handler(InputError)
    async def unusable(http: Request, error: InputError) -> Response:
        return answer(400, error_body(str(error), kind="invalid_request_error"))

    @app.exception_handler(Refused)
    async def on_purpose(http: Request, error: Refused) -> Response:
        return answer(error.status, error.body, error.retry_after)

    @app.exception_handler(Gone)
    async def gone(http: Request, error: Gone) -> Response:
        return answer(499, error_body("the client went away", kind="invalid_request_error"))

    @app.exception_handler(ResourceError)
    async def lacking(http: Request, error: ResourceError) -> Response:
        return answer(503, error_body(str(error), kind="server_error"), 1)

    @app.exception_handler(HTTPException)
    async def plain(http: Request, error: HTTPException) -> Response:
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return answer(error.status_code, error_body(str(error.detail), kind=kind))

    @app.exception_handler(Exception)
    async def unexpected(http: Request, error: Exception) -> Response:
        return answer(500, error_body("internal error; see the server's log", kind="server_error"))
