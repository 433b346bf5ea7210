"""Keys: hashed at rest, several, with limits; the control routes behind keys of their own; TLS; CORS."""

from __future__ import annotations

import os
import ssl
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
import yaml

from puyu.cli.main import main
from puyu.engine.core import EngineConfig
from puyu.engine.llm import LLM
from puyu.errors import ConfigError
from puyu.model.heads import CausalLM
from puyu.serve.config import ServeConfig
from puyu.serve.keys import Account, Bucket, Key, KeyRing, digest, new_key, read_keys, revoke
from puyu.tokenizer.tokenizer import Tokenizer
from tests.serve.conftest import NAME, served, wait_until

TEXT = {"model": NAME, "prompt": "one", "max_tokens": 3}


@pytest.fixture
def lone(model: CausalLM, tokenizer: Tokenizer) -> LLM:
    return LLM.from_model(model, tokenizer, config=EngineConfig(cache_tokens=2048), name=NAME)


def ask(url: str, key: str, path: str = "/v1/completions", body: Any = TEXT) -> httpx.Response:
    return httpx.post(url + path, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=30)


def test_a_file_holds_hashes_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    token = new_key(path, "alice", requests_per_minute=3)
    assert token not in path.read_text() and digest(token) in path.read_text()
    assert path.stat().st_mode & 0o077 == 0, "only its owner may read it"
    other = new_key(path, "bob")
    assert token != other and [key.name for key in read_keys(path).keys] == ["alice", "bob"]
    with pytest.raises(ConfigError, match="already"):
        new_key(path, "alice")
    revoke(path, "alice")
    assert [key.name for key in read_keys(path).keys] == ["bob"]
    with pytest.raises(ConfigError, match="no key 'alice'"):
        revoke(path, "alice")
    with pytest.raises(ConfigError, match="puyu keys new"):
        read_keys(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="name"):
        new_key(path, "not a name")


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "keys.yaml")
    assert main(["keys", "new", "alice", "--file", path, "--requests-per-minute", "5"]) == 0
    token = capsys.readouterr().out.strip()
    assert KeyRing.load(Path(path)).find(token) is not None
    assert main(["keys", "list", "--file", path]) == 0
    listed = capsys.readouterr().out
    assert "alice" in listed and "5/min" in listed and token not in listed
    assert main(["keys", "revoke", "alice", "--file", path]) == 0
    assert main(["keys", "new"]) == 2


def test_a_bucket_refills_steadily() -> None:
    bucket = Bucket(60)
    assert bucket.wait(100.0) == 0
    bucket.take(60)
    assert bucket.wait(100.0) == pytest.approx(1.0)
    assert bucket.wait(100.5) == pytest.approx(0.5)
    assert bucket.wait(101.0) == 0
    bucket.take(61)  # more than there is: the next has to wait for all of it
    assert bucket.wait(101.0) == pytest.approx(61.0)
    assert bucket.wait(1e6) == 0 and bucket.level == 60


def test_an_account_counts_requests_tokens_and_what_runs() -> None:
    key = Key(name="a", sha256="0" * 64, requests_per_minute=2, tokens_per_minute=100, concurrent=1)
    account = Account(key)
    assert account.admit(10.0) == 0
    account.in_flight = 1
    assert account.admit(10.0) == 1.0, "one is running"
    account.in_flight = 0
    assert account.admit(10.0) == 0 and account.admit(10.0) == pytest.approx(30.0)
    account.tokens.take(150)
    assert account.admit(70.0) == 0, "after a minute both have filled up again"
    account.tokens.take(150)
    assert account.admit(71.0) > 25


