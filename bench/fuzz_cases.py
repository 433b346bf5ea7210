"""The cases of serve_harness.py, each made from a seed and its own number alone, so that one can be played again.

Sources: `schema` (schemathesis, see fuzz_schema.py), `mutated` (valid bodies with something wrong), `grammar` (hard
forms), `protocol` (what no HTTP client does), `normal` (traffic whose answers are read).

    case = make_case(17, Place(...), seed=0)
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import fuzz_bodies as words
from fuzz_client import Step
from fuzz_grammars import grammar_body

WEIGHTS = {"schema": 20, "mutated": 34, "grammar": 12, "protocol": 16, "normal": 18}
OPEN_SECONDS = 12.0
"""How long a client waits for a server to give up on a request that never becomes whole."""


@dataclass(frozen=True, slots=True)
class Place:
    """What the cases are made for: a server's dialect, its routes, requests that schemathesis has made."""

    dialect: words.Dialect
    routes: Sequence[str] = ()
    schema: Sequence[tuple[str, str, bytes]] = ()
    """Method, target and body of each."""
    control_key: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """What one client does, and what it is owed."""

    id: int
    source: str
    label: str
    steps: tuple[Step, ...]
    owed: int = 1
    """Answers that must come; 0: the server must close."""
    may_close: bool = False
    """Whether closing without an answer is an answer, too."""
    form: str = ""
    """What a 200 must look like: chat, text, responses, embeddings ...; empty: any JSON."""
    wants: Mapping[str, Any] = field(default_factory=dict)
    heads: tuple[bool, ...] = ()
    limit: float = 0.0
    """Seconds for the answer; 0 is the harness's own limit."""
    is_slow: bool = False
    """Only a few of these at a time."""

    @property
    def wire(self) -> bytes:
        """Everything that is sent."""
        return b"".join(step.data for step in self.steps)


def make_case(id: int, place: Place, *, seed: int) -> Case:
    """Case number `id`."""
    rng = random.Random(f"{seed}/{id}")
    sources = {name: weight for name, weight in WEIGHTS.items() if name != "schema" or place.schema}
    (source,) = rng.choices(list(sources), list(sources.values()))
    case = _MAKERS[source](rng, place, id)
    return replace(case, id=id, source=source)


def request(
    method: str,
    target: str,
    body: bytes | None = None,
    *,
    case: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """A request as bytes; a header that is given empty is left out."""
    rows = {"Host": "localhost", "Content-Type": "application/json"}
    if body is not None:
        rows["Content-Length"] = str(len(body))
    if case is not None:
        rows["X-Case"] = str(case)
    rows |= headers or {}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in rows.items() if value != "")]
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + (body or b"")


def _sent(data: bytes, label: str, **options: Any) -> Case:
    """A case that sends one thing and waits."""
    return Case(0, "", label, (Step("send", data),), **options)


# -- a, b, c, e ------------------------------------------------------------------------------------------------


def _schema(rng: random.Random, place: Place, id: int) -> Case:
    method, target, body = rng.choice(list(place.schema))
    if body[:1] == b"{" and rng.random() < 0.6:  # an unknown model ends the matter too soon
        value = json.loads(body)
        value.pop("model", None)
        body = words.dumps(value)
    data = request(method, target, body if method == "POST" else None, case=id)
    if rng.random() < 0.1:
        return Case(0, "", f"{target} left", (Step("send", data), Step("pause", value=rng.random() / 5), Step("leave")))
    return _sent(data, target, heads=(method == "HEAD",))


def _body(rng: random.Random, place: Place) -> tuple[str, words.Body]:
    """A route and a valid body; generation more often than the rest."""
    known = [path for path in words.bodies(place.dialect) if path in place.routes]
    path = rng.choices(known, [4 if path in ("/v1/chat/completions", "/v1/completions") else 1 for path in known])[0]
    return path, rng.choice(words.bodies(place.dialect)[path])


