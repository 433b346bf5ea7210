"""A repository -> its files in the order of their dependencies, with a report of edges, cycles and what was broken.

    >>> rows = [("a.py", "import b", "python"), ("b.py", "", "python"), ("README.md", "", "markdown")]
    >>> sort(Tree("demo", [SourceFile(*row) for row in rows])).paths
    ('README.md', 'b.py', 'a.py')

Imports are found by regular expressions in what is left of a file without comments and strings (InternLM2, 2024,
section 3.1.2). A file that is no code comes before the first code file of its folder; where a folder has no code, of
the nearest folder around it that has. Every file stands in the order exactly once, however the files are listed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from puyu.data.code import c, golang, java, javascript, python, rust
from puyu.data.code.graph import order
from puyu.data.code.tree import Edge, Found, SourceFile, Tree, ancestors
from puyu.documents.programming import BY_NAME


class Resolver(Protocol):
    """What every language's module has: made of a tree, asked for one file at a time."""

    def __call__(self, path: str) -> Found: ...


_ROOMS = (python, javascript, c, java, golang, rust)
LANGUAGES = tuple(language for room in _ROOMS for language in room.LANGUAGES)
"""Languages whose imports are known."""


@dataclass
class Counts:
    """The imports of the files of one language."""

    files: int = 0
    edges: int = 0
    """From file to file of the repository."""
    satisfied: int = 0
    """Edges whose dependency stands before its user."""
    hard: int = 0
    """Edges of imports that run when the file is loaded."""
    hard_satisfied: int = 0
    """Of these, the ones whose dependency stands before its user."""
    in_cycles: int = 0
    """Of these, the ones inside a cycle: no order satisfies all of them."""
    outside: int = 0
    """Imports of other packages and the standard library."""
    missing: int = 0
    """Imports of this repository that lead to no file."""

    def add(self, other: Counts) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True)
class Sorted:
    """One repository in order."""

    paths: tuple[str, ...]
    edges: tuple[Edge, ...] = ()
    cycles: tuple[tuple[str, ...], ...] = ()
    broken: tuple[Edge, ...] = ()
    counts: Mapping[str, Counts] = field(default_factory=dict)
    """By language."""
    missing: tuple[tuple[str, str], ...] = ()
    """(file, import) of what leads to no file of the repository."""


def is_code(file: SourceFile) -> bool:
    """Whether a file is code, and no markup, data or prose; components (vue, svelte) are code."""
    row = BY_NAME.get(file.language)
    return file.language in LANGUAGES or (row is not None and row.kind == "code")


def find_imports(tree: Tree) -> dict[str, Found]:
    """What each file of a known language imports."""
    found: dict[str, Found] = {}
    for room in _ROOMS:
        files = list(tree.of(*room.LANGUAGES))
        resolve: Resolver | None = room.Imports(tree) if files else None
        found |= {file.path: resolve(file.path) for file in files if resolve is not None}
    return found


def sort(tree: Tree) -> Sorted:
    """The order of all files of a repository."""
    found = find_imports(tree)
    edges = tuple(edge for imports in found.values() for edge in imports.edges)
    wanted = {edge.dependency for edge in edges}
    ordered = order([path for path, file in tree.files.items() if is_code(file) or path in wanted], edges)
    group_of = {path: at for at, group in enumerate(ordered.cycles) for path in group}
    broken = set(ordered.broken)
    counts: dict[str, Counts] = defaultdict(Counts)
    for path, imports in found.items():
        hard = [edge for edge in imports.edges if not edge.soft]
        inside = [edge for edge in hard if group_of.get(path, -1) == group_of.get(edge.dependency, -2)]
        counts[tree[path].language].add(
            Counts(
                files=1,
                edges=len(imports.edges),
                satisfied=sum(edge not in broken for edge in imports.edges),
                hard=len(hard),
                hard_satisfied=sum(edge not in broken for edge in hard),
                in_cycles=len(inside),
                outside=imports.outside,
                missing=len(imports.missing),
            )
        )
    missing = tuple((path, name) for path, imports in found.items() for name in imports.missing)
    paths = tuple(_with_the_rest(tree, ordered.paths))
    return Sorted(paths, edges, ordered.cycles, ordered.broken, dict(sorted(counts.items())), missing)


def _with_the_rest(tree: Tree, ordered: Sequence[str]) -> list[str]:
    """What the order does not have yet, before the first code file of its folder."""
    with_code = {folder for path in ordered if is_code(tree[path]) for folder in ancestors(tree[path].folder)}
    placed = set(ordered)
    waiting: dict[str, list[str]] = defaultdict(list)
    for path, file in tree.files.items():
        if path not in placed:
            home = next((folder for folder in ancestors(file.folder) if folder in with_code), "")
            waiting[home].append(path)
    result: list[str] = []
    for path in ordered:
        for folder in reversed(list(ancestors(tree[path].folder))) if is_code(tree[path]) else ():
            result += waiting.pop(folder, [])
        result.append(path)
    return [*waiting.pop("", []), *result] if not with_code else result + [p for rest in waiting.values() for p in rest]
