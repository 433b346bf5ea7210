"""Fine-tuning on a GPU: fast paths against their references, then memory and speed of InternLM2's shapes.

    python bench/gpu_finetune.py                     # everything, some minutes on one H200
    python bench/gpu_finetune.py --parts check,seven
    python bench/gpu_finetune.py --dry               # toy sizes on a CPU: checks the bench itself, measures nothing

Parts: check (NF4 values of the kernel against torch, bit for bit; adapters on NF4 and int8 bases against their merged
matrices; an embedding on the host), seven and twenty (QLoRA of rank 64 on all matrices, 2,048 tokens, one row, one-byte
moments, activations recomputed: peak of memory and tokens/s), context (the longest row that a LoRA step of
the 7B takes within 24 GB and within the whole card), peer (transformers with peft, and bitsandbytes where it is
installed, on the same shapes). Random weights. Peaks are the allocator's, with the process's own beside them. Without a
GPU it says so and ends. The last line is JSON.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from statistics import median
from typing import Any

import gpu_pretrain as pretrain
import harness
import torch
from gpu_pretrain import Bench, Check, Size, checked, free, measure

from puyu.model.adapted import AdaptedLinear, BaseKind, freeze
from puyu.model.families import joins
from puyu.model.heads import CausalLM
from puyu.model.linear import Linear
from puyu.model.nf4 import NF4
from puyu.model.transformer import HostEmbedding
from puyu.train.memory import MemoryConfig
from puyu.train.optim import OptimConfig
from puyu.train.stage import place
from puyu.train.tune import TuneConfig, Tuning

RANK, TOKENS, ROOM = 64, 2048, 24
pretrain.SHAPES["20B"] = {
    "hidden_size": 6144,
    "num_layers": 48,
    "num_heads": 48,
    "num_kv_heads": 8,
    "intermediate_size": 16384,
}
pretrain.SHAPES["toy64"] = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 128,
}
REAL = Size(small="7B", large="20B")
TOY = pretrain.TOY._replace(small="toy64", large="toy64", tokens=64)


# --- models ---------------------------------------------------------------------------------------------------------


def tuned(size: Size, name: str, method: str) -> CausalLM:
    """Random numbers in the dtype of the products; the base is quantized where it stands, matrix by matrix."""
    config = size.config(name)
    with torch.device("meta"):
        model = CausalLM(config)
    dtype = torch.bfloat16 if size.dtype == "bfloat16" else torch.float32
    for key, parameter in list(model.named_parameters()):
        value = torch.ones(parameter.shape, dtype=dtype, device=size.device)
        if parameter.ndim > 1:
            value.normal_(0, 0.02)
        parent, _, leaf = key.rpartition(".")
        setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(value))
    tune = TuneConfig.model_validate({"method": method, "rank": rank_of(size)})
    Tuning.of(model, tune, seed=0, base=None)
    return place(model, dtype=size.dtype, device=size.device)


def rank_of(size: Size) -> int:
    return RANK if size.device.type == "cuda" else 4


def train(size: Size, name: str, method: str, *, tokens: int, offload: bool = False) -> dict[str, Any]:
    """What `gpu_pretrain.measure` finds of one row, with the allocator's peak."""
    free()
    model = tuned(size, name, method)
    free()
    optim = OptimConfig(kind="adamw8", lr=1e-4, warmup=0, weight_decay=0.0)
    memory = MemoryConfig(checkpoint="full", offload=offload)
    found = measure(size, model, [tokens], seq_len=tokens, optim=optim, memory=memory)
    return found | {"peak_gb": peak_gb()}


def peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


# --- parts ----------------------------------------------------------------------------------------------------------


def check(size: Size) -> dict[str, Any]:
    return checked(checks(size))


def checks(size: Size) -> Iterator[Check]:
    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        made = NF4.of(torch.randn(300, 1024, generator=draw))
        there = NF4(*(getattr(made, name).to(size.device) for name in NF4.__slots__))
        yield Check(f"NF4 values, {dtype}", [there.dequantized(dtype).cpu()], [made.dequantized(dtype)], 0.0)
    (join, _), *_ = joins(size.config("toy64")).values()
    kinds: tuple[BaseKind, ...] = ("nf4", "int8")
    for kind in kinds:
        layer = Linear(256, 192)
        torch.nn.init.normal_(layer.weight, std=0.05, generator=draw)
        plain = AdaptedLinear(freeze(layer, kind), join, {}).to(size.device)
        x = torch.randn(64, 256, generator=draw).to(size.device)
        yield Check(f"product with an {kind} base", [plain.base(x)], [x @ plain.dense().T], 5e-3)
    table, tokens = torch.randn(50, 64, generator=draw), torch.arange(49, 0, -2)
    rows = HostEmbedding(table).to(size.device)(tokens.to(size.device))
    yield Check("an embedding on the host", [rows.cpu()], [table[tokens]], 0.0)


