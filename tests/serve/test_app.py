"""The server below the SDK: refusals by name, no 500 for any body, disconnects, limits, secrets."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from puyu import Agent, Client
from puyu.engine.core import EngineConfig
from puyu.engine.llm import LLM
from puyu.errors import RequestError, ResourceError
from puyu.model.heads import CausalLM
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.tools.calculate import calculator
from puyu.types import GenerateRequest, Guide, SamplingParams
from tests.serve.conftest import NAME, SUM, WHO, served, wait_until

CHAT = {"model": NAME, "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 3}
TEXT = {"model": NAME, "prompt": "one", "max_tokens": 3}
BAD_FORM = {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}
ENDLESS = SamplingParams(max_tokens=900, ignore_eos=True)


@pytest.fixture(scope="module")
def http(url: str) -> Any:
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("chat/completions", {"max_tokens": -1}, "max_tokens"),
        ("chat/completions", {"max_tokens": "3"}, "max_tokens"),
        ("chat/completions", {"max_tokens": 1.5}, "max_tokens"),
        ("chat/completions", {"max_completion_tokens": 0}, "max_completion_tokens"),
        ("chat/completions", {"temperature": -0.1}, "temperature"),
        ("chat/completions", {"temperature": "hot"}, "temperature"),
        ("chat/completions", {"top_p": 0}, "top_p"),
        ("chat/completions", {"top_k": -7}, "top_k"),
        ("chat/completions", {"seed": 2**70}, "seed"),
        ("chat/completions", {"stop": [""]}, "stop"),
        ("chat/completions", {"stop": [1]}, "stop"),
        ("chat/completions", {"stop_token_ids": [10**9]}, "stop_token_ids"),
        ("chat/completions", {"n": 0}, "n"),
        ("chat/completions", {"n": 129}, "n"),
        ("chat/completions", {"best_of": 2}, "best_of"),
        ("chat/completions", {"timeout": 0}, "timeout"),
        ("chat/completions", {"queue_timeout": -1}, "queue_timeout"),
        ("chat/completions", {"priority": 2**40}, "priority"),
        ("chat/completions", {"structured_outputs": {}}, "structured_outputs"),
        ("chat/completions", {"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ("chat/completions", {"structured_outputs": {"regex": "("}}, "guide"),
        ("chat/completions", {"structured_outputs": {"xml": "a"}}, "structured_outputs"),
        ("chat/completions", {"n": True}, "n"),
        ("chat/completions", {"response_format": {"type": "xml"}}, "response_format"),
        ("chat/completions", {"response_format": {"type": "json_schema"}}, "response_format"),
        ("chat/completions", {"response_format": BAD_FORM}, "guide"),
        ("chat/completions", {"min_p": 2}, "min_p"),
        ("chat/completions", {"logit_bias": {"x": 1}}, "logit_bias"),
        ("chat/completions", {"logit_bias": {"999999999": 1}}, "logit_bias"),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice"),
        ("chat/completions", {"tool_choice": "calculator"}, "tool_choice"),
        ("chat/completions", {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ("chat/completions", {"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ("chat/completions", {"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ("chat/completions", {"top_logprobs": 3}, "top_logprobs"),
        ("chat/completions", {"top_logprobs": 999, "logprobs": True}, "top_logprobs"),
        ("chat/completions", {"store": True}, "store"),
        ("chat/completions", {"modalities": ["audio"]}, "modalities"),
        ("chat/completions", {"frequency_penalty": 500}, "frequency_penalty"),
        ("chat/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("chat/completions", {"stream": True, "stream_options": {"x": 1}}, "stream_options"),
        ("chat/completions", {"mesages": []}, "mesages"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": "Hi"}, "messages"),
        ("chat/completions", {"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ("chat/completions", {"messages": [{"role": "wizard", "content": "Hi"}]}, "messages[0]"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0]"),
        ("chat/completions", {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0]"),
        ("chat/completions", {"messages": [{"role": "user", "content": "word " * 3000}]}, "messages"),
        ("chat/completions", {"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ("chat/completions", {"tools": [{"type": "function", "function": {"name": 3}}]}, "tools[0].function.name"),
        ("completions", {"prompt": 3}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [10**6]}, "prompt"),
        ("completions", {"prompt": "word " * 3000}, "prompt"),
        ("completions", {"prompt": [[]]}, "prompt"),
        ("completions", {"prompt": ["a"] * 2000}, "prompt"),
        ("completions", {"prompt": ["a"] * 1000}, "n"),
        ("completions", {"echo": True, "stream": True}, "echo"),
        ("completions", {"logprobs": -1}, "logprobs"),
        ("completions", {"logprobs": 500}, "top_logprobs"),
        ("completions", {"best_of": 3, "stream": True}, "best_of"),
        ("completions", {"best_of": 1, "n": 2}, "best_of"),
        ("completions", {"suffix": "end"}, "suffix"),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("embeddings", {"input": []}, "input"),
        ("embeddings", {"input": [10**7]}, "prompt"),
        ("embeddings", {"input": "a", "dimensions": 3}, "dimensions"),
        ("embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("embeddings", {"input": "word " * 3000}, "input"),
        ("rerank", {"query": "", "documents": ["a"]}, "query"),
        ("rerank", {"query": "a", "documents": []}, "documents"),
        ("reward", {"conversations": []}, "conversations"),
        ("responses", {"input": "a", "store": True}, "store"),
        ("responses", {"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ("responses", {"input": "a", "background": True}, "background"),
        ("responses", {"input": [{"type": "image_generation_call"}]}, "input[0]"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0]"),
        ("responses", {"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].name"),
        ("responses", {"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
    ],
)  # fmt: skip
def test_refused_by_name(http: httpx.Client, path: str, change: dict[str, Any], param: str) -> None:
    base = {"chat/completions": CHAT, "completions": TEXT}.get(path, {"model": NAME})
    answer = http.post(f"/v1/{path}", json=base | change)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("content", "headers", "words"),
    [
        (b'{"model": ', {"Content-Type": "application/json"}, "not valid JSON"),
        (b"[]", {"Content-Type": "application/json"}, "must be a JSON object"),
        (b"null", {"Content-Type": "application/json"}, "must be a JSON object"),
        (b"", {"Content-Type": "application/json"}, "must be a JSON object"),
        (json.dumps(CHAT).encode(), {"Content-Type": "text/plain"}, "Content-Type: application/json"),
        (b"\xff\xfe{}", {"Content-Type": "application/json"}, ""),
        (b"[" * 5000, {"Content-Type": "application/json"}, ""),
        (b'{"messages": ' + b"[" * 200 + b"]" * 200 + b"}", {"Content-Type": "application/json"}, "levels deep"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', {"Content-Type": "application/json"}, "surrogate"),
        (b'{"messages": [], "temperature": NaN}', {"Content-Type": "application/json"}, "finite"),
        (b'{"messages": [], "seed": 1' + b"0" * 5000 + b"}", {"Content-Type": "application/json"}, ""),
    ],
)
def test_malformed_bodies(http: httpx.Client, content: bytes, headers: dict[str, str], words: str) -> None:
    answer = http.post("/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]


def test_unknown_routes_and_methods_have_the_same_form(http: httpx.Client) -> None:
    assert http.get("/v1/nothing").status_code == 404 and "error" in http.get("/v1/nothing").json()
    assert http.get("/v1/completions").status_code == 405 and "error" in http.get("/v1/completions").json()


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4) | st.sampled_from([10**400]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
_fields = st.sampled_from(
    ["messages", "prompt", "stop", "tools", "tool_choice", "seed", "top_k", "stream", "temperature", "user", "x"]
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/score", "/tokenize", "/detokenize"]),
       field=_fields, value=_json)  # fmt: skip
def test_no_body_gives_a_server_error(http: httpx.Client, path: str, field: str, value: Any) -> None:
    base = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}.get(path, {"model": NAME})
    answer = http.post(path, content=json.dumps(base | {field: value}), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400)


def test_neutral_values_that_clients_send_are_accepted(http: httpx.Client) -> None:
    neutral = {
        "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "u", "top_logprobs": 0,
        "response_format": {"type": "text"}, "parallel_tool_calls": True, "store": False, "tool_choice": "auto",
        "metadata": {"a": "b"}, "service_tier": "auto", "top_k": -1, "seed": None, "stop": None, "tools": [],
    }  # fmt: skip
    assert http.post("/v1/chat/completions", json=CHAT | neutral).status_code == 200
    without = {key: value for key, value in CHAT.items() if key not in ("model", "max_tokens")}
    answer = http.post("/v1/chat/completions", json=without).json()
    assert answer["choices"][0]["message"]["content"] == "I am 浦语."


def test_penalties_biases_and_forms_are_those_of_the_engine(http: httpx.Client, llm: LLM) -> None:
    body = CHAT | {"max_tokens": 8, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    fields = {
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
        "min_tokens": 2,
    }
    answer = http.post("/v1/chat/completions", json=body | fields | {"logit_bias": {"40": 100.0}}).json()
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True, logit_bias={40: 100.0}, **fields)
    assert answer["choices"][0]["message"]["content"] == llm.chat(CHAT["messages"], params=params).text
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["red", "blue"]}}}
    answer = http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 30, "response_format": form}).json()
    content = answer["choices"][0]["message"]
    assert json.loads(content["content"]) in ("red", "blue")


# -- other routes ----------------------------------------------------------------------------------------------


def test_tokens_there_and_back(http: httpx.Client, tokenizer: Tokenizer) -> None:
    text = "浦语 <|im_end|> one"
    ids = http.post("/tokenize", json={"prompt": text}).json()
    assert ids["tokens"] == [tokenizer.bos_id, *tokenizer.encode(text)] and ids["count"] == len(ids["tokens"])
    assert tokenizer.im_end_id not in ids["tokens"]
    bare = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": bare}).json() == {"prompt": text}
    chat = http.post("/tokenize", json={"messages": CHAT["messages"]}).json()["tokens"]
    assert tokenizer.im_end_id in chat
    assert http.post("/tokenize", json={}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [-1]}).status_code == 400


def test_a_prompt_of_ids_equals_its_text(http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"prompt": "one two"}).json()["tokens"]
    answers = [http.post("/v1/completions", json=TEXT | {"prompt": p}).json() for p in ("one two", ids)]
    assert len({json.dumps(answer["choices"]) for answer in answers}) == 1
    several = http.post("/v1/completions", json=TEXT | {"prompt": [ids, ids[:2]]}).json()["choices"]
    assert [row["index"] for row in several] == [0, 1] and several[0] == answers[0]["choices"][0]


def test_health_and_metrics(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    before = _metrics(http.get("/metrics").text)
    http.post("/v1/chat/completions", json=CHAT)
    http.post("/v1/chat/completions", json=CHAT | {"max_tokens": -1})
    list(Client(str(http.base_url)).stream_chat([WHO], params=SamplingParams(max_tokens=3)))
    after = _metrics(http.get("/metrics").text)
    assert after["vllm:generation_tokens_total"] == before["vllm:generation_tokens_total"] + 6
    name = 'vllm:request_success_total{finished_reason="length"}'
    assert after[name] == before.get(name, 0) + 2
    assert after['puyu:request_refused_total{status="400"}'] > before.get('puyu:request_refused_total{status="400"}', 0)
    assert after["vllm:time_to_first_token_seconds_count"] == before["vllm:time_to_first_token_seconds_count"] + 2
    assert after["vllm:num_requests_running"] == 0


DASHBOARD = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions", "prefix_cache_queries",
    "prefix_cache_hits", "prompt_tokens", "generation_tokens", "request_success", "time_to_first_token_seconds",
    "inter_token_latency_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_inference_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens",
}  # fmt: skip
"""What vLLM's Grafana dashboard asks for, without the prefix `vllm:`."""


