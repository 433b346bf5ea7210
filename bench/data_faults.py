"""data.8, 9, 10: a torn corpus whose ledger is known to the record, 50 kills, and one result whatever runs it.

    python bench/data_faults.py [--save] [--kills 50] [--megabytes 8]

data.8: a seeded corpus is damaged in known ways (bad bytes, half lines, records without text, a torn .zst frame and a
torn .gz); a sample is how many records the ledger counts otherwise than they were made. data.9: `kill -9` at a random
moment, then the same command again, over and over until it ends; the sample is how many outputs differ in any byte.
data.10: manifests (a hash of every file) of inline, a pool, Daft and Daft on Ray; the sample is how many differ.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import corpus
import harness

from puyu.configure import build, dump
from puyu.data.clean import DataConfig, run
from puyu.files import hash_file, read_json

CHILD = """
import sys
from pathlib import Path
from puyu.data.clean import DataConfig, run
if __name__ == "__main__":
    run(DataConfig.model_validate_json(sys.argv[1]), out=Path(sys.argv[2]))
"""


def config_of(*paths: Path, **more: object) -> DataConfig:
    sources = [{"name": path.name, "path": str(path), "kind": "jsonl"} for path in paths]
    return build(DataConfig, {"sources": sources, "safety": {}, **more})


def manifest(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): hash_file(path) for path in sorted(out.rglob("*")) if path.is_file()}


# ---- data.8


def torn(folder: Path, seed: int, rows: list[dict[str, str]]) -> tuple[list[Path], Counter[str]]:
    """Damaged files, and how many records of each fate a reader must count (`read` is whatever is whole)."""
    rng, wanted = random.Random(seed), Counter[str]()
    lines = []
    for row in rows:
        line = json.dumps(row, ensure_ascii=False).encode()
        fate = rng.choices(("read", "json", "encoding", "record"), (85, 5, 5, 5))[0]
        if fate == "json":
            line = line[: rng.randrange(2, len(line) - 1)].decode("utf-8", "ignore").encode()
        elif fate == "encoding":
            at = line.index(b'"text": "') + 9
            line = line[:at] + rng.choice((b"\xff", b"\xc3(", b"\xed\xa0\x80")) + line[at:]
        elif fate == "record":
            line = rng.choice((b"[1, 2]", b'{"body": "x"}', b'{"text": null}', b"17"))
        wanted[fate] += 1
        lines.append(line)
    plain = folder / "plain.jsonl"
    plain.write_bytes(b"\n".join(lines) + b"\n")
    paths = [plain]
    for name, pack in (("torn.jsonl.gz", gzip.compress), ("torn.jsonl.zst", _zst)):
        data = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows[:200])
        whole = pack(data)
        (folder / name).write_bytes(whole[: rng.randrange(len(whole) // 3, len(whole) - 30)])
        paths.append(folder / name)
    return paths, wanted


def _zst(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=3).compress(data)


def ledger_errors(folder: Path, seed: int) -> int:
    """Records that the ledger counts otherwise than they were made."""
    maker = corpus.Maker(seed, corpus.pools())
    rows = [maker.record(number) for number in range(1500)]
    paths, wanted = torn(folder, seed, rows)
    numbers = run(config_of(*paths), out=folder / "out")
    ledger = read_json(folder / "out" / "ledger.json")["sources"]
    plain = ledger["plain.jsonl"]
    errors = sum(abs(plain["quarantined"].get(fate, 0) - wanted[fate]) for fate in ("json", "encoding", "record"))
    errors += abs(plain["read"] - len(rows))
    for name in ("torn.jsonl.gz", "torn.jsonl.zst"):  # one record says where the archive ends; what is before it counts
        errors += abs(ledger[name]["quarantined"].get("archive", 0) - 1)
    total = sum(row["kept"] + sum(sum(s.values()) for s in row["dropped"].values()) for row in ledger.values())
    return errors + abs(numbers["read"] - numbers["quarantined"] - total)


# ---- data.9


def kills(config: DataConfig, folder: Path, *, count: int, seed: int) -> tuple[int, int]:
    """(outputs that differ, kills that hit a running process)."""
    rng, text = random.Random(seed), config.model_dump_json()
    run(config, out=folder / "whole")
    expected, differs, hit, round_ = manifest(folder / "whole"), 0, 0, 0
    began = time.perf_counter()
    subprocess.run(_command(text, folder / "time"), check=True, capture_output=True, env=_environment())
    whole = time.perf_counter() - began
    while hit < count:
        out = folder / f"killed{round_}"
        round_ += 1
        while hit < count:
            process = subprocess.Popen(
                _command(text, out), stderr=subprocess.DEVNULL, env=_environment(), start_new_session=True
            )
            try:
                process.wait(timeout=rng.uniform(0.2 * whole, 0.95 * whole))
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                hit += 1
        subprocess.run(_command(text, out), check=True, capture_output=True, env=_environment())
        differs += manifest(out) != expected
        print(f"  {hit} kills, {round_} outputs, {differs} differ", file=sys.stderr)
    return differs, hit


def _command(text: str, out: Path) -> list[str]:
    script = out.parent / "child.py"
    script.write_text(CHILD)
    return [sys.executable, str(script), text, str(out)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(harness.ROOT)}


# ---- data.10


def engines_differ(config: DataConfig, folder: Path) -> int:
    """Manifests that differ from that of the plain run."""
    found = []
    for name, how in (
        ("inline", {"workers": 1}),
        ("pool", {"workers": 2}),
        ("daft", {"engine": "daft"}),
        ("ray", {"engine": "ray"}),
    ):
        asked = config.model_copy(update=how)
        done = subprocess.run(
            _command(asked.model_dump_json(), folder / name), capture_output=True, text=True, env=_environment()
        )
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        found.append(manifest(folder / name))
    return sum(other != found[0] for other in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--megabytes", type=int, default=8, help="size of the corpus of data.9 and data.10")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    given = parser.parse_args()
    bench = harness.Run("data_faults", before={})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        errors = []
        for seed in range(5):
            (folder / f"torn{seed}").mkdir()
            errors.append(float(ledger_errors(folder / f"torn{seed}", seed)))
        corpus.make(folder / "corpus", megabytes=given.megabytes, files=3)
        config = config_of(*sorted((folder / "corpus").glob("*.zst")), workers=2, dedup={"index": True, "url": True})
        differs, hit = kills(config, folder, count=given.kills, seed=1)
        other = engines_differ(config, folder)
    bench.notes |= {"kills": hit, "config": dump(config)["dedup"]}
    bench.finish(
        [
            harness.Samples("data.8", errors),
            harness.Samples("data.9", [float(differs)]),
            harness.Samples("data.10", [float(other)]),
        ],
        save=given.save,
    )


if __name__ == "__main__":
    main()
