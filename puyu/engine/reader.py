"""Generated ids -> text that may be shown, stops, tool calls, `Completion`.

Stop strings are matched on text, across token boundaries, and text that may turn out to be the beginning of one is held
back; so is what may become a tool call. All pieces together are the text and the calls of the completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from puyu.engine.calls import CallReader, join_calls
from puyu.engine.request import Request, Running
from puyu.files import hash_json
from puyu.tokenizer.tokenizer import StreamDecoder, Tokenizer
from puyu.types import CallPart, Completion, FinishReason, Message


class Piece(NamedTuple):
    """What a token brings: text that may be shown, and pieces of tool calls."""

    text: str = ""
    calls: tuple[CallPart, ...] = ()


class Reader:
    """Reads one answer, id by id."""

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        *,
        calls: CallReader | None = None,
        markers: Mapping[int, str] | None = None,
    ) -> None:
        """`calls` is told of the special tokens in `markers`, by their names; without it there are no tool calls."""
        self.request, self.tokenizer = request, tokenizer
        self.text = ""
        self.stopped = False
        self.num_read = 0
        """Tokens up to the end, or to a stop string."""
        self._calls, self._markers = calls, markers or {}
        self._decoder = StreamDecoder(tokenizer, skip_special=True)
        self._held = ""
        self._ids: list[int] = []
        self._parts: list[CallPart] = []

    def push(self, token: int) -> Piece:
        """What this token completes; sets `stopped` when a stop string is found, or the answer is over."""
        if self.stopped:
            return Piece()
        self.num_read += 1
        if token in self.request.stop_ids:
            return Piece()
        if self._calls is None:
            return Piece(self._shown(self._decoder.push(token)))
        self._ids.append(token)
        if token in self._markers:
            found = self._calls.push(self._decoder.flush()) + self._calls.marker(self._markers[token])
        else:
            found = self._calls.push(self._decoder.push(token))
        piece = self._taken(found)
        self.stopped = self.stopped or self._calls.is_over
        return piece

    def push_all(self, tokens: Sequence[int]) -> Piece:
        """What they complete together."""
        pieces = [self.push(token) for token in tokens]
        return Piece("".join(piece.text for piece in pieces), tuple(call for piece in pieces for call in piece.calls))

    def close(self) -> Piece:
        """What was held back; a character that the end has torn is dropped."""
        if self.stopped:
            return Piece(self._release())
        rest = self._decoder.flush().rstrip("\ufffd")
        if self._calls is None:
            return Piece(self._shown(rest) + self._release())
        piece = self._taken([*self._calls.push(rest), *self._calls.close()])
        return piece._replace(text=piece.text + self._release())

    def completion(self, running: Running, *, reason: FinishReason) -> Completion:
        """What came back, after `close`. Tokens behind a stop string, which drafts may have brought, do not count."""
        count = self.num_read if self.stopped else running.num_generated
        ids = running.generated[:count]
        calls = join_calls(self._parts)
        return Completion(
            message=Message("assistant", self.text, tool_calls=calls),
            finish_reason="tool_calls" if calls and reason == "stop" else reason,
            usage=replace(running.usage, completion_tokens=count),
            token_ids=tuple(ids),
            logprobs=tuple(running.logprobs[:count]),
            raw_text=self.tokenizer.decode(ids),
            top_logprobs=tuple(running.top_logprobs[:count]),
            prompt_logprobs=tuple(running.prompt_logprobs),
        )

    def _taken(self, found: Sequence[str | CallPart]) -> Piece:
        """Text through the search for stops, calls with their ids; nothing counts behind a stop."""
        text, parts = "", []
        for item in found:
            if self.stopped:
                break
            if isinstance(item, str):
                text += self._shown(item)
            else:
                text += self._release()  # a stop string does not reach over a call
                parts.append(self._identified(item))
        self._parts += parts
        return Piece(text, tuple(parts))

    def _identified(self, part: CallPart) -> CallPart:
        """The first part of a call gets its id, which depends on prompt and answer alone, so that equal runs give equal
        transcripts."""
        if any(known.index == part.index for known in self._parts):
            return part
        seed = hash_json([self.request.prompt_ids, self._ids])
        return replace(part, id=f"call_{seed[:16]}{part.index}")

    def _shown(self, text: str) -> str:
        """Give out what can no longer become a stop string; cut at the first that is complete."""
        self._held += text
        found = [at for stop in self.request.params.stop if (at := self._held.find(stop)) >= 0]
        if found:
            shown, self._held, self.stopped = self._held[: min(found)], "", True
        else:
            keep = _open_end(self._held, self.request.params.stop)
            shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += shown
        return shown

    def _release(self) -> str:
        """Give out what was held back."""
        held, self._held = self._held, ""
        self.text += held
        return held


def _open_end(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that some stop string begins with."""
    longest = min(max((len(stop) - 1 for stop in stops), default=0), len(text))
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
