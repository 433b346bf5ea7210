"""engine.13: what quantization costs in perplexity, on a model trained in the chain and on held-out texts.

    python bench/engine_quant.py --model runs/nano/pretrain --data runs/nano/data/kept.jsonl [--save]

Samples are perplexities on samples/eval/perplexity.jsonl (no training text), in windows of the model's context. GPTQ
and AWQ calibrate on `--data`. The bars of 8 bits are relative changes in percent; those of 4 bits, groups of 64, are
perplexities over that of rounding to nearest. KL divergence and equal tokens of every variant stand in the notes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import harness

TEXTS = harness.ROOT / "samples" / "eval" / "perplexity.jsonl"


def measured(folder: Path, data: Path) -> dict[str, dict[str, Any]]:
    """The distance of each variant from the original."""
    from puyu.model.checkpoint import load_model
    from puyu.quant.evaluate import compare
    from puyu.quant.quantize import QuantizeConfig, quantize_model
    from puyu.quant.texts import Budget, read_documents
    from puyu.tokenizer.tokenizer import Tokenizer

    tokenizer, original = Tokenizer.load(folder), load_model(folder)
    texts = read_documents(TEXTS, tokenizer, Budget(1 << 30, original.config.max_positions, 0))
    calibration = read_documents(data, tokenizer, Budget(64 * 256, 256, 0))
    found: dict[str, dict[str, Any]] = {}
    for name, bits in (("rtn", 8), ("smoothquant", 8), ("rtn", 4), ("gptq", 4), ("awq", 4)):
        config = QuantizeConfig.model_validate({"model": folder, "bits": bits, "method": name, "group": 64})
        model = load_model(folder)
        quantize_model(model, config, calibration)
        found[f"{name}{bits}"] = compare(original, model, texts).numbers()
        print(f"  {name} {bits} bits: {found[f'{name}{bits}']}", file=sys.stderr)
    for storage in ("int8", "int4"):
        found[f"cache {storage}"] = compare(original, original, texts, cache=storage).numbers()  # type: ignore[arg-type]
        print(f"  cache {storage}: {found[f'cache {storage}']}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("runs/nano/pretrain"))
    parser.add_argument("--data", type=Path, default=Path("runs/nano/data/kept.jsonl"), help="calibration texts")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    arguments = parser.parse_args()
    import torch

    run = harness.Run("engine_quant", versions={"torch": torch.__version__})
    found = measured(arguments.model, arguments.data)
    run.notes = {"variants": found}
    after = {name: 1 + numbers["perplexity_change"] for name, numbers in found.items()}
    samples = [
        harness.Samples("engine.13a", [100 * found["rtn8"]["perplexity_change"]]),
        harness.Samples("engine.13b", [100 * found["cache int8"]["perplexity_change"]]),
        harness.Samples("engine.13c", [after["gptq4"] / after["rtn4"]]),
        harness.Samples("engine.13d", [after["awq4"] / after["rtn4"]]),
    ]
    run.finish(samples, save=arguments.save)


if __name__ == "__main__":
    main()
