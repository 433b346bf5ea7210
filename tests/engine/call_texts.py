"""Calls as each format writes them, and what a reader makes of a text, for the tests of both."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from puyu.engine.calls import NAMES, CallFormat, CallReader, join_calls, pick_format
from puyu.tokenizer.template import CHAT_TEMPLATE
from puyu.tokenizer.tokenizer import from_merges
from puyu.types import CallPart, ToolCall

Read = tuple[str, tuple[ToolCall, ...]]

TOKENIZER = from_merges([(b"}", b"}"), (b'"', b":"), (b"}", b"\n"), (b"\n", b"{")], chat_template=CHAT_TEMPLATE)
FORMATS = {name: pick_format(TOKENIZER, name) for name in NAMES}
FORMATS["llama3-marked"] = replace(FORMATS["llama3"], markers=frozenset(["<|python_tag|>"]))
FORMATS["hermes-marked"] = replace(FORMATS["hermes"], markers=frozenset(["<tool_call>", "</tool_call>"]))

WRITTEN = {
    "internlm2": '<|action_start|><|plugin|>\n{"name": NAME, "parameters": ARGUMENTS}<|action_end|>',
    "hermes": '<tool_call>\n{"name": NAME, "arguments": ARGUMENTS}\n</tool_call>',
    "llama3": '{"name": NAME, "parameters": ARGUMENTS}',
    "react": "Action: NAME\nAction Input: ARGUMENTS",
}
BETWEEN = {"internlm2": "", "hermes": "\n", "llama3": "; ", "react": "\n"}


def write(name: str, call: ToolCall) -> str:
    quoted = call.name if name == "react" else json.dumps(call.name, ensure_ascii=False)
    before, after = WRITTEN[name].replace("NAME", quoted).split("ARGUMENTS")
    return before + call.arguments + after


def cut(text: str, places: Iterable[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def feed(reader: CallReader, format: CallFormat, text: str, places: Sequence[int] = ()) -> list[str | CallPart]:
    """All that a reader gives for a text; special tokens of the format stand between the pieces."""
    pieces: list[str | CallPart] = []
    marks = "|".join(map(re.escape, format.markers)) or r"(?!)"
    for part in re.split(f"({marks})", text):
        if part in format.markers:
            pieces += reader.marker(part)
        else:
            pieces += itertools.chain.from_iterable(map(reader.push, cut(part, places)))
    return pieces


def joined(pieces: Iterable[str | CallPart]) -> Read:
    """Text and calls. A call's first part is its name alone; later ones are arguments alone; calls come in order."""
    pieces = list(pieces)
    parts = [piece for piece in pieces if isinstance(piece, CallPart)]
    seen = -1
    for part in parts:
        assert part.index in (seen, seen + 1)
        assert not part.name or part.index == seen + 1
        assert part.index == seen + 1 or part.arguments
        assert not (part.index == seen + 1 and part.arguments)
        seen = part.index
    return "".join(piece for piece in pieces if isinstance(piece, str)), join_calls(parts)


def read(name: str, text: str, places: Sequence[int] = (), *, several: bool = True) -> Read:
    reader = FORMATS[name].reader(several=several)
    return joined(feed(reader, FORMATS[name], text, places) + reader.close())
