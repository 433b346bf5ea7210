"""`puyu data`: the data stage, and what helps with data beside it.

puyu data CONFIG.yaml --out DIR        raw files -> clean documents (as every stage)
puyu data check FILE ...               what is wrong with a fine-tuning or preference set, line by line
puyu data convert FROM TO --to FORM    one form of a fine-tuning set as another
puyu data why DIR ID                   what became of one document
puyu data code FOLDER --out FILE       repositories of source code -> long documents, dependencies first
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from puyu.log import say


def main(arguments: Sequence[str]) -> int:
    """The verb, its own name first; returns the exit code."""
    what, rest = (arguments[1], arguments[2:]) if len(arguments) > 1 else ("", [])
    if what == "check":
        return _check(rest)
    if what == "convert":
        return _convert(rest)
    if what == "why":
        from puyu.cli.why import main as why

        return why(rest)
    if what == "code":
        from puyu.cli.data_code import main as code

        return code(rest)
    from puyu.cli.stage import main as stage

    if what in ("-h", "--help"):
        print("also: puyu data check FILE ... | convert FROM TO --to FORM | why DIR ID   (each has --help)")
        print("      puyu data code FOLDER --out FILE.jsonl\n")
    return stage(arguments)


def _check(arguments: Sequence[str]) -> int:
    from puyu.data.check import check, lines_of
    from puyu.data.formats import FORMS, form_named

    forms = [form.name for form in FORMS]
    options = argparse.ArgumentParser(prog="puyu data check", description="What is wrong with a set, line by line.")
    options.add_argument("files", nargs="+", type=Path, help="JSONL, JSON or CSV")
    options.add_argument("--form", choices=forms, help="what it should be [told by its fields]")
    options.add_argument("--limit", type=int, default=20, metavar="N", help="findings to show of a file [20]")
    given = options.parse_args(list(arguments))
    errors = 0
    for path in given.files:
        report = check(path, form=form_named(given.form) if given.form else None)
        print("\n".join(lines_of(report, limit=given.limit)))
        errors += report.errors
    return 1 if errors else 0


def _convert(arguments: Sequence[str]) -> int:
    from puyu.data.check import convert
    from puyu.data.formats import FORMS, form_named

    forms = [form.name for form in FORMS]
    options = argparse.ArgumentParser(prog="puyu data convert", description="One form of a set as another.")
    options.add_argument("source", type=Path, metavar="FROM", help="JSONL, JSON or CSV")
    options.add_argument("target", type=Path, metavar="TO", help=".jsonl (also .gz, .zst), .json or .csv")
    options.add_argument("--to", choices=forms, default="openai", help="[openai]")
    options.add_argument("--form", choices=forms, help="what FROM is [told by its fields]")
    given = options.parse_args(list(arguments))
    form = form_named(given.form) if given.form else None
    count = convert(given.source, given.target, to=form_named(given.to), form=form)
    say(f"{given.target}: {count} records, {given.to}")
    return 0
