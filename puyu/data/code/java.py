"""Imports of Java and Kotlin -> files of the repository.

    >>> rows = [("a/A.java", "package a; import b.B;", "java"), ("b/B.java", "package b; class B {}", "java")]
    >>> Imports(Tree("demo", [SourceFile(*row) for row in rows]))("a/A.java").edges[0].dependency
    'b/B.java'

A class is found by the package that its file declares, whatever the folders; nested classes and static members lead to
the file of the outer class. `import b.*` leads to the files of b whose class names the user really has. Files of the
user's own package, which Java needs no import for, are soft when their class names are used.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from puyu.data.code.tree import Edge, Found, Tree, shortest_first

LANGUAGES = ("java", "kotlin")
_PACKAGE = re.compile(r"^[ \t]*package[ \t]+([\w.]+)", re.M)
_IMPORT = re.compile(
    r"(?:^|(?<=;))[ \t]*import[ \t]+(?:static[ \t]+)?(?P<name>[\w.]+?)(?P<star>\.\*)?"
    r"[ \t]*(?:as[ \t]+\w+)?[ \t]*(?:;|$)",
    re.M,
)
_TYPE = re.compile(r"\b(?:class|interface|enum|record|object|@interface)[ \t]+(\w+)")
_TOP = re.compile(r"^(?:[\w@]+[ \t]+)*(?:fun(?:[ \t]*<[^>]*>)?|val|var|typealias)[ \t]+(?:[\w.<>]+\.)?(\w+)", re.M)
_WORD = re.compile(r"[A-Za-z_]\w*")


class Imports:
    """Resolves the imports of one repository."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._package_of: dict[str, str] = {}
        self._names: dict[str, dict[str, str]] = defaultdict(dict)
        for path in shortest_first(file.path for file in tree.of(*LANGUAGES)):
            package = found[1] if (found := _PACKAGE.search(tree.code(path))) else ""
            self._package_of[path] = package
            for name in self._declared(path):
                self._names[package].setdefault(name, path)

    def __call__(self, path: str) -> Found:
        """What the file imports."""
        strong: dict[str, bool] = {}
        outside, missing = 0, []
        code = self.tree.code(path)
        words = frozenset(_WORD.findall(_IMPORT.sub("", code)))
        for found in _IMPORT.finditer(code):
            targets = list(self._targets(found["name"], words, star=bool(found["star"])))
            strong |= dict.fromkeys(targets, True)
            if not targets:
                inside = found["name"] in self._names or found["name"].rpartition(".")[0] in self._names
                missing += [found["name"]] if inside and not found["star"] else []
                outside += not inside
        for name, target in self._names[self._package_of[path]].items():
            if name in words:
                strong.setdefault(target, False)
        strong.pop(path, None)
        return Found(
            tuple(Edge(path, target, not hard) for target, hard in sorted(strong.items())), outside, tuple(missing)
        )

    def _targets(self, name: str, words: frozenset[str], *, star: bool) -> Iterator[str]:
        if star and name in self._names:
            yield from sorted({target for word, target in self._names[name].items() if word in words})
            return
        parts = name.split(".")
        for count in range(len(parts) - 1, -1, -1):
            target = self._names.get(".".join(parts[:count]), {}).get(parts[count])
            if target is not None:
                yield target
                return

    def _declared(self, path: str) -> list[str]:
        """Names that other files reach through the package: types at the top, and in Kotlin functions and values."""
        code, file = self.tree.code(path), self.tree[path]
        tops = [found[1] for found in _TYPE.finditer(code) if _depth_is_zero(code, found.start())]
        return [*tops, *(_TOP.findall(code) if file.language == "kotlin" else ())]


def _depth_is_zero(code: str, at: int) -> bool:
    return code.count("{", 0, at) == code.count("}", 0, at)
