"""The client against an endpoint whose every byte is written down (the server's own tests join both ends)."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu import Client
from puyu.errors import ConfigError, RequestError, ResourceError
from puyu.types import (
    Completion,
    GenerateRequest,
    Guide,
    LanguageModel,
    Message,
    SamplingParams,
    ToolCall,
    ToolChoice,
    ToolSpec,
    Usage,
)
from puyu.wire import SseDecoder, StreamReader, request_body

MODELS = {"data": [{"id": "tiny"}]}
CHAT = {
    "choices": [
        {
            "message": {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
            },
            "finish_reason": "tool_calls",
            "logprobs": {"content": [{"token": "a", "logprob": -0.5}]},
        }
    ],
    "usage": {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}},
}


def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def call_part(index: int, **function: str) -> dict[str, Any]:
    head = {"id": f"c{index}", "type": "function"} if "name" in function else {}
    return chunk({"tool_calls": [{"index": index, **head, "function": function}]})


EVENTS = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "12\u20287 等"}),
    chunk({"content": "于"}),
    call_part(0, name="add", arguments=""),
    call_part(0, arguments='{"a":'),
    call_part(1, name="mul", arguments="{}"),
    call_part(0, arguments=" 1}"),
    chunk({}, "tool_calls"),
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9}},
]


def sse(*events: dict[str, Any]) -> bytes:
    lines = [
        b": a comment",
        b"event: message",
        *(b"data: " + json.dumps(e, ensure_ascii=False).encode() for e in events),
    ]
    return b"\r\n\r\n".join([*lines, b"data: [DONE]", b""])


@dataclass
class Endpoint:
    """Answers in order for each path; what was asked is kept."""

    answers: dict[str, list[tuple[int, Any]]]
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, Any, dict[str, str]]] = field(default_factory=list)
    url: str = ""


@contextmanager
def endpoint(headers: dict[str, str] | None = None, **answers: Any) -> Iterator[Endpoint]:
    paths = {"chat": "/v1/chat/completions", "complete": "/v1/completions", "score": "/score", "models": "/v1/models"}
    place = Endpoint(
        {paths[key]: value for key, value in ({"models": [(200, MODELS)]} | answers).items()}, headers or {}
    )

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            place.asked.append((self.path, json.loads(body) if body else None, dict(self.headers)))
            known = place.answers.get(self.path) or [(404, {"error": {"message": "no such route"}})]
            status, value = known.pop(0) if len(known) > 1 else known[0]
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in (place.headers | {"Content-Length": str(len(data))}).items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    place.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield place
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def generate(client: Client, prompt: str | tuple[Message, ...], **params: Any) -> Completion:
    return asyncio.run(client.generate(GenerateRequest(prompt, SamplingParams(**params))))


def test_it_is_a_language_model() -> None:
    assert isinstance(Client("http://127.0.0.1:1"), LanguageModel)


def test_chat_body_and_answer() -> None:
    with endpoint(chat=[(200, CHAT)]) as place, Client(place.url + "/v1/", api_key="k") as client:
        params = SamplingParams(max_tokens=5, temperature=0.5, seed=3, stop=("x",), logprobs=True)
        got = client.chat([{"role": "user", "content": "Hi"}], tools=[ToolSpec("add", "Add.")], params=params)
        same = asyncio.run(
            client.generate(GenerateRequest((Message("user", "Hi"),), params, (ToolSpec("add", "Add."),)))
        )
    assert got == same
    assert got.message.tool_calls == (ToolCall("add", "{}", "c1"),)
    assert (got.finish_reason, got.usage, got.logprobs) == ("tool_calls", Usage(7, 3, 4), (-0.5,))
    (path, body, headers), (_, again, _) = [row for row in place.asked if "chat" in row[0]]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer k" and body == again
    tools = [ToolSpec("add", "Add.").to_openai()]
    assert body == {
        "model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "tools": tools, "max_tokens": 5,
        "temperature": 0.5, "top_p": 1.0, "seed": 3, "stop": ["x"], "logprobs": True,
    }  # fmt: skip


def test_plain_text_goes_to_completions_and_only_set_extensions_are_sent() -> None:
    answer = {"choices": [{"text": " 4", "finish_reason": "stop", "logprobs": {"token_logprobs": [-1.0]}}]}
    with endpoint(complete=[(200, answer)]) as place:
        client = Client(place.url, model="m")
        assert client.complete("2+2=", max_tokens=7).text == " 4"
        assert generate(client, "2+2=", top_k=3, ignore_eos=True, stop_token_ids=(7,)).logprobs == (-1.0,)
    assert [row[0] for row in place.asked] == ["/v1/completions"] * 2
    assert place.asked[0][1]["max_tokens"] == 7
    assert "top_k" not in place.asked[0][1] and "ignore_eos" not in place.asked[0][1]
    assert place.asked[1][1]["top_k"] == 3 and place.asked[1][1]["stop_token_ids"] == [7]


def test_streams_blocking_and_async_are_the_same() -> None:
    async def gathered(client: Client) -> list[Any]:
        return [delta async for delta in client.stream(GenerateRequest((Message("user", "Hi"),)))]

    with endpoint(chat=[(200, sse(*EVENTS))]) as place:
        client = Client(place.url)
        deltas = list(client.stream_chat("Hi"))
        assert deltas == asyncio.run(gathered(client))
    assert "".join(delta.text for delta in deltas) == "12\u20287 等于"
    assert deltas[-1].finish_reason == "tool_calls" and deltas[-1].usage == Usage(7, 9)
    assert deltas[-1].tool_calls == (ToolCall("add", '{"a": 1}', "c0"), ToolCall("mul", "{}", "c1"))
    assert place.asked[1][1]["stream_options"] == {"include_usage": True}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 700), max_size=12))
def test_any_cutting_of_the_bytes_reads_the_same(cuts: list[int]) -> None:
    data = sse(*EVENTS)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    decoder = SseDecoder()
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    assert [event for piece in pieces for event in decoder.push(piece)] == EVENTS


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (400, {"error": {"message": "top_p must be positive", "param": "top_p"}}, RequestError, "top_p must be"),
        (422, {"detail": "bad"}, RequestError, "bad"),
        (401, {"error": {"message": "no key"}}, RequestError, "api_key="),
        (404, {"error": {"message": "no model x", "param": "model"}}, RequestError, "no model x"),
        (500, {"error": {"message": "boom"}}, ResourceError, "server's log"),
        (502, b"<html>bad gateway", ResourceError, "bad gateway"),
        (429, {"error": {"message": "full"}}, ResourceError, "--max-queue"),
        (200, b"<html>a web page", ResourceError, "did not answer with JSON"),
        (200, {"hello": 1}, ResourceError, "not an answer with 'choices'"),
    ],
)
def test_refusals_carry_the_servers_words(status: int, body: Any, kind: type[Exception], words: str) -> None:
    with endpoint(chat=[(status, body)], headers={"Retry-After": "0"}) as place:
        client = Client(place.url, retries=1)
        for ask in (lambda: client.chat("Hi"), lambda: generate(client, (Message("user", "Hi"),))):
            with pytest.raises(kind) as caught:
                ask()
            assert words in str(caught.value)
    if status == 400:
        assert isinstance(caught.value, RequestError) and caught.value.param == "top_p"


def test_a_busy_server_is_asked_again() -> None:
    full = (429, {"error": {"message": "full"}})
    script = [full, (503, {}), (200, CHAT), full, (200, sse(*EVENTS))]
    with endpoint(chat=script, headers={"Retry-After": "0"}) as place:
        client = Client(place.url)
        assert client.chat("Hi").finish_reason == "tool_calls"
        assert list(client.stream_chat("Hi"))[-1].finish_reason == "tool_calls"
    assert len(place.asked) == 6


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (sse(*EVENTS[:4]), "ended before the answer was complete"),
        (sse(EVENTS[0], {"error": {"message": "boom", "type": "server_error"}}), "boom"),
        (b"data: {torn\n\n", "not JSON"),
    ],
)
def test_a_stream_that_breaks_says_so(data: bytes, words: str) -> None:
    with endpoint(chat=[(200, data)]) as place, pytest.raises(ResourceError) as caught:
        list(Client(place.url).stream_chat("Hi"))
    assert words in str(caught.value)


def test_refused_stream() -> None:
    refusal = {"error": {"message": "unknown field 'x'", "param": "x"}}
    with endpoint(chat=[(400, refusal)]) as place, pytest.raises(RequestError, match="unknown field"):
        list(Client(place.url).stream_chat("Hi"))


def test_no_server() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    for ask in (lambda: Client(url).models(), lambda: generate(Client(url), "x")):
        with pytest.raises(ResourceError) as caught:
            ask()
        assert url in str(caught.value) and "puyu serve" in caught.value.remedy


def test_a_silent_server() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ResourceError, match=r"silent for 0\.05 s"):
            Client(url, timeout=0.05).models()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "", "http://"])
def test_a_bad_address(url: str) -> None:
    with pytest.raises(ConfigError, match="not an HTTP address"):
        Client(url)


def test_no_model_on_offer() -> None:
    with endpoint(models=[(200, {"data": []})]) as place, pytest.raises(RequestError, match="lists no model"):
        Client(place.url).chat("Hi")


def test_score_by_our_route() -> None:
    rows = [{"logprob": -1.5, "num_tokens": 2, "num_bytes": 3, "is_greedy": True}]
    with endpoint(score=[(200, {"scores": rows})]) as place:
        (scored,) = asyncio.run(Client(place.url).score([("a", "bcd")]))
    assert (scored.logprob, scored.num_tokens, scored.num_bytes, scored.is_greedy) == (-1.5, 2, 3, True)
    assert place.asked[-1][1] == {"model": "tiny", "pairs": [["a", "bcd"]]}


def test_score_by_echo_counts_only_the_continuation() -> None:
    logprobs = {
        "tokens": ["2+", "2=", "4", "!", "x"],
        "token_logprobs": [None, -1.0, -0.25, -0.5, -9.0],
        "top_logprobs": [None, {"2=": -1.0}, {"4": -0.25}, {"!": -0.5, "?": -0.4}, {}],
        "text_offset": [0, 2, 4, 5, 6],
    }
    with endpoint(complete=[(200, {"choices": [{"logprobs": logprobs}]})]) as place:
        scored = asyncio.run(Client(place.url).score([("2+2=", "4"), ("2+2=", "4!")]))
    assert [(s.logprob, s.num_tokens, s.is_greedy) for s in scored] == [(-0.25, 1, True), (-0.75, 2, False)]
    assert place.asked[-1][1]["echo"] is True


def test_one_client_in_many_loops_and_threads() -> None:
    with endpoint(complete=[(200, {"choices": [{"text": "a", "finish_reason": "stop"}]})]) as place:
        client = Client(place.url)
        assert [generate(client, "x").text for _ in range(3)] == ["a"] * 3
        threads = [threading.Thread(target=generate, args=(client, "x")) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(place.asked) == 7


def test_request_body_is_pure() -> None:
    request = GenerateRequest("x", SamplingParams(logprobs=True))
    assert request_body(request, "m") == request_body(request, "m")
    assert request_body(request, "m", stream=True)[1]["logprobs"] == 1
    assert list(StreamReader().push({"choices": []})) == []


def test_every_parameter_is_sent_or_refused_by_name() -> None:
    talk = (Message("user", "Hi"),)
    sent = {"min_p": 0.1, "min_tokens": 2, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.1}
    body = request_body(GenerateRequest(talk, SamplingParams(logit_bias={5: 1.0}, **sent)), "m")[1]
    assert sent.items() <= body.items() and body["logit_bias"] == {"5": 1.0}
    assert not set(sent) & set(request_body(GenerateRequest(talk), "m")[1]), "defaults are left to the server"
    schema = {"type": "object"}
    for value in (schema, json.dumps(schema)):
        body = request_body(GenerateRequest(talk, SamplingParams(guide=Guide("json_schema", value))), "m")[1]
        assert body["response_format"]["json_schema"]["schema"] == schema
    changed: dict[str, Any] = {
        "max_tokens": 7, "temperature": 0.3, "top_p": 0.5, "top_k": 4, "seed": 1, "stop": ("x",),
        "stop_token_ids": (3,), "ignore_eos": True, "logprobs": True, "top_logprobs": 2,
        "prompt_logprobs": True, "min_p": 0.1, "min_tokens": 2,
        "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.1, "logit_bias": {5: 1.0},
        "bad_words": ("x",), "n": 2, "best_of": 3, "beam_width": 2, "length_penalty": 0.5, "guide": Guide("regex", "a"),
    }  # fmt: skip
    assert set(changed) == {field.name for field in fields(SamplingParams)}, "a new parameter needs its word"
    limits: dict[str, Any] = {
        "priority": 1, "timeout": 3.0, "queue_timeout": 2.0, "adapter": "poet", "template": {"enable_thinking": False},
        "tools": (ToolSpec("f", ""),),
    }  # fmt: skip
    plain = request_body(GenerateRequest(talk), "m")[1]
    for name, value in changed.items():
        assert _sent_or_refused(GenerateRequest(talk, SamplingParams(**{name: value})), plain, name), name
    for name, value in limits.items():
        assert _sent_or_refused(GenerateRequest(talk, **{name: value}), plain, name), name
    text = request_body(GenerateRequest("Hi", SamplingParams(guide=Guide("json_schema", schema), best_of=2)), "m")[1]
    assert text["structured_outputs"] == {"json": schema} and text["best_of"] == 2
    assert request_body(GenerateRequest((5, 6)), "m")[1]["prompt"] == [5, 6]


def _sent_or_refused(request: GenerateRequest, plain: dict[str, Any], name: str) -> bool:
    try:
        return request_body(request, "m")[1] != plain
    except RequestError as error:
        return error.param == name


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        (ToolChoice(), {}),
        (ToolChoice("none"), {"tool_choice": "none"}),
        (ToolChoice("required", parallel=False), {"tool_choice": "required", "parallel_tool_calls": False}),
        (ToolChoice("required", ("f",)), {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ],
)
def test_tool_choices_are_sent(choice: ToolChoice, sent: dict[str, Any]) -> None:
    request = GenerateRequest((Message("user", "Hi"),), tools=(ToolSpec("f", ""),), tool_choice=choice)
    body = request_body(request, "m")[1]
    assert {name: body[name] for name in ("tool_choice", "parallel_tool_calls") if name in body} == sent
