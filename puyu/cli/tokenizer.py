"""`puyu tokenizer`: the tokenizer stage, and what helps with tokenizers beside it.

puyu tokenizer CONFIG.yaml --out DIR              learn a vocabulary (as every stage)
puyu tokenizer extend BASE --keep N ...           learn one that goes on from the first N ranks of another
puyu tokenizer export DIR FILE --to FORM          tiktoken ranks, SentencePiece model or tokenizer.json
puyu tokenizer import FILE --out DIR              a folder from such a file
puyu tokenizer fertility FILES --with DIR ...     tokens of a word, a character and a byte, by language
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from puyu.log import say

if TYPE_CHECKING:
    from puyu.tokenizer.tokenizer import Tokenizer

FORMS = ("tiktoken", "sentencepiece", "json")


def main(arguments: Sequence[str]) -> int:
    """The verb, its own name first; returns the exit code."""
    what, rest = (arguments[1], arguments[2:]) if len(arguments) > 1 else ("", [])
    if what == "extend":
        return _extend(rest)
    if what == "export":
        return _export(rest)
    if what == "import":
        return _import(rest)
    if what == "fertility":
        return _fertility(rest)
    from puyu.cli.stage import main as stage

    if what in ("-h", "--help"):
        others = "extend BASE --keep N | export DIR FILE | import FILE --out DIR | fertility FILES --with DIR"
        print(f"also: puyu tokenizer {others}   (each has --help)\n")
    return stage(arguments)


def _extend(arguments: Sequence[str]) -> int:
    about = "Learn a vocabulary on top of another's first ranks. All other options are those of `puyu tokenizer`."
    options = argparse.ArgumentParser(prog="puyu tokenizer extend", description=about, allow_abbrev=False)
    options.add_argument("base", type=Path, help="a tokenizer's folder or a tiktoken ranks file")
    options.add_argument("--keep", type=int, required=True, help="ranks to keep, the 256 bytes included")
    options.add_argument("--pattern", default="", help="where text is cut: a regular expression, cl100k or gpt2")
    given, rest = options.parse_known_args(list(arguments))
    from puyu.cli.stage import main as stage

    values = {"base": str(given.base), "keep": given.keep, "pattern": given.pattern}
    settings = [word for key, value in values.items() for word in ("--set", f"extend.{key}={json.dumps(value)}")]
    return stage(["tokenizer", *rest, *settings])


def _export(arguments: Sequence[str]) -> int:
    options = argparse.ArgumentParser(prog="puyu tokenizer export", description="A tokenizer as one file.")
    options.add_argument("folder", type=Path, metavar="DIR", help="a tokenizer or a checkpoint")
    options.add_argument("target", type=Path, metavar="FILE")
    options.add_argument("--to", choices=FORMS, default="tiktoken", help="[tiktoken]")
    given = options.parse_args(list(arguments))
    from puyu.files import atomic_write, write_text
    from puyu.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(given.folder)
    if given.to == "tiktoken":
        from puyu.tokenizer.ranks import note_of, to_ranks, write_ranks

        export = to_ranks(tokenizer)
        write_ranks(export, given.target)
        say(f"{given.target}: {len(export.ranks)} ranks; pattern and special tokens in {note_of(given.target)}")
        return 0
    if given.to == "sentencepiece":
        from puyu.tokenizer.sentencepiece_export import to_sentencepiece

        data = to_sentencepiece(tokenizer)
        with atomic_write(given.target, "wb") as stream:
            stream.write(data)
    else:
        write_text(given.target, tokenizer.json_text)
    say(f"{given.target}: {tokenizer.vocab_size} tokens, {given.to}")
    return 0


def _import(arguments: Sequence[str]) -> int:
    about = "A tokenizer's folder from one file: tokenizer.json, a SentencePiece .model, or tiktoken ranks."
    options = argparse.ArgumentParser(prog="puyu tokenizer import", description=about)
    options.add_argument("source", type=Path, metavar="FILE")
    options.add_argument("--out", type=Path, required=True, metavar="DIR")
    options.add_argument("--pattern", default="", help="of ranks: a regular expression, cl100k or gpt2 [FILE.json]")
    options.add_argument("--special", action="append", default=[], metavar="NAME=ID", help="of ranks [FILE.json]")
    given = options.parse_args(list(arguments))
    tokenizer = _imported(given.source, given.pattern, given.special)
    tokenizer.save(given.out)
    say(f"{given.out}: {tokenizer.vocab_size} tokens, {len(tokenizer.special_tokens)} of them special")
    return 0


def _imported(source: Path, pattern: str, special: Sequence[str]) -> Tokenizer:
    from puyu.errors import ConfigError, InputError
    from puyu.tokenizer.ranks import PATTERNS, from_ranks, parse_special, read_note, read_ranks
    from puyu.tokenizer.sentencepiece import to_tokenizer_json
    from puyu.tokenizer.tokenizer import Tokenizer

    if not source.is_file():
        raise InputError(f"no such file: {source}")
    if source.suffix == ".json":
        return Tokenizer(source.read_text(encoding="utf-8"), {})
    if source.suffix == ".model":
        return Tokenizer(to_tokenizer_json(source.read_bytes(), {}), {})
    ranks, (noted, names) = read_ranks(source), read_note(source)
    pattern = PATTERNS.get(pattern, pattern) or noted or ""
    if not pattern:
        remedy = f"give --pattern with a regular expression or one of: {', '.join(PATTERNS)}"
        raise ConfigError(f"{source} does not say where text is cut", remedy=remedy)
    return from_ranks(ranks, pattern=pattern, special=parse_special(special) or names)


def _fertility(arguments: Sequence[str]) -> int:
    options = argparse.ArgumentParser(prog="puyu tokenizer fertility", description="Tokens by language.")
    options.add_argument("files", nargs="+", type=Path, help="JSONL with 'text' (and 'language'), or plain text")
    options.add_argument("--with", dest="folders", nargs="+", type=Path, required=True, metavar="DIR")
    options.add_argument("--max-bytes", type=int, default=4_000_000, help="of each language [4000000]")
    options.add_argument("--json", action="store_true", help="the report as JSON")
    given = options.parse_args(list(arguments))
    from puyu.tokenizer.measure import fertility
    from puyu.tokenizer.tokenizer import Tokenizer

    groups: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for path in given.files:
        for group, text in _texts(path):
            if sizes.get(group, 0) < given.max_bytes:
                groups.setdefault(group, []).append(text)
                sizes[group] = sizes.get(group, 0) + len(text.encode("utf-8"))
    report = fertility({str(folder): Tokenizer.load(folder) for folder in given.folders}, groups)
    print(json.dumps(report, ensure_ascii=False) if given.json else "\n".join(_lines(report)))
    return 0


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """(language, text); a plain file is a group of its own name."""
    from puyu.errors import InputError
    from puyu.files import open_bytes, read_jsonl_lines

    if ".jsonl" not in path.suffixes:
        with open_bytes(path) as stream:
            yield path.name, stream.read().decode("utf-8", "replace")
        return
    for line, row in read_jsonl_lines(path):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise InputError(f"{path}, line {line}: the field 'text' is missing or not text")
        yield str(row.get("language") or "other"), row["text"]


def _lines(report: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    columns = ("tokens", "bytes_per_token", "chars_per_token", "tokens_per_word", "torn_share", "unknown_share")
    lines = []
    for group, rows in report.items():
        first = next(iter(rows.values()))
        lines.append(f"{group}: {first['texts']:.0f} texts, {first['bytes']:.0f} bytes, {first['words']:.0f} words")
        lines += [
            f"  {name}: " + ", ".join(f"{column} {row[column]:g}" for column in (*columns, "against_first"))
            for name, row in rows.items()
        ]
    return lines
