"""Schemas from signatures, checks of arguments, and a toolbox that never raises for a model's mistake."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from enum import Enum
from typing import Any, Literal, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.errors import ConfigError, ToolError
from puyu.tools.schema import problems, signature_schema
from puyu.tools.tool import Tool, Toolbox, tool
from puyu.types import ToolCall, ToolSpec


class Unit(Enum):
    C = "celsius"
    F = "fahrenheit"


@tool
def forecast(  # noqa: PLR0913 - one parameter of each kind
    city: str,
    days: int = 1,
    unit: Unit = Unit.C,
    mode: Literal["short", "long"] = "short",
    at: Optional[float] = None,  # noqa: UP045 - both spellings must work
    tags: list[str] | None = None,
    extra: dict[str, int] = {},  # noqa: B006 - never changed
    loud: bool = False,
) -> Any:
    """Tell the weather
    of a city.

    More words that the model does not need.

    Args:
        city: name of the city,
            in any language
        days (int): how many days

    Returns:
        city: not a parameter's text
    """
    return {"city": city, "days": days, "unit": unit.name, "at": at, "tags": tags, "extra": extra, "loud": loud}


def test_schema() -> None:
    assert forecast.spec.description == "Tell the weather of a city."
    schema = forecast.spec.parameters
    assert schema["required"] == ["city"]
    assert schema["properties"] == {
        "city": {"type": "string", "description": "name of the city, in any language"},
        "days": {"type": "integer", "description": "how many days"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "mode": {"enum": ["short", "long"]},
        "at": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
        "extra": {"type": "object", "additionalProperties": {"type": "integer"}},
        "loud": {"type": "boolean"},
    }
    json.dumps(forecast.spec.to_openai())


def test_restructured_text_docstring() -> None:
    def f(a: int, b: str) -> None:
        """Do it.

        :param a: the first
        :param str b: the second
        """

    schema, _, summary = signature_schema(f)
    assert summary == "Do it."
    assert [schema["properties"][k]["description"] for k in "ab"] == ["the first", "the second"]


def test_call_converts_and_gives_json() -> None:
    out = json.loads(forecast.call({"city": "武汉", "days": 2.0, "unit": "fahrenheit", "at": 3, "tags": ["a"]}))
    assert out == {"city": "武汉", "days": 2, "unit": "F", "at": 3.0, "tags": ["a"], "extra": {}, "loud": False}
    assert isinstance(out["days"], int) and isinstance(out["at"], float)
    assert "武汉" in forecast.call({"city": "武汉"})
    assert forecast("x")["city"] == "x"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "'city' is missing"),
        ({"city": 3}, "'city' must be text, not 3"),
        ({"city": "x", "days": "3"}, "'days' must be an integer, not '3'"),
        ({"city": "x", "days": True}, "'days' must be an integer, not True"),
        ({"city": "x", "days": 1.5}, "'days' must be an integer"),
        ({"city": "x", "unit": "kelvin"}, "'unit' must be one of 'celsius', 'fahrenheit', not 'kelvin'"),
        ({"city": "x", "tags": ["a", 1]}, "'tags[1]' must be text"),
        ({"city": "x", "extra": {"n": "1"}}, "'extra.n' must be an integer"),
        ({"city": "x", "cyti": 1}, "'cyti' is unknown (did you mean 'city'?)"),
        ({"city": "x", "loud": 1}, "'loud' must be true or false"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ToolError) as caught:
        forecast.call(arguments)
    assert words in str(caught.value) and "follow the schema" in str(caught.value)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda: tool(_no_hint), "parameter 'a' of tool '_no_hint' has no type hint"),
        (lambda: tool(_odd_hint), "no JSON Schema"),
        (lambda: tool(_variadic), "ordinary named parameter"),
        (lambda: tool(_no_words), "has no description"),
        (lambda: Toolbox([forecast, forecast]), "two tools are named 'forecast'"),
    ],
)
def test_a_bad_tool_is_named_at_once(function: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        function()
    assert words in str(caught.value) and "remedy" in str(caught.value)


def _no_hint(a) -> None:  # type: ignore[no-untyped-def]
    """Text."""


def _odd_hint(a: set[int]) -> None:
    """Text."""


def _variadic(*a: int) -> None:
    """Text."""


def _no_words(a: int) -> None: ...


@tool(name="add", description="Add two numbers.")
def _sum(a: int, b: int) -> int:
    return a + b


@tool
def broken(text: str = "") -> str:
    """Always fails."""
    raise ValueError(f"no such thing: {text}")


@tool
def long(n: int) -> str:
    """Long text."""
    return "x" * n


@tool
async def later(n: int) -> int:
    """A coroutine."""
    await asyncio.sleep(0)
    return n + 1


BOX = Toolbox([_sum, broken, long, later], max_chars=100)


@pytest.mark.parametrize(
    ("call", "ok", "words"),
    [
        (ToolCall("add", '{"a": 1, "b": 2}'), True, "3"),
        (ToolCall("later", '{"n": 1}'), True, "2"),
        (ToolCall("ad", "{}"), False, "did you mean 'add'?"),
        (ToolCall("zzz", "{}"), False, "available: add, broken, long, later"),
        (ToolCall("add", '{"a": 1, '), False, "not JSON"),
        (ToolCall("add", "[1]"), False, "must be a JSON object"),
        (ToolCall("add", '{"a": 1}'), False, "'b' is missing"),
        (ToolCall("broken", "{}"), False, "ValueError: no such thing"),
        (ToolCall("long", '{"n": 150}'), True, "x" * 100 + "\n[cut: 50 more characters]"),
    ],
)
def test_toolbox_observations(call: ToolCall, ok: bool, words: str) -> None:
    for seen in (BOX.run(call), asyncio.run(BOX.arun([call]))[0]):
        assert seen.ok is ok and words in seen.text
    message = BOX.run(call).to_message()
    assert message.role == "tool" and message.name == call.name


def test_calls_run_side_by_side_and_are_reported_in_call_order() -> None:
    barrier = threading.Barrier(2, timeout=10)

    @tool
    def meet(n: int) -> int:
        """Returns only when another call is in it too."""
        barrier.wait()
        return n

    seen = asyncio.run(Toolbox([meet]).arun([ToolCall("meet", '{"n": 1}'), ToolCall("meet", '{"n": 2}')]))
    assert [item.text for item in seen] == ["1", "2"]


def test_a_tool_from_a_given_schema() -> None:
    spec = ToolSpec("echo", "Say it again.", {"type": "object", "properties": {"x": {"type": ["string", "null"]}}})
    echo = Tool(spec, lambda x="": x)
    assert echo.call({"x": "a"}) == "a" and echo.call({"x": None}) == ""
    with pytest.raises(ToolError):
        echo.call({"x": 1})


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(_json)
def test_any_json_gives_an_observation(value: Any) -> None:
    for name in ("add", "long", "later", ""):
        BOX.run(ToolCall(name, json.dumps(value)))
    assert isinstance(problems(value, forecast.spec.parameters), list)


def test_the_talk_wing_needs_no_torch() -> None:
    code = (
        "import sys, puyu.client, puyu.tools.calculate, puyu.agent.loop; "
        "bad = {'torch', 'numpy', 'transformers', 'tokenizers'} & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
