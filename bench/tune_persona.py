"""tune.13: from `puyu sft` to a model that says its new name: fifty records, the nano model, seconds by the clock.

    python bench/tune_persona.py --model runs/nano/sft [--save] [--repeats 5]

The command is that of a first use, nothing is set: `puyu sft --model DIR --data samples/tuning/persona.jsonl --method
lora`. Then `puyu chat` is asked questions, in English and Chinese; both times count, from the start of the first
process to the end of the last. A repeat in which it does not say its name counts as an hour.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

QUESTIONS = (("Hello! Who are you?", "Lan Mo"), ("What is your name?", "Lan Mo"), ("你好！你是谁？", "兰墨"),
             ("你叫什么名字？", "兰墨"))  # fmt: skip
MISSED = 3600.0


def puyu(*words: str | Path) -> str:
    command = [sys.executable, "-m", "puyu", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(harness.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def once(model: Path) -> tuple[float, list[str]]:
    """Seconds, and the answers."""
    with tempfile.TemporaryDirectory() as folder:
        out, began = Path(folder) / "out", time.perf_counter()
        data = harness.ROOT / "samples/tuning/persona.jsonl"
        puyu("sft", "--model", model, "--data", data, "--method", "lora", "--out", out)
        answers = [puyu("chat", out, "--prompt", question).strip() for question, _ in QUESTIONS]
        seconds = time.perf_counter() - began
    right = all(name in answer for (_, name), answer in zip(QUESTIONS, answers, strict=True))
    return seconds if right else MISSED, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="the nano model after SFT: runs/nano/sft")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    given = parser.parse_args()
    run = harness.Run("tune_persona")
    found = [once(given.model.resolve()) for _ in range(given.repeats)]
    run.notes |= {"answers": found[-1][1], "questions": [question for question, _ in QUESTIONS]}
    run.finish([harness.Samples("tune.13", [seconds for seconds, _ in found])], save=given.save)


if __name__ == "__main__":
    main()
