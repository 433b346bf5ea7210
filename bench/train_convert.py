"""train.11: random models through every form of checkpoint and back; how many tensors are not the same, bit for bit.

    python bench/train_convert.py [--save] [--models 60]

A model is drawn (heads, groups, layers, sizes, precision; every third one a first InternLM with biases), saved, and
taken through LLaMA, InternEvo's shards (tp 1, 2 or 4; pp 1 to 3, also where layers do not divide; both orders of rows,
both cuts of the embedding), LLaMA, shards of another layout, and home. Counted are tensors that are missing, too many,
or differ in a bit: at home against the saved ones and, loaded, against the model itself; shards and LLaMA folders
that were reached by two ways; settings that came back changed. Then the base of dynamic NTK at lengths in random order
against the published formula at each length alone; a base that is off by more than 1e-12 counts, too.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import harness
import torch
from safetensors.torch import load_file
from torch import Tensor

from puyu.model.checkpoint import load_model, read_config, save_model
from puyu.model.config import ModelConfig
from puyu.model.convert import ConvertConfig, convert
from puyu.model.heads import CausalLM
from puyu.model.internevo import same_bytes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TP, PP = (1, 2, 4), (1, 2, 3)


def drawn(rng: random.Random, *, first: bool) -> ModelConfig:
    """A shape that four ranks can share."""
    kv_heads, group = rng.choice((4, 8)), 1 if first else rng.randint(1, 4)
    heads, head_dim = kv_heads * group, rng.choice((2, 4, 8, 16))
    scaling = rng.choice((None, {"type": "dynamic", "factor": 2.0}))
    return ModelConfig(
        family="internlm" if first else "internlm2",
        vocab_size=4 * rng.randint(5, 40),
        hidden_size=heads * head_dim,
        num_layers=rng.randint(3, 7),
        num_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=4 * rng.randint(5, 60),
        qkv_bias=first,
        out_bias=first,
        rope_theta=rng.choice((1e4, 5e4, 1e6)),
        rope_scaling=scaling,
    )


def random_model(config: ModelConfig, dtype: torch.dtype, seed: int) -> CausalLM:
    """Random numbers in every tensor."""
    generator = torch.Generator().manual_seed(seed)
    model = CausalLM(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    for path in sorted(folder.glob("model_tp*.pt")):
        found |= {f"{path.name}: {key}": item for key, item in torch.load(path, weights_only=True).items()}
    return found


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> int:
    return sum(not (name in a and name in b and same_bytes(a[name], b[name])) for name in a.keys() | b.keys())


def round_trip(seed: int, root: Path, counts: Counter[str]) -> int:
    """Tensors that differ anywhere on the way of one model."""
    rng = random.Random(seed)
    config, dtype = drawn(rng, first=seed % 3 == 2), rng.choice(DTYPES)
    model = random_model(config, dtype, seed)
    save_model(model, root / "home")
    layout, other = ({"tp": rng.choice(TP), "pp": rng.choice(PP), "split_vocab": rng.random() < 0.5} for _ in range(2))
    if config.family == "internlm2":
        layout["interleaved"], other["interleaved"] = rng.random() < 0.5, rng.random() < 0.5
    through: list[tuple[str, dict[str, Any]]] = [("internevo", layout), ("internevo", other), (config.family, {})]
    through += [("llama", {}), (config.family, {}), ("internevo", layout), (config.family, {}), ("llama", {})]
    folder = root / "home"
    for number, (form, how) in enumerate(through):
        out = root / str(number)
        convert(ConvertConfig(source=folder, out=out, to=form, allow_pickle=True, max_shard_bytes=50_000, **how))
        folder = out
        counts["conversions"] += 1
        counts[f"tp {how['tp']}, pp {how['pp']}" if how else form] += 1
    home, loaded = stored(root / "home"), load_model(root / "6", dtype=dtype)
    counts["tensors"] += len(home)
    missed = sum(differing(home, stored(root / number)) for number in ("2", "4", "6"))
    missed += differing(dict(model.state_dict()), dict(loaded.state_dict()))
    missed += differing(stored(root / "0"), stored(root / "5")) + differing(stored(root / "3"), stored(root / "7"))
    return missed + (read_config(root / "6").with_(extra={}) != config)


def wrong_bases(seed: int, lengths: int) -> int:
    """Lengths at which the base is not the formula's, whatever was asked before."""
    rng, missed = random.Random(seed), 0
    for head_dim, factor, theta in ((64, 1.0, 1e4), (128, 2.0, 1e6), (128, 2.5, 5e7)):
        shape = {"hidden_size": head_dim, "num_heads": 1, "num_kv_heads": 1, "intermediate_size": 1, "num_layers": 1}
        config = ModelConfig(
            vocab_size=1,
            max_positions=32768,
            rope_theta=theta,
            rope_scaling={"type": "dynamic", "factor": factor},
            **shape,
        )
        for _ in range(lengths):
            length = rng.randint(1, 2_000_000)
            growth = factor * length / 32768 - (factor - 1) if length > 32768 else 1.0
            wanted = theta * growth ** (head_dim / (head_dim - 2))
            missed += abs(config.stretched(length).rope_theta / wanted - 1) > 1e-12
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=int, default=60, help="random models")
    parser.add_argument("--lengths", type=int, default=1000, help="lengths of dynamic NTK, of each of three models")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    arguments = parser.parse_args()
    run = harness.Run("train_convert", versions={"torch": torch.__version__}, before={})
    counts: Counter[str] = Counter()
    missed = 0
    for seed in range(arguments.models):
        with tempfile.TemporaryDirectory() as name:
            found = round_trip(seed, Path(name), counts)
        missed += found
        if found:
            print(f"  model {seed}: {found} tensors differ", file=sys.stderr)
    wrong = wrong_bases(0, arguments.lengths)
    run.notes = {"models": arguments.models, **dict(sorted(counts.items())), "lengths": 3 * arguments.lengths}
    run.notes |= {"tensors that differ": missed, "wrong bases": wrong}
    run.finish([harness.Samples("train.11", [missed + wrong])], save=arguments.save)


if __name__ == "__main__":
    main()
