"""Imports of JavaScript and TypeScript -> files of the repository.

    >>> rows = [("a.js", "import {x} from './lib'", "javascript"), ("lib/index.js", "", "javascript")]
    >>> Imports(Tree("demo", [SourceFile(*row) for row in rows]))("a.js").edges[0].dependency
    'lib/index.js'

`import`, `export ... from`, `require`, `import()` and `/// <reference path>`; suffixes that are left out or written as
they will be after compiling (`./x.js` for x.ts), `index` files, packages of the repository by the name in their
package.json with `main`, `exports` and `imports`, and without any tsconfig the usual roots (`@/x`, `~/x`, `src/x`).
A name that an index file only passes on leads to the file that has it, and softly to the index. `import type`,
`import()` and a `require` inside braces are soft. It reads no tsconfig and runs nothing.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from puyu.data.code.lexer import blank
from puyu.data.code.tree import Edge, Found, Tree, ancestors, join

LANGUAGES = ("javascript", "typescript", "vue", "svelte")
_Q = r"['\"`]"
_STATEMENT = re.compile(
    rf"(?<![\w$.])(?:(?P<verb>import|export)\b(?P<clause>[^;'\"`()=]*?)(?:\bfrom\s*)?(?P<static>{_Q})"
    rf"|(?P<call>require|import|require\.resolve)\s*\(\s*(?P<dynamic>{_Q}))",
)
_REFERENCE = re.compile(r"^///\s*<reference\s+path=[\"']([^\"']+)[\"']", re.M)
_SCRIPT = re.compile(r"<script\b[^>]*>(.*?)</script>", re.S | re.I)
_ENDINGS = (".ts", ".tsx", ".d.ts", ".js", ".jsx", ".mjs", ".cjs", ".mts", ".cts", ".json", ".vue", ".svelte")
_COMPILED = {".js": (".ts", ".tsx", ".jsx", ".d.ts"), ".jsx": (".tsx",), ".mjs": (".mts",), ".cjs": (".cts",)}
_ALIASES = ("@/", "~/", "src/", "@src/", "#/")
_CONDITIONS = ("source", "types", "import", "module", "node", "require", "browser", "default")


@dataclass(frozen=True, slots=True)
class _Import:
    """One statement: what it names, pairs of (name there, name here) or None for all, soft, whether it exports."""

    specifier: str
    names: tuple[tuple[str, str], ...] | None
    soft: bool
    exports: bool


def _statements(text: str, code: str) -> Iterator[_Import]:
    at = depth = 0
    for found in _STATEMENT.finditer(code):
        begin = found.end()
        depth += code.count("{", at, found.start()) - code.count("}", at, found.start())
        at = found.start()
        quote = found["static"] or found["dynamic"]
        end = code.find(quote, begin)
        specifier = text[begin:end] if end >= 0 else ""
        if not specifier or "\n" in specifier or "${" in specifier:
            continue
        if found["static"]:
            clause = found["clause"].strip()
            if not re.search(r"\bfrom\s*$|\bimport\s*$", code[found.start() : begin - 1]):
                continue
            kind = clause.startswith(("type ", "typeof "))
            yield _Import(specifier, _names(clause), kind, found["verb"] == "export")
        else:
            yield _Import(specifier, None, found["call"] == "import" or depth > 0, False)
    for found in _REFERENCE.finditer(text):
        yield _Import(f"./{found[1]}" if not found[1].startswith(".") else found[1], None, True, False)


def _names(clause: str) -> tuple[tuple[str, str], ...] | None:
    """`a, {b as c}` -> ((default, a), (b, c)); None when everything is taken (`* as x`), or nothing (`import "x"`)."""
    if "*" in clause or not clause:
        return None
    pairs = []
    braces = re.search(r"\{([^}]*)\}", clause)
    for part in braces[1].split(",") if braces else ():
        words = part.replace("type ", " ").split()
        if words:
            pairs.append((words[0], words[2] if len(words) > 2 and words[1] == "as" else words[0]))
    default = re.match(r"(?:type\s+)?([\w$]+)\s*(?:,|$)", clause)
    return (*((("default", default[1]),) if default else ()), *pairs)


class Imports:
    """Resolves the imports of one repository's scripts."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._read: dict[str, list[_Import]] = {}
        self._known: dict[tuple[str, str], str | None] = {}
        found = ((file.folder, _object(file.text)) for file in tree.of("json") if file.path.endswith("package.json"))
        self._manifests: dict[str, dict[str, Any]] = dict(found)
        named = sorted(self._manifests.items(), key=lambda item: (item[0].count("/"), item[0]), reverse=True)
        self._packages = {value["name"]: folder for folder, value in named if isinstance(value.get("name"), str)}

    def __call__(self, path: str) -> Found:
        """What the file imports."""
        strong: dict[str, bool] = {}
        outside, missing = 0, []
        for statement in self._statements(path):
            target = self._resolve(path, statement.specifier)
            if target is None:
                local = statement.specifier.startswith(".")
                missing += [statement.specifier] if local else []
                outside += not local
                continue
            for real, soft in self._through(target, statement):
                strong[real] = strong.get(real, False) or not (soft or statement.soft)
        edges = (Edge(path, target, not hard) for target, hard in strong.items() if target != path)
        return Found(tuple(sorted(edges)), outside, tuple(missing))

    def _statements(self, path: str) -> list[_Import]:
        if path not in self._read:
            self._read[path] = list(_statements(self.tree[path].text, self._code(path)))
        return self._read[path]

    def _code(self, path: str) -> str:
        """The text with nothing but code in it; of a component only its scripts."""
        file = self.tree[path]
        if file.language not in ("vue", "svelte"):
            return self.tree.code(path)
        code = re.sub(r"[^\n]", " ", file.text)
        for found in _SCRIPT.finditer(file.text):
            code = code[: found.start(1)] + blank(found[1], "typescript").code + code[found.end(1) :]
        return code

    def _through(self, target: str, statement: _Import) -> Iterator[tuple[str, bool]]:
        """The files that define the names, and softly the index that passes them on."""
        passed = [self._real(target, name) for name, _ in statement.names or ()]
        yield target, bool(passed) and None not in passed
        yield from ((real, False) for real in sorted({real for real in passed if real is not None}))

    def _real(self, module: str, name: str) -> str | None:
        """Where an index file has a name from; None when it is its own."""
        if (module, name) not in self._known:
            self._known[module, name] = None  # what leads back here leads nowhere
            self._known[module, name] = self._passed_on(module, name)
        return self._known[module, name]

    def _passed_on(self, module: str, name: str) -> str | None:
        if self.tree[module].language not in LANGUAGES:
            return None
        stars = []
        for statement in self._statements(module):
            if not statement.exports:
                continue
            target = self._resolve(module, statement.specifier)
            if target is None:
                continue
            if statement.names is None:
                stars.append(target)
            for original, here in statement.names or ():
                if here == name:
                    return self._real(target, original) or target
        for target in stars:
            if found := self._real(target, name):
                return found
            if self.tree[target].language in LANGUAGES and _exports(self._code(target), name):
                return target
        return None

    # ---- a specifier -> a file

    def _resolve(self, path: str, specifier: str) -> str | None:
        specifier = re.sub(r"[?#][^/]*$", "", specifier) if not specifier.startswith("#") else specifier
        folder = self.tree[path].folder
        if specifier.startswith("."):
            return self._file(join(folder, specifier))
        if specifier.startswith("/"):
            return self._file(specifier.strip("/"))
        if specifier.startswith("#") and (found := self._subpath(folder, specifier)) is not None:
            return found
        return self._package(specifier) or self._alias(folder, specifier)

    def _file(self, base: str) -> str | None:
        """A path as written, with a suffix, as it was before compiling, or as a folder with an index."""
        if base.startswith(".."):
            return None
        stem, suffix = posixpath.splitext(base)
        before = (stem + ending for ending in _COMPILED.get(suffix, ()))
        plain = (base + ending for ending in _ENDINGS)
        found = self.tree.first((base, *before, *plain))
        return found or self._main(base) or self.tree.first(join(base, "index" + ending) for ending in _ENDINGS)

    def _main(self, folder: str) -> str | None:
        """The entry of a folder with a package.json; where it is built, the source that it is probably built from."""
        manifest = self._manifests.get(folder)
        if manifest is None:
            return None
        exports = manifest.get("exports")
        entry = exports.get(".", exports) if isinstance(exports, dict) else exports
        named = [*_targets(entry), *(manifest.get(key) for key in ("source", "module", "main", "types"))]
        written = [join(folder, name) for name in named if isinstance(name, str)]
        guesses = [join(folder, stem + ending) for stem in ("src/index", "index", "lib/index") for ending in _ENDINGS]
        entries = [*written, *(name + ending for name in written for ending in _ENDINGS)]
        return self.tree.first([*entries, *guesses])

    def _package(self, specifier: str) -> str | None:
        """`name` or `name/sub` of a package of this repository."""
        words = specifier.split("/")
        count = 2 if specifier.startswith("@") else 1
        name, sub = "/".join(words[:count]), "/".join(words[count:])
        if name not in self._packages:
            return None
        folder = self._packages[name]
        if not sub:
            return self._main(folder)
        exports = self._manifests[folder].get("exports")
        return (
            self._mapped(exports, f"./{sub}", folder)
            or self._file(join(folder, sub))
            or self._file(join(folder, "src", sub))
        )

    def _subpath(self, folder: str, specifier: str) -> str | None:
        near = next((place for place in ancestors(folder) if place in self._manifests), None)
        return None if near is None else self._mapped(self._manifests[near].get("imports"), specifier, near)

    def _mapped(self, table: Any, key: str, folder: str) -> str | None:
        """A row of `exports` or `imports`, `*` included."""
        for pattern, value in table.items() if isinstance(table, dict) else ():
            head, star, tail = str(pattern).partition("*")
            fits = (
                key == pattern
                if not star
                else key.startswith(head) and key.endswith(tail) and len(key) >= len(pattern) - 1
            )
            if fits:
                middle = key[len(head) : len(key) - len(tail)] if star else ""
                for target in _targets(value):
                    if (found := self._file(join(folder, target.replace("*", middle)))) is not None:
                        return found
        return None

    def _alias(self, folder: str, specifier: str) -> str | None:
        """Roots that projects set up by habit. A bare word is a package, never a file at a root."""
        rest = next((specifier[len(alias) :] for alias in _ALIASES if specifier.startswith(alias)), None)
        if rest is None and ("/" not in specifier or specifier.startswith("@")):
            return None
        for root in ancestors(folder):
            names = (join(root, "src", rest), join(root, "app", rest), join(root, rest)) if rest else ()
            for name in names or (join(root, "src", specifier), join(root, specifier)):
                if (found := self._file(name)) is not None:
                    return found
        return None


def _exports(code: str, name: str) -> bool:
    word = re.escape(name)
    declared = rf"\bexport\s+(?:declare\s+)?(?:default\s+)?(?:abstract\s+)?(?:async\s+)?[\w*]+\s*\*?\s+{word}\b"
    return re.search(rf"{declared}|\bexport\s*\{{[^}}]*\b{word}\b", code) is not None


def _targets(value: Any) -> list[str]:
    """The paths in a value of `exports`: a text, a list, or conditions (the ones of sources first)."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [target for item in value for target in _targets(item)]
    if isinstance(value, dict):
        return [target for key in _CONDITIONS if key in value for target in _targets(value[key])]
    return []


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
