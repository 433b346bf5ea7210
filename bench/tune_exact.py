"""tune.1 to tune.5 and tune.12: fine-tuning is exact. Nothing is timed.

    python bench/tune_exact.py [--save] [--only tune.3]

tune.1: losses and gradients of packed documents against whole logits of padded rows, and of documents one by one.
tune.2: a step of eight micro-batches against one of one. tune.3: logits of adapters against those of the merged
checkpoint that `load_model` gives. tune.4: `puyu sft`'s function killed in the middle and run again. tune.5: adapters
between here and peft. tune.12: bytes of NF4 matrices of a 7B, made and counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import peft
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from puyu.data.packing import Pair, pack_documents, pack_pairs
from puyu.model.adapter_files import load_adapter
from puyu.model.checkpoint import load_model, save_model
from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.init import init_weights, initial_value
from puyu.model.nf4 import NF4
from puyu.model.packed import PackedPlan
from puyu.tokenizer.chat import CHAT_TEMPLATE
from puyu.tokenizer.tokenizer import from_merges
from puyu.train import sft
from puyu.train.objectives import lm_loss, pair_losses, ranking_loss
from puyu.train.prefer import Answers, pack_answers, preference_loss
from puyu.train.preference_losses import PairValues, PreferenceNumbers, pair_loss
from puyu.train.trainer import Trainer, TrainerConfig
from puyu.train.tune import TuneConfig, Tuning

SHAPE = {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 256}
METHODS = ("lora", "rslora", "dora", "pissa", "lora+")
BASES = ("dense", "int8", "nf4")
Doc = tuple[list[int], list[bool]]
Found = tuple[float, dict[str, Tensor]]


def made(folder: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    """A random model of LLaMA's family and its byte-level tokenizer, saved."""
    tokenizer = from_merges([(b"t", b"h")], chat_template=CHAT_TEMPLATE)
    tokenizer.save(folder)
    model = CausalLM(ModelConfig(family="llama", vocab_size=tokenizer.vocab_size, max_positions=512, **SHAPE))
    init_weights(model, seed=1, std=0.02)
    save_model(model, folder)
    return load_model(folder, dtype=dtype)


