"""docs/serving.md: every command and every Python block runs, every table says what the code does."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml

from puyu.cli.bench_serve import read_config
from puyu.cli.main import main
from puyu.cli.options import parse
from puyu.configure import build
from puyu.engine.core import EngineConfig
from puyu.engine.llm import LLM
from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.init import init_weights
from puyu.serve.app import build_app
from puyu.serve.chat import ChatBody
from puyu.serve.completions import CompletionBody
from puyu.serve.config import ServeConfig
from puyu.serve.metrics import Metrics
from puyu.serve.responses import ResponsesBody
from puyu.serve.router import Router
from puyu.serve.vectors import EmbeddingBody
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import SamplingParams
from tests.conftest import ROOT
from tests.serve.conftest import NAME, served

TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
HOME = "http://127.0.0.1:8000"


def blocks(language: str, text: str = TEXT) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [inside for name, inside in found if name == language]


def table(name: str) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table between two comments."""
    lines = TEXT[TEXT.index(f"<!-- {name} -->") : TEXT.index(f"<!-- /{name} -->")].splitlines()[1:]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert all(len(row) == len(cells[0]) for row in cells), name
    return cells[0], cells[2:]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# -- what is run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_url(model: CausalLM, tokenizer: Tokenizer) -> Iterator[str]:
    judge = ScalarModel(replace(model.config, extra={"reward_token_id": tokenizer.reward_id}))
    init_weights(judge, seed=0)
    with served(LLM.from_model(judge, tokenizer, config=EngineConfig(cache_tokens=512), name="judge")) as url:
        yield url


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(
    code: str, url: str, reward_url: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {HOME: url, "http://127.0.0.1:8001": reward_url, "runs/nano/ppo": str(checkpoint)}
    for old, new in places.items():
        code = code.replace(old, new)
    exec(compile(code.replace('model="ppo"', f'model="{NAME}"'), "docs/serving.md", "exec"), {})
    said = capsys.readouterr().out
    assert said.strip() and ("I am 浦语." in said or "Who are you?" not in code or "n=3" in code)


def commands() -> list[str]:
    bench = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
    lines = "".join(blocks("")).splitlines() + "".join(blocks("", bench)).splitlines()
    return [line.split(" #")[0].strip() for line in lines if "puyu " in line]


def test_every_command_of_puyu_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the page. Servers are not started: their settings are read and checked."""
    seen: list[ServeConfig] = []
    monkeypatch.setattr("puyu.serve.server.run", seen.append)
    monkeypatch.setattr("puyu.serve.server.leave", int)
    monkeypatch.chdir(tmp_path)
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).touch()
    for command in commands():
        words = shlex.split(command)
        key = words.pop(0).partition("=")[2] if words[0].startswith("PUYU_API_KEY=") else ""
        assert words[0] == "puyu"
        if words[1] == "bench":
            plain = [word for word in words[3:] if not word.endswith((".json", ".svg"))]
            assert read_config(parse([word for word in plain if word not in ("--json", "--plot")])).url == HOME
            continue
        assert main(words[1:]) == 0, command
        if words[1] == "serve":
            seen[-1].model_copy(update={"api_key": key}).check_open()
    assert len(seen) > 5 and "alice" in capsys.readouterr().out


def test_the_file_of_settings_is_understood() -> None:
    (text,) = blocks("yaml")
    config = build(ServeConfig, yaml.safe_load(text))
    assert config.adapters == {"poet": "runs/poet", "clerk": "runs/clerk"} and config.cors_origins


def test_every_curl_gives_an_answer(url: str) -> None:
    lines = [line for line in "".join(blocks("")).splitlines() if line.startswith("curl ")]
    for line in lines:
        words = shlex.split(line.replace(HOME, url))
        (target,) = [word for word in words if word.startswith(url)]
        after = {name: [b for a, b in itertools.pairwise(words) if a == name] for name in ("-H", "-d")}
        headers = dict(header.split(": ", 1) for header in after["-H"])
        method, content = ("POST", after["-d"][0]) if after["-d"] else ("GET", None)
        answer = httpx.request(method, target, headers=headers, content=content, timeout=30)
        assert answer.status_code == 200 and answer.text, line
    assert len(lines) >= 5


# -- what is promised ------------------------------------------------------------------------------------------


def named_tests(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name for node in tree.body if isinstance(node, kinds) and node.name.startswith("test_")}


def test_every_promise_has_its_test() -> None:
    named = [name for row in table("promises")[1] for name in quoted(row[2]) or [""]]
    for name in named:
        file, _, test = name.partition("::")
        path = ROOT / file if "/" in file else ROOT / "tests" / "serve" / file
        assert path.is_file() and test in named_tests(path), name
    own = {f"test_promises.py::{name}" for name in named_tests(ROOT / "tests" / "serve" / "test_promises.py")}
    assert own <= set(named)


# -- what is listed --------------------------------------------------------------------------------------------


def test_every_route_is_listed(llm: LLM) -> None:
    listed = {route for row in table("routes")[1] for route in quoted(row[0])}
    schema = build_app(llm, ServeConfig()).openapi()["paths"]
    served_here = {f"{method.upper()} {path}" for path, methods in schema.items() for method in methods}
    assert listed == served_here | {"GET /openapi.json"}


BODIES: dict[str, Any] = {
    "chat": ChatBody,
    "completions": CompletionBody,
    "responses": ResponsesBody,
    "embeddings": EmbeddingBody,
}
SIZED = {"dimensions": ()}
"""Neutral values that EmbeddingBody checks by itself."""


@pytest.mark.parametrize("route", BODIES)
def test_every_field_is_listed_as_what_it_is(route: str) -> None:
    heading, rows = table("fields")
    body, column = BODIES[route], heading.index(route)
    said = {name: row[column] for row in rows for name in quoted(row[0])}
    assert set(said.values()) <= {"yes", "no effect", "neutral only", "refused", "ours", ""}
    neutral = getattr(body, "neutral", SIZED)
    never = {name for name, values in neutral.items() if not values} if body is not EmbeddingBody else set()
    assert {name for name, word in said.items() if word not in ("refused", "")} == set(body.model_fields) - never
    assert {name for name, word in said.items() if word == "neutral only"} == set(neutral) - never
    assert never <= {name for name, word in said.items() if word == "refused"}


PLAIN: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "Hi"}]},
    "completions": {"prompt": "Hi"},
    "responses": {"input": "Hi"},
}
SENT: dict[str, Any] = {"metadata": {"a": "b"}}


@pytest.mark.parametrize("route", PLAIN)
def test_what_has_no_effect_has_none(route: str) -> None:
    heading, rows = table("fields")
    column = heading.index(route)
    for name in [name for row in rows if row[column] == "no effect" for name in quoted(row[0])]:
        bodies = (PLAIN[route], PLAIN[route] | {name: SENT.get(name, "x")})
        plain, other = (requested(BODIES[route].model_validate(body)) for body in bodies)
        assert plain == other, name


def requested(body: Any) -> Any:
    if isinstance(body, CompletionBody):
        return body.to_requests(SamplingParams())
    return body.to_request(SamplingParams(), context=100)


def test_every_setting_is_listed_with_its_default() -> None:
    config, listed = ServeConfig(), []
    for names, defaults, _ in table("settings")[1]:
        values = [getattr(config, name) for name in quoted(names)]
        shown = [yaml.safe_load(text) for text in quoted(defaults)]
        assert shown == [value for value in values if value not in ("", (), {})], names
        listed += quoted(names)
    assert sorted(listed) == sorted(ServeConfig.model_fields)


def families() -> set[str]:
    """Names of everything on the pages of a server and of a router."""
    page = Metrics(NAME).render(LLM_STATS)
    own = Router(SimpleNamespace(replicas=[]))._own_rows()  # type: ignore[arg-type]
    return {line.split()[2] for line in [*page.splitlines(), *own] if line.startswith("# TYPE")}


LLM_STATS: Any = SimpleNamespace(
    **dict.fromkeys(
        (
            *("num_running", "num_waiting", "num_blocks", "num_free_blocks", "num_preemptions", "num_failed"),
            *("num_drafted", "num_accepted", "num_steps", "num_generated_tokens"),
        ),
        0,
    )
)


def test_every_metric_is_listed() -> None:
    assert {name for row in table("metrics")[1] for name in quoted(row[0])} == families()


def test_the_harness_is_told_as_it_was_recorded() -> None:
    newest = max((ROOT / "bench" / "results").glob("*-serve_harness.json"))
    statuses = json.loads(newest.read_text())["notes"]["ours"]["statuses"]
    head, rows = table("harness")
    shown = {row[0]: {name: int(n) for name, n in zip(head[1:], row[1:], strict=True) if n} for row in rows}
    assert shown == statuses


def test_every_link_within_the_page_leads_somewhere() -> None:
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors
    paths = [path for path in re.findall(r"\]\(([^)#]+)\)", TEXT) if not path.startswith("https://")]
    assert all(os.path.exists(ROOT / "docs" / path) for path in paths)
