"""data.15: a vocabulary of 92,544 tokens learned from 1 GB of English and Chinese, time and memory.

    python bench/tokenizer_train.py [--save] [--runs 3] [--megabytes 1000] [--folder DIR]

The command as users give it, from the JSONL file to tokenizer.json and report.json; the texts are made before and are
not timed (`tokenizer_texts.py`, seeded). Memory is the largest resident set of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import tokenizer_texts

VOCAB = 92_544


def train(corpus: Path, size: int, out: Path) -> tuple[float, float]:
    """(seconds, GB of memory) of one run."""
    options = {"data": corpus, "vocab-size": VOCAB, "max-bytes": 2 * size, "spare": 147, "pad-to-multiple": 128}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "puyu", "tokenizer", *words, "--out", str(out)]
    began = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(harness.ROOT)}, stdout=sys.stderr)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"training ended with code {process.returncode}")
    return time.perf_counter() - began, used.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=1000, help="of text; the bar is for 1000")
    parser.add_argument("--folder", type=Path, help="keep the texts here")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        corpus, size = folder / f"texts-{arguments.megabytes}.jsonl", arguments.megabytes * 1_000_000
        if not corpus.is_file():
            tokenizer_texts.write(corpus, size)
        run = harness.Run("tokenizer_train")
        found = [train(corpus, size, Path(name) / f"out-{n}") for n in range(arguments.runs)]
        report = json.loads((Path(name) / "out-0" / "report.json").read_text(encoding="utf-8"))
    names = ("vocab_size", "merges", "train_bytes", "rare_pieces_one_in", "compression")
    run.notes = {name: report[name] for name in names} | {"megabytes": arguments.megabytes}
    seconds, memory = zip(*found, strict=True)
    save = arguments.save and arguments.megabytes >= 1000
    run.finish([harness.Samples("data.15a", seconds), harness.Samples("data.15b", memory)], save=save)


if __name__ == "__main__":
    main()
