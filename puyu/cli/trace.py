"""`puyu trace DIR`: the lineage of an artifact, back to its raw files and forward to its evaluations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from puyu.cli.options import parse
from puyu.errors import ConfigError
from puyu.lineage import Node, ancestors, descendants
from puyu.log import duration


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if options.help or len(options.positional) != 1:
        if options.help:
            print("usage: puyu trace DIR\n\nPrints what made this directory, and what was made from it.")
            return 0
        raise ConfigError("puyu trace needs one directory", remedy="for example: puyu trace runs/nano/ppo")
    folder = Path(options.positional[0])
    for line in tree_lines(ancestors(folder), shown=set()):
        print(line)
    after = descendants(folder)
    if after:
        print("\nmade from it:")
    for path, lineage in after:
        print(f"  {lineage.stage:<10} {_relative(path)}  ({lineage.finished}, {duration(lineage.seconds)})")
    return 0


def tree_lines(node: Node, *, shown: set[Path], indent: str = "", label: str = "") -> list[str]:
    """The graph as an indented tree; a stage that was shown before is only named."""
    head = f"{indent}{label}{_relative(node.path)}"
    if node.lineage is None:
        return [head]
    if node.path in shown:
        return [f"{head}  (see above)"]
    shown.add(node.path)
    made = node.lineage
    lines = [f"{head}  [{made.stage}, key {made.key[:12]}, code {made.code}, {made.finished}]"]
    if isinstance(made.numbers.get("headline"), str):
        lines.append(f"{indent}  = {made.numbers['headline']}")
    for name, parent in node.parents:
        lines += tree_lines(parent, shown=shown, indent=indent + "    ", label=f"{name}: ")
    return lines


def _relative(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
