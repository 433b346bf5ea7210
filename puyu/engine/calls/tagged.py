"""Calls between tags: InternLM2's special tokens, and the <tool_call> of Hermes, Qwen2.5 and Qwen3.

<|action_start|><|plugin|>\\n{"name": "f", "parameters": {...}}<|action_end|>      agrees with tokenizer.chat.parse
<tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>
"""

from __future__ import annotations

import json
import re

from puyu.engine.calls.body import Body
from puyu.engine.calls.reader import SPACE, CallReader
from puyu.tokenizer.chat import INTERPRETER

ACTION_START, ACTION_END = "<|action_start|>", "<|action_end|>"
PLUGIN_MARKER, INTERPRETER_MARKER = "<|plugin|>", "<|interpreter|>"
OPEN, CLOSE = "<tool_call>", "</tool_call>"

_FENCE = re.compile(r"\s*```(?:python|py)?\n(.*?)\n?```\s*", re.DOTALL)
_PLAIN = re.compile(r"[^<]*[^< \t\r\n]")  # up to the last character before < that is no space
_SPACES = re.compile(r"[ \t\r\n]+")


class Internlm2Reader(CallReader):
    """Tags are token ids, so text is never held back and never looked into."""

    def __init__(self, *, several: bool = True) -> None:
        super().__init__(several=several)
        self._in_block = False
        self._start_block()

    def _start_block(self) -> None:
        self._is_empty = True
        self._is_code = False
        self._before: list[str] = []  # what stands before the object, or the code
        self._body: Body | None = None

    def _read(self, text: str, at: int) -> int:
        if not self._in_block:
            self._out.text(text[at:])
            return len(text)
        self._is_empty = False
        if self._body is not None:
            return len(text) if self._body.is_done else self._body.feed(text, at)
        if text[at] == "{" and not self._is_code and not "".join(self._before).strip(SPACE):
            self._body = Body(self._out, certain=True)
            return at
        spaces = _SPACES.match(text, at)
        end = spaces.end() if spaces and not self._is_code else len(text)
        self._before.append(text[at:end])
        return end

    def _mark(self, name: str) -> None:
        if not self._in_block:
            self._in_block = name == ACTION_START
        elif name == ACTION_END:
            self._end_block()
        else:
            self._is_code = self._is_code or (self._is_empty and name == INTERPRETER_MARKER)
            if self._is_code and self._is_empty:
                self._out.begin(INTERPRETER)
            self._is_empty = False

    def _end(self) -> None:
        if self._in_block:
            self._end_block()

    def _end_block(self) -> None:
        """Each block that is not empty is a call, even without a name: the model is shown what it wrote."""
        before = "".join(self._before)
        if self._is_code:
            fenced = _FENCE.fullmatch(before)
            code = fenced[1] if fenced else before.strip("\n")
            self._out.arguments(json.dumps({"code": code}, ensure_ascii=False))
        elif not self._is_empty and not (self._body is not None and self._body.finish()):
            written = self._body.text if self._body is not None else ""
            known = self._body.arguments if self._body is not None else None
            self._out.begin("")
            self._out.arguments((before + written).strip("\n") if known is None else known)
        if not self._is_empty:
            self._out.end()
        self._in_block = False
        self._start_block()


class HermesReader(CallReader):
    """Tags are text, whether they are special tokens or not. One inside a string of the arguments does not count,
    unless that string is torn. A tag around something else is text. Space before a call belongs to neither."""

    def __init__(self, *, several: bool = True) -> None:
        super().__init__(several=several)
        self._state = self._in_text
        self._space = ""  # may turn out to stand before a call
        self._tag = ""  # may turn out to be a tag
        self._opening = ""  # the tag before the body, and the space after it
        self._follows_call = False
        self._body = Body(self._out, certain=True)

    def _read(self, text: str, at: int) -> int:
        return self._state(text, at)

    def _in_text(self, text: str, at: int) -> int:
        if (self._tag or text[at] == "<") and self._continues(OPEN, text[at]):
            if self._tag == OPEN:
                self._opening, self._tag, self._state = OPEN, "", self._in_opening
            return at + 1
        if self._tag:
            self._say(self._take_tag())
            return at
        if plain := _PLAIN.match(text, at):
            self._say(plain[0])
            return plain.end()
        self._space += text[at]
        return at + 1

    def _in_opening(self, text: str, at: int) -> int:
        if text[at] in SPACE:
            self._opening += text[at]
            return at + 1
        if text[at] == "{":
            self._body, self._state = Body(self._out, certain=True), self._in_body
        else:
            self._back_to_text("")
        return at

    def _in_body(self, text: str, at: int) -> int:
        nesting = self._body.nesting
        if (self._tag or text[at] == "<") and (not nesting.in_string or nesting.is_torn):
            if self._continues(CLOSE, text[at]):
                if self._tag == CLOSE:
                    self._torn(self._take_tag())
                return at + 1
            if self._tag:
                self._feed_tag()
                return at
        at = self._body.feed(text, at)
        if self._body.is_done and self._body.finish():
            self._space, self._state = "", self._after_body
        elif self._body.is_done:
            self._back_to_text(self._body.text)
        return at

    def _after_body(self, text: str, at: int) -> int:
        """Up to the closing tag, which some models forget. One brace too many is no text."""
        if (self._tag or text[at] == "<") and self._continues(CLOSE, text[at]):
            if self._tag == CLOSE:
                self._tag = self._space = ""
                self._end_call()
            return at + 1
        if not self._tag and text[at] in SPACE + "}":
            self._space += text[at].strip("}")
            return at + 1
        self._end_call()
        return at

    def _end(self) -> None:
        if self._state == self._in_opening:
            self._back_to_text("")
        elif self._state == self._in_body:
            self._feed_tag()
            self._torn("")
        elif self._state == self._after_body:
            self._end_call()
            self._tag = ""
        if self._tag:
            self._say(self._take_tag())
        elif not self._follows_call:
            self._say("")

    def _continues(self, wanted: str, char: str) -> bool:
        """Whether the tag may still become the one that is wanted."""
        fits = wanted.startswith(self._tag + char)
        if fits:
            self._tag += char
        return fits

    def _take_tag(self) -> str:
        tag, self._tag = self._tag, ""
        return tag

    def _feed_tag(self) -> None:
        """It was part of the body: it has no character that could end an object."""
        tag, at = self._take_tag(), 0
        while at < len(tag):
            at = self._body.feed(tag, at)

    def _torn(self, closing: str) -> None:
        """The body is over, and the object is not."""
        if self._body.finish():
            self._space = ""
            self._end_call()
        else:
            self._back_to_text(self._body.text + closing)

    def _back_to_text(self, more: str) -> None:
        self._state = self._in_text
        self._say(self._opening + more)

    def _end_call(self) -> None:
        self._out.end()
        self._state, self._follows_call = self._in_text, True

    def _say(self, text: str) -> None:
        self._out.text(self._space + text)
        self._space, self._follows_call = "", False