def test_prometheus_reads_the_metrics_under_vllms_names(http: httpx.Client) -> None:
    list(Client(str(http.base_url)).stream_chat([WHO], params=SamplingParams(max_tokens=5)))
    families = {family.name: family for family in text_string_to_metric_families(http.get("/metrics").text)}
    assert {f"vllm:{name}" for name in DASHBOARD} <= set(families)
    whole = families["vllm:e2e_request_latency_seconds"]
    assert whole.type == "histogram"
    buckets = [sample.value for sample in whole.samples if sample.name.endswith("_bucket")]
    count = next(sample.value for sample in whole.samples if sample.name.endswith("_count"))
    assert buckets == sorted(buckets) and buckets[-1] == count >= 1
    names = ("queue", "prefill", "decode", "inference")
    sums = {name: _sum_of(families[f"vllm:request_{name}_time_seconds"]) for name in names}
    assert sums["inference"] == pytest.approx(sums["prefill"] + sums["decode"])
    assert _sum_of(whole) == pytest.approx(sums["queue"] + sums["inference"])


def _sum_of(family: Any) -> float:
    return float(next(sample.value for sample in family.samples if sample.name.endswith("_sum")))


def _metrics(page: str) -> dict[str, float]:
    """Without the labels that all rows have."""
    rows = [line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#")]
    own = f'model_name="{NAME}",engine="0"'
    assert all(own in name for name, _ in rows)
    return {name.replace(own + ",", "").replace("{" + own + "}", ""): float(value) for name, value in rows}


# -- our client and agent through the wire ---------------------------------------------------------------------


def test_the_client_gives_what_the_engine_gives(url: str, llm: LLM) -> None:
    client = Client(url)
    assert client.models() == [NAME]
    for params in (SamplingParams(max_tokens=20), SamplingParams(max_tokens=8, temperature=1.0, seed=3, top_k=5)):
        for prompt in ("one", (WHO,)):
            request = GenerateRequest(prompt, params)
            ours, theirs = llm.generate_all([request])[0], asyncio.run(client.generate(request))
            assert (theirs.text, theirs.finish_reason) == (ours.text, ours.finish_reason)
            assert theirs.usage.completion_tokens == ours.usage.completion_tokens
    request = GenerateRequest((SUM,), SamplingParams(logprobs=True), (calculator.spec,))
    ours, theirs = llm.generate_all([request])[0], asyncio.run(client.generate(request))
    assert theirs.message == ours.message and theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-4)
    several = GenerateRequest((WHO,), SamplingParams(max_tokens=6, temperature=1.0, seed=2, n=3))
    ours, theirs = llm.generate_all([several])[0], asyncio.run(client.generate(several))
    assert [answer.text for answer in theirs.choices] == [answer.text for answer in ours.choices]
    formed = GenerateRequest("one", SamplingParams(guide=Guide("choice", ("red", "blue"))), priority=1, timeout=30.0)
    assert asyncio.run(client.generate(formed)).text == llm.generate_all([formed])[0].text in ("red", "blue")
    by_ids = GenerateRequest(tuple(llm.driver.front.text_ids("one two")), SamplingParams(max_tokens=4))
    assert asyncio.run(client.generate(by_ids)).text == client.complete("one two", max_tokens=4).text
    assert client.embed_all(["one", "two"])[1] == pytest.approx(llm.embed(["one", "two"])[1], abs=1e-5)
    assert asyncio.run(client.embed(["one"]))[0] == pytest.approx(llm.embed(["one"])[0], abs=1e-5)
    ranking = client.rerank("one two", ["three", "one two", "浦语"])
    assert ranking[0] == (1, pytest.approx(1.0)) and [score for _, score in ranking] == sorted(
        (score for _, score in ranking), reverse=True
    )
    assert client.rerank("one two", ["three", "one two"], top_n=1)[0][0] == 1
    pairs = [("one", " two"), ("I am", " 浦语")] * 40
    assert [row.num_bytes for row in asyncio.run(client.score(pairs))] == [len(pair[1].encode()) for pair in pairs]
    assert asyncio.run(client.score(pairs[:1]))[0] == llm.score_all(pairs[:1])[0]
    with pytest.raises(RequestError, match="continuation"):
        asyncio.run(client.score([("a", "")]))


