"""`puyu data`: the data stage, and what helps with data beside it.

puyu data CONFIG.yaml --out DIR        raw files -> clean documents (as every stage)
puyu data check FILE ...               what is wrong with a fine-tuning or preference set, line by line
puyu data convert FROM TO --to FORM    one form of a fine-tuning or preference set as another
puyu data why DIR ID                   what became of one document
puyu data export DIR FILE.parquet      clean documents for other tools
puyu data what-if | policy | stats | explore | borderline       what was decided, and what other thresholds would
puyu data train-scorer | score | annotate | train-ngram         small models for scores
puyu data enrich | gaps | contamination | self-instruct | code  see docs/scorers.md and docs/code-data.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from puyu.log import say

_ALONE = {
    "borderline": "data_borderline",
    "code": "data_code",
    "export": "data_export",
    "train-ngram": "data_ngram",
    "why": "why",
}
"""Verb -> the module of this package whose `main` takes what follows the verb."""
_TOGETHER = {
    **dict.fromkeys(("explore", "policy", "stats", "what-if"), "data_look"),
    **dict.fromkeys(("enrich", "gaps"), "data_enrich"),
    **dict.fromkeys(("annotate", "score", "train-scorer"), "data_scorers"),
    "contamination": "data_contamination",
    "self-instruct": "data_self_instruct",
}
"""The same where `main` takes the verb, too."""


def main(arguments: Sequence[str]) -> int:
    """The verb, its own name first; returns the exit code."""
    what, rest = (arguments[1], arguments[2:]) if len(arguments) > 1 else ("", [])
    if what == "check":
        return _check(rest)
    if what == "convert":
        return _convert(rest)
    if what in _ALONE:
        return int(import_module(f"puyu.cli.{_ALONE[what]}").main(rest))
    if what in _TOGETHER:
        return int(import_module(f"puyu.cli.{_TOGETHER[what]}").main(arguments[1:]))
    from puyu.cli.stage import main as stage

    if what in ("-h", "--help"):
        print(f"also: puyu data check | convert | {' | '.join(sorted([*_ALONE, *_TOGETHER]))}   (each has --help)\n")
    return stage(arguments)


def _check(arguments: Sequence[str]) -> int:
    from puyu.data.check import FORM_NAMES, check, lines_of

    options = argparse.ArgumentParser(prog="puyu data check", description="What is wrong with a set, line by line.")
    options.add_argument("files", nargs="+", type=Path, help="JSONL, JSON or CSV")
    options.add_argument("--form", choices=FORM_NAMES, default="", help="what it should be [told by its fields]")
    options.add_argument("--limit", type=int, default=20, metavar="N", help="findings to show of a file [20]")
    given = options.parse_args(list(arguments))
    errors = 0
    for path in given.files:
        report = check(path, form=given.form)
        print("\n".join(lines_of(report, limit=given.limit)))
        errors += report.errors
    return 1 if errors else 0


def _convert(arguments: Sequence[str]) -> int:
    from puyu.data.check import FORM_NAMES, convert

    options = argparse.ArgumentParser(prog="puyu data convert", description="One form of a set as another.")
    options.add_argument("source", type=Path, metavar="FROM", help="JSONL, JSON or CSV")
    options.add_argument("target", type=Path, metavar="TO", help=".jsonl (also .gz, .zst), .json or .csv")
    options.add_argument("--to", choices=FORM_NAMES, default="openai", help="[openai]")
    options.add_argument("--form", choices=FORM_NAMES, default="", help="what FROM is [told by its fields]")
    given = options.parse_args(list(arguments))
    count = convert(given.source, given.target, to=given.to, form=given.form)
    say(f"{given.target}: {count} records, {given.to}")
    return 0
