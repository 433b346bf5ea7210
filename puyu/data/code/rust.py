"""Uses and modules of Rust -> files of the repository.

    >>> files = [SourceFile("src/lib.rs", "mod a; mod b;", "rust"), SourceFile("src/b.rs", "", "rust")]
    >>> Imports(Tree("demo", [*files, SourceFile("src/a.rs", "use crate::b::B;", "rust")]))("src/a.rs").edges
    (Edge(user='src/a.rs', dependency='src/b.rs', soft=False),)

`use` with nested braces, `crate`, `self`, `super` (inside an inline `mod` one level less), paths in expressions, other
crates of the repository by the name in their Cargo.toml, `#[path]`. A name that a module only passes on (`pub use`)
leads to the file that has it, and softly to the module. `mod x;` is soft: it tells where a file belongs, and the file
often needs what stands beside the line; what modules under `#[cfg(test)]` use is soft, too. It expands no macros.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from puyu.data.code.tree import Edge, Found, Tree, ancestors, join

LANGUAGES = ("rust",)
_USE = re.compile(r"\b(?P<public>pub(?:[ \t]*\([^)]*\))?[ \t\n]+)?use[ \t\n]+(?P<tree>[^;]+);")
_MOD = re.compile(r"\bmod[ \t\n]+(?P<name>\w+)[ \t\n]*(?P<end>[;{])")
_PATH_ATTRIBUTE = re.compile(r"#\[[ \t]*path[ \t]*=[ \t]*\"([^\"\n]+)\"[ \t]*\][\s\w()]*\bmod[ \t\n]+(\w+)[ \t\n]*;")
_INLINE = re.compile(r"\b(?:crate|self|super)(?:[ \t]*::[ \t]*\w+)+")
_TESTS = re.compile(r"#\[[ \t]*cfg[ \t]*\([ \t]*test[ \t]*\)[ \t]*\][ \t\n]*$")
_PACKAGE_NAME = re.compile(r"^\[(?:package|lib)\][^\[]*?^name[ \t]*=[ \t]*\"([^\"]+)\"", re.M)
_TOKEN = re.compile(r"::|[{},*]|\w+")
_DEPTH = 8


@dataclass(frozen=True, slots=True)
class _Crate:
    """A crate: its name in `use`, the file at its root, the folder of its modules."""

    name: str
    root: str
    folder: str


@dataclass(frozen=True, slots=True)
class _Use:
    """One path of a `use`: words, the name that it has here, whether others can reach it, whether tests need it."""

    words: tuple[str, ...]
    here: str
    public: bool
    tests: bool = False


class Imports:
    """Resolves the modules of one repository."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._libraries: dict[str, _Crate] = {}
        for file in tree.files.values():
            if file.path.rsplit("/", 1)[-1] == "Cargo.toml":
                for name in _PACKAGE_NAME.findall(file.text):
                    self._add(name.replace("-", "_"), file.folder)
        self._uses: dict[str, list[_Use]] = {}

    def _add(self, name: str, folder: str) -> None:
        root = join(folder, "src/lib.rs")
        if root in self.tree:
            self._libraries.setdefault(name, _Crate(name, root, join(folder, "src")))

    def __call__(self, path: str) -> Found:
        """What the file uses and declares."""
        strong: dict[str, bool] = {}
        outside, missing = 0, []
        for use in self._read(path):
            targets = self._targets(path, use.words)
            for target, soft in targets:
                strong[target] = strong.get(target, False) or not (soft or use.tests)
            own = use.words[0] in ("crate", "self", "super") or use.words[0] in self._libraries
            missing += ["::".join(use.words)] if own and not targets else []
            outside += not own and not targets
        for target in self._modules(path):
            strong.setdefault(target, False)
        strong.pop(path, None)
        return Found(
            tuple(Edge(path, target, not hard) for target, hard in sorted(strong.items())), outside, tuple(missing)
        )

    # ---- the text of a file

    def _read(self, path: str) -> list[_Use]:
        if path not in self._uses:
            code = self.tree.code(path)
            inner = _inline_modules(code)
            found = []
            for match in _USE.finditer(code):
                level, tests = _place(match.start(), inner)
                for words, here in _leaves(_TOKEN.findall(match["tree"])):
                    found.append(_Use(_raised(words, level), here, match["public"] is not None and not level, tests))
            plain = _USE.sub(lambda match: " " * len(match.group()), code)
            for match in _INLINE.finditer(plain):
                level, tests = _place(match.start(), inner)
                words = tuple(re.findall(r"\w+", match.group()))
                found.append(_Use(_raised(words, level), "", False, tests))
            self._uses[path] = [use for use in dict.fromkeys(found) if use.words]
        return self._uses[path]

    def _modules(self, path: str) -> Iterator[str]:
        """Files of `mod name;`."""
        placed = {name: place for place, name in _PATH_ATTRIBUTE.findall(self.tree[path].text)}
        for found in _MOD.finditer(self.tree.code(path)):
            if found["end"] == ";":
                name = found["name"]
                own = join(self.tree[path].folder, placed[name]) if name in placed else None
                target = own if own is not None and own in self.tree else self._child(self._home(path), name)
                if target is not None:
                    yield target

    # ---- a path -> files

    def _targets(self, path: str, words: Sequence[str]) -> list[tuple[str, bool]]:
        """(file, whether softly) for a path; nothing when it leads outside."""
        start = self._start(path, words)
        if start is None:
            return []
        module, rest = start
        return self._walk(module, list(rest), _DEPTH)

    def _walk(self, module: str, rest: list[str], depth: int) -> list[tuple[str, bool]]:
        """Down the modules as far as the words lead, then through `pub use`."""
        while rest and (child := self._child(self._home(module), rest[0])) is not None:
            module, rest = child, rest[1:]
        if not rest or rest[0] in ("*", "self") or depth == 0:
            return [(module, False)]
        for use in self._read(module):
            if not use.public or use.here not in (rest[0], "*"):
                continue
            start = self._start(module, use.words)
            if start is None:
                continue
            base, words = start
            tail = [word for word in words if word != "*"] + (rest if use.here == "*" else rest[1:])
            found = self._walk(base, tail, depth - 1)
            ends = [target for target, soft in found if not soft]
            if ends and ends[0] != module and (use.here != "*" or _declares(self.tree.code(ends[0]), rest[0])):
                return [*found, (module, True)]
        return [(module, False)]

    def _start(self, path: str, words: Sequence[str]) -> tuple[str, Sequence[str]] | None:
        """(file of the module where a path begins, the words after it)."""
        first, *rest = words
        child = self._child(self._home(path), first)
        if child is None and first in self._libraries and self._libraries[first].root != path:
            return self._libraries[first].root, rest
        if first == "crate":
            root = self._root(path)
            return None if root is None else (root, rest)
        if first == "self":
            return path, rest
        if first == "super":
            parent = self._parent(path)
            while rest and rest[0] == "super" and parent is not None:
                parent, rest = self._parent(parent), rest[1:]
            return None if parent is None else (parent, rest)
        return None if child is None else (child, rest)

    def _child(self, home: str, name: str) -> str | None:
        return self.tree.first((join(home, f"{name}.rs"), join(home, name, "mod.rs")))

    def _home(self, path: str) -> str:
        """The folder in which a file's child modules stand."""
        file = self.tree[path]
        name = path.rsplit("/", 1)[-1]
        is_root = name in ("lib.rs", "main.rs", "mod.rs", "build.rs") or self._is_alone(path)
        return file.folder if is_root else join(file.folder, file.stem)

    def _is_alone(self, path: str) -> bool:
        """Whether a file is the root of a program of its own: a test, an example, a bench, a program in src/bin."""
        parts = path.split("/")[:-1]
        return (
            bool(parts)
            and (parts[-1] in ("tests", "examples", "benches") or parts[-2:] == ["src", "bin"])
            and (join(*parts[:-1] if parts[-1] != "bin" else parts[:-2], "Cargo.toml") in self.tree)
        )

    def _root(self, path: str) -> str | None:
        """The file of `crate`."""
        if self._is_alone(path):
            return path
        for folder in ancestors(self.tree[path].folder):
            if (root := self.tree.first((join(folder, "lib.rs"), join(folder, "main.rs")))) is not None:
                return root
        return None

    def _parent(self, path: str) -> str | None:
        """The file of the module around a file's."""
        file = self.tree[path]
        name = path.rsplit("/", 1)[-1]
        if name in ("lib.rs", "main.rs") or self._is_alone(path):
            return None
        folder = join(file.folder, "..") if name == "mod.rs" else file.folder
        near = (join(folder, "mod.rs"), f"{folder}.rs", join(folder, "lib.rs"), join(folder, "main.rs"))
        return self.tree.first(near)


