"""Faults that bench/serve_harness.py has found, each by itself: grammars that took the process down, bodies that took
its memory and its time, heads without an end, and answers that were none."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from puyu.engine.constrain import VOCABULARIES, Compiler
from puyu.engine.core import EngineConfig
from puyu.engine.front import LONG_TOKEN, Front
from puyu.engine.grammar_limits import check_numbers, embedded
from puyu.engine.llm import LLM
from puyu.model.heads import CausalLM
from puyu.serve.http import MAX_PARTS, num_parts
from puyu.serve.patience import MAX_HEAD
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import GenerateRequest, Guide
from tests.serve.conftest import NAME, served

JSON = {"Content-Type": "application/json"}
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 3}


# -- grammars ---------------------------------------------------------------------------------------------------


def rules(count: int, *, brackets: int = 0) -> str:
    """A Lark grammar whose rules stand one behind the other."""
    rows = (f"r{at}: {'(' * brackets}r{at + 1}{')' * brackets}" for at in range(count))
    return "start: r0\n" + "\n".join(rows) + f'\nr{count}: "x"'


def references(count: int) -> dict[str, Any]:
    """A JSON Schema whose definitions do."""
    places = {f"d{at}": {"type": "array", "items": {"$ref": f"#/$defs/d{at + 1}"}} for at in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": places | {f"d{count}": {"type": "string"}}}


CHAINS = (
    {"grammar": rules(15_000)},
    {"grammar": rules(4_000, brackets=20)},
    {"json": references(4_000)},
)


@pytest.mark.parametrize("chain", CHAINS, ids=("rules", "brackets", "references"))
def test_long_chains_in_grammars_do_not_overflow_the_stack(url: str, chain: dict[str, Any]) -> None:
    body = CHAT | {"structured_outputs": chain}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 200


NUMBERS = (
    {"const": -(2**63)},
    {"enum": [-(2**63) + 1, "blue"]},
    {"type": "integer", "const": -1e300},
    {"type": "integer", "minimum": -(2**64), "maximum": 5},
    {"type": "integer", "multipleOf": -(2**31)},
    {"type": "integer", "multipleOf": 2**31},
    {"type": "integer", "multipleOf": 1234.567},
    {"type": "integer", "multipleOf": 0},
)


@pytest.mark.parametrize("schema", NUMBERS, ids=range(len(NUMBERS)))
def test_numbers_that_end_the_process_or_never_end_are_refused(url: str, schema: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"anyOf": [schema]}}}}}
    for form in ({"structured_outputs": {"json": schema}}, {"tools": [tool], "tool_choice": "required"}):
        answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT | form, timeout=60)
        assert answer.status_code == 400 and answer.json()["error"]["param"] in form


def test_a_form_that_is_too_much_on_one_of_its_ways_is_refused_before_it_runs(url: str) -> None:
    body = CHAT | {"structured_outputs": {"choice": ["red", "é" * 100_000]}}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400 and "too many states" in answer.json()["error"]["message"]


def test_ordinary_numbers_are_not() -> None:
    for number in (0, -(2**62), 2**64, 1e300, -1e18, True):
        check_numbers({"enum": [number], "multipleOf": 0.01, "properties": {"multipleOf": {"const": 0}}})
    for number in (1, 10**9, 65_536, 0.001, 99.99, 1e-7):
        check_numbers({"multipleOf": number})
    assert list(embedded('start: a\na: %json {"const": 1} %json[2]\nb: "%json" %json {')) == [{"const": 1}, [2]]


def test_tries_for_stop_ids_of_requests_do_not_pile_up(tokenizer: Tokenizer) -> None:
    compiler = Compiler(tokenizer)
    for id in range(VOCABULARIES * 3):
        compiler.compile(Guide("regex", "a+"), stop_ids=frozenset({id}))
    assert len(compiler._vocabularies) == VOCABULARIES


# -- bodies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", b'{"prompt": [' + b"[]," * 1_000_000 + b"[]]}"),
        ("chat/completions", b'{"messages": [' + b"{}," * 1_000_000 + b"{}]}"),
        ("completions", b'{"prompt": "a"' + b"".join(b',"k%d":1' % at for at in range(250_000)) + b"}"),
    ],
    ids=("lists", "objects", "keys"),
)
def test_bodies_of_a_million_parts_are_refused_before_they_are_read(url: str, path: str, body: bytes) -> None:
    answer = httpx.post(f"{url}/v1/{path}", content=body, headers=JSON, timeout=60)
    assert answer.status_code == 400 and str(MAX_PARTS) in answer.json()["error"]["message"]


def test_a_long_list_of_the_wrong_kind_is_one_error(url: str) -> None:
    for value in (b"null", b"{}", b'""'):
        body = b'{"prompt": [' + value + (b"," + value) * (MAX_PARTS - 10) + b"]}"
        answer = httpx.post(f"{url}/v1/completions", content=body, headers=JSON, timeout=60)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"


def test_brackets_within_texts_are_no_parts(url: str) -> None:
    text = '{"a": [[:' * 60_000
    assert num_parts(json.dumps({"prompt": text, "b": [{}]}).encode()) == 5
    assert num_parts(b'"' + b'\\"' * 300_000 + b"[" * (MAX_PARTS + 1)) == 0  # a text that never ends
    answer = httpx.post(f"{url}/tokenize", json={"prompt": text}, timeout=60)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "word " * 600_000}),
        ("chat/completions", {"messages": [{"role": "user", "content": "word " * 200_000}] * 3}),
        ("embeddings", {"input": ["one", "word " * 600_000]}),
        ("rerank", {"query": "one", "documents": ["word " * 600_000]}),
    ],
)
def test_a_prompt_of_megabytes_is_refused_by_its_beginning(
    url: str, llm: LLM, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    encode, lengths = Tokenizer.encode, [0]

    def noted(self: Tokenizer, text: str, **options: Any) -> list[int]:
        lengths.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", noted)
    answer = httpx.post(f"{url}/v1/{path}", json=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert max(lengths) <= llm.driver.engine.context * LONG_TOKEN


def test_a_long_text_of_few_tokens_is_none_too_long(tokenizer: Tokenizer) -> None:
    front, text = Front(tokenizer, context=12), "description" * 18  # a token each
    assert len(text) > 12 * LONG_TOKEN and len(front.text_ids(text)) < 2 * 12
    front.check_size(GenerateRequest(text))


# -- connections ------------------------------------------------------------------------------------------------


@pytest.fixture
def plug(url: str) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=20) as plug:
        yield plug


def heard(plug: socket.socket) -> bytes:
    """Everything until the server closes."""
    data = b""
    try:
        while piece := plug.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


@pytest.mark.parametrize("rubbish", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\0" * 50])
def test_what_is_no_http_gets_an_error_object(plug: socket.socket, rubbish: bytes) -> None:
    plug.sendall(rubbish + b"\r\n\r\n")
    head, _, body = heard(plug).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"Connection: close" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


ENDLESS = {
    "lines": b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
    "one line": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ",
    "target": b"GET /",
    "trailers": b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_head_without_an_end_is_not_kept(plug: socket.socket, kind: str) -> None:
    plug.sendall(ENDLESS[kind])
    more = b"X-A: b\r\n" * 1000 if kind in ("lines", "trailers") else b"a" * 8000
    sent = 0
    with pytest.raises(OSError):  # the server closes long before all of this is through
        while sent < 2000 * MAX_HEAD:
            plug.sendall(more)
            sent += len(more)


def test_large_bodies_and_heads_in_pieces_are_read(plug: socket.socket) -> None:
    body = json.dumps({"prompt": "word " * 100_000}).encode()
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    head += b"X-Long: " + b"a" * (MAX_HEAD // 2) + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = head + b"".join(b"3e8\r\n" + body[at : at + 1000] + b"\r\n" for at in range(0, 400_000, 1000))
    rest = body[400_000:]
    data += b"%x\r\n" % len(rest) + rest + b"\r\n0\r\n\r\n"
    for at in range(0, len(data), 30_000):
        plug.sendall(data[at : at + 30_000])
    assert heard(plug).startswith(b"HTTP/1.1 200 ")


def test_after_a_body_that_did_not_come_the_connection_is_closed(model: CausalLM, tokenizer: Tokenizer) -> None:
    llm = LLM.from_model(model, tokenizer, config=EngineConfig(cache_tokens=64), name=NAME)
    with served(llm, body_seconds=0.3) as base:
        plug = socket.create_connection(("127.0.0.1", int(base.rsplit(":", 1)[1])), timeout=20)
        plug.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n")
        assert heard(plug).startswith(b"HTTP/1.1 408 ")
        plug.close()


def test_a_route_says_which_methods_it_has_and_knows_no_other_spelling(url: str) -> None:
    assert httpx.get(f"{url}/v1/completions").headers["allow"] == "POST"
    assert httpx.post(f"{url}/v1/completions/", json={}).status_code == 404
