"""`puyu data code`: repositories of source code -> one long markdown document a window, dependencies first.

puyu data code FOLDER --out FILE.jsonl [--window 32768] [--tokenizer DIR] [--set key=value ...]
puyu data code CONFIG.yaml --out FILE.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from puyu.cli.options import all_overrides, help_lines, parse
from puyu.errors import ConfigError


def main(arguments: Sequence[str]) -> int:
    """The words after `code`; returns the exit code."""
    options = parse(arguments)
    from puyu.configure import apply_overrides, build, load_yaml
    from puyu.data.code.pipeline import CodeConfig, report_lines, run

    if options.help:
        print("usage: puyu data code FOLDER|ARCHIVE|CONFIG.yaml --out FILE.jsonl [--set key=value ...]\n")
        print("Repositories -> long documents, dependencies first; any field below can be given as --field value\n")
        print("\n".join(help_lines(CodeConfig)))
        return 0
    if len(options.positional) != 1:
        raise ConfigError(f"puyu data code takes one folder, archive or YAML file, got {options.positional}")
    if options.out is None or not options.out.name.endswith(".jsonl"):
        raise ConfigError("puyu data code needs --out FILE.jsonl", remedy="for example --out runs/code.jsonl")
    given = options.positional[0]
    is_config = Path(given).suffix in (".yaml", ".yml")
    source = {"name": Path(given).resolve().name, "path": given, "kind": "repository", "domain": "code"}
    values = load_yaml(Path(given)) if is_config else {"sources": [source]}
    config = build(CodeConfig, apply_overrides(values, all_overrides(options, CodeConfig)), where=given)
    print("\n".join(report_lines(run(config, out=options.out))))
    return 0
