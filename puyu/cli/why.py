"""`puyu why DIR ID`: what the data stage did with one document, with rule, measured value and threshold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from puyu.cli.options import parse
from puyu.errors import ConfigError


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if options.help:
        print("usage: puyu why DATA_DIR DOCUMENT_ID")
        return 0
    if len(options.positional) != 2:
        raise ConfigError("puyu why needs the data folder and a document id", remedy="puyu why runs/nano/data ID")
    from puyu.data.why import why

    print(why(Path(options.positional[0]), options.positional[1]))
    return 0