def documents(count: int, vocab: int) -> list[Doc]:
    rng = random.Random(0)
    lengths = [rng.randint(3, 120) for _ in range(count)]
    return [([rng.randrange(3, vocab) for _ in range(n)], [at >= n // 3 for at in range(n)]) for n in lengths]


# --- tune.1 ---------------------------------------------------------------------------------------------------------


def padded(docs: list[Doc], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ids [B, L], and the weight of each next token [B, L - 1]."""
    longest = max(len(ids) for ids, _ in docs)
    ids_BL, weights_BL = torch.zeros(len(docs), longest, dtype=torch.long), torch.zeros(len(docs), longest, dtype=dtype)
    for row, (ids, learned) in enumerate(docs):
        ids_BL[row, : len(ids)] = torch.tensor(ids)
        weights_BL[row, : len(ids)] = torch.tensor(learned).to(dtype)
    return ids_BL, weights_BL[:, 1:]


def pairs_of(docs: list[Doc]) -> list[Answers]:
    """Neighbors as the two answers to one prompt, with a reference far from zero."""
    couples = zip(docs[::2], docs[1::2], strict=True)
    return [Answers((a, b), (-2.0 * len(a[0]), -2.1 * len(b[0]))) for a, b in couples]


def padded_loss(kind: str, model: Any, docs: list[Doc], *, alone: bool) -> Tensor:
    """From whole logits of rows of one length, or of each document `alone`."""
    dtype = next(model.parameters()).dtype
    ids_BL, weights_BL = padded(docs, dtype)
    rows, longest = ids_BL.shape
    if alone:
        hidden = []
        for ids, _ in docs:
            plan, place = PackedPlan.build([0], len(ids)), torch.arange(len(ids))
            hidden.append(F.pad(model.trunk(torch.tensor(ids), place, plan), (0, 0, 0, longest - len(ids))))
        hidden_BLD = torch.stack(hidden)
    else:
        plan = PackedPlan.build([longest * row for row in range(rows)], rows * longest)
        hidden_BLD = model.trunk(ids_BL.flatten(), torch.arange(longest).repeat(rows), plan).view(rows, longest, -1)
    if kind == "reward":
        last = torch.tensor([len(ids) - 1 for ids, _ in docs])
        scores = model.head(hidden_BLD[torch.arange(rows), last]).squeeze(-1)
        return pair_losses(scores[::2], scores[1::2]).mean()
    logits = hidden_BLD[:, :-1] @ model.head.weight.T
    each = torch.log_softmax(logits, -1).gather(-1, ids_BL[:, 1:, None]).squeeze(-1) * weights_BL
    sums, lengths = each.sum(1), weights_BL.sum(1)
    if kind == "sft":
        return -sums.sum() / lengths.sum()
    reference = torch.tensor([value for one in pairs_of(docs) for value in one.reference], dtype=torch.float64)
    halves = [(part[::2], part[1::2]) for part in (sums, reference.to(sums), lengths)]
    values = PairValues(*(part for pair in halves for part in pair))
    return pair_loss("sigmoid" if kind == "dpo" else "orpo", values, PreferenceNumbers()).mean()


def our_loss(kind: str, model: Any, docs: list[Doc]) -> Tensor:
    if kind == "reward":
        couples = zip(docs[::2], docs[1::2], strict=True)
        output = ranking_loss()(model, pack_pairs([Pair(a[0], b[0]) for a, b in couples]))
    elif kind == "sft":
        output = lm_loss(model, pack_documents(docs))  # type: ignore[arg-type]
    else:
        objective = preference_loss("sigmoid" if kind == "dpo" else "orpo", PreferenceNumbers())
        output = objective(model, pack_answers(pairs_of(docs)))
    return output.loss_sum / output.weight_sum


def three_ways(kind: str, folder: Path, dtype: torch.dtype) -> list[Found]:
    """Packed by the stage's own objective, padded, and one by one."""
    found: list[Found] = []
    for way in ("packed", "padded", "alone"):
        model: Any = load_model(folder, dtype=dtype)
        docs = documents(24, model.config.vocab_size)
        if kind == "reward":
            scalar = ScalarModel(model.config).to(dtype)
            scalar.trunk.load_state_dict(model.trunk.state_dict())
            scalar.head.weight.data = initial_value("scores", (1, SHAPE["hidden_size"]), seed=5, std=0.3).to(dtype)
            model = scalar
        loss = our_loss(kind, model, docs) if way == "packed" else padded_loss(kind, model, docs, alone=way == "alone")
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((float(loss.detach()), grads))
    return found


def apart(a: Found, b: Found, *, relative: bool) -> float:
    """The larger difference of the two: of losses, of gradients."""
    names = a[1].keys()
    assert names and names == b[1].keys()
    one, two = (torch.cat([found[1][name].double().flatten() for name in sorted(names)]) for found in (a, b))
    if relative:
        return max(abs(a[0] / b[0] - 1), float((one - two).norm() / two.norm()))
    return max(abs(a[0] - b[0]), float((one - two).abs().max()))


def packing(folder: Path, notes: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for bar, dtype in (("tune.1", torch.float64), ("tune.1b", torch.float32)):
        made(folder)
        found = {}
        for kind in ("sft", "reward", "dpo", "orpo"):
            packed, *others = three_ways(kind, folder, dtype)
            found[kind] = max(apart(packed, other, relative=bar == "tune.1b") for other in others)
        notes[bar] = found
        yield bar, max(found.values())


# --- tune.2 ---------------------------------------------------------------------------------------------------------


class Given:
    """A BatchSource of given batches."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.at = batches, 0

    def next_batch(self, *, rank: int = 0, world: int = 1) -> Any:
        self.at += 1
        return self.batches[self.at - 1]

    def state(self) -> dict[str, Any]:
        return {"at": self.at}

    def load(self, state: Any, /) -> None:
        self.at = state["at"]


def accumulation(folder: Path, notes: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """By the Trainer's own passes: objectives that divide by tokens, by pairs."""
    for bar, dtype in (("tune.2", "float64"), ("tune.2b", "float32")):
        model = made(folder)
        docs = documents(32, model.config.vocab_size)
        answers = pairs_of(docs)
        cases: dict[str, tuple[Any, Callable[[Any], Any], list[Any]]] = {
            "sft": (lm_loss, pack_documents, docs),
            "dpo": (preference_loss("sigmoid", PreferenceNumbers()), pack_answers, answers),
        }
        notes[bar] = {}
        for name, (objective, pack, items) in cases.items():
            found = []
            for count in (1, 8):
                model = load_model(folder, dtype=getattr(torch, dtype))
                size = len(items) // count
                batches = [pack(items[at : at + size]) for at in range(0, len(items), size)]
                config = TrainerConfig(steps=1, accumulate=count, dtype=dtype, checkpoint_every=0)
                with tempfile.TemporaryDirectory() as out:
                    trainer = Trainer(model, objective, Given(batches), config, out=Path(out))
                    sums = trainer.layout.backward(batches, scale=1.0)
                weight = sums["weight"]
                grads = {
                    one.name: one.update.grad / weight for one in trainer.layout.shares if one.update.grad is not None
                }
                found.append((sums["loss"] / weight, grads))
            notes[bar][name] = apart(found[1], found[0], relative=dtype == "float32")
        yield bar, max(notes[bar].values())


# --- tune.3 and tune.5 ----------------------------------------------------------------------------------------------

IDS = [(7 * at) % 250 for at in range(60)]


def logits(model: CausalLM) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor(IDS), torch.arange(len(IDS)), PackedPlan.build([0], len(IDS)))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def trained(folder: Path, method: str, base: str) -> tuple[CausalLM, Tuning]:
    """A model with shares that are no longer what they began as."""
    model = load_model(folder)
    config = TuneConfig.model_validate({"method": method, "rank": 8, "base": base})
    tuning = Tuning.of(model, config, seed=0, base=folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = initial_value(name, tuple(parameter.shape), seed=9, std=0.01)
                parameter.mul_(1 + noise) if name.endswith("magnitude") else parameter.add_(noise)
    return model, tuning


def merging(folder: Path, notes: dict[str, Any]) -> Iterator[tuple[str, float]]:
    made(folder)
    found = {}
    for method in METHODS:
        for base in BASES:
            model, tuning = trained(folder, method, base)
            tuning.write(model, folder / method / base)
            found[f"{method} on {base}"] = distance(logits(load_model(folder / method / base)), logits(model))
    notes["tune.3"] = found
    yield "tune.3", max(found.values())


def exchange(folder: Path, notes: dict[str, Any]) -> Iterator[tuple[str, float]]:
    made(folder)
    found = {}
    for method in METHODS:
        model, tuning = trained(folder, method, "dense")
        tuning.write(model, folder / method)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            theirs = peft.PeftModel.from_pretrained(plain, str(folder / method)).eval()
        with torch.no_grad():
            there = theirs(torch.tensor([IDS])).logits[0]
        theirs.save_pretrained(str(folder / method / "back"))
        again = load_model(folder)
        load_adapter(again, folder / method / "back")
        found[method] = max(distance(there, logits(model)), distance(logits(again), there))
    notes["tune.5"] = found
    yield "tune.5", max(found.values())


# --- tune.4 ---------------------------------------------------------------------------------------------------------


def going_on(folder: Path, notes: dict[str, Any]) -> Iterator[tuple[str, float]]:
    made(folder / "base")
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"question {at}"},
                {"role": "assistant", "content": "word " * (at % 9)},
            ]
        }
        for at in range(40)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))

    def kill(step: int, _: Any) -> None:
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    differences = 0
    for method in ("full", "freeze", *METHODS, "qlora"):
        values = {"base": folder / "base", "data": folder / "chats.jsonl", "steps": 12, "batch_tokens": 512}
        tune = {"method": method, "rank": 8, "dropout": 0.1}
        config = sft.SFTConfig.model_validate({**values, "tune": tune, "checkpoint_every": 1, "noise": 5.0})
        whole, killed = folder / "runs" / method / "whole", folder / "runs" / method / "killed"
        sft.run(config, out=whole)
        try:
            sft.run(config, out=killed, on_step=kill)
        except SystemExit:
            sft.run(config, out=killed)
        rows = [[json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()] for out in (whole, killed)]
        assert len(rows[0]) == 12
        differences += sum(a != b for a, b in zip(*rows, strict=True))
        files = sorted(whole.glob("*.safetensors"))
        differences += sum(path.read_bytes() != (killed / path.name).read_bytes() for path in files)
        assert files
    notes["tune.4"] = {"methods": 8, "steps": 12, "killed after": 7}
    yield "tune.4", differences


