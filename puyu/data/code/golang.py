"""Imports of Go -> files of the repository.

    >>> rows = [("go.mod", "module x.org/m", "gomod"), ("main.go", 'import "x.org/m/b"', "go"), ("b/b.go", "", "go")]
    >>> Imports(Tree("demo", [SourceFile(*row) for row in rows]))("main.go").edges[0].dependency
    'b/b.go'

An import is of a package, which is all files of a folder but its tests; the module path of the nearest go.mod comes
before it (several modules in one repository too), and without any go.mod the repository's own name. Files of the
user's own package, which Go needs no import for, are soft where a name of theirs is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from puyu.data.code.tree import Edge, Found, Tree, join

LANGUAGES = ("go",)
_MODULE = re.compile(r"^[ \t]*module[ \t]+\"?([^\s\"]+)", re.M)
_PACKAGE = re.compile(r"^[ \t]*package[ \t]+(\w+)", re.M)
_IMPORT = re.compile(r"^[ \t]*import\b[ \t]*(?:\((?P<many>[^)]*)\)|(?P<one>[^\n;]*))", re.M)
_DECLARED = re.compile(r"^(?:func[ \t]+(\w+)|type[ \t]+(\w+)|(?:var|const)[ \t]+(\w+))", re.M)
_GROUP = re.compile(r"^(?:var|const|type)[ \t]*\((.*?)^\)", re.M | re.S)
_IN_GROUP = re.compile(r"^[ \t]*([A-Za-z_]\w*)", re.M)
_WORD = re.compile(r"[A-Za-z_]\w*")


class Imports:
    """Resolves the imports of one repository."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._packages: dict[str, list[str]] = {}
        for file in tree.of("go"):
            if not file.path.endswith("_test.go"):
                self._packages.setdefault(file.folder, []).append(file.path)
        found = [(_MODULE.search(file.text), file.folder) for file in tree.of("gomod") if file.path.endswith("go.mod")]
        self._modules = sorted(((match[1], folder) for match, folder in found if match), key=lambda row: -len(row[0]))
        self._names = {path: self._declared(path) for paths in self._packages.values() for path in paths}

    def __call__(self, path: str) -> Found:
        """What the file imports."""
        strong: dict[str, bool] = {}
        outside, missing = 0, []
        for name in self._imports(path):
            folder, inside = self._folder(path, name)
            targets = self._packages.get(folder, []) if folder is not None else []
            strong |= dict.fromkeys(targets, True)
            missing += [name] if inside and not targets else []
            outside += not inside and not targets
        for target in self._siblings(path):
            strong.setdefault(target, False)
        strong.pop(path, None)
        return Found(
            tuple(Edge(path, target, not hard) for target, hard in sorted(strong.items())), outside, tuple(missing)
        )

    def _imports(self, path: str) -> Iterator[str]:
        text, code = self.tree[path].text, self.tree.code(path)
        for found in _IMPORT.finditer(code):
            begin, end = found.span("many" if found["many"] is not None else "one")
            marks = [at for at in range(begin, end) if code[at] in '"`']
            yield from (text[a + 1 : b] for a, b in zip(marks[::2], marks[1::2], strict=False))

    def _folder(self, path: str, name: str) -> tuple[str | None, bool]:
        """(folder of a package, whether its name says that it is of this repository)."""
        if name.startswith("."):
            return join(self.tree[path].folder, name), True
        for module, folder in self._modules:
            if name == module or name.startswith(f"{module}/"):
                return join(folder, name[len(module) + 1 :]), True
        parts = name.split("/")
        if not self._modules and self.tree.name in parts:
            return join(*parts[parts.index(self.tree.name) + 1 :]), True
        return None, False

    def _siblings(self, path: str) -> list[str]:
        """Files of the same folder that declare a name which the file has."""
        words = frozenset(_WORD.findall(self.tree.code(path)))
        own = self._names.get(path, frozenset())
        near = self._packages.get(self.tree[path].folder, [])
        return [other for other in near if other != path and (self._names[other] - own) & words]

    def _declared(self, path: str) -> frozenset[str]:
        code = self.tree.code(path)
        single = (name for groups in _DECLARED.findall(code) for name in groups if name)
        grouped = (name for group in _GROUP.findall(code) for name in _IN_GROUP.findall(group))
        return frozenset({*single, *grouped} - {"main", "init", "_"})
