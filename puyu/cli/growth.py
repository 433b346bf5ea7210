"""`puyu growth RUN [RUN2 ...] --texts FILE`: bits per byte of a run's checkpoints against tokens; runs at equal tokens.

puyu growth runs/nano/pretrain --texts runs/nano/data/kept.jsonl
puyu growth runs/raw runs/clean --texts unseen.jsonl --out growth.html --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="puyu growth", description="what a model has learned, checkpoint by checkpoint"
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of pretraining runs (their --out)")
    parser.add_argument("--texts", type=Path, required=True, help="JSONL with text and language that no run has seen")
    parser.add_argument("--out", type=Path, help="the page [growth.html in the first folder]")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="of the products: auto, bfloat16, float32")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    given = parser.parse_args(list(arguments))
    from puyu.device import pick_device, require_torch

    require_torch()
    from puyu.chain.growth import grow, growth_json, growth_table, read_texts, write_growth

    texts, device = read_texts(given.texts), pick_device(given.device)
    found = [grow(run, texts, device=device, dtype=given.dtype) for run in given.runs]
    path = write_growth(found, given.out or given.runs[0] / "growth.html")
    print(json.dumps(growth_json(found), indent=1) if given.json else f"{growth_table(found)}\n\n{path}")
    return 0
