"""Tensor parallelism: one model over the processes of a group, sharded in place; rank 0 schedules, the others follow.

Attention by key/value heads and the MLP by its middle, each with one sum over the group at its end (Shoeybi et al.
2019, arXiv 1909.08053); embedding and head by vocabulary. The model's own modules do the rest, so does the engine:
on rank 0 an `Engine` whose runner announces every step, on the others `follow`.

    shard(model, group)
    if rank == 0: engine = Engine(model); engine.runner = Leader(model, engine.runner.cache, group); ...; leader.end()
    else: follow(model, cache, group)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from puyu.engine.runner import Output, Runner, Span
from puyu.errors import ConfigError
from puyu.model.heads import CausalLM
from puyu.model.layers import GatedMLP
from puyu.model.linear import Linear, QuantLinear
from puyu.model.paged import KVCache
from puyu.model.transformer import Block

Group = Any
"""A torch.distributed process group; None is the one of all processes."""


class RowLinear(nn.Module):
    """A product whose inputs are divided over the group; the parts are added, then the bias, once."""

    def __init__(self, inner: Linear | QuantLinear, group: Group) -> None:
        super().__init__()
        self.bias, inner.bias = inner.bias, None
        self.inner, self.group = inner, group

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        dist.all_reduce(y, group=self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class VocabEmbedding(nn.Module):
    """A part of the rows of an embedding; ids of other ranks give zero, and the parts are added."""

    def __init__(self, weight: Tensor, group: Group) -> None:
        super().__init__()
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.group, self.height = group, -(-len(weight) // size)
        self.first = rank * self.height
        mine = weight.detach()[self.first : self.first + self.height]
        self.weight = nn.Parameter(_padded(mine, self.height), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        local = ids - self.first
        foreign = (local < 0) | (local >= self.height)
        x = F.embedding(local.masked_fill(foreign, 0), self.weight).masked_fill(foreign[..., None], 0.0)
        dist.all_reduce(x, group=self.group)
        return x


class VocabHead(nn.Module):
    """Logits of a part of the vocabulary, gathered from all ranks."""

    def __init__(self, inner: Linear | QuantLinear, vocab: int, group: Group) -> None:
        super().__init__()
        self.inner, self.vocab, self.group = inner, vocab, group

    def forward(self, x: Tensor) -> Tensor:
        return self.gather(self.inner(x))

    def gather(self, part: Tensor) -> Tensor:
        """[S, vocab / size] of each rank -> [S, vocab]; rows that only pad the vocabulary are cut off."""
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)[..., : self.vocab]


def shard(model: CausalLM, group: Group = None) -> None:
    """Keep this rank's part of a model that every rank has loaded whole. ConfigError where the shape cannot divide."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    config, trunk = model.trunk.config, model.trunk
    for name in ("num_kv_heads", "intermediate_size"):
        if getattr(config, name) % size:
            raise ConfigError(
                f"model.{name} is {getattr(config, name)}, which {size} processes do not divide",
                remedy=f"use a number of processes that divides {name}",
            )
    for block in trunk.layers:
        assert isinstance(block, Block)
        if not isinstance(block.mlp, GatedMLP):
            raise ConfigError("layers of experts cannot be sharded yet", remedy="run this model in one process")
        for layer in (block.attention.out, block.mlp.down):
            _check_columns(layer, size)
    for block in trunk.layers:
        assert isinstance(block, Block) and isinstance(block.mlp, GatedMLP)
        attention, mlp = block.attention, block.mlp
        attention.qkv = _rows(attention.qkv, _part(attention.qkv.out_features, rank, size))
        attention.out = RowLinear(_columns(attention.out, rank, size), group)  # type: ignore[assignment]
        middle = config.intermediate_size
        gate = _part(middle, rank, size)
        mlp.gate_up = _rows(mlp.gate_up, torch.cat((gate, gate + middle)))
        mlp.down = RowLinear(_columns(mlp.down, rank, size), group)  # type: ignore[assignment]
    model.head = VocabHead(_head(model, rank, size), config.vocab_size, group)  # type: ignore[assignment]
    trunk.embedding = VocabEmbedding(trunk.embedding.weight, group)  # type: ignore[assignment]
    trunk.config = config.with_(
        num_heads=config.num_heads // size,
        num_kv_heads=config.num_kv_heads // size,
        intermediate_size=config.intermediate_size // size,
        tie_embeddings=False,
    )


