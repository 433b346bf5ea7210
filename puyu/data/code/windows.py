"""Files in their order -> long markdown documents of at most so many tokens; nothing is lost.

    >>> pieces = [Piece("a.py", "x = 1\\n", "python"), Piece("b.py", "y = 2\\n", "python")]
    >>> [window.paths for window in windows("demo", pieces, limit=40, length=len)]
    [('a.py',), ('b.py',)]

A window takes whole files while they fit. A file longer than a window is cut at ends of lines into parts that say so
(`part 1 of 3`), a line longer than a window wherever it must be. Lengths are those of the markdown, by the given
function; a window's length is the sum of its files' (a tokenizer's count of the whole is the same or one less at each
border). Every piece stands in exactly one window, or in parts in several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from puyu.data.code.markdown import content, section
from puyu.errors import ConfigError

Length = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Piece:
    """A file to be put into a window."""

    path: str
    text: str
    language: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """A file, or one of several parts of it, in a window. `part` counts from 1."""

    piece: Piece
    markdown: str
    length: int
    part: int = 1
    parts: int = 1


@dataclass(frozen=True, slots=True)
class Window:
    """One document of a repository."""

    repository: str
    index: int
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        return "\n".join(part.markdown for part in self.parts)

    @property
    def length(self) -> int:
        return sum(part.length for part in self.parts)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(part.piece.path for part in self.parts)


def windows(repository: str, pieces: Iterable[Piece], *, limit: int, length: Length) -> Iterator[Window]:
    """Windows in the order of the pieces. ConfigError when a single character and its heading do not fit."""
    index, held, size = 0, list[Part](), 0
    for piece in pieces:
        for part in _parts(piece, limit, length):
            if held and size + part.length > limit:
                yield Window(repository, index, tuple(held))
                index, held, size = index + 1, [], 0
            held.append(part)
            size += part.length
    if held:
        yield Window(repository, index, tuple(held))


def _parts(piece: Piece, limit: int, length: Length) -> list[Part]:
    body, language = content(piece.text, piece.language)
    whole = section(piece.path, body, language)
    size = length(whole + "\n")
    if size <= limit:
        return [Part(piece, whole, size)]
    bodies = list(_cut(piece.path, body, language, limit=limit, length=length))
    made = [section(piece.path, text, language, part=at, parts=len(bodies)) for at, text in enumerate(bodies, 1)]
    return [Part(piece, text, length(text + "\n"), at, len(made)) for at, text in enumerate(made, 1)]


def _cut(path: str, body: str, language: str, *, limit: int, length: Length) -> Iterator[str]:
    """Runs of lines that fit with their heading and fence, whose numbers may have as many digits as the text's size."""
    most = 10 ** len(str(len(body)))

    def fits(text: str) -> bool:
        return length(section(path, text, language, part=most, parts=most) + "\n") <= limit

    if not fits("x"):
        raise ConfigError(f"window: {limit} is too short for a part of {path}", remedy="give a longer window")
    rest = body
    while rest:
        if fits(rest):
            yield rest
            return
        end = _longest(rest, fits)
        line = rest.rfind("\n", 0, end) + 1
        cut = line if line > 0 else end
        yield rest[:cut]
        rest = rest[cut:]


def _longest(text: str, fits: Callable[[str], bool]) -> int:
    """How many characters fit, at least one: doubling, then halving (length must not fall as a text grows)."""
    low, high = 1, 2
    while high < len(text) and fits(text[:high]):
        low, high = high, high * 2
    high = min(high, len(text))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(text[:middle]) else (low, middle)
    return low
