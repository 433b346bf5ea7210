"""The harness that hurts the server: some hundred of its requests against a real process with faults on purpose, and
that its ledger notices each kind of failure in a server that is bad in just that way."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import fuzz_cases
import fuzz_target
import serve_harness
from fuzz_bodies import bodies, dumps, raw
from fuzz_cases import Case, Place, make_case
from fuzz_client import Answer, Step, play
from fuzz_forms import complaint, has_failed, stream_complaint
from fuzz_ledger import KINDS, Failure, Ledger, counts

REQUESTS = 400
PLACE = Place("puyu", tuple(bodies("puyu")), (("GET", "/health", b""),), "key")


@pytest.mark.slow
def test_the_server_stands_some_hundred_requests_and_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fuzz_target.SETTINGS, "body_seconds", 1.0)
    monkeypatch.setattr(serve_harness, "schema_requests", few_schema_requests)
    target = fuzz_target.Ours(tmp_path, seed=5, fault_every=60)
    found = serve_harness.attack(target, requests=REQUESTS, seed=5, limit=120.0)
    assert found["failures"] == dict.fromkeys(KINDS, 0), found["first_failures"]
    assert found["requests"] == REQUESTS and set(found["statuses"]) == set(fuzz_cases.WEIGHTS)
    assert found["struck_by_faults"] >= found["explained_500"] > 0


def few_schema_requests(openapi: dict[str, object], *, count: int, seed: int) -> list[tuple[str, str, bytes]]:
    """schemathesis takes long to warm up; here, of a few routes alone."""
    from fuzz_schema import schema_requests

    paths = openapi["paths"]
    assert isinstance(paths, dict)
    kept = ("/v1/embeddings", "/v1/rerank", "/v1/models/{name}", "/detokenize")
    return schema_requests({**openapi, "paths": {path: paths[path] for path in kept}}, count=count, seed=seed)


def test_a_case_is_made_from_its_number_and_the_seed_alone() -> None:
    for id in range(200):
        case = make_case(id, PLACE, seed=3)
        assert case == make_case(id, PLACE, seed=3) and case.id == id
    assert len({make_case(id, PLACE, seed=3).wire for id in range(200)}) > 150
    assert {make_case(id, PLACE, seed=3).source for id in range(200)} == set(fuzz_cases.WEIGHTS)


def test_raw_values_stand_in_the_json_as_they_are() -> None:
    assert dumps({"a": raw("NaN"), "b": [raw('"\\ud800"'), 1]}) == b'{"a": NaN, "b": ["\\ud800", 1]}'


# -- what the ledger notices ------------------------------------------------------------------------------------

ASK = Case(7, "normal", "ask", (Step("send", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),))
ERROR = b'{"error": {"message": "m", "type": "t", "param": null, "code": null}}'


def answer(body: bytes, *, status: bytes = b"200 OK", kind: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (status, kind, len(body), body)


@contextmanager
def scripted(data: bytes | None, *, then_close: bool = True) -> Iterator[tuple[str, int]]:
    """A server that always says the same; None says nothing and stays."""
    loop, up, place = asyncio.new_event_loop(), threading.Event(), []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if data is not None:
            await reader.read(1)
            writer.write(data)
        if then_close and data is not None:
            writer.close()
        else:
            await asyncio.sleep(60)

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        place.append(server.sockets[0].getsockname())
        up.set()

    loop.create_task(main())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    up.wait(20)
    try:
        yield place[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()


def verdict(data: bytes | None, case: Case = ASK, *, then_close: bool = True) -> Ledger:
    """The ledger after one case against a scripted server."""
    ledger = Ledger()
    with scripted(data, then_close=then_close) as address:
        outcome = asyncio.run(play(address, case.steps, owed=case.owed, limit=0.5, heads=case.heads))
    ledger.add(case, outcome)
    return ledger


def changed(**fields: object) -> Case:
    return Case(**({name: getattr(ASK, name) for name in Case.__slots__} | fields))  # type: ignore[arg-type]


CHUNK = b'data: {"choices": [{"index": 0, "finish_reason": %s}]}\n\n'
DONE = b"data: [DONE]\n\n"
EVENTS = b"text/event-stream"
CHAT = {"form": "chat", "wants": {"stream": True, "answers": 1, "usage": False}}


@pytest.mark.parametrize(
    ("data", "case", "kind"),
    [
        (answer(b"{}"), ASK, None),
        (answer(ERROR, status=b"400 Bad Request"), ASK, None),
        (None, ASK, "hang"),
        (answer(b"{}")[:-1], ASK, "lost"),
        (b"", ASK, "lost"),
        (b"", changed(may_close=True), None),
        (None, changed(owed=0, may_close=True), "open"),
        (answer(ERROR, status=b"500 Oh"), ASK, "500"),
        (answer(b"no", status=b"400 Bad Request"), ASK, "form"),
        (answer(b'{"detail": []}', status=b"400 Bad Request"), ASK, "form"),
        (answer(ERROR, status=b"418 Teapot"), ASK, "form"),
        (answer(b'{"a": NaN}'), ASK, "form"),
        (b"SSH-2.0-OpenSSH\r\n", ASK, "form"),
        (answer(b"{}"), changed(**CHAT), "form"),
        (answer(CHUNK % b"null" + CHUNK % b'"stop"' + DONE, kind=EVENTS), changed(**CHAT), None),
        (answer(CHUNK % b"null" + DONE, kind=EVENTS), changed(**CHAT), "form"),
        (answer(CHUNK % b'"stop"' + CHUNK % b'"stop"' + DONE, kind=EVENTS), changed(**CHAT), "form"),
        (answer(CHUNK % b'"stop"', kind=EVENTS), changed(**CHAT), "form"),
        (answer(b"data: " + ERROR + b"\n\n" + DONE, kind=EVENTS), changed(**CHAT), "500"),
    ],
)
def test_the_ledger_notices(data: bytes | None, case: Case, kind: str | None) -> None:
    found = verdict(data, case).failures()
    assert [failure.kind for failure in found] == ([kind] if kind else []), found


def test_a_500_is_explained_by_a_fault_that_struck_its_own_case() -> None:
    ledger = verdict(answer(ERROR, status=b"500 Oh"))
    assert [failure.kind for failure in ledger.failures({"8"})] == ["500"]
    assert ledger.failures({"7"}) == [] and ledger.explained({"7"}) == 1


def test_pipelined_answers_are_told_apart() -> None:
    head = answer(b"{}").partition(b"{}")[0]
    three = answer(b"{}") + head + answer(b"[1]")  # the second is to HEAD and has no body
    case = changed(owed=3, heads=(False, True, False))
    ledger = verdict(three, case)
    assert ledger.failures() == [] and ledger.entries[0].status == "200"
    assert [failure.kind for failure in verdict(answer(b"{}"), case).failures()] == ["lost"]


class Mortal(fuzz_target.Target):
    """A server of the standard library that dies at the word /die, and keeps what it is given under /keep."""

    CODE = (
        "import http.server, os, sys\n"
        "kept = []\n"
        "class Bad(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        if self.path == '/die': os._exit(3)\n"
        "        if self.path == '/keep': kept.extend(os.dup(0) for _ in range(40))\n"
        "        data = b'{\"choices\": [1]}'\n"
        "        self.send_response(200); self.send_header('Content-Type', 'application/json')\n"
        "        self.send_header('Content-Length', str(len(data))); self.end_headers(); self.wfile.write(data)\n"
        "    def do_POST(self):\n"
        "        self.rfile.read(int(self.headers['Content-Length'])); self.do_GET()\n"
        "http.server.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Bad).serve_forever()\n"
    )

    def command(self) -> list[str]:
        return [sys.executable, "-c", self.CODE, str(self.port)]


def ask_for(path: str, id: int) -> Case:
    return changed(id=id, label=path, steps=(Step("send", b"GET %s HTTP/1.1\r\n\r\n" % path.encode()),))


def test_a_death_is_counted_once_and_the_rest_goes_on(tmp_path: Path) -> None:
    target = Mortal(tmp_path)
    target.start()
    campaign = serve_harness.Campaign(target, limit=30.0)
    try:
        asyncio.run(campaign.run([ask_for("/die" if id == 5 else "/", id) for id in range(40)]))
    finally:
        target.stop()
    found = campaign.ledger.failures()
    assert [failure.kind for failure in found] == ["death"] and "exit code 3" in found[0].note
    assert len(campaign.ledger.entries) == 40 and target.starts == 2


def test_files_that_stay_open_and_a_wrong_answer_are_leaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_target, "SETTLE_SECONDS", 0.5)
    target = Mortal(tmp_path)
    target.start()
    try:
        before = target.warm_up()
        assert target.leaks(before, restarts=0) == []
        target.get("/keep")
        assert [failure.kind for failure in target.leaks(before, restarts=0)] == ["leak"]
        target.right_answer = 2
        assert len(target.leaks(before, restarts=0)) == 2
    finally:
        target.stop()


def test_counts_name_every_kind() -> None:
    assert counts([Failure("hang", 1, ""), Failure("hang", 2, "")]) == dict.fromkeys(KINDS, 0) | {"hang": 2}


def test_forms() -> None:
    late = b'data: {"error": {"message": "the answer took longer than the request allowed"}}\n\n' + DONE
    assert not has_failed(Answer(200, {"content-type": "text/event-stream"}, late))
    assert stream_complaint(late, form="chat", wants={}) == ""
    assert complaint(Answer(200, {"content-type": "application/json"}, b"{"), form="chat")
