"""data.13: repositories in the order of their dependencies, share of import edges whose dependency stands first.

    python bench/data_code.py [--save] [--python DIR ...] [--javascript DIR ...] [--typescript DIR ...]
        [--c DIR ...] [--cpp DIR ...] [--java DIR ...]

Gold: Python by `ast`, JavaScript by node's parser and resolution, TypeScript by its compiler (PUYU_TYPESCRIPT names the
folder of that package), C and C++ by `gcc -M` (everything a file needs, not only what it includes itself), Java by
javac's parser; Go and Rust, and three repositories more of each of the others, by hand (tests/data/code_gold*.py).
Without flags the tools look at what is on the machine: packages of the standard library, the packages in npm, headers
of Python, of numpy and torch and of the system, the sources of a JDK where they are; PUYU_CODE_REPOSITORIES adds
DIR/<language>/<repository>. A language needs at least three repositories.

An edge counts as resolvable when it is needed at load: an import in a function or under TYPE_CHECKING stands there
because no order can satisfy it; the notes have those too. Edges inside cycles do count. The value is the share of the
language with the smallest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import data_code_gold as tools
import harness

from puyu.data.code.sort import sort
from puyu.data.code.tree import Edge, SourceFile, Tree
from puyu.documents.repositories import Tree as Unit
from puyu.documents.repositories import repository_documents

Tool = Callable[[Path, Sequence[str]], tools.Edges]
TOOLS: dict[str, Tool] = {
    "python": tools.python_edges,
    "javascript": tools.javascript_edges,
    "typescript": tools.typescript_edges,
    "c": tools.c_edges,
    "cpp": tools.c_edges,
    "java": tools.java_edges,
}
OURS = {"c": ("c", "cpp"), "cpp": ("c", "cpp", "cuda")}
GOAL_REPOSITORIES = 3


def read(folder: Path) -> Tree:
    """The repository as the reader selects it."""
    documents = repository_documents(
        Unit(folder.name, folder), source="bench", domain="code", skipped=Counter(), quarantine=lambda bad: None
    )
    rows = (document.metadata | {"text": document.text} for document in documents)
    return Tree(folder.name, [SourceFile(row["path"], row["text"], row["programming_language"]) for row in rows])


def measured(tree: Tree, edges: tools.Edges) -> dict[str, int]:
    """Gold edges at load and in all: how many are satisfied, and how many were found at all."""
    found = sort(tree)
    place = {path: at for at, path in enumerate(found.paths)}
    ours = needed(found.edges)
    counts: Counter[str] = Counter(files=len(tree.files))
    for (user, dependency), at_load in edges.items():
        ahead = place[dependency] < place[user]
        counts.update(all=1, all_satisfied=ahead, all_found=(user, dependency) in ours)
        counts.update(load=at_load, load_satisfied=at_load and ahead)
    return dict(counts)


def needed(edges: Sequence[Edge]) -> set[tuple[str, str]]:
    """Every (user, dependency), through others too."""
    direct: dict[str, set[str]] = defaultdict(set)
    for edge in edges:
        direct[edge.user].add(edge.dependency)
    found = set()
    for user in direct:
        work, seen = [user], {user}
        while work:
            more = direct.get(work.pop(), set()) - seen
            seen |= more
            work += more
        found |= {(user, dependency) for dependency in seen}
    return found


def on_this_machine(place: Path) -> Iterator[tuple[str, Path]]:
    """(language, folder) of what is found without being told."""
    library = Path(sysconfig.get_paths()["stdlib"])
    yield from (("python", library / name) for name in ("asyncio", "email", "importlib", "unittest", "xml"))
    npm = Path("/usr/lib/node_modules/npm")
    names = ("", "node_modules/@npmcli/arborist", "node_modules/cacache", "node_modules/semver", "node_modules/pacote")
    yield from (("javascript", npm / name) for name in names)
    yield "c", Path(sysconfig.get_paths()["include"])
    yield from (("c", Path("/usr/include") / name) for name in ("brotli", "openssl", "curl"))
    site = Path(sysconfig.get_paths()["purelib"])
    yield from (("c", path) for path in site.glob("numpy/_core/include/numpy"))
    include = site / "torch" / "include"
    yield from (("cpp", include / name) for name in ("c10", "pybind11", "torch/csrc"))
    yield "cpp", harness.ROOT / "puyu"
    yield from (("java", folder) for folder in _jdk(place))


def _jdk(place: Path) -> Iterator[Path]:
    """Modules of a JDK whose sources are installed."""
    sources = sorted(Path("/usr/lib/jvm").glob("*/lib/src.zip")) if Path("/usr/lib/jvm").is_dir() else []
    for path in [path for path in sources if path.is_file()][:1]:
        with zipfile.ZipFile(path) as archive:
            for module in ("java.logging", "java.net.http", "jdk.jshell", "jdk.httpserver"):
                names = [name for name in archive.namelist() if name.startswith(f"{module}/")]
                archive.extractall(place, names)
                if names:
                    yield place / module


def repositories(arguments: argparse.Namespace, place: Path) -> Iterator[tuple[str, Path]]:
    given = [(language, Path(folder)) for language in TOOLS for folder in getattr(arguments, language)]
    more = os.environ.get("PUYU_CODE_REPOSITORIES", "")
    folders = sorted(Path(more).glob("*/*")) if more else []
    yield from given or on_this_machine(place)
    yield from ((folder.parent.name, folder) for folder in folders if folder.parent.name in TOOLS)


def by_tool(language: str, folder: Path) -> dict[str, int] | None:
    """The counts of one repository; None where there is nothing to measure."""
    if not folder.is_dir():
        return None
    tree = read(folder)
    paths = [file.path for file in tree.files.values() if file.language in OURS.get(language, (language,))]
    edges = TOOLS[language](folder, paths)
    return measured(tree, edges) if edges else None


def by_hand() -> Iterator[tuple[str, str, dict[str, int]]]:
    from tests.data.code_gold_more import ALL

    for case in ALL:
        edges = dict.fromkeys(case.edges, True) | dict.fromkeys(case.later, False)
        yield case.language, f"{case.name} (by hand)", measured(case.tree, edges)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    for language in TOOLS:
        parser.add_argument(f"--{language}", nargs="*", default=[], metavar="DIR", help=f"repositories of {language}")
    arguments = parser.parse_args()
    found: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    for language, name, counts in by_hand():
        found[language][name] = counts
    with tempfile.TemporaryDirectory() as place:
        for language, folder in repositories(arguments, Path(place)):
            if (counts := by_tool(language, folder)) is not None:
                found[language][folder.name] = counts
    shares = {language: summed(rows) for language, rows in sorted(found.items())}
    for language, row in shares.items():
        print(f"  {language:<11} {row}", file=sys.stderr)
    few = [language for language, rows in found.items() if len(rows) < GOAL_REPOSITORIES]
    worst = 0.0 if few else min(row["share"] for row in shares.values())
    run = harness.Run("data_code", versions=versions(), notes={"languages": shares, "repositories": found}, before={})
    run.finish([harness.Samples("data.13", [worst])], save=arguments.save)


def summed(rows: dict[str, dict[str, int]]) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for row in rows.values():
        total.update(row)
    shares = {
        "share": round(total["load_satisfied"] / total["load"], 4),
        "share_with_later": round(total["all_satisfied"] / total["all"], 4),
        "found": round(total["all_found"] / total["all"], 4),
    }
    return {"repositories": len(rows), "edges": total["load"], "edges_with_later": total["all"], **shares}


def versions() -> dict[str, str]:
    """Of the tools that made the gold."""
    found = {}
    for command in (["gcc", "-dumpversion"], ["node", "--version"], ["javac", "-version"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except FileNotFoundError:
            continue
        found[command[0]] = (done.stdout or done.stderr).strip()
    return found


if __name__ == "__main__":
    main()
