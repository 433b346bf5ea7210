"""Import edges of repositories by the tools of their languages: Python's ast, node's parser,
TypeScript's own, gcc -M, javac's parser.

Each function takes a folder and the files that were read of it, and gives {(user, dependency): needed at load}. A tool
that is not there gives an empty result, and its language is measured on the repositories listed by hand alone.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

Edges = dict[tuple[str, str], bool]
SECONDS = 100


# --- Python --------------------------------------------------------------------------------------------------------


def python_edges(folder: Path, files: Sequence[str]) -> Edges:
    """By `ast`: a name leads to its module, or to its package where it is none. The folder itself is a package."""
    known, edges = set(files), Edges()
    for path in files:
        if path.endswith(".py"):
            tree = ast.parse((folder / path).read_bytes())
            for node, later in _walk(tree, False):
                for target in _python_targets(node, path, folder.name, known):
                    if target != path:
                        edges[path, target] = edges.get((path, target), False) or not later
    return edges


def _walk(node: ast.AST, later: bool):  # type: ignore[no-untyped-def]
    for child in ast.iter_child_nodes(node):
        inside = later or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for part in child.body:
                yield from ([(part, True)] if isinstance(part, ast.Import | ast.ImportFrom) else _walk(part, True))
            for part in child.orelse:
                yield from ([(part, inside)] if isinstance(part, ast.Import | ast.ImportFrom) else _walk(part, inside))
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inside
        yield from _walk(child, inside)


def _python_targets(node: ast.Import | ast.ImportFrom, path: str, top: str, known: set[str]) -> list[str]:
    if isinstance(node, ast.Import):
        names = [alias.name.split(".") for alias in node.names]
        return [found for parts in names if (found := _module(parts, top, known))]
    package = [top, *path.split("/")[:-1]]
    package = package[: len(package) - node.level + 1] if node.level else []
    base = [*package, *(node.module.split(".") if node.module else [])]
    found = []
    for alias in node.names:
        target = _module([*base, alias.name], top, known) or _module(base, top, known)
        found += [target] if target else []
    return found


def _module(parts: Sequence[str], top: str, known: set[str]) -> str | None:
    if not parts or parts[0] != top:
        return None
    stem = "/".join(parts[1:])
    names = (f"{stem}.py", f"{stem}/__init__.py") if stem else ("__init__.py",)
    return next((name for name in names if name in known), None)


# --- JavaScript ----------------------------------------------------------------------------------------------------

_NODE = r"""
const acorn = require('internal/deps/acorn/acorn/dist/acorn')
const walk = require('internal/deps/acorn/acorn-walk/dist/walk')
const { createRequire } = require('module'), fs = require('fs'), path = require('path')
const root = fs.realpathSync(process.argv[1]), rows = []
for (const file of JSON.parse(fs.readFileSync(0, 'utf8'))) {
  const whole = path.join(root, file), text = fs.readFileSync(whole, 'utf8').replace(/^#!.*/, '')
  const options = { ecmaVersion: 'latest', allowReturnOutsideFunction: true }
  let tree
  try { tree = acorn.parse(text, { ...options, sourceType: 'script' }) }
  catch { try { tree = acorn.parse(text, { ...options, sourceType: 'module' }) } catch { continue } }
  const add = (node, source, later) => {
    if (!source || source.type !== 'Literal' || typeof source.value !== 'string') return
    try {
      const found = path.relative(root, fs.realpathSync(createRequire(whole).resolve(source.value)))
      if (!found.startsWith('..') && !path.isAbsolute(found)) rows.push([file, found, later])
    } catch {}
  }
  const inside = (ancestors) => ancestors.slice(0, -1).some(node => /Function/.test(node.type))
  walk.ancestor(tree, {
    ImportDeclaration (node) { add(node, node.source, false) },
    ExportNamedDeclaration (node) { add(node, node.source, false) },
    ExportAllDeclaration (node) { add(node, node.source, false) },
    ImportExpression (node) { add(node, node.source, true) },
    CallExpression (node, _, ancestors) {
      if (node.callee.name === 'require') add(node, node.arguments[0], inside(ancestors || _))
    },
  })
}
console.log(JSON.stringify(rows))
"""


def javascript_edges(folder: Path, files: Sequence[str]) -> Edges:
    """By node's own parser (acorn) and node's own resolution."""
    node = shutil.which("node")
    wanted = [path for path in files if path.endswith((".js", ".cjs", ".mjs"))]
    if node is None:
        return {}
    command = [node, "--expose-internals", "-e", _NODE, str(folder)]
    done = subprocess.run(command, input=json.dumps(wanted), capture_output=True, text=True, timeout=SECONDS)
    return _joined(json.loads(done.stdout), set(files)) if done.returncode == 0 else {}


# --- TypeScript ----------------------------------------------------------------------------------------------------

_TYPESCRIPT = r"""
const ts = require(process.argv[1]), fs = require('fs'), path = require('path')
const root = fs.realpathSync(process.argv[2]), rows = []
const options = { moduleResolution: ts.ModuleResolutionKind.Bundler, module: ts.ModuleKind.ESNext, allowJs: true,
  resolveJsonModule: true }
for (const file of JSON.parse(fs.readFileSync(0, 'utf8'))) {
  const whole = path.join(root, file)
  const tree = ts.createSourceFile(whole, fs.readFileSync(whole, 'utf8'), ts.ScriptTarget.Latest, true)
  const add = (node, later) => {
    if (!node || !ts.isStringLiteralLike(node)) return
    const found = ts.resolveModuleName(node.text, whole, options, ts.sys).resolvedModule
    const target = found && path.relative(root, fs.realpathSync(found.resolvedFileName))
    if (target && !target.startsWith('..')) rows.push([file, target, later])
  }
  const visit = (node, inside) => {
    const clause = node.importClause
    if (ts.isImportDeclaration(node)) add(node.moduleSpecifier, Boolean(clause && clause.isTypeOnly))
    else if (ts.isExportDeclaration(node)) add(node.moduleSpecifier, node.isTypeOnly)
    else if (ts.isExternalModuleReference(node)) add(node.expression, false)
    else if (ts.isCallExpression(node)) {
      if (node.expression.kind === ts.SyntaxKind.ImportKeyword) add(node.arguments[0], true)
      else if (node.expression.getText(tree) === 'require') add(node.arguments[0], inside)
    }
    ts.forEachChild(node, child => visit(child, inside || ts.isFunctionLike(node)))
  }
  visit(tree, false)
}
console.log(JSON.stringify(rows))
"""


def typescript_edges(folder: Path, files: Sequence[str]) -> Edges:
    """By the compiler's parser and resolution; PUYU_TYPESCRIPT is the folder of the package `typescript`."""
    node, package = shutil.which("node"), os.environ.get("PUYU_TYPESCRIPT", "")
    if node is None or not package:
        return {}
    command = [node, "-e", _TYPESCRIPT, str(Path(package).resolve()), str(folder)]
    done = subprocess.run(command, input=json.dumps(list(files)), capture_output=True, text=True, timeout=SECONDS)
    return _joined(json.loads(done.stdout), set(files)) if done.returncode == 0 else {}


def _joined(rows: Sequence[Sequence[object]], known: set[str]) -> Edges:
    edges = Edges()
    for user, dependency, later in rows:
        if dependency in known and user != dependency:
            edges[str(user), str(dependency)] = edges.get((str(user), str(dependency)), False) or not later
    return edges


# --- C and C++ -----------------------------------------------------------------------------------------------------


def c_edges(folder: Path, files: Sequence[str]) -> Edges:
    """By `gcc -M`: all files that one needs, through others too, with the repository and its include folder known."""
    gcc, edges = shutil.which("gcc"), Edges()
    roots = [folder, folder / "include", folder / "src", folder.parent]
    flags = [flag for root in roots if root.is_dir() for flag in ("-I", str(root))]
    for path in files if gcc else ():
        kind = "c" if path.endswith(".c") else "c++"
        command = [str(gcc), "-M", "-x", kind, *flags, str(folder / path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode == 0:
            for word in done.stdout.replace("\\\n", " ").split()[1:]:
                place = Path(word).resolve()
                target = place.relative_to(folder.resolve()).as_posix() if folder.resolve() in place.parents else ""
                if target in files and target != path:
                    edges[path, target] = True
    return edges


# --- Java ----------------------------------------------------------------------------------------------------------

_JAVA = r"""
import com.sun.source.tree.*; import com.sun.source.util.*; import java.nio.file.*; import java.util.*;
import javax.tools.*;
class Edges {
  public static void main(String[] arguments) throws Exception {
    Path root = Path.of(arguments[0]);
    List<Path> files = new ArrayList<>();
    for (String line : Files.readAllLines(Path.of(arguments[1]))) files.add(root.resolve(line));
    JavaCompiler compiler = ToolProvider.getSystemJavaCompiler();
    StandardJavaFileManager manager = compiler.getStandardFileManager(null, null, null);
    JavacTask task = (JavacTask) compiler.getTask(null, manager, d -> {}, List.of(), null,
      manager.getJavaFileObjectsFromPaths(files));
    Map<String, Map<String, String>> types = new HashMap<>();
    List<CompilationUnitTree> units = new ArrayList<>();
    for (CompilationUnitTree unit : task.parse()) {
      units.add(unit);
      String name = unit.getPackageName() == null ? "" : unit.getPackageName().toString();
      String file = root.relativize(Path.of(unit.getSourceFile().toUri())).toString();
      for (Tree type : unit.getTypeDecls()) if (type instanceof ClassTree found)
        types.computeIfAbsent(name, key -> new HashMap<>()).put(found.getSimpleName().toString(), file);
    }
    for (CompilationUnitTree unit : units) {
      String user = root.relativize(Path.of(unit.getSourceFile().toUri())).toString();
      Set<String> words = new HashSet<>();
      new TreeScanner<Void, Void>() {
        @Override public Void visitIdentifier(IdentifierTree node, Void v) {
          words.add(node.getName().toString()); return null;
        }
        @Override public Void visitImport(ImportTree node, Void v) { return null; }
      }.scan(unit, null);
      for (ImportTree line : unit.getImports()) {
        String name = line.getQualifiedIdentifier().toString();
        if (name.endsWith(".*") && types.containsKey(name.substring(0, name.length() - 2))) {
          for (var type : types.get(name.substring(0, name.length() - 2)).entrySet())
            if (words.contains(type.getKey())) System.out.println(user + "\t" + type.getValue());
          continue;
        }
        String[] parts = name.split("\\.");
        for (int i = parts.length - 1; i >= 0; i--) {
          String target = types.getOrDefault(String.join(".", Arrays.copyOf(parts, i)), Map.of()).get(parts[i]);
          if (target != null) { System.out.println(user + "\t" + target); break; }
        }
      }
    }
  }
}
"""


def java_edges(folder: Path, files: Sequence[str]) -> Edges:
    """By javac's parser: import lines to the files that declare the types; `.*` to those of the names that stand."""
    java = shutil.which("java")
    wanted = [path for path in files if path.endswith(".java") and not path.endswith(("-info.java",))]
    if java is None or not wanted:
        return {}
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "Edges.java").write_text(_JAVA)
        (Path(place) / "files.txt").write_text("\n".join(wanted))
        command = [java, f"{place}/Edges.java", str(folder.resolve()), f"{place}/files.txt"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    rows = [(*line.split("\t"), False) for line in done.stdout.splitlines()]
    return _joined(rows, set(files)) if done.returncode == 0 else {}
