"""Structured output: what comes out always has the form; what cannot be compiled is refused before it is queued."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from puyu.engine.constrain import Compiler
from puyu.engine.core import EngineConfig
from puyu.engine.grammar_limits import MAX_UNROLLED, unrolled_size
from puyu.engine.llm import LLM
from puyu.errors import RequestError
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import GenerateRequest, Guide, SamplingParams
from tests.engine.conftest import tiny_model

CONFIG = EngineConfig(cache_tokens=4096, block_size=4)

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 3, None]}, "maxItems": 3},
        "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
        "good": {"type": "boolean"},
    },
    "required": ["name", "age", "code"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(tokenizer: Tokenizer) -> Iterator[LLM]:
    model = tiny_model(2, vocab_size=tokenizer.vocab_size, max_positions=512)
    with LLM.from_model(model, tokenizer, config=CONFIG) as llm:
        yield llm


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """JSON Schema as far as these tests use it, read by hand."""
    if "enum" in schema:
        return value in schema["enum"]
    if schema["type"] == "object":
        known = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(known)
            and all(fits(item, known[key]) for key, item in value.items())
        )
    if schema["type"] == "array":
        return len(value) <= schema["maxItems"] and all(fits(item, schema["items"]) for item in value)
    if schema["type"] == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if schema["type"] == "string":
        matches = re.search(schema.get("pattern", ""), value) is not None
        return isinstance(value, str) and len(value) <= schema.get("maxLength", 99) and matches
    return isinstance(value, bool)


def hot(guide: Guide, seed: int, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 300, "temperature": 1.0, "seed": seed, "guide": guide} | changes)


@pytest.mark.parametrize("as_text", [True, False])
def test_json_schema_always_holds(llm: LLM, as_text: bool) -> None:
    guide = Guide("json_schema", json.dumps(PERSON) if as_text else PERSON)
    answers = llm.generate_all([GenerateRequest("Hello", hot(guide, seed)) for seed in range(25)])
    for answer in answers:
        assert answer.finish_reason == "stop" and fits(json.loads(answer.text), PERSON), answer.text
    assert len({answer.text for answer in answers}) > 20


def test_regex_grammar_and_choice_always_hold(llm: LLM) -> None:
    lark = 'start: item ("," item)*\nitem: /[0-9]{1,3}/ | "(" start ")"'
    odd = ("yes", "no (maybe)", "是的", "a.b", "x|y", 'q"\\', "a b\n", "naïve🎉")
    cases = [
        (Guide("regex", r"(cat|dog)s? [0-9]{2,4}"), re.compile(r"(cat|dog)s? [0-9]{2,4}")),
        (Guide("regex", r"[一-龥]{2}!"), re.compile(r"[一-龥]{2}!")),
        (Guide("grammar", lark), re.compile(r"[0-9,()]+")),
        (Guide("choice", odd), re.compile("|".join(re.escape(text) for text in odd))),
    ]
    requests = [GenerateRequest("Hello", hot(guide, seed)) for guide, _ in cases for seed in range(12)]
    answers = llm.generate_all(requests)
    for (_, form), start in zip(cases, range(0, 48, 12), strict=True):
        for answer in answers[start : start + 12]:
            assert answer.finish_reason in ("stop", "length")
            assert answer.finish_reason == "length" or form.fullmatch(answer.text), answer.text
    assert {answer.text for answer in answers[36:]} <= set(odd) and len({a.text for a in answers[36:]}) > 3


def test_a_cut_is_stated(llm: LLM) -> None:
    answer = llm.complete("Hello", params=hot(Guide("json_schema", PERSON), 1, max_tokens=3))
    assert answer.finish_reason == "length" and len(answer.token_ids) == 3


def test_min_tokens_give_way_to_the_grammar(llm: LLM) -> None:
    answer = llm.complete("Hello", params=hot(Guide("choice", ("yes",)), 1, min_tokens=50))
    assert (answer.text, answer.finish_reason) == ("yes", "stop")
    answer = llm.complete("Hello", params=hot(Guide("regex", "[ab]+"), 1, min_tokens=20, max_tokens=200))
    assert len(answer.token_ids) > 20 and set(answer.text) <= set("ab")


@pytest.mark.parametrize("drafts", [3, 8])
def test_drafts_change_nothing(tokenizer: Tokenizer, drafts: int) -> None:
    model = tiny_model(2, vocab_size=tokenizer.vocab_size, max_positions=512).double()
    guides = [Guide("json_schema", PERSON), Guide("regex", "(ab|ba){3,30}"), Guide("choice", ("abababab", "ab"))]
    requests = [
        GenerateRequest("ababab", hot(guide, seed, max_tokens=120, temperature=heat))
        for guide in guides
        for seed, heat in ((1, 0.0), (2, 1.0), (3, 1.0))
    ]
    with LLM.from_model(model, tokenizer, config=CONFIG) as plain:
        expected = plain.generate_all(requests)
    with LLM.from_model(model, tokenizer, config=CONFIG.model_copy(update={"draft_tokens": drafts})) as guessing:
        found = guessing.generate_all(requests)
        assert guessing.stats().num_accepted > 10
    assert [(a.token_ids, a.finish_reason) for a in found] == [(a.token_ids, a.finish_reason) for a in expected]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


BOMBS = {
    "nested repetitions": Guide("regex", "((a{100}){100}){100}"),
    "one long repetition": Guide("regex", "a{1000000}"),
    "open repetition": Guide("regex", "(a{900,}){900,}"),
    "in a class-like place": Guide("grammar", "start: [ /(a{1000}){1000}/ ]"),
    "in a rule": Guide("grammar", 'start: (("a"{1,2000}){1,2000}){1,2000}'),
    "in a pattern": Guide("json_schema", {"type": "string", "pattern": "^(([a-z]{500}){500})$"}),
    "in a pattern in a list": Guide("json_schema", {"anyOf": [{"type": "string", "pattern": "(a{1000}){1000}"}]}),
    "in a key": Guide("json_schema", {"type": "object", "patternProperties": {"(a{1000}){1000}": {}}}),
    "deep": Guide("json_schema", nested(500)),
    "deeper": Guide("json_schema", nested(100_000)),
    "deep text": Guide("json_schema", '{"type":"array","items":' * 20_000 + "{}" + "}" * 20_000),
    "300 KB": Guide("json_schema", {"enum": ["x" * 300 + str(i) for i in range(1000)]}),
    "many properties": Guide("json_schema", {"type": "object", "properties": {f"k{i}": {} for i in range(3000)}}),
    "doubling": Guide(
        "json_schema",
        {
            "$ref": "#/$defs/a16",
            "$defs": {"a0": {"type": "integer"}}
            | {
                f"a{i + 1}": {
                    "allOf": [
                        {"anyOf": [{"$ref": f"#/$defs/a{i}"}, {"type": "string", "minLength": i}]},
                        {"anyOf": [{"$ref": f"#/$defs/a{i}"}, {"type": "string", "maxLength": i + 5}]},
                    ]
                }
                for i in range(16)
            },
        },
    ),
    "nested rules": Guide("grammar", 'start: x{1000}\nx: y{1000}\ny: z{1000}\nz: "a"'),
}
INVALID = {
    "regex": Guide("regex", "(a"),
    "empty regex": Guide("regex", ""),
    "grammar": Guide("grammar", "start: missing"),
    "schema text": Guide("json_schema", "{"),
    "schema list": Guide("json_schema", "[1]"),
    "schema type": Guide("json_schema", {"type": "thing"}),
    "schema that nothing fits": Guide("json_schema", {"type": "integer", "minimum": 5, "maximum": 2}),
    "missing reference": Guide("json_schema", {"$ref": "#/nothing"}),
    "remote reference": Guide("json_schema", {"$ref": "http://localhost/x"}),
    "no choice": Guide("choice", ()),
    "empty choice": Guide("choice", ("a", "")),
    "choice of numbers": Guide("choice", (1, 2)),  # type: ignore[arg-type]
    "not JSON": Guide("json_schema", {"enum": [object()]}),
    "kind": Guide("xml", "a"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", [*BOMBS, *INVALID])
def test_what_cannot_be_used_is_refused_quickly_and_by_name(llm: LLM, name: str) -> None:
    guide = (BOMBS | INVALID)[name]
    began = time.process_time()
    with pytest.raises(RequestError) as caught:
        llm.complete("Hello", guide=guide)
    assert time.process_time() - began < 2.0
    assert caught.value.param == "guide"
    assert not llm.driver.has_work and len(str(caught.value)) < 700


def test_harmless_repetitions_are_let_through(llm: LLM) -> None:
    for guide in (
        Guide("regex", r"[0-9]{4}-[0-9]{2}-[0-9]{2}"),
        Guide("regex", r"[(\[]{3}x[{]5[}]"),
        Guide("regex", "a{5000}"),
        Guide("json_schema", {"type": "string", "pattern": "^[a-z]{1,500}$", "description": "a {thing} (of sorts"}),
    ):
        assert llm.complete("Hello", guide=guide, max_tokens=4).finish_reason == "length"


def test_unrolled_sizes() -> None:
    for regex, size in [("abc", 3), ("a{3}", 3), ("(ab){3}c", 7), ("((ab){2}){3}", 12), ("[abc]{4}", 4), (r"\({2}", 2)]:
        assert unrolled_size(regex) == size
    assert unrolled_size("(a{200}){200}") == 40_000 > MAX_UNROLLED


def test_a_grammar_that_fails_while_running_ends_that_request_alone(llm: LLM, tokenizer: Tokenizer) -> None:
    class Failing:
        """A matcher that gives up at the third token, as one whose limits are reached."""

        def __init__(self, count: int = 0) -> None:
            self.count, self.inner = count, Compiler(tokenizer).compile(Guide("regex", "[ab]{50}"), stop_ids=ENDS)

        def deep_copy(self) -> Failing:
            return Failing(self.count)

        def compute_bitmask(self) -> bytes:
            return self.inner.compute_bitmask()

        def consume_token(self, token: int) -> bool:
            self.count += 1
            return not self.is_error() and self.inner.consume_token(token)

        def is_stopped(self) -> bool:
            return self.is_error()

        def is_error(self) -> bool:
            return self.count >= 3

        def get_error(self) -> str:
            return "too complex" if self.is_error() else ""

    ENDS = frozenset(tokenizer.stop_ids)
    driver, results = llm.driver, {}
    before = llm.stats().num_failed
    request = GenerateRequest("Hello", SamplingParams(max_tokens=20, ignore_eos=True))
    driver.submit(request, done=lambda answer: results.update(good=answer))
    from dataclasses import replace

    (prepared,) = driver.front.prepare(request)
    driver.queue(request, [replace(prepared, guide=Failing())], done=lambda answer: results.update(bad=answer))
    while driver.pump():
        driver.engine.audit()
    assert (results["bad"].finish_reason, len(results["bad"].token_ids)) == ("error", 3)
    assert results["good"].finish_reason == "length" and llm.stats().num_failed == before + 1
    assert llm.complete("Hello", max_tokens=20, ignore_eos=True).token_ids == results["good"].token_ids


def test_a_failed_grammar_allows_nothing(llm: LLM, tokenizer: Tokenizer) -> None:
    """llguidance answers a failed grammar with the end of the text; that must not look like success."""
    matcher = Compiler(tokenizer).compile(Guide("regex", "ab"), stop_ids=frozenset({2})).deep_copy()
    assert not matcher.consume_token(tokenizer.encode("c")[0]) and matcher.is_error()
    from puyu.engine.edits import row_edits
    from puyu.engine.request import Request, Running

    running = Running(Request("r", (1,), 5, stop_ids=frozenset({2})), 0)
    running.guide = matcher
    running.request = Request("r", (1,), 5, stop_ids=frozenset({2}), guide=matcher)
    (edits,) = row_edits(running, ())
    assert edits is not None and edits.allowed is not None and not any(edits.allowed)
    assert running.append(2) == "error"


def test_compiling_does_not_block_the_event_loop(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, where = threading.Event(), threading.Event(), []
    compile_ = llm.driver.front._compiler.compile

    def slow(guide: Guide, *, stop_ids: frozenset[int]) -> Any:
        where.append(threading.current_thread())
        begun.set()
        assert go_on.wait(20)
        return compile_(guide, stop_ids=stop_ids)

    monkeypatch.setattr(llm.driver.front._compiler, "compile", slow)

    async def run() -> tuple[str, str]:
        guided = asyncio.create_task(llm.generate(GenerateRequest("Hi", hot(Guide("choice", ("yes",)), 1))))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        plain = await llm.generate(GenerateRequest("Hi", SamplingParams(max_tokens=3, ignore_eos=True)))
        assert not guided.done(), "somebody else is answered while the grammar is compiled"
        go_on.set()
        return (await guided).text, plain.finish_reason

    assert asyncio.run(run()) == ("yes", "length")
    assert where[0] is not threading.main_thread()


def test_compiled_grammars_are_kept_and_forgotten(tokenizer: Tokenizer) -> None:
    compiler, ends = Compiler(tokenizer), frozenset({2})
    first = compiler.compile(Guide("choice", ("a",)), stop_ids=ends)
    assert compiler.compile(Guide("choice", ("a",)), stop_ids=ends) is first
    assert compiler.compile(Guide("choice", ("a",)), stop_ids=frozenset({1})) is not first
    rng = random.Random(0)
    for _ in range(70):
        compiler.compile(Guide("choice", (str(rng.random()),)), stop_ids=ends)
    assert compiler.compile(Guide("choice", ("a",)), stop_ids=ends) is not first