def _part(count: int, rank: int, size: int) -> Tensor:
    return torch.arange(count // size) + rank * (count // size)


def _padded(rows: Tensor, height: int) -> Tensor:
    return torch.cat((rows, rows.new_zeros(height - len(rows), rows.shape[1])))


def _rows(layer: Linear | QuantLinear, keep: Tensor) -> Any:
    """The layer with these outputs alone."""
    keep = keep.to(layer.weight.device if isinstance(layer, Linear) else layer.codes.device)
    tensors = {name: tensor.detach() for name, tensor in layer.state_dict().items()}
    return _rebuilt(layer, {name: part if name == "perm" else part[keep] for name, part in tensors.items()})


def _check_columns(layer: Linear | QuantLinear, size: int) -> None:
    """ConfigError where the inputs of a quantized layer do not divide."""
    if isinstance(layer, QuantLinear) and layer.perm is not None:
        raise ConfigError(
            "quantized inputs that stand in an order of their own do not divide over processes",
            remedy="quantize without that order, or use one process",
        )
    if isinstance(layer, QuantLinear) and not layer.form.fits(layer.in_features // size):
        group = layer.form.group or 8 // layer.form.bits
        raise ConfigError(
            f"{layer.in_features} inputs in groups of {group} do not divide over {size} processes",
            remedy="quantize with a smaller group, or use fewer processes",
        )


def _columns(layer: Linear | QuantLinear, rank: int, size: int) -> Any:
    """The layer with this rank's inputs alone; the bias stays whole."""
    tensors = {}
    for name, tensor in layer.state_dict().items():
        whole = name == "bias" or tensor.shape[1] == 1  # what belongs to whole rows
        tensors[name] = tensor if whole else tensor.chunk(size, dim=1)[rank].contiguous()
    return _rebuilt(layer, tensors)


def _rebuilt(layer: Linear | QuantLinear, tensors: dict[str, Tensor]) -> Linear | QuantLinear:
    """A layer of the same kind around smaller tensors."""
    bias = "bias" in tensors
    if isinstance(layer, Linear):
        outputs, inputs = tensors["weight"].shape
        with torch.device("meta"):
            smaller: Linear | QuantLinear = Linear(inputs, outputs, bias=bias)
    else:
        outputs, inputs = tensors["codes"].shape
        with torch.device("meta"):
            smaller = QuantLinear(inputs * (2 if layer.form.bits == 4 else 1), outputs, form=layer.form, bias=bias)
    smaller.load_state_dict(tensors, assign=True)
    return smaller.requires_grad_(False)


def _head(model: CausalLM, rank: int, size: int) -> Linear | QuantLinear:
    """This rank's rows of the head, of the embedding where they are tied; the last rank's are padded."""
    vocab = model.trunk.config.vocab_size
    height = -(-vocab // size)
    keep = torch.arange(rank * height, (rank + 1) * height).clamp(max=vocab - 1)
    if model.head is not None:
        head: Linear | QuantLinear = _rows(model.head, keep)
        return head
    weight = model.trunk.embedding.weight.detach()
    tied = Linear(weight.shape[1], height).requires_grad_(False)
    tied.weight = nn.Parameter(weight[keep.to(weight.device)], requires_grad=False)
    return tied


class Leader(Runner):
    """The runner of rank 0: announces each step to the ranks that follow, then runs its own part."""

    def __init__(self, model: CausalLM, cache: KVCache, group: Group = None) -> None:
        super().__init__(model, cache)
        self.group = group

    def run(self, spans: Sequence[Span], feed: Tensor | None = None) -> Output:
        assert feed is None, "steps overlap on one process only"
        assert not any(span.hidden or span.adapter for span in spans), "ranks share neither states nor adapters"
        _announce(_packed(spans), self.group, self.device)
        return super().run(spans)

    def end(self) -> None:
        """Let the others go; nothing may be run after it."""
        _announce([], self.group, self.device)


def follow(model: CausalLM, cache: KVCache, group: Group = None) -> int:
    """Run the steps that rank 0 announces, until it ends; returns how many there were."""
    runner, steps = Runner(model, cache), 0
    while spans := _heard(group, runner.device):
        runner.run(spans)
        steps += 1
    return steps


def _packed(spans: Sequence[Span]) -> list[int]:
    """Spans as one list of numbers: context, wanted rows, two lengths, then tokens and blocks."""
    numbers: list[int] = []
    for span in spans:
        numbers += [span.context, span.rows, len(span.tokens), len(span.blocks), *span.tokens, *span.blocks]
    return numbers


def _first(group: Group) -> int:
    """The global rank of the group's rank 0."""
    return 0 if group is None else dist.get_global_rank(group, 0)


def _announce(numbers: list[int], group: Group, device: torch.device) -> None:
    source = _first(group)
    dist.broadcast(torch.tensor([len(numbers)], device=device), source, group=group)
    if numbers:
        dist.broadcast(torch.tensor(numbers, device=device), source, group=group)


def _heard(group: Group, device: torch.device) -> list[Span]:
    source = _first(group)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    dist.broadcast(count, source, group=group)
    numbers = torch.zeros(int(count), dtype=torch.int64, device=device)
    if not len(numbers):
        return []
    dist.broadcast(numbers, source, group=group)
    flat, spans, at = numbers.tolist(), [], 0
    while at < len(flat):
        context, rows, length, blocks = flat[at : at + 4]
        middle = at + 4 + length
        at, tokens = middle + blocks, tuple(flat[at + 4 : middle])
        spans.append(Span(tokens, context, tuple(flat[middle:at]), rows))
    return spans
