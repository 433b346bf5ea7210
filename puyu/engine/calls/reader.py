"""What every reader of tool calls shares: text in any pieces goes in, text and parts of calls come out.

A reader is a machine over single characters (runs of them are only taken together where nothing can happen inside),
so the pieces that a text arrives in can never change what is read.

    reader = pick_format(tokenizer).reader()
    reader.push('<tool_call>{"name": "f", "argum')     # [CallPart(index=0, name='f')]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from puyu.types import CallPart, ToolCall

SPACE = " \t\r\n"


class CallReader(ABC):
    """Reads one answer. All text that comes out, and all parts of each call, put together are the answer."""

    def __init__(self, *, several: bool = True) -> None:
        """`several=False`: the answer is over when its first call is."""
        self._out = Output(several=several)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come out, whatever the model goes on to write."""
        return self._out.is_over

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._out.num_calls

    def push(self, text: str) -> list[str | CallPart]:
        """What these characters make certain."""
        self._read_all(text)
        return self._out.take()

    def marker(self, name: str) -> list[str | CallPart]:
        """The same for a special token, one of the format's `markers`."""
        if not self.is_over:
            self._mark(name)
        return self._out.take()

    def close(self) -> list[str | CallPart]:
        """The end of the answer: what was held back."""
        if not self.is_over:
            self._end()
        return self._out.take()

    @abstractmethod
    def _read(self, text: str, at: int) -> int:
        """Take characters from `at` on; returns where to go on (`at` itself after a change of state)."""

    def _mark(self, name: str) -> None:
        """Where a reader does not know better, it is read like text."""
        self._read_all(name)

    def _read_all(self, text: str) -> None:
        at = 0
        while at < len(text) and not self.is_over:
            at = self._read(text, at)

    @abstractmethod
    def _end(self) -> None: ...


class PlainReader(CallReader):
    """Everything is text."""

    def _read(self, text: str, at: int) -> int:
        self._out.text(text[at:])
        return len(text)

    def _end(self) -> None:
        pass


class Output:
    """Pieces in order. After the end of the last call that is wanted, nothing more is taken."""

    def __init__(self, *, several: bool) -> None:
        self.is_over = False
        self.num_calls = 0
        self._several = several
        self._pieces: list[str | CallPart] = []

    def text(self, text: str) -> None:
        """More of the answer's text."""
        self._add(text)

    def begin(self, name: str) -> None:
        """A new call; `name` is empty for a call so torn that it has none."""
        self._pieces.append(CallPart(self.num_calls, name=name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """More of the arguments of the call that has begun last."""
        if text:
            self._add(CallPart(self.num_calls - 1, text))

    def end(self) -> None:
        """The call that has begun last is complete, or as complete as it will be."""
        self.is_over = self.is_over or not self._several

    def stop(self) -> None:
        """The rest of the answer does not count."""
        self.is_over = True

    def take(self) -> list[str | CallPart]:
        """The pieces since the last time."""
        pieces, self._pieces = self._pieces, []
        return pieces if len(pieces) < 2 else _joined(pieces)

    def _add(self, piece: str | CallPart) -> None:
        if piece and not self.is_over:
            self._pieces.append(piece)


def _joined(pieces: list[str | CallPart]) -> list[str | CallPart]:
    """Neighbors of one kind as one piece; the part with a call's name stays alone."""
    runs: list[list[str | CallPart]] = []
    for piece in pieces:
        if runs and _is_more(piece, runs[-1][0]):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return [_one(run) for run in runs]


def _is_more(piece: str | CallPart, before: str | CallPart) -> bool:
    if isinstance(piece, str) or isinstance(before, str):
        return isinstance(piece, str) and isinstance(before, str)
    return piece.index == before.index and bool(piece.arguments) and bool(before.arguments)


def _one(run: list[str | CallPart]) -> str | CallPart:
    if isinstance(run[0], str):
        return "".join(piece for piece in run if isinstance(piece, str))
    if len(run) == 1:
        return run[0]
    return CallPart(run[0].index, "".join(piece.arguments for piece in run if isinstance(piece, CallPart)))


def join_calls(parts: Iterable[CallPart]) -> tuple[ToolCall, ...]:
    """The calls that all parts of an answer make."""
    names: dict[int, str] = {}
    ids: dict[int, str] = {}
    arguments: dict[int, list[str]] = {}
    for part in parts:
        names[part.index] = names.get(part.index) or part.name
        ids[part.index] = ids.get(part.index) or part.id
        arguments.setdefault(part.index, []).append(part.arguments)
    return tuple(ToolCall(names[index], "".join(arguments[index]), ids[index]) for index in sorted(names))
