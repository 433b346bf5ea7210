"""Python's imports -> files of the repository.

    >>> tree = Tree("demo", [SourceFile("a.py", "import b", "python"), SourceFile("b.py", "", "python")])
    >>> Imports(tree)("a.py").edges
    (Edge(user='a.py', dependency='b.py', soft=False),)

Relative imports, packages with and without `__init__.py`, several source roots; `from package import name` leads to the
module that really defines the name when the package's `__init__.py` passes it on, and softly to the `__init__.py`.
Imports inside functions and under TYPE_CHECKING are soft. It runs nothing, so imports by a computed name stay unseen.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from puyu.data.code.tree import Edge, Found, Tree, ancestors, join, shortest_first

LANGUAGES = ("python",)
_STATEMENT = re.compile(
    r"(?:^|(?<=;)|(?<=:))(?P<indent>[ \t]*)(?:from[ \t]+(?P<module>\.*[ \t]*[\w.]*)[ \t]+import[ \t]*"
    r"(?:\((?P<many>[^)]*)\)|(?P<few>[^\n;]+))|import[ \t]+(?P<plain>[^\n;]+))",
    re.M,
)
_HEADER = re.compile(r"^([ \t]*)(?:(async[ \t]+def|def|if|class|else|elif|try|except|with|for|while)\b)([^\n]*)", re.M)
_JOINED = re.compile(r"\\\n")
_DEPTH = 8
"""How many packages a name is followed through."""


@dataclass(frozen=True, slots=True)
class _Import:
    """One statement: dots, module, (name, name here) pairs (empty for `import module`), and whether it runs later."""

    dots: int
    module: str
    names: tuple[tuple[str, str], ...]
    deferred: bool


# ---- the text of a file


def _statements(code: str) -> Iterator[_Import]:
    code = _JOINED.sub("  ", code)
    later = _deferred(code)
    for found in _STATEMENT.finditer(code):
        deferred = any(start <= found.start() < end for start, end in later)
        if found["plain"] is not None:
            for module, _ in _names(found["plain"]):
                yield _Import(0, module, (), deferred)
        else:
            module = found["module"].replace(" ", "").replace("\t", "")
            bare = module.lstrip(".")
            names = tuple(_names(found["many"] if found["many"] is not None else found["few"]))
            yield _Import(len(module) - len(bare), bare, names, deferred)


def _names(text: str) -> Iterator[tuple[str, str]]:
    """`a as b, c` -> (a, b), (c, c)."""
    for part in text.replace("(", " ").split(","):
        words = part.split()
        if words and re.fullmatch(r"[\w.]+|\*", words[0]):
            yield words[0], words[2] if len(words) > 2 and words[1] == "as" else words[0]


def _deferred(code: str) -> list[tuple[int, int]]:
    """Spans of function bodies and of `if TYPE_CHECKING` blocks."""
    spans: list[tuple[int, int]] = []
    for found in _HEADER.finditer(code):
        for_types = found[2] == "if" and "TYPE_CHECKING" in found[3] and "not " not in found[3]
        is_inside = bool(spans) and found.start() < spans[-1][1]
        if ("def" in found[2] or for_types) and not is_inside:
            spans.append((found.start(), _block_end(code, found.end(), _width(found[1]))))
    return spans


def _block_end(code: str, at: int, width: int) -> int:
    """Where the first line begins that is indented no deeper; lines inside brackets do not count."""
    depth, line = 0, at
    while 0 <= line < len(code):
        stop = code.find("\n", line)
        text = code[line : stop if stop >= 0 else len(code)]
        bare = text.lstrip()
        begins = line > at and depth <= 0 and bool(bare) and not bare.startswith((")", "]", "}"))
        if begins and _width(text[: len(text) - len(bare)]) <= width:
            return line
        depth += sum(map(text.count, "([{")) - sum(map(text.count, ")]}"))
        if stop < 0:
            break
        line = stop + 1
    return len(code)


def _width(indent: str) -> int:
    return len(indent.expandtabs(8))


def _defines(code: str, name: str) -> bool:
    word = re.escape(name)
    return re.search(rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{word}\b|^{word}[ \t]*[:=]", code, re.M) is not None


# ---- where a statement leads


class Imports:
    """Resolves the imports of one repository's Python files."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._folders = {parent for file in tree.of("python") for parent in ancestors(file.folder)}
        self._source_roots = shortest_first(folder for folder in self._folders if self._package(folder) is None)
        self._read: dict[str, list[_Import]] = {}

    def __call__(self, path: str) -> Found:
        """What the file imports."""
        strong: dict[str, bool] = {}
        outside, missing = 0, []
        for statement in self._statements(path):
            found = list(self._targets(path, statement))
            for target, soft in found:
                strong[target] = strong.get(target, False) or not (soft or statement.deferred)
            if not found and statement.dots:
                missing.append("." * statement.dots + statement.module)
            outside += not found and not statement.dots
        edges = (Edge(path, target, not hard) for target, hard in strong.items() if target != path)
        return Found(tuple(sorted(edges)), outside, tuple(missing))

    def _statements(self, path: str) -> list[_Import]:
        if path not in self._read:
            self._read[path] = list(_statements(self.tree.code(path)))
        return self._read[path]

    def _targets(self, path: str, statement: _Import) -> Iterator[tuple[str, bool]]:
        """(file, whether softly)."""
        module = self._module(path, statement)
        if not statement.names and module is not None:
            yield module, False
        base = self._folder(path, statement)
        for name, _ in statement.names:
            child = self._in_folder(base, name) if base is not None and name != "*" else None
            if child is not None:
                yield child, False
            elif module is not None:
                yield from self._through(module, name)

    def _through(self, module: str, name: str) -> Iterator[tuple[str, bool]]:
        """The file that defines `name`, and softly the package that passes it on."""
        real = self._real(module, name, _DEPTH)
        yield real or module, False
        if real is not None:
            yield module, True

    def _real(self, module: str, name: str, depth: int) -> str | None:
        """Where a package's `__init__.py` has a name from; None when it is its own, or unknown."""
        if not module.endswith(("__init__.py", "__init__.pyi")) or depth == 0 or name == "*":
            return None
        for statement in self._statements(module):
            for original, here in statement.names:
                if here in (name, "*") and (found := self._origin(module, statement, original, name)):
                    target, is_end = found
                    return target if is_end else self._real(target, original, depth - 1) or target
        return None

    def _origin(self, module: str, statement: _Import, original: str, name: str) -> tuple[str, bool] | None:
        """(file that a statement of `module` has the name from, whether that is its end)."""
        target = self._module(module, statement)
        if original == "*":
            return (target, True) if target and _defines(self.tree.code(target), name) else None
        base = self._folder(module, statement)
        child = self._in_folder(base, original) if base is not None else None
        if child is not None:
            return child, True
        return (target, False) if target is not None and target != module else None

    def _in_folder(self, folder: str, name: str) -> str | None:
        base = f"{folder}/{name}" if folder else name
        tails = (".py", "/__init__.py", ".pyx", ".pyi", "/__init__.pyi")
        return self.tree.first(base + tail for tail in tails)

    def _package(self, folder: str) -> str | None:
        prefix = f"{folder}/" if folder else ""
        return self.tree.first((f"{prefix}__init__.py", f"{prefix}__init__.pyi"))

    def _folder(self, path: str, statement: _Import) -> str | None:
        """The folder of the statement's module as a package, where there is one."""
        if statement.dots:
            up = [self.tree[path].folder, *[".."] * (statement.dots - 1)]
            folder = join(*up, *filter(None, statement.module.split(".")))
            return None if folder.startswith("..") else folder
        tail = statement.module.replace(".", "/")
        return next((folder for folder in self._places(path, tail) if folder in self._folders), None)

    def _module(self, path: str, statement: _Import) -> str | None:
        """The file of the statement's module; of `import a.b.c` the longest part that is one."""
        if statement.dots:
            folder = self._folder(path, statement)
            if folder is None:
                return None
            head, _, last = folder.rpartition("/")
            return (self._in_folder(head, last) if statement.module else None) or self._package(folder)
        parts = statement.module.split(".")
        shortest = len(parts) if statement.names else 1
        tails = ("/".join(parts[:count]) for count in range(len(parts), shortest - 1, -1))
        found = (self._at(place) for tail in tails for place in self._places(path, tail))
        return next((target for target in found if target is not None), None)

    def _at(self, place: str) -> str | None:
        if not place:
            return self._package("")
        head, _, last = place.rpartition("/")
        return self._in_folder(head, last)

    def _places(self, path: str, tail: str) -> Iterator[str]:
        """Where `a/b` may stand: beside the file when it is a script, then below source roots, the shortest first.

        A name of the standard library is one of the repository only where that is a package at the top.
        """
        folder, top = self.tree[path].folder, tail.split("/", 1)[0]
        if self._package(folder) is None:
            yield join(folder, tail)
        if top == self.tree.name and self._package("") is not None:  # the repository is the package itself
            yield tail.partition("/")[2]
        if top in sys.stdlib_module_names:
            yield from (join(root, tail) for root in ("", "src", "lib") if self._package(join(root, top)) is not None)
            return
        around = [root for root in ancestors(folder) if self._package(root) is None]
        yield from (join(root, tail) for root in dict.fromkeys([*around, *self._source_roots]))
