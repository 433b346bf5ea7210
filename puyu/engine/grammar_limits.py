"""What must be refused before llguidance sees a grammar, since it would take seconds, for ever, or the process.

Found by bench/serve_harness.py with llguidance 1.9: nested counted repetitions are written out; `multipleOf` is worked
out digit by digit, one state for each remainder; numbers at the lower end of 64 bits never end its recursion.

    check_numbers({"type": "integer", "minimum": -(2**63), "maximum": 5})      RequestError
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

from puyu.errors import RequestError

MAX_UNROLLED = 20_000
"""Characters that a regular expression has when its counted repetitions are written out. llguidance writes them out at
the first step, and nested ones take it seconds."""
MAX_MULTIPLE = 100_000
"""Digits of a `multipleOf`, without point and closing zeros, as a number: remainders that must be told apart."""
LEAST = -(2**62)
"""The smallest number that a schema may hold."""


def check_repetitions(texts: Iterable[str]) -> None:
    """Refuse nested counted repetitions. In a Lark grammar brackets need not be classes, so both readings count."""
    size = 0
    for text in texts:
        size += max(unrolled_size(text), unrolled_size(text.replace("[", " ").replace("]", " "))) - len(text)
    if size > MAX_UNROLLED:
        raise RequestError(
            f"its counted repetitions, as in (a{{100}}){{100}}, unroll to {size} characters",
            param="guide",
            remedy=f"at most {MAX_UNROLLED}; use * or + instead",
        )


_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?P<low>\d+)(?:,(?P<high>\d*))?\}|.", re.DOTALL)


def unrolled_size(regex: str) -> int:
    """Characters of a regular expression whose `{n,m}` are written out m times (n times where m is open)."""
    sizes, last = [0], 0
    for match in _TOKEN.finditer(regex):
        if match["low"]:
            count = int(match["high"] or match["low"])
            sizes[-1] += last * max(count - 1, 0)
            last *= max(count, 1)
        elif match[0] == "(":
            sizes.append(0)
        elif match[0] == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        else:
            last = 1
            sizes[-1] += 1
    return sum(sizes)


def strings(schema: Any) -> Iterator[str]:
    """All texts of a schema that a repetition may stand in: patterns, and the keys of `patternProperties`."""
    waiting = [schema]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if "{" in item:
                yield item
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            waiting += item


def check_numbers(schema: Any) -> None:
    """Refuse numbers that llguidance cannot work with."""
    for key, value in _numbers(schema):
        if value < LEAST:
            message = f"the schema holds the number {value}, which is below {LEAST}"
            raise RequestError(message, param="guide", remedy="leave the limit out")
        if key == "multipleOf" and not (value > 0 and _significand(value) <= MAX_MULTIPLE):
            message = f"multipleOf must be above 0 and of few digits, at most {MAX_MULTIPLE} without point and zeros"
            raise RequestError(message, param="guide", remedy="use a rounder one")


def _significand(value: int | float) -> int:
    digits = Decimal(str(value)).normalize().as_tuple().digits
    return int("".join(map(str, digits[:20])))


def _numbers(schema: Any) -> Iterator[tuple[str, int | float]]:
    """Every number of a schema with the key that it stands under; of a list, the key of the list."""
    waiting: list[tuple[str, Any]] = [("", schema)]
    while waiting:
        key, item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.items()
        elif isinstance(item, list):
            waiting += [(key, inner) for inner in item]
        elif isinstance(item, int | float) and not isinstance(item, bool):
            yield key, item


def embedded(grammar: str) -> Iterator[Any]:
    """The JSON Schemas that stand in a Lark grammar after `%json`; what is no JSON is left to llguidance."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"%json\s*", grammar):
        try:
            yield decoder.raw_decode(grammar, match.end())[0]
        except (ValueError, RecursionError):
            continue