@pytest.mark.parametrize("watched", [False, True])
def test_an_agent_through_the_server_calls_the_calculator(url: str, watched: bool) -> None:
    events: list[Any] = []
    agent = Agent(Client(url), [calculator], on_event=events.append if watched else None)
    run = agent.run("12*7?")
    assert (run.status, run.answer) == ("done", "It is 84.")
    assert [(o.call.name, o.text, o.ok) for step in run.steps for o in step.observations] == [
        ("calculator", "84", True)
    ]
    assert bool(events) is watched


def test_an_agent_on_the_engine_gives_the_same(llm: LLM) -> None:
    assert Agent(llm, [calculator]).run("12*7?").answer == "It is 84."


# -- leaving, limits, secrets ----------------------------------------------------------------------------------


@pytest.fixture
def lone(model: CausalLM, tokenizer: Tokenizer) -> LLM:
    """An engine of one test's own: no prefix cache, so that all blocks must come back; one request at a time."""
    config = EngineConfig(cache_tokens=2048, max_running=1, prefix_cache=False)
    return LLM.from_model(model, tokenizer, config=config, name=NAME)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waiting", [False, True])
def test_a_client_that_leaves_frees_its_blocks(lone: LLM, stream: bool, waiting: bool) -> None:
    body = json.dumps(TEXT | {"max_tokens": 900, "ignore_eos": True, "stream": stream}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request += b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    with served(lone) as url, socket.socket() as first, socket.socket() as second:
        port = int(url.rsplit(":", 1)[1])
        total = lone.stats().num_free_blocks
        for each in (first, second) if waiting else (first,):
            each.connect(("127.0.0.1", port))
            each.sendall(request)
        wait_until(lambda: lone.stats().num_running == 1 and lone.stats().num_waiting == int(waiting))
        if waiting:  # the queued one leaves first, before it has computed anything
            second.close()
            wait_until(lambda: lone.stats().num_waiting == 0)
            assert lone.stats().num_running == 1
        generated = lone.stats().num_generated_tokens
        first.close()
        wait_until(lambda: lone.stats().num_running == 0)
        assert lone.stats().num_free_blocks == total
        assert lone.stats().num_generated_tokens - generated < 800
        page = _metrics(httpx.get(f"{url}/metrics").text)
        assert page['vllm:request_success_total{finished_reason="abort"}'] == 1 + waiting


def test_a_full_queue_is_429_with_retry_after(lone: LLM) -> None:
    async def main(url: str) -> None:
        client = Client(url, retries=0)
        request = GenerateRequest("one", ENDLESS)
        async with asyncio.timeout(30):
            tasks = [asyncio.create_task(client.generate(request)) for _ in range(2)]
            while lone.stats().num_running + lone.stats().num_waiting < 2:
                await asyncio.sleep(0.005)
            with pytest.raises(ResourceError, match=r"429.*\n.*--max-queue"):
                await client.generate(request)
            async with httpx.AsyncClient() as raw:
                full = await raw.post(f"{url}/v1/completions", json=TEXT | {"stream": True})
            assert full.status_code == 429 and int(full.headers["Retry-After"]) >= 1
            assert full.json()["error"]["code"] == "rate_limit_exceeded"
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    with served(lone, max_queue=1) as url:
        asyncio.run(main(url))


def test_api_key(lone: LLM) -> None:
    with served(lone, api_key="s3cret") as url:
        for key in ("", "wrong", "s3cret "):
            for path in ("/v1/models", "/metrics", "/openapi.json"):
                headers = {"Authorization": f"Bearer {key}"} if key.strip() else {}
                answer = httpx.get(url + path, headers=headers if key != "s3cret " else {"Authorization": "s3cret"})
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/health").status_code == 200
        assert Client(url, api_key="s3cret").models() == [NAME]
        with pytest.raises(RequestError, match="api_key="):
            Client(url).models()


def test_body_limit_host_and_no_cors(lone: LLM) -> None:
    with served(lone, max_body_mb=0.001) as url:
        big = json.dumps(TEXT | {"prompt": "x" * 2000})
        headers = {"Content-Type": "application/json"}
        assert httpx.post(f"{url}/v1/completions", content=big, headers=headers).status_code == 413
        chunked = httpx.post(f"{url}/v1/completions", content=iter([big.encode()]), headers=headers)
        assert chunked.status_code == 413 and "larger than" in chunked.json()["error"]["message"]
        assert httpx.get(f"{url}/v1/models", headers={"Host": "evil.example"}).status_code == 403
        assert httpx.get(f"{url}/v1/models", headers={"Host": "localhost:1"}).status_code == 200
        plain = httpx.get(f"{url}/v1/models", headers={"Origin": "http://evil.example"})
        assert not any("access-control" in name for name in plain.headers)
        preflight = httpx.options(f"{url}/v1/completions", headers={"Origin": "http://evil.example"})
        assert preflight.status_code == 405


def test_logs_hold_no_text_unless_asked(
    lone: LLM, model: CausalLM, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    again = LLM.from_model(model, tokenizer, config=EngineConfig(cache_tokens=512), name=NAME)
    with caplog.at_level(logging.DEBUG, logger="puyu"), served(lone) as url:
        httpx.post(f"{url}/v1/completions", json=TEXT | {"prompt": "my secret diary"})
        httpx.post(f"{url}/v1/completions", json=TEXT | {"prompt": "my secret diary", "max_tokens": -1})
        httpx.post(f"{url}/v1/completions", json=TEXT | {"prompt": "my secret diary " * 900})
    lines = [line for line in caplog.text.splitlines() if "POST /v1/completions" in line]
    assert len(lines) == 3 and "diary" not in caplog.text
    with caplog.at_level(logging.INFO, logger="puyu"), served(again, log_text=True) as url:
        answer = httpx.post(f"{url}/v1/completions", json=TEXT | {"prompt": "my secret diary"})
    asked = next(line for line in caplog.text.splitlines() if "diary" in line)
    assert answer.headers["x-request-id"] in asked


def test_a_stopped_engine_is_503(model: CausalLM, tokenizer: Tokenizer) -> None:
    stopped = LLM.from_model(model, tokenizer, config=EngineConfig(cache_tokens=64), name=NAME)
    stopped.close()
    with served(stopped) as url:
        assert httpx.get(f"{url}/health").status_code == 503
        assert httpx.post(f"{url}/v1/completions", json=TEXT).status_code == 503
