"""Checkpoints in several forms for these tests, and InternEvo's shards by their definition, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from puyu.model.checkpoint import save_model
from puyu.model.config import ModelConfig
from puyu.model.convert import ConvertConfig, Done, convert
from puyu.model.heads import CausalLM


def random_model(*, seed: int = 0, std: float = 0.05, **shape: Any) -> CausalLM:
    """Every tensor random, norms and biases too."""
    sizes = {"vocab_size": 24, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "intermediate_size": 40}
    shape = {**sizes, "hidden_size": 32, "max_positions": 64, **shape}
    generator = torch.Generator().manual_seed(seed)
    model = CausalLM(ModelConfig(**shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            middle = 1.0 if "norm" in name else 0.0
            parameter.copy_(middle + torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def model_folder(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **shape: Any) -> Path:
    save_model(random_model(seed=seed, **shape), folder, dtype=dtype)
    return folder


def turned(source: Path, out: Path, to: str, **settings: Any) -> Path:
    """Convert, pickles allowed."""
    done(source, out, to, **settings)
    return out


def done(source: Path, out: Path, to: str, **settings: Any) -> Done:
    return convert(ConvertConfig(source=source, out=out, to=to, **{"allow_pickle": True, **settings}))


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder; those of InternEvo under file and name."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    for path in sorted(folder.glob("model_tp*.pt")):
        state = torch.load(path, weights_only=True)
        found |= {f"{path.name}: {name}": tensor for name, tensor in state.items()}
    return found


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not there twice, bit for bit."""
    both = a.keys() & b.keys()
    return sorted((a.keys() | b.keys()) - both) + sorted(name for name in both if not equal_bits(a[name], b[name]))


def equal_bits(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and raw(a) == raw(b)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def naive_stages(num_layers: int, pp: int) -> list[list[int]]:
    """Later stages take what does not divide evenly."""
    counts = [num_layers // pp] * pp
    for rank in range(num_layers % pp):
        counts[pp - 1 - rank] += 1
    layers = iter(range(num_layers))
    return [[next(layers) for _ in range(count)] for count in counts]


def naive_shards(state: dict[str, Tensor], config: ModelConfig, *, tp: int, pp: int, **how: bool) -> dict[str, Tensor]:
    """InternEvo's files of an InternLM2 folder's tensors, as {file: name -> tensor}."""
    found: dict[str, Tensor] = {}
    heads_each, group = config.num_kv_heads // tp, config.queries_per_kv + 2
    for p, layers in enumerate(naive_stages(config.num_layers, pp)):
        for t in range(tp):
            file = f"model_tp{t}_pp{p}.pt: "
            for local, layer in enumerate(layers):
                old, new = f"model.layers.{layer}.", f"{file}layers.{local}."
                for name in ("attention_norm.weight", "ffn_norm.weight"):
                    found[new + name] = state[old + name]
                rows = []
                for kv in range(t * heads_each, (t + 1) * heads_each):
                    for member in range(group):
                        head = [(kv * group + member) * config.head_dim + i for i in range(config.head_dim)]
                        rows += paired(head) if how.get("interleaved") and member < group - 1 else head
                found[new + "attention.wqkv.weight"] = state[old + "attention.wqkv.weight"][rows]
                for name in ("feed_forward.w1.weight", "feed_forward.w3.weight"):
                    found[new + name] = part(state[old + name], t, tp, 0)
                for name in ("attention.wo.weight", "feed_forward.w2.weight"):
                    found[new + name] = part(state[old + name], t, tp, 1)
            if p == 0:
                name = "tok_embeddings.word_embeddings.weight" if how.get("split_vocab") else "tok_embeddings.weight"
                axis = 0 if how.get("split_vocab") else 1
                found[file + name] = part(state["model.tok_embeddings.weight"], t, tp, axis)
            if p == pp - 1:
                found[file + "norm.weight"] = state["model.norm.weight"]
                found[file + "output.weight"] = part(state["output.weight"], t, tp, 0)
    return found


def naive_first_shards(state: dict[str, Tensor], config: ModelConfig, *, tp: int, pp: int) -> dict[str, Tensor]:
    """The same of a first InternLM's folder: blocks, Wqkv by kind, w2 above w3."""
    found: dict[str, Tensor] = {}
    each = config.num_heads // tp * config.head_dim
    for p, layers in enumerate(naive_stages(config.num_layers, pp)):
        for t in range(tp):
            file = f"model_tp{t}_pp{p}.pt: "
            for local, layer in enumerate(layers):
                old, new = f"model.layers.{layer}.", f"{file}blocks.{local}."
                found[new + "norm1.weight"] = state[old + "input_layernorm.weight"]
                found[new + "norm2.weight"] = state[old + "post_attention_layernorm.weight"]
                for kind in ("weight", "bias"):
                    parts = [state[f"{old}self_attn.{x}_proj.{kind}"][t * each : (t + 1) * each] for x in "qkv"]
                    found[f"{new}mixer.Wqkv.{kind}"] = torch.cat(parts)
                found[new + "mixer.out_proj.weight"] = part(state[old + "self_attn.o_proj.weight"], t, tp, 1)
                if t == 0:
                    found[new + "mixer.out_proj.bias"] = state[old + "self_attn.o_proj.bias"]
                found[new + "mlp.w1.weight"] = part(state[old + "mlp.gate_proj.weight"], t, tp, 0)
                found[new + "mlp.w2.weight"] = part(state[old + "mlp.up_proj.weight"], t, tp, 0)
                found[new + "mlp.w3.weight"] = part(state[old + "mlp.down_proj.weight"], t, tp, 1)
            if p == 0:
                found[file + "embedding.weight"] = part(state["model.embed_tokens.weight"], t, tp, 1)
            if p == pp - 1:
                found[file + "norm.weight"] = state["model.norm.weight"]
                found[file + "head.weight"] = part(state["lm_head.weight"], t, tp, 0)
    return found


def paired(rows: list[int]) -> list[int]:
    """Rows in halves -> the order in which row 2i is the first half's i-th, row 2i + 1 the second's."""
    half = len(rows) // 2
    return [row for i in range(half) for row in (rows[i], rows[half + i])]


def part(tensor: Tensor, rank: int, count: int, axis: int) -> Tensor:
    size = tensor.shape[axis] // count
    return tensor.narrow(axis, rank * size, size)


def write_shards(folder: Path, shards: dict[str, Tensor], values: Any, *, prefix: str = "model.") -> Path:
    """As training writes them: an ordered dict a file, names with or without `model.`."""
    folder.mkdir(parents=True)
    files: dict[str, dict[str, Tensor]] = {}
    for key, tensor in shards.items():
        file, name = key.split(": ")
        files.setdefault(file, {})[prefix + name] = tensor.clone()
    for file, state in files.items():
        torch.save(state, folder / file)
    torch.save(values, folder / "model_config.pt")
    return folder
