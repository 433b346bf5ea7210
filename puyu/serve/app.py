"""The routes of one model: OpenAI's chat, completions, responses, embeddings and models; rerank, rewards, likelihoods,
tokens, health, metrics. A thin user of the engine.

    app = build_app(LLM("runs/nano/ppo"), ServeConfig())

Every request ends in a stated way: an answer with its finish reason, a refusal that names the field (400), 429 when
the queue is full, 503 when the engine has stopped. A client that goes away aborts its request within one step.
Logs hold ids, counts and times; text only where `log_text` asks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from puyu.engine.llm import LLM
from puyu.engine.loop import Asked
from puyu.errors import PuyuError, RequestError, ResourceError
from puyu.log import logger
from puyu.serve.answers import Echo, Head, Writer, chat_answer, text_answer
from puyu.serve.chat import ChatBody, read_messages
from puyu.serve.completions import CompletionBody, DetokenizeBody, ScoreBody, TokenizeBody
from puyu.serve.config import ServeConfig
from puyu.serve.control import BODIES, add_control
from puyu.serve.guard import SPENT, Guard
from puyu.serve.http import CheckedRoute, EventResponse, Gone, Refused, until_gone
from puyu.serve.keys import KeyRing
from puyu.serve.protocol import error_body, explain
from puyu.serve.responses import ResponsesBody, ResponseWriter, whole_response
from puyu.serve.service import Service, refuse_broken
from puyu.serve.vectors import EmbeddingBody, RerankBody, RewardBody, embedding_answer, rerank_answer, reward_answer
from puyu.types import Delta, GenerateRequest, SamplingParams

CHARACTERS_AT_ONCE = 8_000


class AnyWriter(Protocol):
    """What turns batches of deltas into events."""

    def open(self) -> bytes: ...
    def push(self, deltas: Sequence[Delta]) -> bytes: ...
    def close(self) -> bytes: ...


def build_app(llm: LLM, config: ServeConfig, *, defaults: SamplingParams | None = None) -> FastAPI:
    """The application; closing it (lifespan) stops the engine. `defaults` stand in for what a request leaves out."""
    service = Service(llm, config, defaults or SamplingParams())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(llm.close)

    # The documentation pages of FastAPI load scripts from the network; the schema itself stays at /openapi.json.
    app = FastAPI(title="Puyu", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.router.route_class = CheckedRoute
    app.state.service = service
    app.add_middleware(
        Guard,
        keys=key_ring(config),
        max_body=int(config.max_body_mb * 1e6),
        local_only=config.is_local,
        body_seconds=config.body_seconds,
    )
    if config.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"])
    _add_errors(app, service)
    _add_generation(app, service)
    _add_vectors(app, service)
    _add_tokens(app, service)
    _add_care(app, service)
    add_control(app, service)
    return app


def key_ring(config: ServeConfig) -> KeyRing:
    """All keys of a configuration."""
    return KeyRing.of(config.keys_file, api_key=config.api_key, control_key=config.control_key)


# ---- generation ----


def _add_generation(app: FastAPI, service: Service) -> None:
    context, tokenizer = service.llm.driver.engine.context, service.llm.tokenizer

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: Request) -> Response:
        """Answer a conversation."""
        adapter = service.check(body.model)
        _log_text(service, http, body)
        asked = await service.prepare([body.to_request(service.defaults, context=context)], adapter, words=body.words)
        head = Head(adapter or service.name, chat=True)
        if body.stream:
            writer = Writer(head, tokenizer, answers=asked[0].num_answers, include_usage=body.include_usage)
            return await _streamed(service, asked, writer, http)
        (completion,) = await until_gone(http, service.generate(asked))
        _spend(http, completion.usage.prompt_tokens + completion.usage.completion_tokens)
        return JSONResponse(chat_answer(head, completion, tokenizer))

    @app.post("/v1/responses")
    async def respond(body: ResponsesBody, http: Request) -> Response:
        """Answer items, in the form of OpenAI's newer API; nothing is stored."""
        adapter = service.check(body.model)
        _log_text(service, http, body)
        asked = await service.prepare([body.to_request(service.defaults, context=context)], adapter, words=body.words)
        name = adapter or service.name
        if body.stream:
            return await _streamed(service, asked, ResponseWriter(name, body), http)
        (completion,) = await until_gone(http, service.generate(asked))
        _spend(http, completion.usage.prompt_tokens + completion.usage.completion_tokens)
        return JSONResponse(whole_response(name, body, completion))

    @app.post("/v1/completions")
    async def complete(body: CompletionBody, http: Request) -> Response:
        """Continue plain text."""
        adapter = service.check(body.model)
        _log_text(service, http, body)
        asked = await service.prepare(body.to_requests(service.defaults), adapter, words=body.words)
        head = Head(adapter or service.name, chat=False)
        if body.stream:
            answers = sum(item.num_answers for item in asked)
            writer = Writer(head, tokenizer, answers=answers, include_usage=body.include_usage)
            return await _streamed(service, asked, writer, http)
        completions = await until_gone(http, service.generate(asked))
        echoes = [Echo(item.parts[0].prompt_ids, silent=body.max_tokens == 0) for item in asked] if body.echo else []
        answer = text_answer(head, completions, tokenizer, echoes=echoes)
        _spend(http, answer["usage"]["total_tokens"])
        return JSONResponse(answer)


