"""JSON Schema from a Python signature, and the check of arguments against it.

    >>> def f(n: int, unit: str | None = None) -> str: "Convert."
    >>> signature_schema(f)[0]["required"]
    ['n']
    >>> problems({"n": "3"}, signature_schema(f)[0])
    ["'n' must be an integer, not '3'"]

Types: str, int, float, bool, None, list[T], dict[str, T], Literal, Optional and unions, Enum. The check covers the
keywords that are made here and those that tool servers commonly send (type, properties, required,
additionalProperties, items, enum, const, anyOf); other keywords are the tool's own to check.
Nothing is guessed: "3" is not taken for 3; a whole float is taken for an integer, as JSON has one kind of number.
"""

from __future__ import annotations

import difflib
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from puyu.errors import ConfigError

SCALARS: Mapping[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
NAMES: Mapping[str, str] = {
    "string": "text",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "an object",
}


@dataclass(frozen=True, slots=True)
class Bound:
    """How JSON values become the values that the function takes: a converter for each parameter that needs one."""

    converters: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)

    def to_python(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Checked arguments, converted."""
        return {name: self.converters.get(name, _same)(value) for name, value in arguments.items()}


def _same(value: Any) -> Any:
    return value


# -- signature -> schema ---------------------------------------------------------------------------------------


def signature_schema(function: Callable[..., Any]) -> tuple[dict[str, Any], Bound, str]:
    """The schema of the parameters, the converters, and the docstring's first paragraph."""
    summary, texts = read_docstring(inspect.getdoc(function) or "")
    hints = _hints(function)
    properties: dict[str, Any] = {}
    converters: dict[str, Callable[[Any], Any]] = {}
    required = []
    for name, parameter in inspect.signature(function).parameters.items():
        where = f"parameter {name!r} of tool {function.__name__!r}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigError(f"{where} must be an ordinary named parameter", remedy="no *args, **kwargs or /")
        if name not in hints:
            raise ConfigError(f"{where} has no type hint", remedy=f"write `{name}: str`, say")
        converters[name] = _converter(hints[name])
        properties[name] = type_schema(hints[name], where) | ({"description": texts[name]} if name in texts else {})
        if parameter.default is parameter.empty:
            required.append(name)
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return schema, Bound(converters), summary


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except NameError as error:
        raise ConfigError(f"a type hint of tool {function.__name__!r} cannot be resolved: {error}") from error


def type_schema(hint: Any, where: str) -> dict[str, Any]:
    """The JSON Schema of one type hint; ConfigError names the place of one that has none."""
    if hint in SCALARS:
        return {"type": SCALARS[hint]}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": [member.value for member in hint]}
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [type_schema(arg, where) for arg in args]}
    if hint is list or origin in (list, Sequence):
        return {"type": "array"} | ({"items": type_schema(args[0], where)} if args else {})
    if hint is dict or origin in (dict, Mapping):
        if args and args[0] is not str:
            raise ConfigError(f"{where}: the keys of a JSON object are text", remedy="use dict[str, ...]")
        inner = type_schema(args[1], where) if args and args[1] is not Any else None
        return {"type": "object"} | ({"additionalProperties": inner} if inner else {})
    if hint is Any:
        return {}
    remedy = "use str, int, float, bool, list, dict, Literal, Optional or an Enum"
    raise ConfigError(f"{where}: no JSON Schema for the type {hint!r}", remedy=remedy)


def _converter(hint: Any) -> Callable[[Any], Any]:
    """JSON value -> Python value of the hint; the value has passed the check."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint
    if hint is int or hint is float:
        return hint
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _union_converter(args)
    if origin in (list, Sequence) and args:
        inner = _converter(args[0])
        return lambda value: [inner(item) for item in value]
    if origin in (dict, Mapping) and args:
        inner = _converter(args[1])
        return lambda value: {key: inner(item) for key, item in value.items()}
    return _same


def _union_converter(args: tuple[Any, ...]) -> Callable[[Any], Any]:
    choices = [(type_schema(arg, "union"), _converter(arg)) for arg in args]

    def convert(value: Any) -> Any:
        for schema, converter in choices:
            if not problems(value, schema):
                return converter(value)
        return value

    return convert


_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?):\s*$")
_ARGS = ("Args", "Arguments", "Parameters")
_PARAM = re.compile(r"^:param\s+(?:\S+\s+)?(\w+):\s*(.*)$")
_ARG = re.compile(r"^\s+\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")


def read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """First paragraph, and the text of each parameter (Google's `Args:` or `:param name:`)."""
    texts: dict[str, str] = {}
    summary: list[str] = []
    section, current, opening = "", "", True
    for line in text.splitlines():
        if heading := _SECTION.match(line):
            section, current, opening = heading[1], "", False
        elif match := _PARAM.match(line) or (
            _ARG.match(line) if section in ("Args", "Arguments", "Parameters") else None
        ):
            current, opening = match[1], False
            texts[current] = match[2].strip()
        elif not line.strip():
            current, opening = "", opening and not summary
        elif current:
            texts[current] = f"{texts[current]} {line.strip()}".strip()
        elif opening:
            summary.append(line.strip())
    return " ".join(summary), texts


# -- arguments against a schema --------------------------------------------------------------------------------


def problems(value: Any, schema: Mapping[str, Any], where: str = "") -> list[str]:
    """What is wrong with a JSON value, each with its place; empty when it fits."""
    name = f"'{where}'" if where else "the value"
    if "anyOf" in schema:
        return _any_of(value, schema["anyOf"], where)
    if "const" in schema and value != schema["const"]:
        return [f"{name} must be {schema['const']!r}, not {_short(value)}"]
    if "enum" in schema and not any(value == item and type(value) is type(item) for item in schema["enum"]):
        return [f"{name} must be one of {', '.join(map(repr, schema['enum']))}, not {_short(value)}"]
    kinds = schema.get("type")
    allowed = [kinds] if isinstance(kinds, str) else list(kinds or ())
    if allowed and not any(_is(value, kind) for kind in allowed):
        wanted = " or ".join(NAMES.get(kind, kind) for kind in allowed)
        return [f"{name} must be {wanted}, not {_short(value)}"]
    if isinstance(value, Mapping):
        return _object_problems(value, schema, where)
    if isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        return [found for i, item in enumerate(value) for found in problems(item, schema["items"], f"{where}[{i}]")]
    return []


def _any_of(value: Any, choices: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    found = [problems(value, choice, where) for choice in choices]
    if any(not item for item in found):
        return []
    return [" or ".join(dict.fromkeys(text for item in found for text in item))]


def _object_problems(value: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> list[str]:
    known: Mapping[str, Any] = schema.get("properties") or {}
    more = schema.get("additionalProperties", True)
    prefix = f"{where}." if where else ""
    found = [f"'{prefix}{name}' is missing" for name in schema.get("required") or () if name not in value]
    for key, item in value.items():
        if key in known:
            found += problems(item, known[key], f"{prefix}{key}")
        elif more is False:
            near = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none'}"
            found.append(f"'{prefix}{key}' is unknown ({hint})")
        elif isinstance(more, Mapping):
            found += problems(item, more, f"{prefix}{key}")
    return found


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    checks: Mapping[str, bool] = {
        "string": isinstance(value, str),
        "integer": isinstance(value, int) or (isinstance(value, float) and value.is_integer()),
        "number": isinstance(value, int | float),
        "boolean": False,
        "null": value is None,
        "array": isinstance(value, list),
        "object": isinstance(value, Mapping),
    }
    return checks.get(kind, True)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
