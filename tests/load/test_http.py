"""The HTTP reader against responses in every kind of piece, and connections that are used again or torn."""

from __future__ import annotations

import asyncio
import math

import pytest

from puyu.errors import ConfigError, ResourceError
from puyu.load.http import Endpoint, Response, Torn
from tests.load.conftest import END, STREAM, Asked, Write, chunk, plain, scripted

BODY = "data: 浦语 and more\n\n".encode() * 3
CHUNKED = STREAM + b"".join(chunk(BODY[at : at + 7]) for at in range(0, len(BODY), 7)) + END


def fed(data: bytes, size: int) -> tuple[Response, bytes]:
    response = Response()
    return response, b"".join(response.push(data[at : at + size]) for at in range(0, len(data), size))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 10_000])
def test_chunked_bodies_in_any_pieces(size: int) -> None:
    response, body = fed(CHUNKED, size)
    assert body == BODY and response.is_done and response.keeps_open and response.status == 200


@pytest.mark.parametrize("size", [1, 4, 10_000])
def test_bodies_of_a_given_length(size: int) -> None:
    response, body = fed(plain({"a": 1}, 400), size)
    assert body == b'{"a": 1}' and response.status == 400 and response.is_done and response.keeps_open


def test_extensions_and_trailers_of_chunks_and_interim_answers_are_passed_over() -> None:
    data = b"HTTP/1.1 100 Continue\r\n\r\n" + STREAM + b"3;name=value\r\nabc\r\n0\r\nDigest: x\r\n\r\n"
    response, body = fed(data, 1)
    assert body == b"abc" and response.is_done and response.status == 200


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    response, body = fed(b"HTTP/1.0 200 OK\r\n\r\nall of it", 4)
    assert body == b"all of it" and not response.is_done
    response.end()
    assert response.is_done and not response.keeps_open


@pytest.mark.parametrize("cut", [3, 40, len(STREAM) + 2, len(STREAM) + 9, len(CHUNKED) - 1])
def test_what_ends_too_early_is_torn(cut: int) -> None:
    response, _ = fed(CHUNKED[:cut], 10_000)
    with pytest.raises(Torn, match="head" if cut <= 40 and cut < 15 else "inside a response"):
        response.end()
    assert not response.keeps_open


@pytest.mark.parametrize("data", [b"SSH-2.0-OpenSSH\r\n", STREAM + b"zz\r\n", STREAM + b"2\r\nabcd\r\n", b"x" * 70_000])
def test_what_is_no_http_is_torn(data: bytes) -> None:
    with pytest.raises(Torn):
        fed(data, 10_000)


def test_no_content_has_no_body() -> None:
    response, body = fed(b"HTTP/1.1 204 No Content\r\n\r\n", 10_000)
    assert response.is_done and not body and response._left == math.inf and not response.keeps_open


def test_requests_carry_what_they_must() -> None:
    endpoint = Endpoint("http://localhost:81/base/v1/", api_key="s3cret")
    head, _, body = endpoint.request("POST", "/v1/completions", {"prompt": "浦"}).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /base/v1/completions HTTP/1.1\r\nHost: localhost:81\r\n")
    assert b"Authorization: Bearer s3cret" in head and b"Content-Length: 17" in head
    assert body == '{"prompt": "浦"}'.encode() and endpoint.port == 81
    assert Endpoint("https://example.org").port == 443 and Endpoint("https://example.org").tls is not None


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="url"):
        Endpoint(url)


def test_connections_are_used_again_and_stale_ones_replaced() -> None:
    async def script(asked: Asked, write: Write) -> None:
        await write(plain({"path": asked.path}))
        if asked.path == "/bye":
            raise ConnectionAbortedError

    async def main() -> None:
        async with scripted(script) as server:
            endpoint = Endpoint(server.url)
            for path in ("/a", "/b", "/bye"):
                assert await endpoint.ask("GET", path) == (200, {"path": path})
            assert server.connections == 1
            assert await endpoint.ask("GET", "/c") == (200, {"path": "/c"})
            assert server.connections == 2
            await endpoint.close()

    asyncio.run(main())


def test_a_torn_answer_and_nobody_there() -> None:
    async def script(asked: Asked, write: Write) -> None:
        await write(STREAM + b"5\r\nab")
        raise ConnectionAbortedError

    async def main() -> None:
        async with scripted(script) as server:
            with pytest.raises(Torn):
                await Endpoint(server.url).ask("GET", "/")
        with pytest.raises(ResourceError, match="no answer from"):
            await Endpoint(server.url).ask("GET", "/")

    asyncio.run(main())