async def _streamed(service: Service, asked: Sequence[Asked], writer: AnyWriter, http: Request) -> Response:
    """Wait for the first deltas, so that a refusal is still an HTTP status, then stream."""
    batches = service.stream(asked)
    try:
        first = await until_gone(http, anext(batches))
        if all(delta.finish_reason is not None for delta in first):
            refuse_broken(first[0].finish_reason or "")
    except BaseException:
        await batches.aclose()
        raise
    chunks = _chunks(first, batches, writer, http)
    return EventResponse(chunks, slow_seconds=service.config.slow_seconds, cut=service.cut)


async def _chunks(
    first: Sequence[Delta], batches: AsyncGenerator[list[Delta], None], writer: AnyWriter, http: Request
) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(batches):
        yield writer.open() + writer.push(first)
        _spend_all(http, first)
        async for batch in batches:
            _spend_all(http, batch)
            if data := writer.push(batch):
                yield data
        yield writer.close()


def _spend(http: Request, tokens: int) -> None:
    """Leave what a request has cost for the guard, which knows whose it is."""
    http.scope[SPENT] = http.scope.get(SPENT, 0) + tokens


def _spend_all(http: Request, deltas: Sequence[Delta]) -> None:
    for delta in deltas:
        if delta.usage is not None:
            _spend(http, delta.usage.prompt_tokens + delta.usage.completion_tokens)


def _log_text(service: Service, http: Request, body: BaseModel) -> None:
    if service.config.log_text:
        text = json.dumps(body.model_dump(exclude_unset=True), ensure_ascii=False, default=str)
        logger.info("request %s asks: %s", http.scope.get("puyu.request", "-"), text)


# ---- vectors, tokens ----


def _add_vectors(app: FastAPI, service: Service) -> None:
    @app.post("/v1/embeddings")
    async def embed(body: EmbeddingBody, http: Request) -> Response:
        """One vector for each text."""
        adapter = service.check(body.model)
        body.check_size(service.llm.model.config.hidden_size)
        work = service.vectors(body.inputs(), adapter, pooling=body.pooling or "mean")
        vectors = await until_gone(http, work)
        _spend(http, sum(vector.num_tokens for vector in vectors))
        return JSONResponse(embedding_answer(adapter or service.name, body, vectors))

    @app.post("/v1/rerank")
    async def rerank(body: RerankBody, http: Request) -> Response:
        """Documents by their nearness to a query."""
        adapter = service.check(body.model)
        work = service.vectors([body.query, *body.documents], adapter, param="documents")
        vectors = await until_gone(http, work)
        _spend(http, sum(vector.num_tokens for vector in vectors))
        return JSONResponse(rerank_answer(adapter or service.name, body, vectors))

    @app.post("/v1/reward")
    async def reward(body: RewardBody, http: Request) -> Response:
        """A reward model's score of each conversation."""
        service.check(body.model)
        vectors = await until_gone(http, service.rewards(body.messages()))
        _spend(http, sum(vector.num_tokens for vector in vectors))
        return JSONResponse(reward_answer(service.name, vectors))

    @app.post("/score")
    async def score(body: ScoreBody, http: Request) -> Response:
        """Log-likelihoods, a few pairs at a time so that generation goes on in between."""
        service.check(body.model)
        pairs = body.to_pairs()

        async def work() -> list[dict[str, Any]]:
            rows = []
            with service.seats(1):
                for some in few_at_once(pairs):
                    rows += await service.llm.score(some)
            _spend(http, sum(row.num_tokens for row in rows))
            names = ("logprob", "num_tokens", "num_bytes", "is_greedy")
            return [{name: getattr(row, name) for name in names} for row in rows]

        return JSONResponse({"model": service.name, "scores": await until_gone(http, work())})