def _place(at: int, inner: Sequence[tuple[int, int, bool]]) -> tuple[int, bool]:
    """(how many inline modules are around a place, whether one of them is for tests)."""
    around = [tests for begin, end, tests in inner if begin <= at < end]
    return len(around), any(around)


def _inline_modules(code: str) -> list[tuple[int, int, bool]]:
    """Spans of `mod name { ... }`, and whether they are for tests."""
    spans = []
    for found in _MOD.finditer(code):
        if found["end"] == "{":
            depth, at = 1, found.end()
            for brace in re.compile("[{}]").finditer(code, at):
                depth += 1 if brace.group() == "{" else -1
                at = brace.end()
                if depth == 0:
                    break
            before = code[max(0, found.start() - 80) : found.start()]
            spans.append((found.end(), at, _TESTS.search(before) is not None))
    return spans


def _raised(words: tuple[str, ...], level: int) -> tuple[str, ...]:
    """A path as it reads from the file, when it stands `level` inline modules deep."""
    if level and words and words[0] == "super":
        count = next((i for i, word in enumerate(words) if word != "super"), len(words))
        left = max(0, count - level)
        rest = words[count:]
        return (*["super"] * left, *rest) if left else ("self", *rest)
    if level and words and words[0] == "self":
        return ()
    return words


def _leaves(tokens: list[str], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """The paths of a use tree, each with the name that it gets here."""
    words, at = list(prefix), 0
    start, alias, open_ = len(prefix), "", True
    while at <= len(tokens):
        token = tokens[at] if at < len(tokens) else ","
        if token == "{":
            end = _closing(tokens, at)
            yield from _leaves(tokens[at + 1 : end], tuple(words))
            at, open_ = end, False
        elif token == ",":
            if open_ and len(words) > start:
                path = tuple(words[:-1]) if words[-1] == "self" and len(words) > 1 else tuple(words)
                yield path, alias or path[-1]
            words, alias, open_ = list(prefix), "", True
        elif token == "as" and at + 1 < len(tokens):
            alias, at = tokens[at + 1], at + 1
        elif token != "::":
            words.append(token)
        at += 1


def _closing(tokens: list[str], at: int) -> int:
    depth = 0
    for index in range(at, len(tokens)):
        depth += (tokens[index] == "{") - (tokens[index] == "}")
        if depth == 0:
            return index
    return len(tokens)


def _declares(code: str, name: str) -> bool:
    word = re.escape(name)
    kinds = r"fn|struct|enum|trait|type|const|static|union|mod|macro_rules!"
    return re.search(rf"\b(?:{kinds})\s+(?:mut\s+)?{word}\b", code) is not None
