"""`puyu data what-if` over the score columns of many documents: a new process each time, start and output included.

    python bench/data_what_if.py [--documents 500000] [--times 5] [--data runs/nano/data]

The columns are those of a data folder, its rows drawn with replacement (seeded) until there are enough. Two questions:
one threshold of one policy, and one of each policy. No bar belongs to it; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
from pyarrow import parquet

QUESTIONS = {
    "one_threshold": ["--set", "words.chars_min=400"],
    "every_policy": ["--set", "words.dup_10gram_max=0.05", "--set", "zh.chars_min=80", "--set", "code.letters_min=0.4"],
}


def enlarged(data: Path, out: Path, *, documents: int) -> None:
    """A folder with the ledger of `data` and as many rows of its scores."""
    table = parquet.read_table(data / "scores.parquet")
    rows = np.random.default_rng(7).integers(0, table.num_rows, documents)
    out.mkdir(parents=True)
    parquet.write_table(table.take(rows), out / "scores.parquet", compression="zstd", row_group_size=200_000)
    shutil.copy(data / "ledger.json", out / "ledger.json")


def seconds(folder: Path, question: list[str]) -> float:
    command = [sys.executable, "-m", "puyu", "data", "what-if", str(folder), *question]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=harness.ROOT)
    return time.perf_counter() - began


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--documents", type=int, default=500_000)
    options.add_argument("--times", type=int, default=5)
    options.add_argument("--data", type=Path, default=Path("runs/nano/data"))
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "data"
        enlarged(given.data, folder, documents=given.documents)
        found = {}
        for name, question in QUESTIONS.items():
            seconds(folder, question)
            found[name] = [round(seconds(folder, question), 3) for _ in range(given.times)]
    medians = {name: statistics.median(times) for name, times in found.items()}
    facts = {"bench": "data_what_if", "commit": harness.commit(), "machine": harness.machine()}
    print(json.dumps({**facts, "documents": given.documents, "seconds": found, "median_seconds": medians}))


if __name__ == "__main__":
    main()
