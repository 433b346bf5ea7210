"""Includes of C, C++, CUDA and Objective-C -> files of the repository.

    >>> tree = Tree("demo", [SourceFile("src/a.c", '#include "b.h"', "c"), SourceFile("include/b.h", "", "c")])
    >>> Imports(tree)("src/a.c").edges[0].dependency
    'include/b.h'

Quotes: beside the file, then the folders around it and their include folders, then any folder under which the path
fits, the shortest first. Angle brackets: the same without the file's own folder, and never a header of the C, C++ or
POSIX standard at a place that is no include folder. A header that only includes others (an umbrella) also leads to
those of them whose names the user really has. Lines under `#if 0` do not count; macros in an include are not expanded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from puyu.data.code.tree import Edge, Found, Tree, ancestors, join

LANGUAGES = ("c", "cpp", "cuda", "objective-c", "opencl", "glsl")
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*(?:include|include_next|import)[ \t]*(?P<mark>[\"<])", re.M)
_NEVER = re.compile(r"^[ \t]*#[ \t]*if[ \t]+0\b.*?^[ \t]*#[ \t]*(?:endif|else|elif)\b", re.M | re.S)
_DIRECTIVE = re.compile(r"^[ \t]*#[^\n]*(?:\\\n[^\n]*)*$", re.M)
_EXTERN = re.compile(r"extern[ \t]+\"[ ]*\"[ \t]*\{|\}")
_DECLARED = re.compile(
    r"#[ \t]*define[ \t]+(\w+)|\b(?:struct|class|union|enum(?:[ \t]+class)?|concept)[ \t]+(\w+)"
    r"|\b(\w+)[ \t]*\([^;{}()]*\)[ \t\n]*(?:const|noexcept|override)?[ \t\n]*[;{]|\}[ \t]*(\w+)[ \t]*;"
    r"|\btypedef\b[^;{}]*?\b(\w+)[ \t]*;"
)
_WORD = re.compile(r"[A-Za-z_]\w*")
_INCLUDE_FOLDERS = ("include", "inc", "includes", "headers", "src", "lib", "source")
_HEADERS = (".h", ".hh", ".hpp", ".hxx", ".h++", ".cuh", ".inl", ".ipp", ".tpp")
_STANDARD = re.compile(
    r"(?:"
    r"assert|complex|ctype|errno|fenv|float|inttypes|iso646|limits|locale|math|setjmp|signal|stdalign|stdarg|"
    r"stdatomic|stdbool|stddef|stdint|stdio|stdlib|stdnoreturn|string|tgmath|threads|time|uchar|wchar|wctype|"
    r"aio|dirent|dlfcn|fcntl|fnmatch|ftw|glob|grp|iconv|langinfo|libgen|malloc|memory|netdb|poll|pthread|pwd|"
    r"regex|sched|search|semaphore|spawn|strings|syslog|termios|ucontext|unistd|utime|wordexp|getopt|alloca|"
    r"endian|byteswap|features|ifaddrs|resolv"
    r")\.h"
)
"""Headers of C and POSIX."""


class Imports:
    """Resolves the includes of one repository."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._umbrella: dict[str, tuple[str, ...]] = {}
        self._names: dict[str, frozenset[str]] = {}

    def __call__(self, path: str) -> Found:
        """What the file includes."""
        strong: dict[str, bool] = {}
        outside, missing = 0, []
        for name, quoted in self._includes(path):
            target = self._resolve(path, name, quoted=quoted)
            if target is None:
                missing += [name] if quoted else []
                outside += not quoted
                continue
            strong[target] = True
            strong |= dict.fromkeys(self._really_used(path, target), True)
        strong.pop(path, None)
        return Found(tuple(Edge(path, target) for target in sorted(strong)), outside, tuple(missing))

    def _includes(self, path: str) -> Iterator[tuple[str, bool]]:
        """(what stands between the marks, whether they are quotes)."""
        text, code = self.tree[path].text, self.tree.code(path)
        dead = [found.span() for found in _NEVER.finditer(code)]
        for found in _INCLUDE.finditer(code):
            begin, end = found.end(), text.find('"' if found["mark"] == '"' else ">", found.end())
            if end > begin and "\n" not in text[begin:end] and not any(a <= begin < b for a, b in dead):
                yield text[begin:end].strip().replace("\\", "/"), found["mark"] == '"'

    def _resolve(self, path: str, name: str, *, quoted: bool) -> str | None:
        folder = self.tree[path].folder
        places = [join(folder, name)] if quoted else []
        for around in ancestors(folder):
            places += [join(around, name), *(join(around, inner, name) for inner in _INCLUDE_FOLDERS)]
        if name.startswith(f"{self.tree.name}/"):  # the repository is the include folder itself
            places.append(name.partition("/")[2])
        standard = not quoted and _is_standard(name)
        if standard:
            places = [place for place in places if "include" in place.split("/")]
        found = self.tree.first(place for place in places if place != path)
        if found is not None or standard or name.startswith(".."):
            return found
        fitting = [place for place in self.tree.ending(join(name)) if place != path]
        return fitting[0] if fitting and (quoted or "/" in name or _in_include_folder(fitting[0])) else None

    # ---- umbrella headers

    def _really_used(self, path: str, header: str) -> list[str]:
        """Of what an umbrella header includes, the headers with a name that the user has; for others nothing."""
        inner = self._inner(header)
        if not inner or path in inner:
            return []
        words = frozenset(_WORD.findall(self.tree.code(path)))
        return [target for target in inner if words & self._declared(target)]

    def _inner(self, header: str) -> tuple[str, ...]:
        """The includes of a header in which nothing else stands."""
        if header not in self._umbrella:
            self._umbrella[header] = ()
            code = _EXTERN.sub("", _DIRECTIVE.sub("", self.tree.code(header)))
            if header.endswith(_HEADERS) and not code.strip():
                found = (self._resolve(header, name, quoted=quoted) for name, quoted in self._includes(header))
                inner = tuple(dict.fromkeys(target for target in found if target is not None))
                deeper = (leaf for target in inner for leaf in self._inner(target) or (target,))
                self._umbrella[header] = tuple(dict.fromkeys(deeper)) if len(inner) > 1 else ()
        return self._umbrella[header]

    def _declared(self, header: str) -> frozenset[str]:
        if header not in self._names:
            found = _DECLARED.findall(self.tree.code(header))
            self._names[header] = frozenset(name for groups in found for name in groups if len(name) > 1)
        return self._names[header]


def _is_standard(name: str) -> bool:
    plain = "/" not in name and ("." not in name or _STANDARD.fullmatch(name) is not None)
    return plain or name.startswith("sys/")


def _in_include_folder(path: str) -> bool:
    return any(part in _INCLUDE_FOLDERS for part in path.split("/")[:-1]) or "/" not in path
