"""A file's path and content -> its language, from one table: suffix, name, `#!` line, editor's mode line.

    >>> language_of("src/Vector.h", "class Vector { public: int size() const; };").name
    'cpp'
    >>> language_of("bin/run", "#!/usr/bin/env python3\\n").name
    'python'

Suffixes that several languages share (.h, .m, .pl, .ts, .v, .r ...) are decided by patterns of the content, in the
order of the table's rows; without a hit the first row stands. A mode line or a `#!` line that names a language wins
over the suffix only where the suffix is shared or absent. It reads no file, and judges no quality.

`fence` is the info string of a markdown code block (GitHub's names); `kind` tells code from markup, data and prose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["code", "markup", "data", "prose"]


@dataclass(frozen=True, slots=True)
class Comments:
    """How comments and strings look: line openers, block pairs, and the regular expressions of whole strings."""

    line: tuple[str, ...] = ()
    blocks: tuple[tuple[str, str], ...] = ()
    strings: tuple[str, ...] = ()
    nested: bool = False
    """Whether block comments nest."""
    at_word: bool = False
    """Whether a line comment begins only where a word may."""


@dataclass(frozen=True, slots=True)
class Language:
    """A row of the table."""

    name: str
    suffixes: tuple[str, ...]
    comments: Comments
    kind: Kind = "code"
    names: tuple[str, ...] = ()
    """Whole file names."""
    programs: tuple[str, ...] = ()
    """What stands in a `#!` line, or in a mode line beside the name."""
    fence: str = ""


# ---- strings and comments

_DOUBLE, _SINGLE = r'"(?:\\(?s:.)|[^"\\\n])*"', r"'(?:\\(?s:.)|[^'\\\n])*'"
_CHARACTER = r"'(?:\\(?:u\{[^}'\n]*\}|[^\n][0-9A-Fa-f]*)|[^'\\\n])'"
_TRIPLE = r'"""(?:\\(?s:.)|[^\\])*?"""', r"'''(?:\\(?s:.)|[^\\])*?'''"
_TICKS = r"`(?:\\(?s:.)|[^`\\])*`"
# a slash that begins an expression; what stands before it is part of the match
_REGEX = (
    r"(?:[(,=:\[!&|?{};+\n]|\breturn|\btypeof)[ \t]*/(?![*/])"
    r"(?:\\(?s:.)|\[(?:\\(?s:.)|[^\]\\\n])*\]|[^/\\\[\n])+/[a-z]*"
)
_PLAIN = (_DOUBLE, _SINGLE)
_SLASHES = (("/*", "*/"),)

C_LIKE = Comments(("//",), _SLASHES, (_DOUBLE, _CHARACTER))
CPP = Comments(("//",), _SLASHES, (r'R"(?P<raw>[^()\\\s]{0,16})\((?:.|\n)*?\)(?P=raw)"', _DOUBLE, _CHARACTER))
JAVA = Comments(("//",), _SLASHES, (_TRIPLE[0], _DOUBLE, _CHARACTER))
SCRIPT = Comments(("//",), _SLASHES, (_TICKS, _DOUBLE, _SINGLE, _REGEX))
GO = Comments(("//",), _SLASHES, (r"`[^`]*`", _DOUBLE, _CHARACTER))
RUST = Comments(
    ("//",),
    _SLASHES,
    (r'\b(?:b|c)?r(?P<hashes>#*)"(?:.|\n)*?"(?P=hashes)', r'"(?:\\(?s:.)|[^"\\])*"', _CHARACTER),
    True,
)
PYTHON = Comments(("#",), (), (*_TRIPLE, _DOUBLE, _SINGLE))
HASH = Comments(("#",), (), _PLAIN)
SHELL = Comments(("#",), (), (r'"(?:\\(?s:.)|[^"\\])*"', r"'[^']*'"), at_word=True)
STYLE = Comments((), _SLASHES, _PLAIN)
PHP = Comments(("//", "#"), _SLASHES, (r'"(?:\\(?s:.)|[^"\\])*"', r"'(?:\\(?s:.)|[^'\\])*'"))
ANGLE = Comments((), (("<!--", "-->"),))
DASHES = Comments(("--",), _SLASHES, (r"'(?:''|[^'])*'", r'"[^"]*"'))
HASKELL = Comments(("--",), (("{-", "-}"),), (_DOUBLE, _CHARACTER), True)
LUA = Comments(("--",), (("--[[", "]]"),), (r"\[\[(?:.|\n)*?\]\]", *_PLAIN))
LISP = Comments((";",), (("#|", "|#"),), (r'"(?:\\(?s:.)|[^"\\])*"',))
PERCENT = Comments(("%",), (("%{", "%}"),), (_DOUBLE,))
TEX = Comments(("%",))
ML = Comments((), (("(*", "*)"),), (_DOUBLE, _CHARACTER), True)
FSHARP = Comments(("//",), (("(*", "*)"),), (_TRIPLE[0], _DOUBLE, _CHARACTER))
PASCAL = Comments(("//",), (("(*", "*)"), ("{", "}")), (r"'(?:''|[^'\n])*'",))
BANG = Comments(("!",), (), _PLAIN)
QUOTE = Comments(("'",), (), (r'"[^"\n]*"',))
ASSEMBLY = Comments((";", "# ", "//"), _SLASHES, (_DOUBLE,))
POWERSHELL = Comments(("#",), (("<#", "#>"),), _PLAIN)
JULIA = Comments(("#",), (("#=", "=#"),), (_TRIPLE[0], _DOUBLE, _CHARACTER))
NIX = Comments(("#",), _SLASHES, (r"''(?:.|\n)*?''", _DOUBLE))
QUOTED = Comments((), (), (_DOUBLE,))
NONE = Comments()


# ---- the table: names of the comment styles stand above

LANGUAGES = (
    Language("c", (".c", ".h", ".idc"), C_LIKE),
    Language("cpp", (".cc", ".cpp", ".cxx", ".c++", ".hpp", ".hh", ".hxx", ".h++", ".ipp", ".tpp", ".inl", ".h"), CPP),
    Language("objective-c", (".m", ".mm", ".h"), C_LIKE, programs=("objc",), fence="objectivec"),
    Language("cuda", (".cu", ".cuh"), CPP, fence="cuda"),
    Language("opencl", (".cl", ".opencl"), C_LIKE, fence="c"),
    Language("glsl", (".glsl", ".vert", ".frag", ".geom", ".comp"), C_LIKE),
    Language("csharp", (".cs", ".csx"), JAVA, programs=("c#",)),
    Language("java", (".java",), JAVA),
    Language("kotlin", (".kt", ".kts"), JAVA),
    Language("scala", (".scala", ".sc", ".sbt"), JAVA),
    Language("groovy", (".groovy", ".gradle"), JAVA, programs=("groovy",)),
    Language("javascript", (".js", ".mjs", ".cjs", ".jsx"), SCRIPT, programs=("node", "nodejs", "js")),
    Language("typescript", (".ts", ".mts", ".cts", ".tsx"), SCRIPT, programs=("deno", "ts-node", "bun")),
    Language("vue", (".vue",), ANGLE, "markup"),
    Language("svelte", (".svelte",), ANGLE, "markup"),
    Language("python", (".py", ".pyi", ".pyx", ".pxd", ".pyw"), PYTHON, names=("SConstruct", "wscript"),
             programs=("python", "python2", "python3", "pypy", "pypy3")),
    Language("go", (".go",), GO),
    Language("rust", (".rs",), RUST, programs=("rust-script",)),
    Language("swift", (".swift",), Comments(("//",), _SLASHES, (_TRIPLE[0], _DOUBLE), True)),
    Language("dart", (".dart",), Comments(("//",), _SLASHES, (*_TRIPLE, _DOUBLE, _SINGLE))),
    Language("zig", (".zig",), Comments(("//",), (), (_DOUBLE, _CHARACTER))),
    Language("d", (".d",), C_LIKE),
    Language("ruby", (".rb", ".rake", ".gemspec"), Comments(("#",), (("\n=begin", "\n=end"),), _PLAIN),
             names=("Rakefile", "Gemfile"), programs=("ruby", "jruby")),
    Language("perl", (".pl", ".pm", ".t"), Comments(("#",), (("\n=pod", "\n=cut"), ("\n=head", "\n=cut")), _PLAIN),
             programs=("perl",)),
    Language("prolog", (".pl", ".pro", ".prolog"), Comments(("%",), _SLASHES, _PLAIN), programs=("swipl",)),
    Language("php", (".php", ".phtml"), PHP, programs=("php",)),
    Language("shell", (".sh", ".bash", ".zsh", ".ksh", ".bats"), SHELL, programs=("sh", "bash", "zsh", "ksh", "dash"),
             names=(".bashrc", ".profile", "PKGBUILD")),
    Language("powershell", (".ps1", ".psm1", ".psd1"), POWERSHELL, programs=("pwsh",)),
    Language("batch", (".bat", ".cmd"), Comments(("REM ", "rem ", "::")), fence="bat"),
    Language("lua", (".lua",), LUA, programs=("lua", "luajit")),
    Language("r", (".r", ".rmd"), HASH, programs=("Rscript",)),
    Language("rebol", (".r", ".reb"), LISP, fence="rebol"),
    Language("julia", (".jl",), JULIA, programs=("julia",)),
    Language("matlab", (".m",), PERCENT, programs=("octave",)),
    Language("fortran", (".f", ".f77", ".for", ".f90", ".f95", ".f03", ".f08"), BANG),
    Language("haskell", (".hs", ".lhs"), HASKELL, programs=("runhaskell", "stack")),
    Language("elm", (".elm",), HASKELL),
    Language("ocaml", (".ml", ".mli"), ML, programs=("ocaml",)),
    Language("fsharp", (".fs", ".fsi", ".fsx"), FSHARP),
    Language("coq", (".v",), ML, fence="coq"),
    Language("verilog", (".v", ".vh", ".sv", ".svh"), Comments(("//",), _SLASHES, (_DOUBLE,))),
    Language("v", (".v",), C_LIKE, fence="v"),
    Language("vhdl", (".vhd", ".vhdl"), Comments(("--",), (), (_DOUBLE,))),
    Language("erlang", (".erl", ".hrl"), Comments(("%",), (), (_DOUBLE,)), programs=("escript",)),
    Language("elixir", (".ex", ".exs"), PYTHON, programs=("elixir",)),
    Language("clojure", (".clj", ".cljs", ".cljc", ".edn"), LISP),
    Language("lisp", (".lisp", ".lsp", ".el"), LISP, programs=("sbcl", "emacs"), fence="lisp"),
    Language("scheme", (".scm", ".ss", ".rkt"), LISP, programs=("guile", "racket")),
    Language("ada", (".adb", ".ads"), Comments(("--",), (), (_DOUBLE,))),
    Language("pascal", (".pas", ".pp", ".dpr", ".lpr"), PASCAL),
    Language("visual-basic", (".vb", ".bas", ".vbs"), QUOTE, fence="vb"),
    Language("cobol", (".cob", ".cbl", ".cpy"), Comments(("*>",), (), _PLAIN)),
    Language("assembly", (".s", ".asm"), ASSEMBLY, fence="asm"),
    Language("sql", (".sql", ".ddl"), DASHES),
    Language("solidity", (".sol",), C_LIKE),
    Language("nim", (".nim",), Comments(("#",), (("#[", "]#"),), (_TRIPLE[0], _DOUBLE))),
    Language("crystal", (".cr",), HASH),
    Language("nix", (".nix",), NIX),
    Language("terraform", (".tf", ".hcl"), Comments(("#", "//"), _SLASHES, (_DOUBLE,)), fence="hcl"),
    Language("protobuf", (".proto",), C_LIKE),
    Language("thrift", (".thrift",), Comments(("//", "#"), _SLASHES, _PLAIN)),
    Language("graphql", (".graphql", ".gql"), HASH),
    Language("tcl", (".tcl",), Comments(("#",), (), (_DOUBLE,)), programs=("tclsh", "wish")),
    Language("awk", (".awk",), Comments(("#",), (), (_DOUBLE,)), programs=("awk", "gawk")),
    Language("vim", (".vim",), NONE),
    Language("makefile", (".mk", ".mak"), HASH, names=("Makefile", "makefile", "GNUmakefile"), programs=("make",)),
    Language("cmake", (".cmake",), Comments(("#",), (("#[[", "]]"),), (_DOUBLE,)), names=("CMakeLists.txt",)),
    Language("dockerfile", (".dockerfile",), HASH, names=("Dockerfile", "Containerfile")),
    Language("starlark", (".bzl", ".star"), PYTHON, names=("BUILD", "BUILD.bazel", "WORKSPACE"), fence="python"),
    Language("html", (".html", ".htm", ".xhtml"), ANGLE, "markup"),
    Language("xml", (".xml", ".xsd", ".xsl", ".xslt", ".svg", ".plist", ".csproj"), ANGLE, "markup"),
    Language("qt-translation", (".ts",), ANGLE, "data", fence="xml"),
    Language("css", (".css",), STYLE, "markup"),
    Language("scss", (".scss", ".sass", ".less"), C_LIKE, "markup"),
    Language("tex", (".tex", ".sty", ".cls", ".bib"), TEX, "markup"),
    Language("json", (".json", ".jsonc", ".json5"), QUOTED, "data"),
    Language("yaml", (".yaml", ".yml"), HASH, "data"),
    Language("toml", (".toml",), HASH, "data", names=("Pipfile",)),
    Language("ini", (".ini", ".cfg", ".conf", ".properties"), Comments((";", "#")), "data"),
    Language("gomod", (".mod",), Comments(("//",)), "data", names=("go.mod", "go.work"), fence="go"),
    Language("notebook", (".ipynb",), QUOTED, "prose", fence="json"),
    Language("markdown", (".md", ".markdown", ".mdx"), NONE, "prose"),
    Language("restructuredtext", (".rst",), NONE, "prose", fence="rst"),
    Language("text", (".txt", ".text"), NONE, "prose",
             names=("README", "LICENSE", "COPYING", "NOTICE", "AUTHORS", "CHANGELOG", "INSTALL", "CONTRIBUTING")),
)  # fmt: skip

_CONTENT: dict[str, tuple[tuple[str, re.Pattern[str]], ...]] = {
    ".h": (
        ("objective-c", re.compile(r"^[ \t]*(?:@(?:interface|protocol|property|end|class)\b|#import\b)", re.M)),
        ("cpp", re.compile(
            r"^[ \t]*(?:template\s*<|namespace\s+[\w:]*\s*\{?|using\s+\w|class\s+\w+[^;]*$)"
            r"|^[ \t]*(?:public|private|protected)\s*:"
            r"|\bstd::|#include\s*<(?:string|vector|map|memory|iostream|cstdint|cstddef|functional|utility|algorithm)>"
            r"|\bclass\s+\w+\s*(?:final\s*)?[:{]|\b(?:constexpr|nullptr|virtual)\b|\boperator\s*[=<>+\-*\[(]", re.M)),
        ("c", re.compile("")),
    ),
    ".m": (
        ("objective-c", re.compile(r"^[ \t]*@(?:interface|implementation|protocol|import|end)\b"
                                   r"|^[ \t]*#(?:import|include)\b|\[\s*\w+\s+\w+", re.M)),
        ("matlab", re.compile(r"^[ \t]*(?:function\b|classdef\b|%|end\b|disp\(|clear\b|clc\b)|\.\*|;\s*$", re.M)),
        ("objective-c", re.compile("")),
    ),
    ".pl": (
        ("prolog", re.compile(r"^[ \t]*:-|^[a-z]\w*(?:\([^()]*\))?\s*:-|^[a-z]\w*\([^()]*\)\.\s*$", re.M)),
        ("perl", re.compile("")),
    ),
    ".ts": (
        ("qt-translation", re.compile(r"\A\s*(?:<\?xml|<!DOCTYPE TS|<TS\b)")),
        ("typescript", re.compile("")),
    ),
    ".v": (
        ("coq", re.compile(r"^[ \t]*(?:Require\b|Theorem\b|Lemma\b|Proof\b|Definition\b|Inductive\b|Fixpoint\b|Qed\.)",
                           re.M)),
        ("verilog", re.compile(r"^[ \t]*(?:module\s+\w+\s*[#(;]|endmodule|`(?:timescale|define|include)|always\b)",
                               re.M)),
        ("v", re.compile(r"^[ \t]*(?:(?:pub\s+)?fn\s+[\w(]|module\s+\w+\s*$|import\s+\w|struct\s+\w)|:=", re.M)),
        ("verilog", re.compile("")),
    ),
    ".r": (
        ("rebol", re.compile(r"\A\s*rebol\b", re.I)),
        ("r", re.compile("")),
    ),
    ".cls": (
        ("tex", re.compile(r"^[ \t]*(?:%|\\)", re.M)),
        ("visual-basic", re.compile("")),
    ),
    ".d": (
        ("makefile", re.compile(r"\A\s*[\w./-]+\.o\s*:")),
        ("d", re.compile("")),
    ),
    ".fs": (
        ("glsl", re.compile(r"^[ \t]*(?:#version\b|precision\s+\w+|uniform\s|varying\s)", re.M)),
        ("fsharp", re.compile("")),
    ),
    ".t": (
        ("perl", re.compile(r"^[ \t]*(?:use\s+[\w:]+|my\s+[$@%]|package\s)", re.M)),
        ("text", re.compile("")),
    ),
    ".mod": (
        ("gomod", re.compile(r"^[ \t]*(?:module|go|require)\s", re.M)),
        ("text", re.compile("")),
    ),
    ".pp": (
        ("pascal", re.compile(r"\b(?:begin|unit|program|procedure)\b", re.I)),
        ("ruby", re.compile("")),
    ),
}  # fmt: skip
"""Suffix -> (language, pattern of the content), tried in order; the last always fits."""

BY_NAME = {language.name: language for language in LANGUAGES}
BY_SUFFIX = {suffix: language for language in reversed(LANGUAGES) for suffix in language.suffixes}
_BY_FILE = {name: language for language in LANGUAGES for name in language.names}
_BY_PROGRAM = {word: language for language in LANGUAGES for word in (*language.programs, language.name)}

_MODE = re.compile(
    r"-\*-\s*(?:.*?mode:\s*)?([\w+#-]+)\s*(?:;.*)?-\*-|\bvim?:.*?\b(?:ft|filetype|syntax)=([\w+#-]+)", re.I
)
_HEADER = re.compile(r"^[ \t]*#[ \t]*(?:include[ \t]*[<\"]|pragma[ \t]+once)", re.M)  # C++ headers have no suffix
_VERSION = re.compile(r"[\d.]+$")
_MODES = {"c++": "cpp", "objc": "objective-c", "sh": "shell", "js": "javascript", "emacs-lisp": "lisp", "latex": "tex"}


def language_of(path: str, text: str) -> Language | None:
    """The row of a file; None when neither its name nor its content tells one."""
    name = path.rsplit("/", 1)[-1]
    if found := _BY_FILE.get(name):
        return found
    suffix = name[name.rindex(".") :].lower() if "." in name.lstrip(".") else ""
    declared = _declared(text)
    if suffix in _CONTENT:
        shared = [row for row in LANGUAGES if suffix in row.suffixes]
        return declared if declared in shared else _by_content(suffix, text)
    header = BY_NAME["cpp"] if not suffix and _HEADER.search(text) else None
    return BY_SUFFIX.get(suffix) or declared or header


def is_known_suffix(path: str) -> bool:
    """Whether the name alone tells a language."""
    name = path.rsplit("/", 1)[-1]
    return name in _BY_FILE or ("." in name and name[name.rindex(".") :].lower() in BY_SUFFIX)


def _by_content(suffix: str, text: str) -> Language:
    return next(BY_NAME[name] for name, pattern in _CONTENT[suffix] if pattern.search(text))


def _declared(text: str) -> Language | None:
    """The language of a `#!` line, or of an editor's mode line among the first or last five lines."""
    if text.startswith("#!"):
        words = [word.rsplit("/", 1)[-1] for word in text[2:200].split("\n")[0].split()]
        asked = [word for word in words if word != "env" and not word.startswith("-") and "=" not in word]
        program = asked[0] if asked else ""
        return _BY_PROGRAM.get(program) or _BY_PROGRAM.get(_VERSION.sub("", program))
    lines = text[:2000].split("\n")[:5] + text[-2000:].split("\n")[-5:]
    if found := _MODE.search("\n".join(lines)):
        mode = (found.group(1) or found.group(2)).lower()
        return _BY_PROGRAM.get(_MODES.get(mode, mode))
    return None