def test_keys_open_the_server_within_their_limits(lone: LLM, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    alice, bob = new_key(path, "alice", requests_per_minute=2), new_key(path, "bob", tokens_per_minute=5)
    with served(lone, keys_file=str(path), api_key="root") as url:
        assert httpx.post(f"{url}/v1/completions", json=TEXT).status_code == 401
        assert [ask(url, alice).status_code for _ in range(3)] == [200, 200, 429]
        refused = ask(url, alice)
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert [ask(url, bob).status_code for _ in range(2)] == [200, 429], "the first has used more than 5 tokens"
        assert [ask(url, "root").status_code for _ in range(4)] == [200] * 4
        carol = new_key(path, "carol")
        revoke(path, "bob")
        wait_until(lambda: ask(url, carol).status_code == 200)
        assert ask(url, bob).status_code == 401 and ask(url, alice).status_code == 429, "alice's count goes on"
        path.write_text("keys: [")
        os.utime(path, (time.time() + 5, time.time() + 5))
        time.sleep(1.1)
        assert ask(url, carol).status_code == 200, "a torn file leaves the keys as they were"


def test_control_routes_are_not_there_without_a_control_key(lone: LLM) -> None:
    with served(lone, api_key="k") as url:
        assert ask(url, "k", "/control/sleep", {}).status_code == 404
    with pytest.raises(ConfigError, match="another control key"):
        KeyRing.of("", api_key="same", control_key="same")


def test_control_routes_want_the_control_key_and_it_opens_nothing_else(lone: LLM, checkpoint: Path) -> None:
    with served(lone, api_key="k", control_key="c") as url:
        assert ask(url, "k", "/control/sleep", {}).status_code == 403
        assert ask(url, "x", "/control/sleep", {}).status_code == 401
        assert ask(url, "c").status_code == 403
        assert ask(url, "c", "/control/sleep", {"level": 1}).json()["asleep"] is True
        asleep = ask(url, "k")
        assert asleep.status_code == 503 and "Retry-After" in asleep.headers
        assert ask(url, "c", "/control/wake", None).json()["asleep"] is False
        first = ask(url, "k").json()["choices"]
        assert ask(url, "c", "/control/weights", {"path": str(checkpoint)}).status_code == 200
        assert ask(url, "k").json()["choices"] == first
        assert ask(url, "c", "/control/reset_prefix_cache", None).status_code == 200
        missing = ask(url, "c", "/control/weights", {"path": "/nothing/here"})
        assert missing.status_code == 400 and "/nothing/here" in missing.json()["error"]["message"]
        assert ask(url, "c", "/control/sleep", {"level": 7}).json()["error"]["param"] == "level"
        assert ask(url, "c", "/control/sleep", {"depth": 1}).json()["error"]["param"] == "depth"
        state = httpx.get(f"{url}/control/state", headers={"Authorization": "Bearer c"}).json()
        assert state["asleep"] is False and state["running"] == 0 and state["blocks"] > 0


def test_control_alone_leaves_the_rest_open_on_loopback(lone: LLM) -> None:
    with served(lone, control_key="c") as url:
        assert httpx.post(f"{url}/v1/completions", json=TEXT).status_code == 200
        assert httpx.post(f"{url}/control/wake").status_code == 401


def test_browsers_only_where_asked_for(lone: LLM) -> None:
    asked = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
    with served(lone, cors_origins=("http://a.example",), api_key="k") as url:
        allowed = httpx.options(f"{url}/v1/completions", headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "http://a.example"
        other = httpx.options(f"{url}/v1/completions", headers=asked | {"Origin": "http://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_tls(lone: LLM, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    with served(lone, tls_cert=str(cert), tls_key=str(key)) as url:
        secure = url.replace("http://", "https://")
        context = ssl.create_default_context()
        authority.configure_trust(context)
        assert httpx.post(f"{secure}/v1/completions", json=TEXT, verify=context).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")


def test_tls_needs_both_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="belong together"):
        ServeConfig(tls_cert="cert.pem").check_open()
    with pytest.raises(ConfigError, match=r"no file .*cert\.pem"):
        ServeConfig(tls_cert=str(tmp_path / "cert.pem"), tls_key=str(tmp_path / "key.pem")).check_open()


def test_a_key_file_makes_an_open_address_safe(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    new_key(path, "ops", control=True)
    config = ServeConfig(host="0.0.0.0", keys_file=str(path))
    with pytest.raises(ConfigError, match="no api_key"):
        config.check_open()
    new_key(path, "alice")
    config.check_open()
    path.write_text(yaml.safe_dump({"keys": [{"name": "a"}]}))
    with pytest.raises(ConfigError, match="sha256"):
        config.check_open()
