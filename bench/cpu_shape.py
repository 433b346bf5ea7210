"""The model of the engine's comparisons: 16 layers, d 1024, ffn 4096, 16 query and 8 key heads of 64, 32k tokens.

Random weights, saved once under runs/bench as every side wants them: bf16 for transformers, int4 (groups of 64) and
int8 (groups of 32) for us, Q4_0 and Q8_0 for llama.cpp. Bytes that a token reads, a weight of the blocks and of the
head: int4 4.5 bits (a half float scale and offset a group) and int8 8.5 against Q4_0's 4.5 and Q8_0's 8.5; the head
is int8 with a scale a row in all of ours, Q8_0 in both of theirs.
"""

from __future__ import annotations

import json
from pathlib import Path

import harness

VOCAB = 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 4096,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
FOLDER = harness.ROOT / "runs" / "bench" / "engine-317m"


def prompt(count: int, *, start: int = 0) -> list[int]:
    """Token ids that stand for letters, one each, so that text and ids have one length."""
    return [1, *(40 + (7 * index + start) % 60 for index in range(count - 1))]


def packed_bytes(path: Path) -> int:
    """Bytes that one token reads: all weights but the embedding, the head as int8."""
    rows, hidden = VOCAB, int(CONFIG["hidden_size"])
    layers = int(CONFIG["num_hidden_layers"])
    inner, heads, kv = (
        int(CONFIG[name]) for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    block = hidden * 64 * (heads + 2 * kv) + heads * 64 * hidden + 3 * hidden * inner
    bits = {"int4": 4.5, "int8": 8.5}[path.name]
    return int(layers * block * bits / 8) + rows * (hidden + 2)


def inputs() -> Path:
    """The folder with `bf16`, `int4`, `int8`, `q4_0.gguf` and `q8_0.gguf`; made on the first call."""
    if not (FOLDER / "ready.json").is_file():
        FOLDER.mkdir(parents=True, exist_ok=True)
        _save_model(FOLDER / "bf16")
        _save_quantized(FOLDER)
        _save_gguf(FOLDER)
        sizes = {str(path.relative_to(FOLDER)): path.stat().st_size for path in sorted(FOLDER.rglob("*.*"))}
        (FOLDER / "ready.json").write_text(json.dumps(sizes))
    return FOLDER


def _save_model(folder: Path) -> None:
    import torch

    from puyu.model.checkpoint import save_model
    from puyu.model.config import ModelConfig
    from puyu.model.heads import CausalLM
    from puyu.model.init import init_weights
    from puyu.tokenizer.template import CHAT_TEMPLATE
    from puyu.tokenizer.tokenizer import from_merges

    model = CausalLM(ModelConfig.from_hf(CONFIG))
    init_weights(model, seed=0)
    save_model(model, folder, dtype=torch.bfloat16)
    small = from_merges([], chat_template=CHAT_TEMPLATE).vocab_size
    pairs = [(bytes([a]), bytes([b])) for a in range(128, 256) for b in range(256)]
    from_merges(pairs[: VOCAB - small], chat_template=CHAT_TEMPLATE).save(folder)


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
