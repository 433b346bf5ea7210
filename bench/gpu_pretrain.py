"""Pretraining on a GPU: fast paths against their references, then the speed of InternLM2's shapes with random weights.

    python bench/gpu_pretrain.py                    # everything, some minutes on one H200
    python bench/gpu_pretrain.py --parts check,small
    python bench/gpu_pretrain.py --dry              # toy sizes on a CPU: checks the bench itself, measures nothing

Parts: check (float8, recomputed and compiled blocks, one-byte moments, loss in chunks against what they stand for),
small (1.8B, bf16, rows of 4096 tokens: MFU), seven (7B, all parameters on one card: one-byte moments, recomputed
activations), float8 (gain over bf16), long (rows of 32k, half of the tokens in documents under 4096, against 4k).
All runs are the real Trainer's. MFU = tokens/s x (6N + 12LdT) / peak (puyu/train/meter.py), with N the parameters of
products, output head included; the count of a causal mask stands beside. Without a GPU it says so and ends. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import harness  # also puts the checkout on the path
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from puyu.data.packing import Batch, pack_documents
from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM
from puyu.train.adam8 import pack, unpack
from puyu.train.float8 import Scaled, multiply
from puyu.train.memory import MemoryConfig, spare
from puyu.train.objectives import chunked_cross_entropy, lm_loss
from puyu.train.optim import OptimConfig
from puyu.train.stage import place
from puyu.train.trainer import Trainer, TrainerConfig

SHAPES = {
    "1.8B": {"hidden_size": 2048, "num_layers": 24, "num_heads": 16, "num_kv_heads": 8, "intermediate_size": 8192},
    "7B": {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "intermediate_size": 14336},
    "toy": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 64},
}


class Size(NamedTuple):
    """How big everything is: the real thing, or a toy."""

    small: str = "1.8B"
    large: str = "7B"
    vocab: int = 92544
    rows: int = 4096
    long: int = 32768
    tokens: int = 32768
    """Of a step."""
    device: torch.device = torch.device("cuda")
    dtype: str = "bfloat16"
    float8: str = "float8"
    warm: int = 4
    steps: int = 8

    def config(self, name: str) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.vocab, max_positions=self.long, rope_theta=1e6, norm_eps=1e-5, **SHAPES[name]
        )  # type: ignore[arg-type]


TOY = Size("toy", "toy", 96, 16, 64, 64, torch.device("cpu"), "float32", "float8-emulated", 1, 2)


class Documents:
    """A BatchSource of random tokens in documents of given lengths, the same every step."""

    def __init__(self, lengths: Sequence[int], vocab: int) -> None:
        self.lengths, self.vocab, self.drawn = list(lengths), vocab, 0

    def next_batch(self, *, rank: int = 0, world: int = 1) -> Batch:
        self.drawn += 1
        rng = np.random.default_rng(self.drawn)
        return pack_documents([(rng.integers(3, self.vocab, length), None) for length in self.lengths])

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load(self, state: Mapping[str, Any], /) -> None:
        self.drawn = state["drawn"]


def mixed(size: Size) -> list[int]:
    """Half of a step's tokens in documents of `long` tokens, half in documents shorter than `rows`."""
    whole, rng = [size.long] * max(1, size.tokens // (2 * size.long)), np.random.default_rng(0)
    left, short = sum(whole), []
    while left:
        short.append(min(left, int(rng.integers(size.rows // 8, size.rows))))
        left -= short[-1]
    return whole + short


def model_of(size: Size, name: str) -> CausalLM:
    """Random weights, made where they stay."""
    with size.device:
        model = CausalLM(size.config(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
    return place(model, dtype=size.dtype, device=size.device)


class Enough(Exception):
    """Leaves a run before its last step, which would save a state of many GB that nobody reads."""


def train(size: Size, name: str, lengths: Sequence[int], *, seq_len: int, **settings: Any) -> dict[str, Any]:
    """A model of that size, all of which trains; what `measure` finds."""
    free()
    return measure(size, model_of(size, name), lengths, seq_len=seq_len, **settings)


def measure(size: Size, model: CausalLM, lengths: Sequence[int], *, seq_len: int, **settings: Any) -> dict[str, Any]:
    """The real Trainer for some steps: medians of tokens/s and MFU, peak of memory, first and last loss."""
    rows: list[dict[str, Any]] = []
    config = TrainerConfig(
        steps=size.warm + size.steps + 1, checkpoint_every=0, dtype=size.dtype,
        **({"optim": OptimConfig(lr=1e-4, warmup=0)} | settings),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(model, lm_loss, Documents(lengths, size.vocab), config, out=Path(out))
        trainer.meter.enter(seq_len)

        def leave(done: int, metrics: dict[str, Any]) -> None:
            rows.append(metrics)
            if done == size.warm + size.steps:
                raise Enough

        trainer.on_step = leave
        with suppress(Enough):
            trainer.fit()
    kept = rows[size.warm :]
    found = {key: median(row[key] for row in kept) for key in ("tokens_per_s", "mfu", "mfu_causal") if key in kept[0]}
    found |= {"memory_gib": max(row["memory_gib"] for row in rows), "tokens": sum(lengths), "documents": len(lengths)}
    found |= {"loss_first": rows[0]["loss"], "loss_last": rows[-1]["loss"]}
    print(f"  {settings}: {json.dumps(found)}", file=sys.stderr)
    return found


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- check: every fast path against its reference ------------------------------------------------------------------


class Check(NamedTuple):
    name: str
    ours: Sequence[Tensor]
    reference: Sequence[Tensor]
    limit: float


def check(size: Size) -> dict[str, Any]:
    return checked(checks(size))


def checked(made_by: Iterable[Check]) -> dict[str, Any]:
    """Relative error of each path; one beyond its limit is named in `failed`."""
    found: dict[str, Any] = {}
    for made in made_by:
        error = max(relative(a, b) for a, b in zip(made.ours, made.reference, strict=True))
        found[made.name] = {"error": error, "limit": made.limit, "holds": error <= made.limit}
        print(f"  {made.name}: {json.dumps(found[made.name])}", file=sys.stderr)
    return {"paths": found, "failed": [name for name, row in found.items() if not row["holds"]]}


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def checks(size: Size) -> Iterator[Check]:
    toy = size.device.type == "cpu"
    draw = torch.Generator(size.device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=size.device)

    a, b = Scaled.of(randn(512, 256), torch.float8_e4m3fn), Scaled.of(randn(256, 128), torch.float8_e4m3fn)
    exact = multiply(a, b, dtype=torch.float32, emulated=True)
    yield Check("float8 product", [multiply(a, b, dtype=torch.bfloat16, emulated=False)], [exact], 5e-3)
    values = randn(64, 1000)
    there, here = pack(values, signed=True), pack(values.cpu(), signed=True)
    ours = unpack(*there, signed=True)
    yield Check("one-byte moments", [ours], [unpack(*here, signed=True).to(size.device)], 1e-6)
    hidden, head = randn(300, 64).requires_grad_(), randn(size.vocab, 64).requires_grad_()
    targets = torch.randint(size.vocab, (300,), generator=draw, device=size.device)
    weights = torch.ones(300, device=size.device)
    chunked = torch.autograd.grad(chunked_cross_entropy(hidden, head, targets, weights)[0], (hidden, head))
    full = torch.autograd.grad(F.cross_entropy(hidden @ head.T, targets, reduction="sum"), (hidden, head))
    yield Check("loss in chunks", chunked, full, 1e-2 if torch.backends.cuda.matmul.allow_tf32 else 1e-5)
    wanted, limit = gradients(size, MemoryConfig()), 1e-5 if toy else 2e-2
    kinds = [MemoryConfig(checkpoint="full"), MemoryConfig(checkpoint="selective"), MemoryConfig(offload=True)]
    for memory in kinds if toy else [*kinds, MemoryConfig(compile=True)]:
        name = ", ".join(f"{key} {value}" for key, value in memory.model_dump(exclude_defaults=True).items())
        yield Check(name, gradients(size, memory), wanted, limit)


def gradients(size: Size, memory: MemoryConfig) -> list[Tensor]:
    """Of the first two blocks' shape, over packed documents."""
    with size.device:
        torch.manual_seed(0)
        model = CausalLM(size.config(size.small).with_(num_layers=2))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    place(model, dtype=size.dtype, device=size.device)
    spare(model, memory)
    batch = Documents([size.rows // 2, size.rows // 4 + 1, 7], size.vocab).next_batch().to(size.device)
    lm_loss(model, batch).loss_sum.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


# --- speeds --------------------------------------------------------------------------------------------------------


def rows_of(size: Size, length: int) -> list[int]:
    return [length] * max(1, size.tokens // length)


def best(ways: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Each way's numbers and the fastest; one that does not fit the card is told as such."""
    found: dict[str, Any] = {}
    for name, way in ways.items():
        try:
            found[name] = way()
        except torch.OutOfMemoryError as error:
            found[name] = {"tokens_per_s": 0.0, "error": str(error).splitlines()[0]}
    return {"best": max(found, key=lambda name: found[name]["tokens_per_s"]), **found}


def spared(size: Size, *, compiled: bool = True, **memory: Any) -> dict[str, Any]:
    return {"memory": MemoryConfig(**memory, compile=compiled and size.device.type == "cuda")}


def small(size: Size) -> dict[str, Any]:
    """1.8B: rows that are one document each (the most attention), in three ways; and rows of shorter documents."""
    rows = rows_of(size, size.rows)
    run = lambda lengths, **settings: train(size, size.small, lengths, seq_len=size.rows, **settings)  # noqa: E731
    found = best(
        {
            "eager": lambda: run(rows),
            "compiled": lambda: run(rows, **spared(size)),
            "compiled, selective": lambda: run(rows, **spared(size, checkpoint="selective")),
        }
    )
    short = [length for length in mixed(size) if length < size.rows]
    return found | {"shorter documents, eager": run(short)}


def seven(size: Size) -> dict[str, Any]:
    """7B with all parameters on one card: fp32 weights, one-byte moments."""
    rows, optim = rows_of(size, size.rows), OptimConfig(kind="adamw8", lr=1e-4, warmup=0)
    ways = {}
    for kind in ("full", "selective"):
        settings = spared(size, checkpoint=kind) | {"optim": optim}
        ways[kind] = lambda s=settings: train(size, size.large, rows, seq_len=size.rows, **s)
    return best(ways)


def float8(size: Size) -> dict[str, Any]:
    """1.8B, compiled: bf16 against float8, and the losses of both."""
    found = {}
    for precision in ("dtype", size.float8):
        settings = spared(size) | {"precision": precision}
        found[precision] = train(size, size.small, rows_of(size, size.rows), seq_len=size.rows, **settings)
    return found | {"gain": found[size.float8]["tokens_per_s"] / found["dtype"]["tokens_per_s"]}


def long(size: Size) -> dict[str, Any]:
    """1.8B: rows of 4k, rows of 32k with half of the tokens in short documents, and whole documents of 32k."""
    settings = spared(size, compiled=False, checkpoint="selective")
    sized = size._replace(tokens=2 * size.long)
    found = {
        name: train(sized, size.small, lengths, seq_len=seq_len, **settings)
        for name, lengths, seq_len in (
            ("4k", rows_of(sized, size.rows), size.rows),
            ("32k, half short", mixed(sized), size.long),
            ("32k", rows_of(sized, size.long), size.long),
        )
    }
    lost = {f"lost, {name}": 1 - found[name]["tokens_per_s"] / found["4k"]["tokens_per_s"] for name in list(found)[1:]}
    return {**found, **lost}


# --- all of it -----------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Size], dict[str, Any]]] = {
    "check": check,
    "small": small,
    "seven": seven,
    "float8": float8,
    "long": long,
}


def judged(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The bars of the parts that were run."""
    found = {
        bar: result[part][result[part]["best"]]["mfu"]
        for bar, part in (("train.13", "small"), ("train.14", "seven"))
        if "mfu" in result.get(part, {}).get(result.get(part, {}).get("best"), {})
    }
    if "float8" in result:
        found["train.15"] = result["float8"]["gain"]
    if "long" in result:
        found["train.16"] = result["long"]["lost, 32k, half short"]
    return harness.judged([harness.Samples(bar, [float(value)]) for bar, value in found.items()])


class Bench(NamedTuple):
    """One bench of a GPU: its name, its parts, its bars, and its sizes, real and toy."""

    name: str
    doc: str
    parts: dict[str, Callable[[Size], dict[str, Any]]]
    judged: Callable[[dict[str, Any]], list[dict[str, Any]]]
    real: Size
    toy: Size

    def main(self, arguments: Sequence[str]) -> int:
        """Run the parts that are asked for; the last line is JSON."""
        parser = argparse.ArgumentParser(description=self.doc.partition("\n")[0])
        parser.add_argument("--parts", default=",".join(self.parts), help=f"of {', '.join(self.parts)}")
        parser.add_argument("--dry", action="store_true", help="toy sizes on a CPU: checks the bench itself")
        parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
        options = parser.parse_args(arguments)
        if not options.dry and not torch.cuda.is_available():
            print(json.dumps({"bench": self.name, "measured": False, "why": "torch sees no GPU"}))
            return 0
        size = self.toy if options.dry else self.real
        result = self.facts(size)
        for name in options.parts.split(","):
            print(name, file=sys.stderr)
            result[name] = self.parts[name](size)
            free()
        result["bars"] = [] if options.dry else self.judged(result)
        if options.save and not options.dry:
            path = harness.RESULTS / f"{result['date'][:10]}-{self.name}.json"
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(result), flush=True)
        return 1 if result.get("check", {}).get("failed") else 0

    def facts(self, size: Size) -> dict[str, Any]:
        cuda, versions = size.device.type == "cuda", {"torch": torch.__version__}
        card = torch.cuda.get_device_name() if cuda else "toy sizes"
        return {**harness.facts(self.name, versions, card=card), "measured": cuda}


BENCH = Bench("gpu_pretrain", __doc__ or "", PARTS, judged, Size(), TOY)
main = BENCH.main


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
