"""The `quantize` verb: a language model with 8- or 4-bit weights in a public format, and a receipt.

    puyu quantize --model runs/nano/ppo --bits 4 --method gptq --out runs/nano/int4

Every linear layer of the trunk becomes integers; embedding, norms, routers and head keep full precision (`rest`). The
result is a checkpoint directory like any other, with `quantization_config` in its config.json: GPTQ's layout for
rtn and gptq, AWQ's for awq, compressed-tensors for smoothquant. What was written is read again and compared with the
original. How fast it is needs an engine, which this room may not see: the caller passes `measure`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from puyu.configure import Config
from puyu.device import pick_device
from puyu.errors import CheckpointError, ConfigError
from puyu.log import say
from puyu.model.checkpoint import copy_side_files, is_scalar_checkpoint, load_model, read_config, save_model
from puyu.model.heads import CausalLM
from puyu.model.kv_cache import CacheStorage
from puyu.model.linear import Linear, QuantFormat, QuantLinear, QuantWeight
from puyu.model.quant_files import FileForm
from puyu.model.quant_modules import replace_module
from puyu.model.transformer import Block
from puyu.quant.awq import awq, awq_scales
from puyu.quant.calibrate import Seen, block_by_block, linears
from puyu.quant.evaluate import compare
from puyu.quant.gptq import gptq
from puyu.quant.rtn import rtn
from puyu.quant.smooth import smooth
from puyu.quant.texts import Budget, read_documents, sampled_documents
from puyu.tokenizer.tokenizer import Tokenizer

Measure = Callable[[Path], dict[str, Any]]
Method = Literal["rtn", "gptq", "awq", "smoothquant"]
_BITS: dict[Method, tuple[int, ...]] = {"rtn": (4, 8), "gptq": (4, 8), "awq": (4,), "smoothquant": (8,)}


class QuantizeConfig(Config):
    model: Path
    """Checkpoint directory of a language model in full precision."""
    bits: Literal[8, 4] = 8
    """Bits of a weight: 8 (one scale a row) or 4 (a scale and a zero point a group)."""
    method: Literal["auto", "rtn", "gptq", "awq", "smoothquant"] = "auto"
    """rtn: round to nearest; gptq: later weights make up for the errors of earlier ones; awq: finer steps where
    activations are large (4 bits); smoothquant: int8 weights and activations. auto: rtn for 8 bits, gptq for 4."""
    group: Literal[32, 64, 128, 256] = 64
    """4 bits: inputs that share a scale; must divide every layer's inputs. Smaller is more exact and larger in size."""
    symmetric: bool = False
    """4 bits: the same reach on both sides of zero, no zero points (not for awq)."""
    data: Path | None = None
    """Calibration texts: JSONL of `text` or `messages`. Without it the model's own samples are used."""
    sequences: int = Field(default=64, ge=1)
    """Calibration documents of full length; of shorter ones as many as hold the same tokens."""
    length: int = Field(default=256, ge=2)
    """Longest document in tokens, to calibrate with or drawn for the receipt; at most the model's context."""
    eval_data: Path | None = None
    """Held-out texts for the receipt, in the same form. Without it other samples of the model are used."""
    eval_tokens: int = Field(default=8192, ge=2)
    """Tokens that the receipt compares."""
    cache: CacheStorage = "auto"
    """How the receipt's quantized model keeps keys and values; the engine is told by its own `cache_dtype`."""
    damping: float = Field(default=0.01, gt=0)
    """gptq: share of the mean of the inputs' squares that is added to all of them."""
    act_order: bool = True
    """gptq: round the weights of the largest inputs first."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """smoothquant: how much of the activations' range moves into the weights."""
    rest: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of what stays: embedding, norms, head, biases."""
    device: str = "auto"
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> QuantizeConfig:
        if self.bits not in _BITS[self.chosen]:
            raise ValueError(f"method {self.chosen} makes {_BITS[self.chosen][0]}-bit weights, not {self.bits}")
        if self.symmetric and self.chosen == "awq":
            raise ValueError("method awq stores zero points; leave symmetric out")
        return self

    @property
    def chosen(self) -> Method:
        """The method that `auto` stands for."""
        if self.method != "auto":
            return self.method
        return "rtn" if self.bits == 8 else "gptq"

    @property
    def form(self) -> QuantFormat:
        """What the matrices are made of."""
        if self.bits == 8:
            return QuantFormat(8, activations=self.chosen == "smoothquant")
        return QuantFormat(4, self.group, self.symmetric)

    @property
    def file_form(self) -> FileForm:
        """How they are stored."""
        form = self.form
        method = {"awq": "awq", "smoothquant": "compressed-tensors"}.get(self.chosen, "gptq")
        return FileForm(method, form.bits, form.group, form.symmetric, activations=form.activations)


@dataclass
class WeightError:
    """Differences between dequantized and original weights, gathered over layers."""

    count: int = 0
    largest: float = 0.0
    total: float = 0.0
    squared: float = 0.0
    signal: float = 0.0

    def add(self, original: torch.Tensor, stands_for: torch.Tensor) -> None:
        difference = (stands_for - original.float()).abs()
        self.count += difference.numel()
        self.largest = max(self.largest, difference.max().item())
        self.total += difference.sum(dtype=torch.float64).item()
        self.squared += difference.double().square().sum().item()
        self.signal += original.double().square().sum().item()

    def numbers(self) -> dict[str, float]:
        """`relative` is the norm of the differences over the norm of the weights."""
        relative = math.sqrt(self.squared / self.signal) if self.signal else 0.0
        return {"max": self.largest, "mean": self.total / max(self.count, 1), "relative": relative}


def run(config: QuantizeConfig, *, out: Path, measure: Measure | None = None) -> dict[str, Any]:
    """Quantize `config.model` into `out`; returns the receipt.

    Work that a kill left in `out` is written anew: every file appears by rename, with the same bytes.
    """
    check_source(config.model)
    device = pick_device(config.device)
    model = load_model(config.model, device=device)
    check_layers(model, config.file_form)
    tokenizer = Tokenizer.load(config.model) if config.data or config.eval_data else None
    documents = _documents(config, model, tokenizer) if config.chosen != "rtn" else []
    evaluation = _evaluation(config, model, tokenizer)
    error, unseen = quantize_model(model, config, documents)
    rest = {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.rest]
    shape = model.config.with_(quantization=config.file_form.to_config(skipped=_skipped(model)))
    save_model(model, out, dtype=rest, config=shape)
    _carry_files(config.model, out)
    original, written = load_model(config.model, device=device), load_model(out, device=device)
    distance = compare(original, written, evaluation, cache=config.cache)
    before, after = ({"perplexity": round(value, 4)} for value in distance.perplexities)
    numbers = {
        "method": config.chosen,
        "bits": config.bits,
        "group": config.form.group,
        "size_before": weight_bytes(config.model),
        "size_after": weight_bytes(out),
        "weight_error": error.numbers(),
        "unseen_layers": unseen,
        "before": before,
        "after": after,
        **distance.numbers(),
        "evaluated_on": str(config.eval_data or "samples"),
    }
    if measure is not None:
        before |= measure(config.model)
        after |= measure(out)
    for line in receipt(numbers):
        say(line)
    return numbers | {"headline": _headline(numbers)}


def check_source(folder: Path) -> None:
    """Refuse what cannot be quantized, before any weight is read."""
    if read_config(folder).quantization:
        raise ConfigError(f"{folder} is quantized already", remedy="give the full-precision checkpoint it was made of")
    if is_scalar_checkpoint(folder):
        raise ConfigError(f"{folder} is a reward model", remedy="only language models are quantized")


def check_layers(model: CausalLM, form: FileForm) -> None:
    """Refuse shapes that the format cannot hold and weights that are not numbers."""
    for name, layer in layers_of(model).items():
        problem = form.why_not(inputs=layer.in_features, outputs=_smallest_part(name, layer, model))
        if problem:
            fitting = [group for group in (256, 128, 64, 32) if layer.in_features % group == 0]
            by_group = form.group and layer.in_features % form.group and fitting
            remedy = f"set group={fitting[0]}" if by_group else "use bits=8"
            raise ConfigError(f"{name}: {problem}", remedy=remedy)
        if not layer.weight.isfinite().all():
            raise CheckpointError(f"{name}.weight holds NaN or infinity", remedy="quantize an earlier checkpoint")


def _smallest_part(name: str, layer: Linear, model: CausalLM) -> int:
    """Outputs of the smallest matrix that a layer becomes in files."""
    config = model.config
    if name.endswith(".qkv") and len(config.row.qkv) > 1:
        return config.num_kv_heads * config.head_dim
    return layer.out_features // 2 if name.endswith(".gate_up") else layer.out_features


def layers_of(model: CausalLM) -> dict[str, Linear]:
    """The layers that are quantized, by their name in the trunk."""
    blocks = enumerate(model.trunk.layers)
    return {f"layers.{i}.{name}": layer for i, block in blocks for name, layer in linears(block).items()}


def quantize_model(
    model: CausalLM, config: QuantizeConfig, documents: Sequence[Sequence[int]]
) -> tuple[WeightError, list[str]]:
    """Replace the layers of the trunk, in place; the errors of their weights, and the layers that no calibration
    token reached (experts of a mixture may be left out): those are rounded to nearest."""
    error, unseen = WeightError(), []

    def visit(index: int, block: Block, seen: dict[str, Seen]) -> None:
        seen = _prepared(block, seen, config)
        for name, layer in linears(block).items():
            found, weight = seen.get(name), layer.weight.detach()
            if found is not None and not found.tokens:
                unseen.append(f"layers.{index}.{name}")
            codes = _codes(weight, found, config)
            error.add(weight.cpu(), codes.dequantized().cpu())
            replace_module(block, name, QuantLinear.of(codes, bias=layer.bias))

    if config.chosen == "rtn":
        for index, block in enumerate(model.trunk.layers):
            visit(index, block, {})  # type: ignore[arg-type]
    else:
        block_by_block(model, documents, visit)
    return error, unseen


def _prepared(block: Block, seen: dict[str, Seen], config: QuantizeConfig) -> dict[str, Seen]:
    """Scales folded in where the method has some; what the layers see then."""
    if config.chosen == "awq":
        return awq_scales(block, seen, config.form)
    if config.chosen == "smoothquant":
        smooth(block, seen, alpha=config.alpha)
    return seen


def _codes(weight: torch.Tensor, seen: Seen | None, config: QuantizeConfig) -> QuantWeight:
    if seen is not None and seen.tokens and config.chosen == "gptq":
        return gptq(weight, seen.gram_II, config.form, damping=config.damping, act_order=config.act_order)
    if seen is not None and seen.tokens and config.chosen == "awq":
        return awq(weight, seen.gram_II, config.form)
    return rtn(weight, config.form)


def _documents(config: QuantizeConfig, model: CausalLM, tokenizer: Tokenizer | None) -> list[list[int]]:
    length = min(config.length, model.config.max_positions)
    budget = Budget(config.sequences * length, length, config.seed)
    if config.data is None:
        return sampled_documents(model, budget)
    assert tokenizer is not None
    return read_documents(config.data, tokenizer, budget)


def _evaluation(config: QuantizeConfig, model: CausalLM, tokenizer: Tokenizer | None) -> list[list[int]]:
    """Held-out windows of the model's context, or samples of calibration's length with another seed."""
    context, seed = model.config.max_positions, config.seed + 1
    if config.eval_data is None:
        return sampled_documents(model, Budget(config.eval_tokens, min(config.length, context), seed))
    assert tokenizer is not None
    return read_documents(config.eval_data, tokenizer, Budget(config.eval_tokens, context, seed))


def _skipped(model: CausalLM) -> list[str]:
    """Names, in files, of linear layers that stay: the head."""
    return [] if model.head is None else [model.config.row.head]


def receipt(numbers: dict[str, Any]) -> list[str]:
    """The receipt as a table of lines."""
    before, after = numbers["before"], numbers["after"]
    rows = [("", "before", "after"), ("bytes", f"{numbers['size_before']:,}", f"{numbers['size_after']:,}")]
    rows += [(key.replace("_", " "), f"{before[key]:,}", f"{after[key]:,}") for key in before]
    rows.append(("KL(before || after), nats/token", "", f"{numbers['kl']:.5f}"))
    rows.append(("same likeliest token", "", f"{numbers['top1_agreement']:.2%}"))
    lines = [f"{name:<32}{left:>14}{right:>14}" for name, left, right in rows]
    kind = f"{numbers['method']}, {numbers['bits']} bits" + (f", groups of {numbers['group']}" * bool(numbers["group"]))
    return [f"{kind}; {numbers['tokens']:,} tokens of {numbers['evaluated_on']}", *lines]


def _headline(numbers: dict[str, Any]) -> str:
    share = numbers["size_after"] / numbers["size_before"]
    return (
        f"{numbers['method']} {numbers['bits']} bits: {share:.0%} of the size, perplexity "
        f"{numbers['before']['perplexity']:.3f} -> {numbers['after']['perplexity']:.3f}, KL {numbers['kl']:.4f}, "
        f"same token {numbers['top1_agreement']:.1%}"
    )


def _carry_files(source: Path, out: Path) -> None:
    copy_side_files(source, out)
    if (source / "generation_config.json").is_file():  # may name more stop tokens than config.json does
        shutil.copyfile(source / "generation_config.json", out / "generation_config.json")


def weight_bytes(folder: Path) -> int:
    """Bytes of all weight files of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
