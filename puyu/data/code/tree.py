"""The files of one repository, and where an import of one leads: indexes by path, by name and by folder.

    >>> tree = Tree("demo", [SourceFile("a/x.py", "", "python"), SourceFile("x.py", "", "python")])
    >>> tree.ending("x.py")
    ['x.py', 'a/x.py']

Among several files that fit, the one with the shorter path comes first (fewer folders, then by name), as InternLM2
(2024, section 3.1.2) has it. Paths have forward slashes and no leading one. It reads nothing.
"""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from puyu.data.code.lexer import Blank, blank


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a repository: path, text, language (a name of `puyu.documents.programming`)."""

    path: str
    text: str
    language: str

    @property
    def folder(self) -> str:
        return posixpath.dirname(self.path)

    @property
    def stem(self) -> str:
        return posixpath.splitext(posixpath.basename(self.path))[0]


@dataclass(frozen=True, slots=True, order=True)
class Edge:
    """`user` imports `dependency`. A soft edge holds where it makes no cycle: what is imported later, for types only,
    by the file's package, or through a file that only passes names on."""

    user: str
    dependency: str
    soft: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What the imports of a file came to."""

    edges: tuple[Edge, ...] = ()
    outside: int = 0
    """Imports of what is not in the repository: the standard library, other packages."""
    missing: tuple[str, ...] = ()
    """Imports that name this repository, but no file in it."""


def shortest_first(paths: Iterable[str]) -> list[str]:
    """Fewer folders first, then by name."""
    return sorted(paths, key=lambda path: (path.count("/"), path))


def join(*parts: str) -> str:
    """A path in the repository, without `.` and `..`; empty for its root, and None-like `..` for what lies above."""
    path = posixpath.normpath(posixpath.join("", *parts))
    return "" if path == "." else path


class Tree:
    """Files by path, with the indexes that resolving needs. Of two files with one path the first stays."""

    def __init__(self, name: str, files: Iterable[SourceFile]) -> None:
        self.name = name
        by_path: dict[str, SourceFile] = {}
        for file in files:
            by_path.setdefault(file.path, file)
        self.files = dict(sorted(by_path.items()))
        self._blanks: dict[str, Blank] = {}

    def __contains__(self, path: str) -> bool:
        return path in self.files

    def __getitem__(self, path: str) -> SourceFile:
        return self.files[path]

    def code(self, path: str) -> str:
        """The text of a file with nothing but code in it, at the same offsets."""
        if path not in self._blanks:
            file = self.files[path]
            self._blanks[path] = blank(file.text, file.language)
        return self._blanks[path].code

    def of(self, *languages: str) -> Iterator[SourceFile]:
        """Files of these languages, by path."""
        return (file for file in self.files.values() if file.language in languages)

    @cached_property
    def folders(self) -> dict[str, list[str]]:
        """Folder -> paths of the files that stand right in it."""
        found: dict[str, list[str]] = defaultdict(list)
        for path, file in self.files.items():
            found[file.folder].append(path)
        return dict(found)

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for path in shortest_first(self.files):
            found[posixpath.basename(path)].append(path)
        return dict(found)

    def named(self, name: str) -> list[str]:
        """Files with this name, the shortest path first."""
        return self._by_name.get(name, [])

    def ending(self, tail: str) -> list[str]:
        """Files whose path is `tail` or ends with it at a slash, the shortest first."""
        named = self.named(posixpath.basename(tail))
        return [path for path in named if path == tail or path.endswith(f"/{tail}")]

    def first(self, candidates: Iterable[str]) -> str | None:
        """The first path that is a file."""
        return next((path for path in candidates if path in self.files), None)


def ancestors(folder: str) -> Iterator[str]:
    """The folder, the one around it, ... down to the root, which is empty."""
    while folder:
        yield folder
        folder = posixpath.dirname(folder)
    yield ""
