"""Structured output: JSON Schema, regular expression, Lark grammar or a choice of texts -> what may come next.

Grammars are compiled before a request is queued, under limits of size and work that do not depend on the machine,
so that no grammar can stop the engine; a bad one is an error that names the field. Compiling and matching are
llguidance's (https://github.com/guidance-ai/llguidance), which walks the tokenizer's trie with an Earley parser.

    matcher = Compiler(tokenizer).compile(Guide("choice", ("yes", "no")), stop_ids=frozenset({2}))
    bits = matcher.compute_bitmask()          # one for each id
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic, TypeVar

from puyu.engine.grammar_limits import check_numbers, check_repetitions, embedded, strings
from puyu.engine.request import Matcher
from puyu.errors import DependencyError, RequestError
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Guide

MAX_BYTES = 256 * 1024
"""Size of a grammar as text."""
CACHED = 64
"""Compiled grammars that are kept."""
VOCABULARIES = 8
"""Tries of the vocabulary that are kept, one for each set of stop ids that requests come with."""
STACK_BYTES = 512 * 1024 * 1024
"""Of the thread that compiles a grammar: llguidance descends along chains of rules and references, up to 1,000 bytes
for each byte of the grammar. What is not used takes no memory."""
LARGE_BYTES = 16 * 1024
"""Grammars from here on are compiled one at a time, since they may use much of that."""
TRIAL = 8
"""Tokens that a new grammar is tried with: some exceed their limits only after the first ones."""

K = TypeVar("K")
T = TypeVar("T")
_STACK_SIZE = threading.Lock()
"""Held while the size of new threads' stacks, which the whole process shares, is changed."""
_LIMITS = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
}
"""llguidance's own units; compiling stays within some tens of milliseconds, a step within about ten."""


class Compiler:
    """Grammars for one tokenizer; what was compiled is kept. Any thread may compile."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._vocabularies: Recent[frozenset[int], Any] = Recent(VOCABULARIES)
        self._compiled: Recent[tuple[str, frozenset[int]], Matcher] = Recent(CACHED)
        self._large = threading.Lock()

    def compile(self, guide: Guide, *, stop_ids: frozenset[int]) -> Matcher:
        """A matcher before its first token, to be copied; RequestError says what is wrong with the grammar."""
        grammar = grammar_of(guide)

        def build() -> Matcher:
            with self._large if len(grammar) > LARGE_BYTES else contextlib.nullcontext():
                return with_deep_stack(partial(self._build, grammar, stop_ids))

        return self._compiled.get((grammar, stop_ids), build)

    def _build(self, grammar: str, stop_ids: frozenset[int]) -> Matcher:
        llguidance = _library()
        limits = llguidance.LLParserLimits(**_LIMITS)
        matcher = llguidance.LLMatcher(self._vocabulary(stop_ids), grammar, log_level=0, limits=limits)
        wrong = matcher.get_error() if matcher.is_error() else ""
        for pick in (min, max):  # the ways of the lowest and of the highest ids
            wrong = wrong or _trial(matcher.deep_copy(), pick)
        if wrong:
            raise RequestError(f"the grammar cannot be used: {_first_line(wrong)}", param="guide")
        return matcher

    def _vocabulary(self, stop_ids: frozenset[int]) -> Any:
        return self._vocabularies.get(stop_ids, partial(self._new_vocabulary, stop_ids))

    def _new_vocabulary(self, stop_ids: frozenset[int]) -> Any:
        ends = sorted(stop_ids) or [self.tokenizer.eos_id or 0]
        try:
            return _library().LLTokenizer(self.tokenizer.json_text, eos_token=ends, n_vocab=self.tokenizer.vocab_size)
        except (ValueError, RuntimeError) as error:
            raise RequestError(f"this tokenizer cannot be constrained: {error}", param="guide") from error


class Recent(Generic[K, T]):
    """The few things that were made or asked for last, by key; any thread may ask."""

    def __init__(self, most: int) -> None:
        self._most, self._kept = most, OrderedDict[K, T]()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: K, make: Callable[[], T]) -> T:
        """What is kept under the key, or what `make` gives."""
        with self._lock:
            found = self._kept.pop(key, None)
        found = make() if found is None else found
        with self._lock:
            self._kept[key] = found
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return found


def with_deep_stack(work: Callable[[], T]) -> T:
    """What `work` gives, or raises, in a thread of its own that has STACK_BYTES of stack."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            future.set_exception(error)

    thread = threading.Thread(target=run, name="puyu-grammar", daemon=True)
    with _STACK_SIZE:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return future.result()


def _trial(matcher: Matcher, pick: Callable[[Sequence[int]], int]) -> str:
    """What goes wrong along one way through the grammar; empty when nothing does."""
    for _ in range(TRIAL):
        bits = matcher.compute_bitmask()
        if matcher.is_error():
            return matcher.get_error()
        places = [at for at, byte in enumerate(bits) if byte]
        if not places:
            return "no token of this vocabulary can begin or go on"
        at = pick(places)
        bit = pick([bit for bit in range(8) if bits[at] >> bit & 1])
        if not matcher.consume_token(at * 8 + bit) or matcher.is_stopped():
            break
    return matcher.get_error() if matcher.is_error() else ""


def grammar_of(guide: Guide) -> str:
    """The grammar in llguidance's form; RequestError for a value of the wrong kind or size."""
    value = guide.value
    text = value if isinstance(value, str) else _as_json(value)
    if len(text.encode("utf-8", errors="replace")) > MAX_BYTES:
        raise RequestError(f"a grammar may have {MAX_BYTES} bytes", param="guide", remedy="simplify it")
    matcher = _library().LLMatcher
    if guide.kind == "json_schema":
        return _schema_grammar(text)
    if guide.kind == "choice":
        if isinstance(value, str) or not value or not all(isinstance(item, str) and item for item in value):
            raise RequestError("a choice is a list of texts, none of them empty", param="guide")
        return str(matcher.grammar_from_regex("|".join(re.escape(item) for item in value)))
    if guide.kind not in ("regex", "grammar"):
        message = f"no guide is called {guide.kind!r}"
        raise RequestError(message, param="guide", remedy="known: json_schema, choice, regex, grammar")
    if not isinstance(value, str) or not value:
        raise RequestError(f"a {guide.kind} is a text that is not empty", param="guide")
    check_repetitions([value])
    if guide.kind == "grammar":
        for schema in embedded(value):
            check_numbers(schema)
    return str(matcher.grammar_from_regex(value) if guide.kind == "regex" else matcher.grammar_from_lark(value))


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the guide's value is not JSON: {error}", param="guide") from error


def _schema_grammar(text: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the JSON Schema is not JSON: {error}", param="guide") from error
    if not isinstance(schema, dict):
        raise RequestError("a JSON Schema is an object", param="guide")
    check_repetitions(strings(schema))
    check_numbers(schema)
    return str(_library().LLMatcher.grammar_from_json_schema(text))


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        remedy = "pip install llguidance, or install the extra `local`"
        raise DependencyError("structured output needs llguidance", remedy=remedy) from error
    return llguidance


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]
