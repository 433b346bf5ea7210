"""What goes wrong with one request, or one callback, costs nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from puyu.engine.core import Engine, EngineConfig
from puyu.engine.front import Reader
from puyu.engine.llm import LLM
from puyu.engine.overlap import OverlapEngine
from puyu.engine.request import Request, Running
from puyu.engine.speculate import ModelDrafter
from puyu.errors import RequestError
from puyu.model.heads import CausalLM
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Completion, GenerateRequest, SamplingParams
from tests.engine.conftest import tiny_model

SMALL = EngineConfig(cache_tokens=2048)
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture
def llm(tokenizer: Tokenizer) -> LLM:
    return LLM.from_model(tiny_model(2, vocab_size=tokenizer.vocab_size), tokenizer, config=SMALL)


def asked(count: int, **changes: Any) -> list[GenerateRequest]:
    return [GenerateRequest(f"text {index}", replace(PARAMS, **changes)) for index in range(count)]


@pytest.mark.parametrize("method", ["push", "close", "completion"])
@pytest.mark.parametrize("stop", [(), ("never said",)], ids=["read at the end", "watched"])
def test_tokens_that_cannot_be_read_fail_their_request_alone(
    llm: LLM, method: str, stop: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = llm.generate_all(asked(4, stop=stop))
    victim = f"request-{4 + 2}"  # the third of the next four
    real = getattr(Reader, method)

    def torn(self: Reader, *arguments: Any, **named: Any) -> Any:
        if self.request.id == victim:
            raise ValueError("torn")
        return real(self, *arguments, **named)

    monkeypatch.setattr(Reader, method, torn)
    found = llm.generate_all(asked(4, stop=stop))
    assert [item.finish_reason for item in found] == ["length", "length", "error", "length"]
    assert [found[at].text for at in (0, 1, 3)] == [expected[at].text for at in (0, 1, 3)]
    assert victim in caplog.text and not llm.driver.has_work
    assert llm.stats().num_free_blocks == llm.stats().num_blocks


def test_a_server_goes_on_after_a_request_that_cannot_be_read(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Reader.completion

    def torn(self: Reader, running: Running, **named: Any) -> Completion:
        if self.request.id == "request-0":
            raise RecursionError("too deep")
        return real(self, running, **named)

    monkeypatch.setattr(Reader, "completion", torn)

    async def both() -> list[Completion]:
        return [await llm.generate(request) for request in asked(2)]

    first, second = asyncio.run(both())
    llm.close()
    assert (first.finish_reason, second.finish_reason) == ("error", "length")


def test_what_a_callback_raises_is_raised_when_all_others_have_been_told(llm: LLM) -> None:
    told: list[str] = []

    def done(name: str) -> Any:
        def take(completion: Completion) -> None:
            told.append(name)
            if name == "b":
                raise KeyError("mine")

        return take

    for name, request in zip("abc", asked(3), strict=True):
        llm.driver.submit(request, done=done(name))
    with pytest.raises(KeyError, match="mine"):
        while llm.driver.pump():
            pass
    assert told == ["a", "b", "c"] and not llm.driver.has_work


def test_an_adapter_that_went_meanwhile_fails_its_request_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = {"", "poet"}

    def check(name: str) -> None:
        if name not in loaded:
            raise RequestError(f"no such adapter: {name!r}", param="adapter")

    monkeypatch.setattr(llm.driver.front, "check_adapter", check)
    found: list[Completion] = []
    for request in (GenerateRequest("a", PARAMS, adapter="poet"), GenerateRequest("b", PARAMS)):
        llm.driver.submit(request, done=found.append)
    loaded.discard("poet")
    while llm.driver.pump():
        pass
    assert [item.finish_reason for item in found] == ["error", "length"]


def test_a_forbidden_word_without_tokens_is_refused(tokenizer: Tokenizer, llm: LLM) -> None:
    class Trims:
        """A tokenizer that drops spaces at the ends, as some do."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def encode(self, text: str, **named: Any) -> list[int]:
            return tokenizer.encode(text.strip(), **named)

    llm.driver.front.tokenizer = Trims()  # type: ignore[assignment]
    with pytest.raises(RequestError, match="bad_words: ' ' is no token"):
        llm.complete("x", params=PARAMS, bad_words=(" ",))
    assert llm.complete("x", params=PARAMS, bad_words=("e",)).finish_reason == "length"


def test_ends_beyond_the_vocabulary_can_be_forbidden(model: CausalLM) -> None:
    """generation_config.json may name an id that the model does not have."""
    engine = Engine(model, SMALL)
    params = SamplingParams(max_tokens=5, min_tokens=5)
    running = engine.add(Request("a", (1, 2), 5, params, stop_ids=frozenset((7, 5000))))
    while engine.has_work:
        engine.step()
    assert running.finish_reason == "length" and 7 not in running.generated


def finished(engine: Engine, requests: Sequence[Request]) -> list[Running]:
    runs = []
    for request in requests:
        runs.append(engine.add(request))
        engine.step()
        engine.audit()
    while engine.has_work:
        engine.step()
        engine.audit()
    return runs


def test_a_draft_model_guesses_nothing_beyond_its_context_and_no_id_that_the_large_one_lacks() -> None:
    model, draft = tiny_model(0), tiny_model(1, max_positions=24, vocab_size=128)
    drafter = ModelDrafter(draft, num_ids=97)
    config = EngineConfig(cache_tokens=1024, draft_tokens=4)
    requests = [Request(str(index), tuple(range(5 + 9 * index, 10 + 20 * index)), 30) for index in range(3)]
    plain = finished(Engine(model, EngineConfig(cache_tokens=1024)), requests)
    proposed: list[int] = []
    real = drafter.propose

    def watched(wanted: Any) -> list[list[int]]:
        guesses = real(wanted)
        for (running, _), guess in zip(wanted, guesses, strict=True):
            assert len(running.tokens) + len(guess) <= 24 and all(token < 97 for token in guess)
            proposed.extend(guess)
        return guesses

    drafter.propose = watched  # type: ignore[method-assign]
    ours = finished(Engine(model, config, drafter=drafter), requests)
    assert proposed and [list(run.generated) for run in ours] == [list(run.generated) for run in plain]


@pytest.mark.parametrize("running", [1, 2, 5])
def test_overlap_with_priorities_never_mixes_requests_up(model: CausalLM, running: int) -> None:
    """A request that is preempted by a higher one while its token is under way keeps its own tokens."""
    sizes = {"cache_tokens": 80, "block_size": 4, "max_running": running, "max_step_tokens": 12}
    requests = [
        Request(
            str(index),
            tuple(range(index, index + 6)),
            9,
            priority=(index * 7) % 3,
            params=SamplingParams(logprobs=True),
        )
        for index in range(9)
    ]
    plain = finished(Engine(model, EngineConfig(**sizes)), requests)
    ours = finished(OverlapEngine(model, EngineConfig(overlap=True, **sizes)), requests)
    for expected, found in zip(plain, ours, strict=True):
        assert list(found.generated) == list(expected.generated) and found.finish_reason == expected.finish_reason
    assert running == 5 or any(run.num_preemptions for run in ours), "the test means what its name says"
