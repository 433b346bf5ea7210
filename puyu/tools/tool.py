"""What a model may call: a Python function with a JSON Schema made from its signature and docstring.

    >>> @tool
    ... def weather(city: str, days: int = 1) -> str:
    ...     '''Forecast for a city.
    ...
    ...     Args:
    ...         city: its name
    ...     '''
    ...     return f"{city}: sun for {days} days"
    >>> weather.call({"city": "Wuhan"})
    'Wuhan: sun for 1 days'

A `Tool` validates arguments, runs, and gives text; every mistake is a ToolError whose words are meant for the
model. A `Toolbox` turns a model's ToolCall into an `Observation`, whatever happens. It knows no model and no
agent; it sets no time limit (a thread cannot be stopped) and gives no isolation: a tool is trusted code, and what
a model writes is only data to it.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

from puyu.errors import ConfigError, InputError, ToolError
from puyu.tools.schema import Bound, problems, signature_schema
from puyu.types import Message, ToolCall, ToolSpec

MAX_CHARS = 8000


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call. `bound` turns JSON arguments into Python's (enum members, defaults)."""

    spec: ToolSpec
    function: Callable[..., Any]
    bound: Bound = field(default_factory=Bound)

    @property
    def name(self) -> str:
        return self.spec.name

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the function takes them; ToolError lists every problem with its place."""
        found = problems(arguments, self.spec.parameters)
        if found:
            schema = json.dumps(self.spec.parameters, ensure_ascii=False)
            raise ToolError(
                f"bad arguments for {self.name!r}: {'; '.join(found)}", remedy=f"follow the schema {schema}"
            )
        return self.bound.to_python(arguments)

    def call(self, arguments: Mapping[str, Any]) -> str:
        """Validate, run, give the result as text. ToolError when it cannot."""
        values = self.check(arguments)
        return as_text(_explain(self.name, lambda: _finished(self.function(**values))))

    async def acall(self, arguments: Mapping[str, Any]) -> str:
        """Like `call`; a plain function runs in a thread, a coroutine function in this loop."""
        values = self.check(arguments)
        if not inspect.iscoroutinefunction(self.function):
            return await asyncio.to_thread(lambda: as_text(_explain(self.name, lambda: self.function(**values))))
        try:
            return as_text(await self.function(**values))
        except Exception as error:
            raise _failure(self.name, error) from error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The plain function, for people."""
        return self.function(*args, **kwargs)


def _finished(value: Any) -> Any:
    return asyncio.run(value) if inspect.iscoroutine(value) else value


def _explain(name: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:
        raise _failure(name, error) from error


def _failure(name: str, error: Exception) -> ToolError:
    if isinstance(error, ToolError):
        return error
    return ToolError(f"{name!r} failed: {type(error).__name__}: {error}")


def as_text(value: Any) -> str:
    """Text as it is; None as nothing; all else as JSON, or by `str` where JSON has no form for it."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False, default=str)


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(*, name: str = "", description: str = "") -> Callable[[Callable[..., Any]], Tool]: ...


def tool(
    function: Callable[..., Any] | None = None, /, *, name: str = "", description: str = ""
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a Tool of a function: `@tool`, or `@tool(name=..., description=...)`.

    The schema comes from the type hints (str, int, float, bool, list, dict, Literal, Optional, enum), the texts
    from the docstring (`Args:` section or `:param name:`). ConfigError names a parameter without a usable hint.
    """

    def make(target: Callable[..., Any]) -> Tool:
        parameters, bound, summary = signature_schema(target)
        text = description or summary
        if not text:
            remedy = "write a docstring: it is what the model reads"
            raise ConfigError(f"tool {target.__name__!r} has no description", remedy=remedy)
        return Tool(ToolSpec(name or target.__name__, text, parameters), target, bound)

    return make if function is None else make(function)


@dataclass(frozen=True, slots=True)
class Observation:
    """What a call led to: the text for the model, and whether it is a result or a mistake explained."""

    call: ToolCall
    text: str
    ok: bool = True

    def to_message(self) -> Message:
        """The turn that answers the call."""
        return Message("tool", self.text, tool_call_id=self.call.id, name=self.call.name)


class Toolbox:
    """Tools by name. `run` never raises for what a model did wrong: the model reads what it did.

    `max_chars` caps every observation; what is cut is said in the text.
    """

    def __init__(self, tools: Iterable[Tool | Callable[..., Any]] = (), *, max_chars: int = MAX_CHARS) -> None:
        self.max_chars = max_chars
        self._tools: dict[str, Tool] = {}
        for item in tools:
            made = item if isinstance(item, Tool) else tool(item)
            if made.name in self._tools:
                raise ConfigError(f"two tools are named {made.name!r}", remedy="rename one: @tool(name=...)")
            self._tools[made.name] = made

    def __len__(self) -> int:
        return len(self._tools)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tools)

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        """What the model is told."""
        return tuple(item.spec for item in self._tools.values())

    def run(self, call: ToolCall) -> Observation:
        """Run one call to an observation."""
        try:
            found, arguments = self._open(call)
            return self._seen(call, found.call(arguments))
        except (ToolError, InputError) as error:
            return self._seen(call, f"error: {error}", ok=False)

    async def arun(self, calls: Iterable[ToolCall]) -> tuple[Observation, ...]:
        """Run calls side by side; observations come in call order."""
        return tuple(await asyncio.gather(*(self._arun_one(call) for call in calls)))

    async def _arun_one(self, call: ToolCall) -> Observation:
        try:
            found, arguments = self._open(call)
            return self._seen(call, await found.acall(arguments))
        except (ToolError, InputError) as error:
            return self._seen(call, f"error: {error}", ok=False)

    def _open(self, call: ToolCall) -> tuple[Tool, dict[str, Any]]:
        if call.name not in self._tools:
            near = difflib.get_close_matches(call.name, self.names, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]!r}?" if near else f"available: {', '.join(self.names) or 'none'}"
            raise ToolError(f"there is no tool {call.name!r}", remedy=remedy)
        return self._tools[call.name], call.parsed()

    def _seen(self, call: ToolCall, text: str, *, ok: bool = True) -> Observation:
        if len(text) > self.max_chars:
            cut = len(text) - self.max_chars
            text = f"{text[: self.max_chars]}\n[cut: {cut} more characters]"
        return Observation(call, text, ok)
