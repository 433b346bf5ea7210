"""The models of the engine's comparisons, by the number of their weights.

317m: 16 layers, d 1024, ffn 4096, 16 query and 8 key heads of 64, 32k tokens. 1.8b: InternLM2's, 24 layers, d 2048,
ffn 8192, 16 query and 8 key heads of 128, 92,544 tokens.

Random weights, saved once under runs/bench as every side wants them: bf16 for transformers, int4 (groups of 64) and
int8 (groups of 32) for us, Q4_0 and Q8_0 for llama.cpp. Bytes that a token reads, a weight of the blocks and of the
head: int4 4.5 bits (a half float scale and offset a group) and int8 8.5 against Q4_0's 4.5 and Q8_0's 8.5; the head
is int8 with a scale a row in all of ours, Q8_0 in both of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import harness

FORM = 2
"""Of the files; those of another one are made again."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of the llama family, which computes what InternLM2 does under other names."""

    name: str
    layers: int
    hidden: int
    inner: int
    head_dim: int
    vocab: int
    rope_theta: float
    heads: int = 16
    kv_heads: int = 8

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.inner,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        }

    @property
    def folder(self) -> Path:
        return harness.ROOT / "runs" / "bench" / f"engine-{self.name}"

    def packed_bytes(self, kind: str) -> int:
        """Bytes that one token reads of `int4` or `int8`: all weights but the embedding, the head as int8."""
        bits = {"int4": 4.5, "int8": 8.5}[kind]
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        block = attention + 3 * self.hidden * self.inner
        return int(self.layers * block * bits / 8) + self.vocab * (self.hidden + 2)


SHAPES = {
    shape.name: shape
    for shape in (Shape("317m", 16, 1024, 4096, 64, 32000, 1e4), Shape("1.8b", 24, 2048, 8192, 128, 92544, 1e6))
}


def shape_of(path: Path) -> Shape:
    """The shape whose folder holds `path`."""
    return SHAPES[path.parent.name.removeprefix("engine-")]


def prompt(count: int, *, start: int = 0) -> list[int]:
    """Token ids that stand for letters, one each, so that text and ids have one length."""
    return [1, *(40 + (7 * index + start) % 60 for index in range(count - 1))]


def inputs(shape: Shape) -> Path:
    """The folder with `bf16`, `int4`, `int8`, `q4_0.gguf` and `q8_0.gguf`; made on the first call."""
    folder = shape.folder
    ready = folder / "ready.json"
    if not ready.is_file() or json.loads(ready.read_text()).get("form") != FORM:
        folder.mkdir(parents=True, exist_ok=True)
        _save_model(shape, folder / "bf16")
        _save_quantized(folder)
        _save_gguf(folder)
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*.*"))}
        ready.write_text(json.dumps({"form": FORM} | sizes))
    return folder


def _save_model(shape: Shape, folder: Path) -> None:
    import torch

    from puyu.model.checkpoint import save_model
    from puyu.model.config import ModelConfig
    from puyu.model.heads import CausalLM
    from puyu.model.init import init_weights
    from puyu.tokenizer.template import CHAT_TEMPLATE
    from puyu.tokenizer.tokenizer import from_merges

    model = CausalLM(ModelConfig.from_hf(shape.config))
    init_weights(model, seed=0)
    save_model(model, folder, dtype=torch.bfloat16)
    small = from_merges([], chat_template=CHAT_TEMPLATE).vocab_size
    merges = list(islice(_merges(), shape.vocab - small))
    from_merges(merges, chat_template=CHAT_TEMPLATE).save(folder)


def _merges() -> Iterator[tuple[bytes, bytes]]:
    """Letters of two bytes, then all pairs of such letters: no prompt has them, and every token of an answer is text
    that a server can send at once."""
    letters = [(bytes([first]), bytes([second])) for first, second in product(range(0xC2, 0xE0), range(0x80, 0xC0))]
    yield from letters
    yield from product([a + b for a, b in letters], repeat=2)


def _save_quantized(folder: Path) -> None:
    """Round to nearest over each group's whole range: what the codes are changes no speed."""
    from puyu.model.checkpoint import copy_side_files, load_model, save_model
    from puyu.model.linear import Linear, QuantLinear
    from puyu.model.quant_files import FileForm
    from puyu.model.quant_modules import replace_module

    for name, form in {"int4": FileForm("gptq", 4, 64, False), "int8": FileForm("gptq", 8, 32, True)}.items():
        model = load_model(folder / "bf16")
        for block in model.trunk.layers:
            for layer, module in list(block.named_modules()):
                if isinstance(module, Linear):
                    replace_module(block, layer, QuantLinear.of(_rounded(module.weight.detach(), form)))
        save_model(model, folder / name, config=model.config.with_(quantization=form.to_config()))
        copy_side_files(folder / "bf16", folder / name)


def _rounded(weight, form):  # type: ignore[no-untyped-def]
    import torch

    from puyu.model.linear import QuantWeight

    grouped = weight.float().unflatten(1, (-1, form.group))
    if form.bits == 8:
        scales = grouped.abs().amax(-1) / 127
        codes = (grouped / scales[..., None]).round().to(torch.int8).flatten(1)
        return QuantWeight(codes, scales.half(), bits=8)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (grouped / scales.float()[..., None]).round() + zeros[..., None]
    return QuantWeight.of(codes.clamp(0, 15).to(torch.uint8).flatten(1), scales, zeros.to(torch.int16))


def _save_gguf(folder: Path) -> None:
    from puyu.quant.gguf import export_gguf

    export_gguf(folder / "bf16", folder / "q4_0.gguf", kind="q4_0", pre="default")
    export_gguf(folder / "bf16", folder / "q8_0.gguf", kind="q8_0", pre="default")
