"""data.7: ten million short documents through the data stage; peak memory of all its processes.

    python bench/data_many.py [--save] [--millions 10]

Lines of ten to thirty words, a third of them near copies of another, all rules off but those of duplicates; exact and
near duplicates over all of them. Memory is looked at five times a second, over all processes of the run; what they
share counts once.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import harness
from data_chain import watched

from puyu.files import write_jsonl

CHILD = """
import json, sys
from pathlib import Path
from puyu.configure import build
from puyu.data.clean import DataConfig, run
from puyu.data.filters import LanguagePolicies
if __name__ == "__main__":
    source, out = map(Path, sys.argv[1:])
    off = {name: dict.fromkeys(type(policy).model_fields) for name, policy in LanguagePolicies()}
    sources = [{"name": "short", "path": str(source), "kind": "jsonl", "language": "en"}]
    numbers = run(build(DataConfig, {"sources": sources, "policies": off, "mask": []}), out=out / "data")
    print(json.dumps({"read": numbers["read"], "kept": numbers["kept"]}))
"""


def rows(count: int, seed: int = 1) -> Iterator[dict[str, str]]:
    rng = random.Random(seed)
    words = [f"{a}{b}{c}" for a in ("ba", "ko", "ri", "su", "te") for b in "lmnrst" for c in ("an", "o", "ish", "er")]
    words += [f"{a}{word}" for a in ("un", "re", "pre", "out", "over") for word in words[:100]]
    last = [" ".join(rng.choices(words, k=20))]
    for _ in range(count):
        if rng.random() < 1 / 3:
            parts = rng.choice(last).split()
            parts[rng.randrange(len(parts))] = rng.choice(words)
            yield {"text": " ".join(parts)}
        else:
            text = " ".join(rng.choices(words, k=rng.randint(10, 30)))
            last = [*last[-500:], text]
            yield {"text": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--millions", type=float, default=10)
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    given = parser.parse_args()
    run = harness.Run("data_many", before={})
    with tempfile.TemporaryDirectory(dir=harness.ROOT / "runs" / "bench") as name:
        folder = Path(name)
        count = write_jsonl(folder / "short.jsonl.zst", rows(int(given.millions * 1e6)))
        seconds, peak, facts = watched(CHILD, folder, folder / "short.jsonl.zst", name)
        if facts["read"] != count:
            raise SystemExit(f"{facts['read']} of {count} documents were read")
        run.notes |= {**facts, "seconds": round(seconds, 1)}
    run.finish([harness.Samples("data.7", [peak / 1e9])], save=given.save)


if __name__ == "__main__":
    main()
