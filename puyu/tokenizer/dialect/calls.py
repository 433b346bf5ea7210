"""Reading the JSON of one call as well as it can be, also when the model tore it. Knows no markers."""

from __future__ import annotations

import json
import re
from typing import Any

from puyu.types import ToolCall

_BODY = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"parameters"\s*: ?(.*)\}\s*', re.DOTALL)
_NAME = re.compile(r'"name"\s*:\s*"([^"\\]*)"')
_PARAMETERS = re.compile(r'"(?:parameters|arguments)"\s*:\s*(.*)', re.DOTALL)


def read_call(body: str) -> ToolCall:
    """Arguments as the model wrote them, also when they are torn; other shapes are read as well as they can be."""
    value, ours = json_or_none(body), _BODY.fullmatch(body)
    if isinstance(value, dict) and (ours is None or set(value) != {"name", "parameters"}):
        arguments = value.get("parameters", value.get("arguments", {}))
        return ToolCall(str(value.get("name", "")), json.dumps(arguments, ensure_ascii=False))
    if ours and isinstance(known := json_or_none(ours[1]), str):
        return ToolCall(known, ours[2])
    name, arguments = _NAME.search(body), _PARAMETERS.search(body)
    return ToolCall(name[1] if name else "", arguments[1] if arguments else body.strip("\n"))


def json_or_none(text: str) -> Any:
    """The value of a JSON text; None where it is torn, or a number of thousands of digits, or brackets without end."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
