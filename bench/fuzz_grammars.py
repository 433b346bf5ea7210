"""Forms of answers that are hard, endless, broken or huge, for serve_harness.py: regular expressions, Lark and GBNF
grammars, JSON Schemas, choices.

    grammar_body("puyu", random.Random(1))      a chat that asks for one of them
"""

from __future__ import annotations

import json
import random
from typing import Any

from fuzz_bodies import HELLO, SCHEMA, Body, Dialect

SIZES = (3, 30, 300, 3_000)
NUMBERS = (0, -1, 0.1, 12_345.678, 2**31, -(2**31), 2**53, -(2**63) + 1, -(2**63), 2**63, 2**64, -1e300, 1e300, 5e-324)


def grammar_body(dialect: Dialect, rng: random.Random) -> Body:
    """A chat with a form that is hard, endless, broken or huge."""
    body: Body = {"messages": HELLO, "max_tokens": rng.choice((4, 30, 200)), "stream": rng.random() < 0.3}
    if dialect == "llama":
        if rng.random() < 0.4:
            return body | {"grammar": _gbnf(rng)}
        return body | {"response_format": {"type": "json_object", "schema": _schema(rng)}}
    kind = rng.choice(("regex", "grammar", "json", "response_format", "tools", "choice"))
    if kind == "response_format":
        return body | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": _schema(rng)}}}
    if kind == "tools":
        tool = {"type": "function", "function": {"name": "f", "parameters": _schema(rng)}}
        return body | {"tools": [tool], "tool_choice": "required"}
    value = {"regex": _regex, "grammar": _lark, "json": _schema, "choice": _choice}[kind](rng)
    return body | {"structured_outputs": {kind: value}}


def _regex(rng: random.Random) -> Any:
    n = rng.choice(SIZES)
    return rng.choice(
        (
            f"((a{{{n}}}){{{n}}}){{{n}}}",
            "(" * n + "a" + ")" * n,
            "(" * n,
            f"(a|aa){{0,{n}}}b",
            "(a*)*" * min(n, 50) + "b",
            "|".join(f"word{i}" for i in range(n)),
            ".*" * min(n, 200) + "x",
            "[^\\n]*" * 20,
            "\\p{L}+" * min(n, 30),
            "(?=a)b",
            "(?<!a)b",
            "\\1(a)",
            "[a-",
            "a{2,1}",
            "a{99999999}",
            "",
            "^$",
            "\\",
            "(?i)" + "a" * n,
            f"[\\u0000-\\uffff]{{{n}}}",
            f"(.{{0,{n}}}|x)+y",
            "\\b",
            f"(?:a?){{{n}}}a{{{n}}}",
            "[[:alpha:]]+",
            "\\d{4}-\\d{2}",
            "&",
            "~(.*a.*)&(.*b.*)",
        )
    )


def _lark(rng: random.Random) -> Any:
    n = rng.choice(SIZES)
    return rng.choice(
        (
            "start: start",
            "start: a\na: b\nb: a",
            'start: start start | "a"',
            'start: "a" start | ',
            "start: " + "(" * n + '"a"' + ")" * n,
            "start: " + " | ".join(f'"w{i}"' for i in range(n)),
            "\n".join(f"r{i}: r{i + 1}" for i in range(n)) + f'\nr{n}: "x"\nstart: r0',
            "start: A+\nA: /(a|b)*/ /(a|c)*/",
            f"start: A\nA: /((a{{{n}}}){{{n}}})/",
            "start: undefined_rule",
            "start",
            "",
            "start: /[/",
            'start: "',
            f'start: "a"~{n}',
            f'start: ("a" ~ 1..{n})+',
            "%import common.INT\nstart: INT",
            "%ignore /a/\nstart: /a+/",
            "start: <|im_end|>",
            'start: x\nx: "" x | ""',
            'start[capture="a"]: /.*/',
            'start: %json {"type": "nothing"}',
            "start: %json " + json.dumps(_schema(rng))[:2000],
            "start[max_tokens=3]: /.*/ start",
            "start: /.*/",
            'start: gen("a")',
            "root ::= [a-z]",
            "😀: /a/\nstart: 😀",
        )
    )


