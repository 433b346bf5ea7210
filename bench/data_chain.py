"""data.1 and 2: a seeded corpus in JSONL.zst to packed shards, MB of raw text a second and core, and peak memory.

    python bench/data_chain.py [--save] [--megabytes 500] [--runs 3]

The whole chain as a user runs it, its start included: read, language, rules, listed words, exact and near duplicates,
personal data, quality, then tokens in shards; two processes on two cores. The rate is raw input text over wall time and
cores. Memory is the sum over all processes of the run, looked at five times a second, the largest of all runs. About
30 % of the corpus is kept; what each step takes is printed by the run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import corpus
import harness
import psutil

CHILD = """
if __name__ == "__main__":  # workers import what they need, not what this file needs
    import json, sys
    from pathlib import Path
    from puyu.configure import build
    from puyu.data.clean import DataConfig, run
    source, tokenizer, out = map(Path, sys.argv[1:])
    sources = [{"name": "web", "path": str(source / "*.zst"), "kind": "jsonl"}]
    numbers = run(build(DataConfig, {"sources": sources, "safety": {}}), out=out / "data")
    from puyu.tokenizer.tokenizer import Tokenizer
    from puyu.train.corpus import open_corpus
    found = open_corpus(out / "data", Tokenizer.load(tokenizer), out / "shards", heldout=0.001)
    tokens = sum(shard.num_tokens for shard in found.train.values())
    print(json.dumps({"kept": numbers["kept"] / numbers["read"], "tokens": tokens}))
"""


def tokenizer_of(folder: Path, vocab_size: int) -> Path:
    """A tokenizer trained once on a small corpus of another seed."""
    made = folder / f"tokenizer-{vocab_size}"
    if not (made / "tokenizer.json").is_file():
        corpus.make(folder / "corpus-small", megabytes=20, seed=99, files=1)
        config = {"sources": [{"name": "web", "path": str(folder / "corpus-small" / "*.zst"), "kind": "jsonl"}]}
        (folder / "small.json").write_text(json.dumps(config))
        puyu = [sys.executable, "-m", "puyu"]
        subprocess.run([*puyu, "data", folder / "small.json", "--out", folder / "small"], check=True)
        flags = ["--data", str(folder / "small"), "--vocab_size", str(vocab_size)]
        subprocess.run([*puyu, "tokenizer", *flags, "--out", made], check=True)
    return made


def measure(source: Path, tokenizer: Path) -> tuple[float, float, dict[str, float]]:
    """(seconds, peak bytes of all processes, what the run says of itself)."""
    with tempfile.TemporaryDirectory() as name:
        return watched(CHILD, Path(name), source, tokenizer, name)


def watched(child: str, folder: Path, *arguments: object) -> tuple[float, float, dict[str, Any]]:
    """The same of a Python program that prints JSON; it is written to `folder`."""
    script = folder / "child.py"
    script.write_text(child)
    began, peak = time.perf_counter(), 0
    process = psutil.Popen([sys.executable, str(script), *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, memory_of(process))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"the run ended with code {process.returncode}")
    return time.perf_counter() - began, float(peak), json.loads(process.stdout.read())


def memory_of(process: psutil.Process) -> int:
    """Memory of a process and its children; what they share counts once (proportional set size)."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            text = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
            total += 1024 * int(text.partition("Pss:")[2].split(maxsplit=1)[0])
    except (psutil.Error, OSError, IndexError):  # it ended meanwhile
        pass
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    given = parser.parse_args()
    folder = harness.ROOT / "runs" / "bench"
    source = folder / f"corpus-{given.megabytes}"
    if not (source / "truth.json").is_file():
        corpus.make(source, megabytes=given.megabytes)
    truth, tokenizer = json.loads((source / "truth.json").read_text()), tokenizer_of(folder, 32000)
    run = harness.Run("data_chain", notes={"corpus": truth})
    rates, peaks = [], []
    for number in range(given.runs):
        seconds, peak, facts = measure(source, tokenizer)
        rates.append(truth["bytes"] / 1e6 / seconds / harness.cores())
        peaks.append(peak / 1e9)
        run.notes |= facts
        print(
            f"  run {number + 1}/{given.runs}: {seconds:.1f} s, {rates[-1]:.2f} MB/s of a core, {peaks[-1]:.2f} GB",
            file=sys.stderr,
        )
    run.finish([harness.Samples("data.1", rates), harness.Samples("data.2", [max(peaks)])], save=given.save)


if __name__ == "__main__":
    main()