# --- tune.12 --------------------------------------------------------------------------------------------------------


def sizes(folder: Path, notes: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """InternLM2-7B: matrices of one layer are made, the others have the same shapes."""
    hidden, inner, vocab, layers, kv = 4096, 14336, 92544, 32, 1024
    shapes = {"qkv": (hidden + 2 * kv, hidden), "out": (hidden, hidden), "gate_up": (2 * inner, hidden)}
    shapes["down"] = (hidden, inner)
    generator, quantized, dense = torch.Generator().manual_seed(0), 0, 0
    for rows, columns in shapes.values():
        weight = NF4.of(torch.randn(rows, columns, generator=generator) * 0.02)
        quantized += sum(t.nbytes for t in (weight.codes, weight.scale_codes, weight.scales, weight.offset))
        dense += 2 * rows * columns
    tables = 2 * 2 * vocab * hidden + 2 * (2 * layers + 1) * hidden
    notes["tune.12"] = {"GB in NF4": layers * quantized / 1e9, "GB of embedding, head and norms in bf16": tables / 1e9}
    yield "tune.12", quantized / dense
    yield "tune.12b", (layers * quantized + tables) / (layers * dense + tables)


PARTS = {
    "tune.1": packing,
    "tune.2": accumulation,
    "tune.3": merging,
    "tune.4": going_on,
    "tune.5": exchange,
    "tune.12": sizes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=PARTS, default="", help="one of them")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    given = parser.parse_args()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    run = harness.Run("tune_exact", versions=versions, before={})
    rows = []
    for name, part in PARTS.items():
        if given.only in ("", name):
            with tempfile.TemporaryDirectory() as folder:
                rows += [harness.Samples(bar, [float(value)]) for bar, value in part(Path(folder), run.notes)]
    run.finish(rows, save=given.save and not given.only)


if __name__ == "__main__":
    main()
