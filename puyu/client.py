"""A LanguageModel over HTTP: our server, or any endpoint that speaks OpenAI's protocol. Needs no torch.

    >>> client = Client("http://127.0.0.1:8000")                              # doctest: +SKIP
    >>> client.chat([{"role": "user", "content": "Who are you?"}]).text       # doctest: +SKIP

Async `generate`, `stream`, `score` make it a `LanguageModel`; `chat`, `stream_chat`, `complete` and `models` are
the blocking forms. Bodies and answers are built and read by pure functions, shared by both. It knows nothing of
templates or tokens: those are the server's. A busy server (429, 503) is asked again after its `Retry-After`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx

from puyu.errors import ConfigError, RequestError, ResourceError
from puyu.types import Completion, Delta, GenerateRequest, Message, SamplingParams, Scored, ToolChoice, ToolSpec
from puyu.wire import (
    SseDecoder,
    StreamReader,
    read_completion,
    read_echo,
    read_models,
    read_ranking,
    read_rewards,
    read_scores,
    read_vectors,
    request_body,
)

Chat = str | Sequence[Message | Mapping[str, Any]]
"""A user's text, messages, or OpenAI's dicts."""

LONGEST_WAIT_S = 30.0
BUSY = (429, 503)


class Client:
    """Talks to one endpoint; safe to share between threads and between event loops.

    `url` is with or without `/v1`. `model` left empty takes the first one that the server lists. `api_key` is sent
    as a bearer token and only where given: no key is read from the environment. `ca_file` holds the certificates to
    trust, where a server's own is not one that everybody trusts.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        model: str = "",
        api_key: str = "",
        timeout: float = 600.0,
        retries: int = 5,
        ca_file: str = "",
    ) -> None:
        self.url = _base_url(url)
        self.model = model
        self.timeout = timeout
        self.retries = retries
        # Through a proxy from the environment a loopback address would mean another machine.
        local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Timeout(timeout, connect=min(timeout, 10.0))
        self._options: dict[str, Any] = {"headers": headers, "timeout": limits, "trust_env": not local}
        if ca_file:
            self._options["verify"] = ssl.create_default_context(cafile=ca_file)
        self._http = httpx.Client(base_url=self.url, **self._options)
        self._loops: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}

    def close(self) -> None:
        """Close the blocking connections; those of an event loop end with it."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- the LanguageModel protocol ---------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> Completion:
        """Run one request to its end. RequestError: the server refused it. ResourceError: no server, or it is busy."""
        path, body = request_body(request, await self._name())
        return read_completion(await self._ask("POST", path, body))

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """Yield deltas as they arrive; leaving the loop early closes the connection, which aborts the request."""
        path, body = request_body(request, await self._name(), stream=True)
        reader = StreamReader()
        async with contextlib.aclosing(self._events(path, body)) as events:
            async for event in events:
                for delta in reader.push(event):
                    yield delta
        for delta in reader.finish():
            yield delta

    async def score(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """Log-likelihood of each continuation: by `/score`, or where that is unknown by `echo` with logprobs."""
        body = {"model": await self._name(), "pairs": [list(pair) for pair in pairs]}
        try:
            return read_scores(await self._ask("POST", "/score", body))
        except RequestError as error:
            if not isinstance(error, UnknownRoute):
                raise
        return list(await asyncio.gather(*(self._score_by_echo(*pair) for pair in pairs)))

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector for each text, of length 1; makes the client an `Embedder`."""
        return read_vectors(
            await self._ask("POST", "/v1/embeddings", {"model": await self._name(), "input": list(texts)})
        )

    async def rewards(self, conversations: Sequence[Chat]) -> list[float]:
        """What a reward model thinks of each conversation's last answer."""
        return read_rewards(await self._ask("POST", "/v1/reward", self._reward_body(await self._name(), conversations)))

    async def _score_by_echo(self, context: str, continuation: str) -> Scored:
        body = {"model": self.model, "prompt": context + continuation, "max_tokens": 1, "temperature": 0.0}
        answer = await self._ask("POST", "/v1/completions", {**body, "echo": True, "logprobs": 1})
        return read_echo(answer, context, continuation)

    # -- blocking forms ---------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Chat,
        *,
        tools: Sequence[ToolSpec | Mapping[str, Any]] = (),
        tool_choice: ToolChoice = ToolChoice(),  # noqa: B008 - frozen
        params: SamplingParams | None = None,
        **changes: Any,
    ) -> Completion:
        """Answer a conversation. `changes` are fields of SamplingParams: `client.chat("Hi", temperature=0.7)`."""
        path, body = request_body(_request(messages, tools, tool_choice, _params(params, changes)), self._name_now())
        return read_completion(self._ask_now("POST", path, body))

    def complete(self, text: str, *, params: SamplingParams | None = None, **changes: Any) -> Completion:
        """Continue plain text, without the chat template."""
        path, body = request_body(GenerateRequest(text, _params(params, changes)), self._name_now())
        return read_completion(self._ask_now("POST", path, body))

    def stream_chat(
        self,
        messages: Chat,
        *,
        tools: Sequence[ToolSpec | Mapping[str, Any]] = (),
        tool_choice: ToolChoice = ToolChoice(),  # noqa: B008 - frozen
        params: SamplingParams | None = None,
        **changes: Any,
    ) -> Iterator[Delta]:
        """Like `chat`, delta by delta; the last one has the finish reason and the usage."""
        path, body = request_body(
            _request(messages, tools, tool_choice, _params(params, changes)), self._name_now(), stream=True
        )
        reader = StreamReader()
        for event in self._events_now(path, body):
            yield from reader.push(event)
        yield from reader.finish()

    def embed_all(self, texts: Sequence[str]) -> list[list[float]]:
        """Like `embed`."""
        return read_vectors(self._ask_now("POST", "/v1/embeddings", {"model": self._name_now(), "input": list(texts)}))

    def reward(self, conversations: Sequence[Chat]) -> list[float]:
        """Like `rewards`."""
        return read_rewards(self._ask_now("POST", "/v1/reward", self._reward_body(self._name_now(), conversations)))

    def rerank(self, query: str, documents: Sequence[str], *, top_n: int | None = None) -> list[tuple[int, float]]:
        """(place of the document, relevance), the most relevant first."""
        body: dict[str, Any] = {"model": self._name_now(), "query": query, "documents": list(documents)}
        body |= {"return_documents": False} | ({"top_n": top_n} if top_n is not None else {})
        return read_ranking(self._ask_now("POST", "/v1/rerank", body))

    def _reward_body(self, name: str, conversations: Sequence[Chat]) -> dict[str, Any]:
        rows = [[message.to_openai() for message in _messages(item)] for item in conversations]
        return {"model": name, "conversations": rows}

    def models(self) -> list[str]:
        """Names that the server offers."""
        return read_models(self._ask_now("GET", "/v1/models"))

    # -- transport --------------------------------------------------------------------------------------------

    async def _name(self) -> str:
        if not self.model:
            self.model = self._first(read_models(await self._ask("GET", "/v1/models")))
        return self.model

    def _name_now(self) -> str:
        if not self.model:
            self.model = self._first(self.models())
        return self.model

    def _first(self, names: Sequence[str]) -> str:
        if not names:
            raise RequestError(f"{self.url} lists no model", param="model", remedy="name one: Client(url, model=...)")
        return names[0]

    def _async_http(self) -> httpx.AsyncClient:
        # Connections belong to one event loop; those of closed loops are forgotten here.
        loop = asyncio.get_running_loop()
        for old in [known for known in self._loops if known.is_closed()]:
            del self._loops[old]
        if loop not in self._loops:
            self._loops[loop] = httpx.AsyncClient(base_url=self.url, **self._options)
        return self._loops[loop]

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        for attempt in range(self.retries + 1):
            with self._explained():
                response = await self._async_http().request(method, path, json=body)
            wait = self._wait(response, attempt)
            if wait is None:
                break
            await asyncio.sleep(wait)
        return self._json(response)

    def _ask_now(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        for attempt in range(self.retries + 1):
            with self._explained():
                response = self._http.request(method, path, json=body)
            wait = self._wait(response, attempt)
            if wait is None:
                break
            time.sleep(wait)
        return self._json(response)

    async def _events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        for attempt in range(self.retries + 1):
            with self._explained():
                async with self._async_http().stream("POST", path, json=body) as response:
                    wait = self._wait(response, attempt)
                    if wait is None:
                        if response.is_error:
                            await response.aread()
                            raise self._refusal(response)
                        sse = SseDecoder()
                        async for chunk in response.aiter_bytes():
                            for event in sse.push(chunk):
                                yield event
                        return
            await asyncio.sleep(wait)

    def _events_now(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        for attempt in range(self.retries + 1):
            with self._explained(), self._http.stream("POST", path, json=body) as response:
                wait = self._wait(response, attempt)
                if wait is None:
                    if response.is_error:
                        response.read()
                        raise self._refusal(response)
                    sse = SseDecoder()
                    for chunk in response.iter_bytes():
                        yield from sse.push(chunk)
                    return
            time.sleep(wait)

    def _wait(self, response: httpx.Response, attempt: int) -> float | None:
        """Seconds until the next try, or None when the answer stands."""
        if response.status_code not in BUSY or attempt >= self.retries:
            return None
        given = response.headers.get("Retry-After", "")
        return min(float(given) if given.isdigit() else 0.5 * 2**attempt, LONGEST_WAIT_S)

    def _json(self, response: httpx.Response) -> Any:
        if response.is_error:
            raise self._refusal(response)
        try:
            return response.json()
        except ValueError as error:
            remedy = "check that the URL is that of an OpenAI-compatible server"
            raise ResourceError(f"{response.url} did not answer with JSON", remedy=remedy) from error

    def _refusal(self, response: httpx.Response) -> RequestError | ResourceError:
        message, param = _error_text(response)
        where = f"{self.url} answered {response.status_code}: {message}"
        if response.status_code == 429:
            remedy = "ask later: the server is busy (--max-queue), or this key's limit is reached"
            return ResourceError(where, remedy=remedy)
        if response.status_code >= 500:
            return ResourceError(where, remedy="ask later; look into the server's log")
        if response.status_code in (401, 403):
            return RequestError(where, param=param, remedy="give the server's key: Client(url, api_key=...)")
        if response.status_code in (404, 405) and param is None:
            return UnknownRoute(where)
        return RequestError(where, param=param)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Name the URL and the remedy for what can go wrong on the wire."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            remedy = "start one with `puyu serve DIR --port N`, or check the address"
            raise ResourceError(f"no server answers at {self.url} ({error})", remedy=remedy) from error
        except httpx.TimeoutException as error:
            remedy = "raise it: Client(url, timeout=...)"
            raise ResourceError(f"{self.url} was silent for {self.timeout:g} s", remedy=remedy) from error
        except httpx.TransportError as error:
            remedy = "look into the server's log; it may have been stopped"
            raise ResourceError(f"the connection to {self.url} broke off: {error}", remedy=remedy) from error


class UnknownRoute(RequestError):
    """The server does not know this path (as opposed to: it refuses this request)."""


def _base_url(url: str) -> str:
    base = url.rstrip("/").removesuffix("/v1")
    if urlsplit(base).scheme not in ("http", "https") or not urlsplit(base).hostname:
        raise ConfigError(f"not an HTTP address: {url!r}", remedy="for example http://127.0.0.1:8000")
    return base


def _params(params: SamplingParams | None, changes: Mapping[str, Any]) -> SamplingParams:
    return replace(params or SamplingParams(), **changes)


def _messages(messages: Chat) -> tuple[Message, ...]:
    if isinstance(messages, str):
        messages = (Message("user", messages),)
    return tuple(turn if isinstance(turn, Message) else Message.from_openai(turn) for turn in messages)


def _request(
    messages: Chat, tools: Sequence[ToolSpec | Mapping[str, Any]], choice: ToolChoice, params: SamplingParams, /
) -> GenerateRequest:
    turns = _messages(messages)
    specs = tuple(spec if isinstance(spec, ToolSpec) else ToolSpec.from_openai(spec) for spec in tools)
    return GenerateRequest(turns, params, specs, choice)


def _error_text(response: httpx.Response) -> tuple[str, str | None]:
    """The server's own words: OpenAI's error body, FastAPI's `detail`, or the plain text."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:500] or response.reason_phrase, None
    if not isinstance(body, Mapping):
        return str(body)[:500], None
    error = body.get("error", body)
    if isinstance(error, Mapping):
        return str(error.get("message") or error.get("detail") or error), error.get("param")
    return str(error), None
