"""Grammars that force calls: nothing but one call, or one and more, of exactly the tools on offer.

Each tool is an alternative of its own: the text up to the arguments as models are trained to write it, then the
tool's JSON Schema, whose references are its own. The text is Lark as llguidance reads it, for
`Guide("grammar", text)`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from puyu.errors import RequestError
from puyu.types import Guide, ToolSpec

_OPTIONS = {"lenient": True, "whitespace_pattern": "[ \\n]{1,32}"}
"""Of the JSON: keywords that llguidance does not know are not enforced, and space comes to an end."""


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a forced call is written. `before` and `after` are symbols of Lark, `head` and `tail` plain text around the
    arguments."""

    head: Callable[[str], str]
    """The text from the call's beginning to its arguments, for a tool of this name."""
    tail: str = "}"
    first: str = ""
    """Symbols before the first call."""
    before: str = ""
    after: str = ""
    between: str = ""
    """Text between two calls."""


def call_grammar(form: CallForm, tools: Sequence[ToolSpec], *, several: bool, otherwise: Guide | None = None) -> str:
    """Lark for one call, or for `several`, or for an answer of the form `otherwise`; RequestError when there is nothing
    to call."""
    if not tools:
        raise RequestError("a call is wanted and no tool is on offer", param="tools")
    more = f"({literal(form.between)} call)*" if form.between else "call*"
    lines = ["start: calls"] if otherwise is None else ["start: calls | answer", f"answer: {_answer(otherwise)}"]
    lines += [
        f"calls: {form.first} call {more if several else ''}",
        "call: " + " | ".join(f"call_{index}" for index in range(len(tools))),
        *(f"call_{index}: {_rule(form, tool)}" for index, tool in enumerate(tools)),
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _answer(guide: Guide) -> str:
    """The form of an answer without calls, as one rule."""
    if guide.kind == "json_schema":
        return f"%json {guide.value if isinstance(guide.value, str) else json.dumps(guide.value, ensure_ascii=False)}"
    if guide.kind == "choice" and not isinstance(guide.value, str):
        return " | ".join(literal(str(text)) for text in guide.value)
    remedy = "use a JSON Schema or a choice, or offer no tools"
    raise RequestError(f"a {guide.kind} cannot stand beside tools", param="guide", remedy=remedy)


def _rule(form: CallForm, tool: ToolSpec) -> str:
    tail = literal(form.tail) if form.tail else ""
    parts = (form.before, literal(form.head(tool.name)), f"%json {_schema(tool)}", tail, form.after)
    return " ".join(part for part in parts if part)


def _schema(tool: ToolSpec) -> str:
    try:
        return json.dumps({"type": "object", **tool.parameters, "x-guidance": _OPTIONS}, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the parameters of tool {tool.name!r} are not JSON: {error}", param="tools") from error


def literal(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)


def json_head(before: str, key: str) -> Callable[[str], str]:
    """The head of a call that is a JSON object with `name` and, under `key`, the arguments."""

    def head(name: str) -> str:
        return f'{before}{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": '

    return head
