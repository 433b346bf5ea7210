"""The JSON object that a call is written as, read while it is being written: where it ends, its name, its arguments.

    {"name": "calculator", "arguments": {"expression": "1+1"}}

The arguments are given out as the model writes them, once the name is known. Nothing is parsed and written again, so
what the model wrote is what a client gets, also where it is not quite JSON.
"""

from __future__ import annotations

import json
import re
from typing import Any

from puyu.engine.calls.reader import Output

ARGUMENTS = ("parameters", "arguments")
_MEMBERS = ("name", "type", "id", "function", *ARGUMENTS)
_IN_STRING = re.compile(r'[^"\\\n<]+')


class Nesting:
    """Brackets and strings: how deep a text that should be JSON stands."""

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self.is_torn = False
        """In a string that has a raw line break, which JSON does not allow."""
        self._escaped = False

    def take(self, text: str, at: int) -> str:
        """The next character; in a string, as many as cannot end it."""
        run = _IN_STRING.match(text, at) if self.in_string and not self._escaped else None
        piece = run[0] if run else text[at]
        if self.in_string:
            self._in_string(piece)
        elif piece == '"':
            self.in_string, self.is_torn = True, False
        elif piece in "{[":
            self.depth += 1
        elif piece in "}]":
            self.depth -= 1
        return piece

    def _in_string(self, piece: str) -> None:
        if self._escaped:
            self._escaped = False
        elif piece == "\\":
            self._escaped = True
        elif piece == '"':
            self.in_string = False
        elif piece == "\n":
            self.is_torn = True


class Body:
    """One object, from its `{` on. Begins a call in `out` when it is one, and leaves the call's end to the caller."""

    def __init__(self, out: Output, *, certain: bool) -> None:
        """`certain`: what has a name is a call. Otherwise it also needs arguments."""
        self.is_done = False
        """The object is complete."""
        self.is_call = False
        """The call has begun."""
        self.nesting = Nesting()
        self._out, self._certain = out, certain
        self._text: list[str] = []
        self._name = ""
        self._arguments: str | None = None
        self._key: str | None = None
        self._token: list[str] = []
        self._num_members = 0
        self._is_live = False  # the arguments are being given out
        self._is_given = False  # all of them have been

    @property
    def text(self) -> str:
        """All that was read."""
        return "".join(self._text)

    @property
    def arguments(self) -> str | None:
        """The arguments as they were written, unless they were given out on the way."""
        return self._arguments

    @property
    def is_foreign(self) -> bool:
        """Its first member is none that a call begins with, so this is some other JSON."""
        return self._num_members == 0 and self._key is not None and self._key not in _MEMBERS

    def feed(self, text: str, at: int) -> int:
        """Read on from `at`, which is before the end of the object; returns how far."""
        was_in_string, depth = self.nesting.in_string, self.nesting.depth
        piece = self.nesting.take(text, at)
        self._text.append(piece)
        if was_in_string or self.nesting.in_string:
            self._add(piece)
            if not self.nesting.in_string and depth == 1:
                self._string_ends()
        elif self.nesting.depth == 0:
            self._member_ends()
            self.is_done = True
        elif depth == 1 and piece == ":" and self._key is None:
            self._key_ends()
        elif depth == 1 and piece == ",":
            self._member_ends()
        elif depth > 0:
            self._bracket_or_more(piece, depth)
        return at + len(piece)

    def _bracket_or_more(self, piece: str, depth: int) -> None:
        if self._is_live_from(depth):
            self._is_live = True
        self._add(piece)
        if self._is_live and self.nesting.depth == 1:
            self._is_live, self._is_given = False, True

    def _is_live_from(self, depth: int) -> bool:
        """The arguments begin here, as an object or a list, and whose they are is known."""
        opens = depth == 1 and self.nesting.depth == 2
        return opens and self.is_call and self._key in ARGUMENTS and not self._is_given and not self._value

    def finish(self) -> bool:
        """No more will come. False: this was no call, and `text` is what it was instead."""
        if not self.is_call:
            return False
        if not self._is_given and not self._is_live:
            torn = self._value if self._key in ARGUMENTS else ""
            self._out.arguments(torn or ("{}" if self.is_done else self.text.strip("\n")))
        return True

    @property
    def _value(self) -> str:
        return "".join(self._token).strip()

    def _add(self, piece: str) -> None:
        if self._is_live:
            self._out.arguments(piece)
        else:
            self._token.append(piece)

    def _string_ends(self) -> None:
        if self._key == "name" and not self._name:
            name = loads(self._value)
            self._name = name if isinstance(name, str) else ""
            self._settle()

    def _key_ends(self) -> None:
        key = loads(self._value)
        self._key = key if isinstance(key, str) else self._value
        self._token = []
        self._settle()

    def _member_ends(self) -> None:
        if self._key in ARGUMENTS and self._arguments is None and not self._is_given:
            self._arguments = whole_arguments(self._value)
        self._num_members += self._key is not None
        self._key, self._token = None, []
        self._settle()

    def _settle(self) -> None:
        """Begin the call when it is known to be one, and give its arguments if they came before."""
        has_arguments = self._arguments is not None or self._key in ARGUMENTS
        if self._name and not self.is_call and (self._certain or has_arguments):
            self._out.begin(self._name)
            self.is_call = True
        if self.is_call and self._arguments is not None and not self._is_given:
            self._out.arguments(self._arguments)
            self._is_given = True


def whole_arguments(written: str) -> str:
    """Arguments as they were written; those of a string that holds an object, and of nothing at all, as an object."""
    inner = loads(written) if written.startswith('"') else None
    return inner if isinstance(inner, str) and isinstance(loads(inner), dict) else written or "{}"


def loads(text: str) -> Any:
    """The JSON value of a text, or None. Half of a surrogate pair, which no UTF-8 can hold, becomes `?`."""
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):  # torn, or numbers of thousands of digits, or brackets without end
        return None
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value