def _choice(rng: random.Random) -> Any:
    n = rng.choice((1, 100, 3_000))
    return rng.choice(
        ([f"choice {i}" for i in range(n)], [""], [], ["a" * n], ["a", "a"], ["\0"], ["(", ")*"], ["😀" * n])
    )


def _schema(rng: random.Random) -> Any:
    n = rng.choice((2, 20, 200, 2_000))
    nested: Any = {"type": "string"}
    for _ in range(min(n, 50)):
        nested = {"type": "object", "properties": {"a": nested}, "required": ["a"]}
    return rng.choice(
        (
            {},
            {"type": "nothing"},
            {"type": 3},
            {"type": ["string", "null"]},
            nested,
            {"$ref": "#"},
            {"$ref": "#/nowhere"},
            {"$ref": "http://127.0.0.1:9/a.json"},
            {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
            {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}},
            {"type": "string", "pattern": _regex(rng)},
            {"type": "string", "minLength": n, "maxLength": n * n},
            {"type": "array", "items": {"type": "integer"}, "minItems": n, "maxItems": n},
            {"enum": []},
            {"enum": list(range(n))},
            {"enum": [{"a": [1, None]}]},
            {"const": "a" * n},
            {"anyOf": [{"const": i} for i in range(n)]},
            {"anyOf": []},
            {"not": {}},
            {"allOf": [{"type": "string"}, {"type": "integer"}]},
            {"oneOf": [{"type": "string"}, {"minLength": 1}]},
            {
                "type": "object",
                "properties": {f"p{i}": {"type": "string"} for i in range(n)},
                "required": [f"p{i}" for i in range(n)],
            },
            {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(n)}},
            {"type": "object", "minProperties": 5},
            {"type": "object", "patternProperties": {_regex(rng): {"type": "string"}}},
            {"type": "object", "required": ["not there"]},
            {"type": "integer", "minimum": 10, "maximum": 1},
            {"type": ["integer", "string"], "const": rng.choice(NUMBERS)},
            {"enum": [rng.choice(NUMBERS), "a"]},
            {"type": "integer", "minimum": rng.choice(NUMBERS), "maximum": rng.choice(NUMBERS)},
            {"type": "number", "exclusiveMinimum": rng.choice(NUMBERS), "multipleOf": rng.choice(NUMBERS)},
            {"type": "number", "multipleOf": 1e-9},
            {"type": "integer", "multipleOf": 0},
            {"type": "integer", "minimum": -(10**30), "maximum": 10**30},
            {"type": "string", "format": "date-time"},
            {"type": "string", "format": "?"},
            {"if": {"type": "string"}, "then": {"minLength": 2}},
            {"type": "object", "additionalProperties": {"$ref": "#"}},
            {"properties": {"😀\0": {"type": "null"}}, "required": ["😀\0"]},
            {"type": "array", "prefixItems": [SCHEMA] * min(n, 50)},
            SCHEMA,
        )
    )


def _gbnf(rng: random.Random) -> str:
    """Grammars in llama.cpp's own language."""
    n = rng.choice(SIZES)
    return str(
        rng.choice(
            (
                'root ::= "a" root | "a"',
                "root ::= root",
                'root ::= root "a"',
                "root ::= undefined",
                "",
                "root ::= [",
                'root ::= "',
                "root ::= " + "(" * n + '"a"' + ")" * n,
                "root ::= " + " | ".join(f'"w{i}"' for i in range(n)),
                f'root ::= "a"{{{n},{n * n}}}',
                'root ::= ("a"*)*',
                'root ::= "" | root',
                'root ::= ("a" | "a")+ "b"',
                "x ::= [a-z]",
                'root ::= [a-z]+ "\\n"',
                "root ::= .*",
                f'root ::= (("a"{{{n}}}){{{n}}}){{{n}}}',
                "\n".join(f"r{i} ::= r{i + 1}" for i in range(n)) + f'\nr{n} ::= "x"\nroot ::= r0',
            )
        )
    )
