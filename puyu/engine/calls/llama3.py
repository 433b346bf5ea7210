"""Calls of Llama 3.1 and later: an answer that begins with a JSON object which has a name and parameters.

    {"name": "f", "parameters": {...}}; {"name": "g", "parameters": {...}}

With <|python_tag|> before it, it need not have parameters.
"""

from __future__ import annotations

from puyu.engine.calls.body import Body
from puyu.engine.calls.reader import SPACE, CallReader

PYTHON_TAG = "<|python_tag|>"
_BETWEEN = SPACE + ";"


class Llama3Reader(CallReader):
    """Once something else has come, all is text; only the special token makes calls possible again."""

    def __init__(self, *, several: bool = True) -> None:
        super().__init__(several=several)
        self._state = self._before
        self._held = ""  # space, separators and the tag, before what may be a call
        self._tag = ""  # may turn out to be the tag
        self._follows_call = False
        self._is_tagged = False
        self._body = Body(self._out, certain=False)

    def _read(self, text: str, at: int) -> int:
        return self._state(text, at)

    def _mark(self, name: str) -> None:
        if self._state == self._in_body:
            self._body_ends()
        elif self._tag:
            self._say("")
        self._state, self._is_tagged = self._before, True

    def _before(self, text: str, at: int) -> int:
        char = text[at]
        if not self._is_tagged and PYTHON_TAG.startswith(self._tag + char):
            self._tag += char
            self._is_tagged = self._tag == PYTHON_TAG
            if self._is_tagged:
                self._held, self._tag = self._held + PYTHON_TAG, ""
        elif not self._tag and char in (_BETWEEN if self._follows_call else SPACE):
            self._held += char
        elif not self._tag and char == "{":
            self._body, self._state = Body(self._out, certain=self._is_tagged), self._in_body
            return at
        else:
            self._say("")
            return at
        return at + 1

    def _in_body(self, text: str, at: int) -> int:
        at = self._body.feed(text, at)
        if self._body.is_done or (self._body.is_foreign and not self._is_tagged):
            self._body_ends()
        return at

    def _in_text(self, text: str, at: int) -> int:
        self._out.text(text[at:])
        return len(text)

    def _body_ends(self) -> None:
        if self._body.finish():
            self._out.end()
            self._state, self._held, self._follows_call, self._is_tagged = self._before, "", True, False
        else:
            self._say(self._body.text)

    def _end(self) -> None:
        if self._state == self._in_body:
            self._body_ends()
        if self._state == self._before and (self._held.strip(_BETWEEN) or self._tag or not self._follows_call):
            self._say("")

    def _say(self, text: str) -> None:
        self._out.text(self._held + self._tag + text)
        self._state, self._held, self._tag = self._in_text, "", ""
