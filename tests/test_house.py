"""The house itself: layers, public names, size, and what `puyu --help` may import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import puyu

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "puyu").rglob("*.py"))


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_layer_law_holds():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_help_imports_nothing_heavy():
    code = "import sys; from puyu.cli.main import main; main(['--help']); print(sorted(sys.modules))"
    modules = python(code)
    for name in ("'torch'", "'pydantic'", "'rich'", "'numpy'", "'yaml'", "'httpx'"):
        assert name not in modules, name


def test_the_talk_wing_and_the_client_need_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import puyu.client, puyu.agent.loop, puyu.tools.calculate, puyu.eval.run, puyu.documents.readers\n"
        "import puyu.chain.recipe, puyu.chain.runner, puyu.lineage\n"
    )
    python(code)


def test_public_names_are_there():
    for name in puyu.__all__:
        assert getattr(puyu, name) is not None, name
    assert set(puyu.__all__) <= set(dir(puyu))
    with pytest.raises(AttributeError, match="LLMM"):
        _ = puyu.LLMM


def test_size_of_the_house():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert sum(lines.values()) <= 70_000
    long = {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > 500}
    assert not long, long


def test_every_module_says_what_it_is_for():
    bare = [
        path for path in SOURCES if path.name != "__init__.py" and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not bare


def test_no_star_import_no_bare_except_no_leftovers():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "TODO" not in text and "NotImplementedError" not in text and "FIXME" not in text, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name != "*" for alias in node.names), path
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno}"


def test_functions_are_short():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines"


def test_version_stands_in_the_changelog():
    assert f"## {puyu.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
