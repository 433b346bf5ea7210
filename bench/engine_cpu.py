"""engine.1 to 8: decoding, prompts and batches on the CPU, against llama.cpp, transformers, memory.

    python bench/engine_cpu.py [--save] [--pairs 7] [--only engine.1 engine.5-1.8b]

See cpu_shape.py for the models, 317m unless a bar names another, and cpu_sides.py for what each side does. Every
comparison runs its two sides in turns; llama.cpp is built natively from source (bench/peers/llama.txt).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cpu_shape
import harness

HERE = Path(__file__).parent

# bar: task, our weights, the peer and its file
COMPARISONS = {
    "engine.1": ("decode", "int4", "llama", "q4_0.gguf"),
    "engine.2": ("decode", "int8", "llama", "q8_0.gguf"),
    "engine.3": ("decode", "int4", "stream", "int4"),
    "engine.4": ("decode", "int4", "transformers", "bf16"),
    "engine.5": ("prefill", "int4", "llama", "q4_0.gguf"),
    "engine.6": ("prefill", "int4", "transformers", "bf16"),
    "engine.7": ("batch", "int4", "llama", "q4_0.gguf"),
    "engine.8": ("serve", "int4", "transformers", "bf16"),
}
COMPARISONS |= {f"engine.{number}-1.8b": COMPARISONS[f"engine.{number}"] for number in (1, 2, 3, 4)}


def compare(bar: str, *, pairs: int) -> tuple[harness.Samples, dict[str, str], dict[str, object]]:
    """One bar: both sides in turns."""
    task, weights, peer, file = COMPARISONS[bar]
    folder = cpu_shape.inputs(cpu_shape.SHAPES[bar.partition("-")[2] or "317m"])
    python = Path(sys.executable) if peer == "stream" else harness.peer_python(peer)
    script = HERE / "cpu_sides.py"
    print(f"{bar}: {task}, {weights} against {peer} {file}", file=sys.stderr)
    us = harness.Worker([sys.executable, script, "ours", task, folder / weights])
    them = harness.Worker([python, script, peer, task, folder / file])
    found = harness.alternate(us, them, pairs=pairs)
    us.close()
    them.close()
    notes = {"ids": us.facts["ids"], "peer_ids": them.facts["ids"]}
    return harness.Samples(bar, *found, unit="tokens/s"), us.facts["versions"] | them.facts["versions"], notes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=7, help="samples of each side")
    parser.add_argument("--only", nargs="+", choices=list(COMPARISONS), default=list(COMPARISONS))
    parser.add_argument("--save", action="store_true", help="keep the results in bench/results, a file for each bar")
    arguments = parser.parse_args()
    for bar in arguments.only:
        # a run of its own for each bar: the probes then frame few minutes
        run = harness.Run(f"engine_cpu_{bar.partition('.')[2]}", peer_flags=FLAGS[COMPARISONS[bar][2]])
        samples, run.versions, run.notes = compare(bar, pairs=arguments.pairs)
        run.finish([samples], save=arguments.save)


FLAGS = {
    "llama": "built natively (GGML_NATIVE, AVX-512 VNNI and BF16), n_threads 2, n_ubatch 512, weights repacked at load",
    "transformers": "bf16, sdpa, DynamicCache, inference mode; generate_batch for 16 sequences",
    "stream": "torch.sum over int64",
}

if __name__ == "__main__":
    main()
