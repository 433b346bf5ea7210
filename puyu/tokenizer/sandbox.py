"""A stranger's Jinja template, run with bounds: it cannot reach Python, hang, or fill the memory with its output.

Immutable and sandboxed as in transformers, with the same extensions: `raise_exception`, `strftime_now`, plain
`tojson`, loop controls, `generation` blocks. Each line of the template checks the clock; strings and numbers that grow
by operators, methods or filters, and the text itself, have a largest size. Knows no tokenizer.

    text = run(compile_template("{{ messages[0].content }}"), {"messages": [{"content": "Hi"}]})
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from puyu.errors import InputError

LONGEST = 1 << 22
"""Characters of a rendered text, and items of a sequence that a template puts together."""
SECONDS = 5.0
_BITS = 4096
_FILE = "<template>"  # what jinja2 calls the code of a template that has no file
_WIDTH = re.compile(r"\d{6,}|\*")
_FIELD = re.compile(r"\{[^{}]*\d{6,}")
"""Widths of six digits or more, or given apart: in the forms of `%`, and of `str.format`."""
_GROWING = ("replace", "join", "indent", "center", "format")
_MISTAKES = (
    *(jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
    *(RecursionError, MemoryError),
)


class _Environment(ImmutableSandboxedEnvironment):
    """Operators that can make much out of little are computed here."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _too_large(operator, left, right):
            raise jinja2.TemplateRuntimeError(f"a result of {operator!r} is too large")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *arguments: Any, **named: Any) -> Any:
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(owner, str):
            _check_growth(getattr(function, "__name__", ""), owner, (*arguments, *named.values()))
        return super().call(context, function, *arguments, **named)


def _too_large(operator: str, left: Any, right: Any) -> bool:
    if operator == "%":
        return isinstance(left, str) and _WIDTH.search(left) is not None
    if operator == "**":
        return isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _BITS
    if operator == "+":
        return _size(left) + _size(right) > LONGEST
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length() > _BITS
    times = right if isinstance(right, int) else left if isinstance(left, int) else 1
    return max(_size(left), _size(right)) * times > LONGEST


def _check_growth(name: str, text: str, arguments: Sequence[Any]) -> None:
    """Refuse a method or a filter of a text whose result would be too large."""
    texts = [item for item in arguments if isinstance(item, str)]
    width = max((item for item in arguments if isinstance(item, int)), default=0)
    size = len(text)
    if name == "replace" and len(texts) > 1:
        size += text.count(texts[0]) * len(texts[1])
    elif name == "join":
        items = next((item for item in arguments if isinstance(item, list | tuple)), ())
        size *= len(items)
        if size <= LONGEST:  # else it is known, and there may be millions of items
            size += sum(map(_size, items))
    elif name in ("indent", "expandtabs"):
        size += width * (text.count("\n") + text.count("\t") + 1)
    elif name in ("center", "ljust", "rjust", "zfill", "format"):
        size += width
    wide = name in ("format", "format_map") and _FIELD.search(text) is not None
    if size > LONGEST or wide or (name == "%" and _too_large("%", text, arguments)):
        raise jinja2.TemplateRuntimeError(f"a result of {name!r} is too large")


def _checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is bounded like the method of its name."""

    @functools.wraps(function)  # with jinja2's mark for filters that are told more than their values
    def bounded(*arguments: Any, **named: Any) -> Any:
        values = [*arguments[hasattr(function, "jinja_pass_arg") :], *named.values()]
        if name == "join":
            separator = next((item for item in values[1:] if isinstance(item, str)), "")
            _check_growth(name, separator, values[:1])
        elif isinstance(values[0], str):
            _check_growth("%" if name == "format" else name, values[0], values[1:])
        return function(*arguments, **named)

    return bounded


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


class _Generation(Extension):
    """{% generation %}: marks what the assistant wrote, for trainers; the text is the body's."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def compile_template(source: str) -> jinja2.Template:
    """InputError when it is not valid Jinja."""
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # nothing runs before `run` watches it
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    bounded = {name: _checked(name, environment.filters[name]) for name in _GROWING}
    environment.filters |= {**bounded, "tojson": _tojson}
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
        raise InputError(f"the chat template is not valid Jinja: {error}") from error


def run(template: jinja2.Template, variables: Mapping[str, Any], *, seconds: float = SECONDS) -> str:
    """The rendered text; InputError when the template refuses, errs, or takes too much time or room."""
    clock, before = _Clock(time.monotonic() + seconds), sys.gettrace()
    sys.settrace(clock.watch)
    try:
        return "".join(_bounded(template.generate(**variables)))
    except _MISTAKES as error:
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        raise InputError(f"the chat template refuses these messages: {kind}{error}") from error
    finally:
        sys.settrace(before)


class _Clock:
    """A trace function for the lines of a template; all other code runs at full speed."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def watch(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != _FILE:
            return None
        if time.monotonic() > self.deadline:
            raise jinja2.TemplateRuntimeError("it takes too long")
        return self.watch


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > LONGEST:
            raise jinja2.TemplateRuntimeError(f"its text is longer than {LONGEST} characters")
        yield piece


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Plain JSON: jinja2's own filter escapes <, > and & for HTML."""
    if isinstance(options.get("indent"), int) and options["indent"] > 100:
        raise jinja2.TemplateRuntimeError("an indent of more than 100 is too large")
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
