"""`puyu data train-ngram FILES --out MODEL`: a small language model for perplexity, splices and value columns."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from puyu.log import say


def main(arguments: Sequence[str]) -> int:
    """The words after the verb; returns the exit code."""
    options = argparse.ArgumentParser(prog="puyu data train-ngram", description=(__doc__ or "").partition(": ")[2])
    options.add_argument("files", nargs="+", type=Path, help="texts, or JSONL as kept.jsonl; also .gz, .zst")
    options.add_argument("--out", type=Path, required=True, metavar="MODEL", help="the file to write")
    options.add_argument("--text-field", default="text", help="of JSONL [text]")
    options.add_argument("--language", default="", help="only rows of this language")
    options.add_argument("--order", type=int, help="units of an n-gram [3]")
    options.add_argument("--vocabulary", type=int, help="units with an id, at most [65000]")
    options.add_argument("--max-ngrams", type=int, help="n-grams to keep of each order [4000000]")
    given = options.parse_args(list(arguments))

    from puyu.data.ngram import NgramConfig, train
    from puyu.data.ngram_files import TextFiles

    sizes = {name: getattr(given, name) for name in ("order", "vocabulary", "max_ngrams")}
    config = NgramConfig(**{name: value for name, value in sizes.items() if value is not None})
    texts = TextFiles(tuple(given.files), given.text_field, given.language)
    model = train(texts, config, sources=texts.sources())
    model.save(given.out)
    kept = ", ".join(f"{row['kept']} {order}-grams of {row['seen']}" for order, row in model.header["ngrams"].items())
    unknown = model.header["unknown"] / model.header["units"]
    say(
        f"{given.out}: {model.header['texts']} texts, {model.header['units']} units ({unknown:.1%} unknown), "
        f"{model.size - 2} in the vocabulary, {kept}; {given.out.stat().st_size / 1e6:.1f} MB"
    )
    return 0