def few_at_once(pairs: Sequence[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Pairs in order, in parts that do not hold up the others for long."""
    part: list[tuple[str, str]] = []
    size = 0
    for pair in pairs:
        if part and size + len(pair[0]) + len(pair[1]) > CHARACTERS_AT_ONCE:
            yield part
            part, size = [], 0
        part.append(pair)
        size += len(pair[0]) + len(pair[1])
    if part:
        yield part


def _add_tokens(app: FastAPI, service: Service) -> None:
    front, tokenizer = service.llm.driver.front, service.llm.tokenizer

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        """Ids of a text, or of a chat as the model gets it."""
        service.check(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        if body.messages is not None:
            request = GenerateRequest(read_messages(body.messages), tools=body.specs)
            ids = await asyncio.to_thread(front.prompt_ids, request)
        else:
            encode = front.text_ids if body.add_special_tokens else tokenizer.encode
            ids = await asyncio.to_thread(encode, body.prompt or "")
        context = service.llm.driver.engine.context
        return JSONResponse({"count": len(ids), "max_model_len": context, "tokens": ids})

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        """Text of ids."""
        service.check(body.model)
        bad = next((id for id in body.tokens if not 0 <= id < tokenizer.vocab_size), None)
        if bad is not None:
            raise RequestError(f"id {bad} is not in the vocabulary of {tokenizer.vocab_size}", param="tokens")
        return JSONResponse({"prompt": tokenizer.decode(body.tokens)})


# ---- care ----


def _add_care(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        """The model, and its adapters."""
        return JSONResponse({"object": "list", "data": [_model_row(service, name) for name in names()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One of them."""
        service.adapter_of(name)
        return JSONResponse(_model_row(service, name))

    def names() -> list[str]:
        return [service.name, *service.llm.adapters]

    @app.get("/health")
    async def health() -> Response:
        """200 while requests are accepted."""
        trouble = service.trouble
        return JSONResponse({"status": trouble or "ok"}, 503 if trouble else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text."""
        page = service.metrics.render(service.llm.stats())
        return PlainTextResponse(page, media_type="text/plain; version=0.0.4")


def _model_row(service: Service, name: str) -> dict[str, Any]:
    parent = None if name == service.name else service.name
    row = {"id": name, "object": "model", "created": service.created, "owned_by": "puyu"}
    return row | {"max_model_len": service.llm.driver.engine.context, "parent": parent}


_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponsesBody,
    "/v1/embeddings": EmbeddingBody,
    "/v1/rerank": RerankBody,
    "/v1/reward": RewardBody,
    "/score": ScoreBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    **BODIES,
}


def _add_errors(app: FastAPI, service: Service) -> None:
    """Every error is OpenAI's error object."""

    def answer(
        status: int, body: dict[str, Any], retry_after: int | None = None, *, headers: Mapping[str, str] | None = None
    ) -> Response:
        service.metrics.refused[status] += 1
        waits = {"Retry-After": str(retry_after)} if retry_after is not None else {}
        return JSONResponse(body, status, headers={**(headers or {}), **waits})

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        message, param = explain(error.errors(), _BODIES.get(http.url.path))
        return answer(400, error_body(message, kind="invalid_request_error", param=param))

    @app.exception_handler(RequestError)
    async def refused(http: Request, error: RequestError) -> Response:
        return answer(400, error_body(str(error), kind="invalid_request_error", param=error.param, code=error.code))

    @app.exception_handler(PuyuError)
    async def unusable(http: Request, error: PuyuError) -> Response:
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
        return answer(error.status_code, error_body(str(error.detail), kind=kind), headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(http: Request, error: Exception) -> Response:
        return answer(500, error_body("internal error; see the server's log", kind="server_error"))