def _mutated(rng: random.Random, place: Place, id: int) -> Case:
    path, body = _body(rng, place)
    roll = rng.random()
    if roll < 0.015:
        path = rng.choice(("/v1/chat/completions", "/v1/completions"))
        return _sent(request("POST", path, words.huge(rng), case=id), f"{path} huge")
    if roll < 0.12:
        return _odd_route(rng, place, id)
    if roll < 0.22:
        return _sent(request("POST", path, words.mangled(words.dumps(body), rng), case=id), f"{path} mangled")
    if roll < 0.27:
        kind = rng.choice(
            ("text/plain", "", "application/json; charset=utf-16", "multipart/form-data; boundary=x", "*/*", "é")
        )
        data = request("POST", path, words.dumps(body), case=id, headers={"Content-Type": kind})
        return _sent(data, f"{path} content type")
    return _sent(request("POST", path, words.dumps(words.spoiled(body, rng)), case=id), f"{path} spoiled")


def _odd_route(rng: random.Random, place: Place, id: int) -> Case:
    """Unknown routes and methods, strange paths, wrong keys, pages beside the API."""
    control = place.routes and any(path.startswith("/control/") for path in place.routes)
    paths = [
        "/",
        "/health",
        "/metrics",
        "/v1/models",
        "/v1/models/tiny",
        "/v1/models/no%20such",
        "/openapi.json",
        "/docs",
        "/v1",
        "/v1/chat/completions/",
        "//v1/models",
        "/../etc/passwd",
        "/%00",
        "/%ff%fe",
        "/v1/models/%2e%2e/x",
        "/v1/models?a=1&a=%zz",
        "/" + "a" * 3_000,
        "/v1/models/" + "%E6%B5%A6" * 50,
        "/health#x",
        "/v1/completions?stream=true",
        "/*",
        "/v1/models/../models",
    ]
    if control:
        paths += ["/control/state", "/control/sleep", "/control/nothing", "/control/adapters/x", "/CONTROL/state"]
    method = rng.choice(("GET", "GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "BREW", "get"))
    headers = {}
    if rng.random() < 0.3:
        headers["Authorization"] = rng.choice(
            ("Bearer x", "Basic eDp5", "Bearer", "bearer " + "k" * 5_000, "Bearer \xff", place.control_key)
        )
    if rng.random() < 0.2:
        headers["Host"] = rng.choice(
            ("evil.example", "localhost:99999", "[::1]:80", "127.0.0.1.evil", "local host", "a" * 500)
        )
    if rng.random() < 0.1:
        headers["Origin"] = "http://evil.example"
    if rng.random() < 0.05 and control:  # what an operator may do at any time
        key = {"Authorization": f"Bearer {place.control_key}"}
        return _sent(
            request("POST", "/control/reset_prefix_cache", b"", case=id, headers=key), "reset the prefix cache"
        )
    body = b"{}" if method in ("POST", "PUT", "PATCH", "DELETE") else None
    data = request(method, rng.choice(paths), body, case=id, headers=headers)
    return _sent(data, f"route {method}", heads=(method == "HEAD",))


def _grammar(rng: random.Random, place: Place, id: int) -> Case:
    body = grammar_body(place.dialect, rng)
    return _sent(
        request("POST", "/v1/chat/completions", words.dumps(body), case=id), "grammar", form="chat", wants=_wants(body)
    )


def _normal(rng: random.Random, place: Place, id: int) -> Case:
    path, body = _body(rng, place)
    body = copy.deepcopy(body)
    if (
        "max_tokens" in body
        and not {"structured_outputs", "echo"} & set(body)
        and body.get("tool_choice") != "required"
    ):
        body["max_tokens"] = max(rng.choice((1, 3, 8, 20, 90)), body.get("min_tokens", 0))
    if path in ("/v1/chat/completions", "/v1/completions", "/v1/responses") and not body.get("echo"):
        if not {"best_of", "beam_width", "stream_options"} & set(body):
            body["stream"] = rng.random() < 0.5
        if place.dialect == "puyu" and path != "/v1/responses" and body.get("stream") and rng.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
    form = path.rpartition("/v1/")[2].split("/")[0] if path.startswith("/v1/") else path.rpartition("/")[2]
    data = request("POST", path, words.dumps(body), case=id)
    return _sent(data, f"{path} normal", form=form, wants=_wants(body) | {"ok": path != "/v1/reward"})


def _wants(body: words.Body) -> dict[str, Any]:
    """What the answer must hold."""
    prompts = body.get("prompt", "")
    several = len(prompts) if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) else 1
    options = body.get("stream_options") or {}
    return {
        "stream": bool(body.get("stream")),
        "answers": body.get("n", 1) * several,
        "usage": not body.get("stream") or bool(options.get("include_usage")),
    }


# -- d: the protocol -------------------------------------------------------------------------------------------


def _protocol(rng: random.Random, place: Place, id: int) -> Case:
    maker = rng.choice(_ABUSES)
    case: Case = maker(rng, place, id)
    return replace(case, label=maker.__name__.strip("_"))


def _chat_bytes(rng: random.Random, id: int, **fields: Any) -> bytes:
    body = {"messages": words.HELLO, "max_tokens": rng.choice((3, 30, 200)), "stream": rng.random() < 0.5} | fields
    return request("POST", "/v1/chat/completions", words.dumps(body), case=id)


def _leave(rng: random.Random, place: Place, id: int) -> Case:
    """At any byte of the request."""
    data = _chat_bytes(rng, id)
    cut = rng.choice((0, rng.randrange(len(data)), len(data)))
    steps = (Step("send", data[:cut]), Step("pause", value=rng.choice((0.0, 0.01, 0.1, 0.4))), Step("leave"))
    return Case(0, "", "", steps)


def _leave_stream(rng: random.Random, place: Place, id: int) -> Case:
    steps = (
        Step("send", _chat_bytes(rng, id, stream=True, max_tokens=300)),
        Step("await", value=rng.choice((1, 400, 4_000))),
    )
    return Case(0, "", "", (*steps, Step("leave")))


def _half_close(rng: random.Random, place: Place, id: int) -> Case:
    data = _chat_bytes(rng, id)
    cut = rng.choice((len(data), len(data), rng.randrange(1, len(data))))
    return Case(0, "", "", (Step("send", data[:cut]), Step("half")), may_close=True)


def _slow_request(rng: random.Random, place: Place, id: int) -> Case:
    """It comes, but in small pieces; on a busy machine too slowly."""
    data = _chat_bytes(rng, id, max_tokens=4)
    cut = rng.choice((0, data.index(b"\r\n\r\n") + 4))
    steps = (Step("send", data[:cut]), Step("trickle", data[cut:], rng.choice((0.3, 1.5))))
    return Case(0, "", "", steps, may_close=True, is_slow=True)


def _never_whole(rng: random.Random, place: Place, id: int) -> Case:
    """It never comes to its end: the server must give up by itself."""
    data = _chat_bytes(rng, id, max_tokens=4)
    cut = rng.choice((0, rng.randrange(1, data.index(b"\r\n\r\n")), data.index(b"\r\n\r\n") + 4, len(data) - 1))
    return Case(0, "", "", (Step("send", data[:cut]),), owed=0, may_close=True, limit=OPEN_SECONDS, is_slow=True)


def _slow_reader(rng: random.Random, place: Place, id: int) -> Case:
    """Asks for much and takes nothing for a while: the server may cut it off."""
    many = {"n": 4, "logprobs": True, "top_logprobs": 20, "ignore_eos": True} if place.dialect == "puyu" else {}
    data = _chat_bytes(rng, id, stream=True, max_tokens=300, temperature=1.0, **many)
    return Case(
        0, "", "", (Step("send", data), Step("deaf", value=rng.choice((0.5, 4.0)))), may_close=True, is_slow=True
    )


def _chunked(rng: random.Random, place: Place, id: int) -> Case:
    body = words.dumps({"messages": words.HELLO, "max_tokens": 3})
    size = rng.choice((1, 7, 1000))
    parts = [b"%x\r\n%s\r\n" % (len(body[at : at + size]), body[at : at + size]) for at in range(0, len(body), size)]
    end = rng.choice((b"0\r\n\r\n", b"0\r\nTrailer: x\r\n\r\n", b"0;ext=1\r\n\r\n"))
    bad = rng.choice((b"", b"", b"zz\r\nab\r\n", b"-1\r\n", b"ffffffffffffffffff\r\n", b"5\r\nab\r\n"))
    data = request("POST", "/v1/chat/completions", case=id, headers={"Transfer-Encoding": "chunked"})
    return _sent(data + bad + b"".join(parts) + end, "", may_close=bool(bad))


def _lengths(rng: random.Random, place: Place, id: int) -> Case:
    """Lengths that are missing, wrong, doubled, or beside a chunked body."""
    body = words.dumps({"messages": words.HELLO, "max_tokens": 3})
    wrong = rng.choice(
        ("", "0", "1", str(len(body) - 1), str(len(body) + 5), "-1", "x", "1e3", "+5", " ", "9" * 17, "9" * 30, "٣")
    )
    headers = {"Content-Length": wrong}
    if rng.random() < 0.3:
        headers["Transfer-Encoding"] = rng.choice(("chunked", "gzip, chunked", "identity", "chunked, chunked"))
    data = request("POST", "/v1/chat/completions", body, case=id, headers=headers)
    if rng.random() < 0.2:
        data = data.replace(b"X-Case", b"Content-Length: 3\r\nX-Case", 1)
    return _sent(data, "", may_close=True, is_slow=True)


def _pipelined(rng: random.Random, place: Place, id: int) -> Case:
    """Several requests at once; their answers come in order."""
    parts, heads = [], []
    for _ in range(rng.randrange(2, 6)):
        kind = rng.choice(("get", "head", "chat", "bad"))
        heads.append(kind == "head")
        if kind in ("get", "head"):
            parts.append(request("HEAD" if kind == "head" else "GET", "/v1/models", case=id))
        elif kind == "chat":
            parts.append(_chat_bytes(rng, id, max_tokens=3))
        else:
            parts.append(request("POST", "/v1/completions", b'{"prompt": 1}', case=id))
    return _sent(b"".join(parts), "", owed=len(parts), heads=tuple(heads))


def _garbage(rng: random.Random, place: Place, id: int) -> Case:
    data = rng.choice(
        (
            rng.randbytes(rng.choice((1, 30, 3_000, 300_000))) + b"\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500) + b"\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET /\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET  / HTTP/1.1\r\n\r\n",
            b"\r\n\r\n\r\nGET /x HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\nHost: localhost\n\n",
            b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\n folded\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: local\0host\r\n\r\n",
            b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"CONNECT localhost:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET \xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\r\n",
            b"GET /health HTTP/1.0\r\n\r\n",
            b"\0" * 100 + b"\r\n\r\n",
        )
    )
    return _sent(data, "", may_close=True, is_slow=True)


def _long_head(rng: random.Random, place: Place, id: int) -> Case:
    kind = rng.choice(("one", "many", "target", "endless"))
    if kind == "target":
        return _sent(
            request("GET", "/v1/models?" + "a" * rng.choice((9_000, 70_000, 300_000)), case=id), "", may_close=True
        )
    if kind == "endless":
        return _sent(
            b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 100_000, "", may_close=True, limit=OPEN_SECONDS, is_slow=True
        )
    size = rng.choice((9_000, 63_000, 300_000))
    headers = {"X-Long": "a" * size} if kind == "one" else {f"X-{at}": "a" for at in range(size // 10)}
    return _sent(request("GET", "/v1/models", case=id, headers=headers), "", may_close=True)


def _expects(rng: random.Random, place: Place, id: int) -> Case:
    body = words.dumps({"messages": words.HELLO, "max_tokens": 3})
    headers = {"Expect": rng.choice(("100-continue", "200-ok")), "Content-Length": str(len(body))}
    head = request("POST", "/v1/chat/completions", case=id, headers=headers)
    return Case(0, "", "", (Step("send", head), Step("pause", value=0.05), Step("send", body)))


def _upgrade(rng: random.Random, place: Place, id: int) -> Case:
    headers = {
        "Connection": "Upgrade",
        "Upgrade": rng.choice(("websocket", "h2c", "TLS/1.0")),
        "Sec-WebSocket-Version": "13",
    }
    headers |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    path = rng.choice(("/v1/models", "/v1/realtime", "/"))
    return _sent(request("GET", path, case=id, headers=headers), "", may_close=True)


def _again(rng: random.Random, place: Place, id: int) -> Case:
    """One connection for a request, a pause, and another; or for one and a head that never ends."""
    first, second = (_chat_bytes(rng, id, max_tokens=3) for _ in range(2))
    steps = (Step("send", first), Step("pause", value=rng.choice((0.1, 1.0))), Step("send", second))
    return Case(0, "", "", steps, owed=2)


_ABUSES = (
    *(_leave, _leave, _leave_stream, _leave_stream, _half_close, _slow_request, _never_whole, _slow_reader, _chunked),
    *(_chunked, _lengths, _lengths, _pipelined, _pipelined, _garbage, _garbage, _long_head, _expects, _upgrade, _again),
)
_MAKERS: dict[str, Callable[[random.Random, Place, int], Case]] = {
    "schema": _schema,
    "mutated": _mutated,
    "grammar": _grammar,
    "protocol": _protocol,
    "normal": _normal,
}