def seven(size: Size) -> dict[str, Any]:
    return train(size, size.small, "qlora", tokens=min(TOKENS, size.tokens))


def twenty(size: Size) -> dict[str, Any]:
    return train(size, size.large, "qlora", tokens=min(TOKENS, size.tokens))


def context(size: Size) -> dict[str, Any]:
    """By doubling and then halving the distance, to a sixteenth."""
    found: dict[str, Any] = {}
    card = torch.cuda.mem_get_info()[1] / 1e9 if torch.cuda.is_available() else 1.0
    for name, room in (("24 GB", ROOM), ("card", card)):
        least, tokens = 0, size.tokens // 4
        most = 0
        while True:
            if fits(size, tokens, room):
                least = tokens
                tokens = 2 * tokens if not most else (least + most) // 2
            else:
                most = tokens
                tokens = (least + most) // 2
            if (most and most - least <= max(least // 16, 1)) or (size.device.type == "cpu" and least):
                break
        found[name] = least
    return found


def fits(size: Size, tokens: int, room: float) -> bool:
    """Whether two LoRA steps on one row stay within so many GB."""
    short = size._replace(warm=1, steps=1, long=max(size.long, tokens))
    try:
        return train(short, size.small, "lora", tokens=tokens, offload=tokens > 65536)["peak_gb"] <= room
    except torch.OutOfMemoryError:
        return False


def peer(size: Size) -> dict[str, Any]:
    """transformers and peft by a plain loop: recomputed activations, 4-bit base where bitsandbytes is installed."""
    if any(find_spec(name) is None for name in ("transformers", "peft")):
        return {"why": "transformers or peft is not installed"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that peft still uses and transformers calls old
        return _peer(size)


def _peer(size: Size) -> dict[str, Any]:
    import peft
    import transformers

    free()
    four_bits = find_spec("bitsandbytes") is not None and size.device.type == "cuda"
    shape = pretrain.SHAPES[size.small]
    config = transformers.LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        intermediate_size=shape["intermediate_size"],
        max_position_embeddings=size.long,
    )
    dtype = torch.bfloat16 if size.dtype == "bfloat16" else torch.float32
    with size.device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if four_bits:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            free()
            quantized = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=quantized, dtype=dtype
            )
    free()
    lora = peft.LoraConfig(r=rank_of(size), target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    kind: Any = torch.optim.AdamW
    if four_bits:
        import bitsandbytes

        kind = bitsandbytes.optim.AdamW8bit
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens, times = min(TOKENS, size.tokens), []
    for _ in range(size.warm + size.steps):
        rows = torch.randint(3, size.vocab, (1, tokens), device=size.device)
        began = time.perf_counter()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if size.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    versions = {"transformers": transformers.__version__, "peft": peft.__version__, "4-bit base": four_bits}
    return {"tokens_per_s": tokens / median(times[size.warm :]), "peak_gb": peak_gb(), **versions}


PARTS: dict[str, Callable[[Size], dict[str, Any]]] = {
    "check": check,
    "seven": seven,
    "twenty": twenty,
    "context": context,
    "peer": peer,
}


def judged(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The bars of the parts that were run."""
    found: dict[str, float] = {}
    for bar, part in (("tune.14", "seven"), ("tune.15", "twenty")):
        if "peak_gb" in result.get(part, {}):
            found[bar] = result[part]["peak_gb"]
    if "tokens_per_s" in result.get("peer", {}) and "seven" in result:
        found["tune.16"] = result["seven"]["tokens_per_s"] / result["peer"]["tokens_per_s"]
    return harness.judged([harness.Samples(bar, [float(value)]) for bar, value in found.items()])


main = Bench("gpu_finetune", __doc__ or "", PARTS, judged, REAL, TOY).main


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
