"""The GPU's way through a step: the kernels of `kernels/` in place of the torch modules, decodes as CUDA graphs.

Same weights, same cache, same numbers within rounding (tested in Triton's interpreter). A step of decodes alone is
captured once for each batch size of `BUCKETS` and replayed over static inputs; rows that fill up a bucket have length
0, write nothing and are cut off. Steps with prompts run as they come. What the kernels do not know (other layers,
dtypes, no Triton) the torch modules do: `make` then gives None.

    step = GpuStep.make(model, cache)
    logits_SV = step.run(spans)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from puyu.engine.kernels.attention import (
    Pages,
    Tiles,
    decode_attention,
    prefill_attention,
    tile_arrays,
    tile_height,
)
from puyu.engine.kernels.fp8 import Fp8Linear
from puyu.engine.kernels.launch import DTYPES, can_launch, upload
from puyu.engine.kernels.matmul import Around, Weight, project
from puyu.engine.kernels.rope import Angles, Places, rope_and_cache
from puyu.engine.parallel import RowLinear, VocabEmbedding, VocabHead
from puyu.model.attention import Attention
from puyu.model.heads import CausalLM
from puyu.model.layers import GatedMLP, RMSNorm
from puyu.model.linear import Linear, QuantLinear
from puyu.model.paged import KVCache
from puyu.model.rope import RopeScaling
from puyu.model.transformer import Block

if TYPE_CHECKING:
    from puyu.engine.runner import Span

BUCKETS = (1, 2, 4, 8, *range(16, 257, 8))
"""Batch sizes that have a graph; a larger batch of decodes runs as it comes."""


Rope = tuple[float, RopeScaling | None]


class Batch(NamedTuple):
    """The tensors of one step. Sequences of one token come first, `num_decodes` of them."""

    tokens_T: Tensor
    places: Places
    pages: Pages
    num_decodes: int
    tiles: Tiles | None
    sampled_S: Tensor | None
    """Rows whose logits are wanted; None for all."""


class _Layer(NamedTuple):
    attention_norm: Tensor
    qkv: Weight
    out: Weight
    mlp_norm: Tensor
    gate_up: Weight
    down: Weight


class GpuStep:
    """Runs steps of one model over one cache; `make` says whether it can."""

    def __init__(self, model: CausalLM, cache: KVCache) -> None:
        self.model, self.cache, self.device = model, cache, cache.device
        self._layers: list[_Layer] = []
        self._head: Weight | None = None
        self._rows = [module for module in model.modules() if isinstance(module, RowLinear)]
        self._leads = not self._rows or dist.get_rank(self._rows[0].group) == 0
        self._width = -(-min(model.config.max_positions, cache.num_slots) // cache.block_size)
        self._angles: tuple[Rope, Angles] | None = None
        self._graphs: dict[int, _Graph] = {}
        self._read()

    @staticmethod
    def make(model: CausalLM, cache: KVCache) -> GpuStep | None:
        """None where the torch modules must do it."""
        if not can_launch(cache.device) or cache.rows.dtype not in DTYPES:
            return None
        return GpuStep(model, cache) if _is_known(model, cache.rows.dtype) else None

    def _read(self) -> None:
        head = self.model.head.inner if isinstance(self.model.head, VocabHead) else self.model.head
        self._layers = [_layer(block) for block in self.model.trunk.layers]
        self._head = Weight(self.model.trunk.embedding.weight) if head is None else Weight.of(head)  # type: ignore[arg-type]

    def renew(self) -> bool:
        """Take over weights that have changed; whether the kernels know them. Graphs stay where nothing has moved."""
        known = _is_known(self.model, self.cache.rows.dtype)
        if known:
            self._read()
        return known

    def release(self) -> None:
        """Give back graphs and all that was made of the weights; nothing may be run before `renew`."""
        self._layers, self._head, self._angles = [], None, None
        self._graphs.clear()

    @torch.inference_mode()
    def run(self, spans: Sequence[Span], feed: Tensor | None = None) -> Tensor:
        """Logits [S, V] of the wanted rows; valid until the next run.

        A token below 0 stands for a result that is still on the device: -1 for the first of `feed`, -2 for the second.
        """
        size = next((size for size in BUCKETS if size >= len(spans)), None)
        if self.device.type == "cuda" and size is not None and all(len(span.tokens) == 1 for span in spans):
            logits_BV = self._graph(size).replay(spans, feed)
            wanted = [span.rows > 0 for span in spans]
            return logits_BV if all(wanted) else logits_BV[torch.tensor(wanted, device=self.device)]
        return self.forward(self._batch(spans, feed))

    def forward(self, batch: Batch) -> Tensor:
        """All layers, then logits."""
        trunk, eps = self.model.trunk, self.model.config.norm_eps
        assert self._head is not None, "a step whose weights were given back"
        x_TD = trunk.embedding(batch.tokens_T).to(self.cache.rows.dtype)
        for layer, rows in zip(self._layers, self.cache.rows, strict=True):
            x_TD = self._block(layer, rows, x_TD, batch)
        if batch.sampled_S is not None:
            x_TD = x_TD[batch.sampled_S]
        logits_SV = project(x_TD, self._head, Around(trunk.norm.weight, eps))
        return self.model.head.gather(logits_SV) if isinstance(self.model.head, VocabHead) else logits_SV

    def _block(self, layer: _Layer, rows: Tensor, x_TD: Tensor, batch: Batch) -> Tensor:
        eps, heads = self.model.config.norm_eps, self.cache.num_kv_heads
        qkv = project(x_TD, layer.qkv, Around(layer.attention_norm, eps))
        q_TNH = rope_and_cache(qkv, rows, self.angles(), batch.places, num_kv_heads=heads)
        o_TNH = self._attend(q_TNH, rows, batch)
        x_TD = self._join(o_TNH.flatten(1), layer.out, x_TD)
        middle = project(x_TD, layer.gate_up, Around(layer.mlp_norm, eps, gated=True))
        return self._join(middle, layer.down, x_TD)

    def _attend(self, q_TNH: Tensor, rows: Tensor, batch: Batch) -> Tensor:
        heads, count = self.cache.num_kv_heads, batch.num_decodes
        if batch.tiles is None:
            return decode_attention(q_TNH, rows, batch.pages, num_kv_heads=heads)
        o_TNH = prefill_attention(q_TNH, rows, batch.pages, batch.tiles, num_kv_heads=heads)
        if count:
            o_TNH[:count] = decode_attention(q_TNH[:count], rows, batch.pages, num_kv_heads=heads)
        return o_TNH

    def _join(self, x: Tensor, weight: Weight, residual_TD: Tensor) -> Tensor:
        """residual + x W^T; where inputs are divided, one rank adds residual and bias and all sum."""
        if not self._rows:
            return project(x, weight, Around(residual_MN=residual_TD))
        part = project(x, weight, Around(residual_MN=residual_TD if self._leads else None))
        dist.all_reduce(part, group=self._rows[0].group)
        return part

    def angles(self) -> Angles:
        """cos and sin of every position that a sequence can reach, made again when the base changes."""
        trunk, rope = self.model.trunk, self.rope
        if self._angles is None or self._angles[0] != rope:
            positions = torch.arange(self._width * self.cache.block_size, device=self.device)
            half = self.cache.rows.shape[-1] // 2
            turn = trunk.rotation(positions, self.cache.rows.dtype)
            self._angles = (rope, Angles(*(x.flatten(1)[:, :half].contiguous() for x in turn)))
        return self._angles[1]

    @property
    def rope(self) -> Rope:
        """What angles depend on, as it is now."""
        return self.model.trunk.rope_theta, self.model.trunk.config.scaling

    def _batch(self, spans: Sequence[Span], feed: Tensor | None) -> Batch:
        """Everything in one upload."""
        cache, lengths = self.cache, [len(span.tokens) for span in spans]
        count = next((row for row, length in enumerate(lengths) if length > 1), len(spans))
        starts = np.cumsum([0, *lengths])
        group = self.model.config.queries_per_kv
        height = tile_height(group, cache.rows.shape[-1], cache.rows.dtype)
        prompts = [(row, int(starts[row]), lengths[row], spans[row].context) for row in range(count, len(spans))]
        wanted = zip(starts[1:], spans, strict=True)
        last = np.array([row for end, span in wanted for row in range(end - span.rows, end)], dtype=np.int64)
        tables = _tables(spans, len(spans))
        arrays = [*_token_arrays(spans, cache.block_size), *_length_arrays(spans), tables, last]
        uploaded = upload([*arrays, *tile_arrays(prompts, height)], self.device)
        tokens_T, positions_T, slots_T, lengths_B, tables_BW, sampled_S, *tiles = uploaded
        sequences, tile_starts, ends, at = tiles
        return Batch(
            _fed(tokens_T, feed),
            Places(positions_T, slots_T),
            Pages(tables_BW, lengths_B, cache.block_size),
            count,
            Tiles(sequences, tile_starts, ends, at, height) if prompts else None,
            None if len(last) == len(tokens_T) else sampled_S,
        )

    def _graph(self, size: int) -> _Graph:
        """The graph of one batch size, captured on first use, and again when weights or the cache have moved."""
        key = (self.rope, *(tensor.data_ptr() for tensor in self._tensors()))
        graph = self._graphs.get(size)
        if graph is None or graph.key != key:
            pool = next((other.graph.pool() for other in self._graphs.values()), None)
            graph = self._graphs[size] = _Graph(self, size, key, pool)
        return graph

    def _tensors(self) -> Iterator[Tensor]:
        yield self.cache.rows
        yield self.model.trunk.norm.weight
        for layer in self._layers:
            yield layer.attention_norm
            yield layer.mlp_norm
            for weight in (layer.qkv, layer.out, layer.gate_up, layer.down):
                yield from weight.tensors()
        assert self._head is not None, "a step whose weights were given back"
        yield from self._head.tensors()

    @property
    def width(self) -> int:
        """Blocks in the longest table."""
        return self._width


class _Graph:
    """One captured step of `size` decodes over static inputs."""

    def __init__(self, step: GpuStep, size: int, key: tuple[object, ...], pool: Any) -> None:
        self.key, self.step, self.size = key, step, size
        device = step.device
        self.ids_4B = torch.zeros(4, size, dtype=torch.int32, device=device)  # tokens, positions, slots, lengths
        self.ids_4B[2] = -1
        self.tables_BW = torch.zeros(size, step.width, dtype=torch.int32, device=device)
        tokens, positions, slots, lengths = self.ids_4B
        pages = Pages(self.tables_BW, lengths, step.cache.block_size)
        batch = Batch(tokens, Places(positions, slots), pages, size, None, None)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            step.forward(batch)  # compiles what is not compiled yet, which no capture may do
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # other threads of a server may use the device meanwhile
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.logits_BV = step.forward(batch)

    def replay(self, spans: Sequence[Span], feed: Tensor | None) -> Tensor:
        rows = len(spans)
        ids = np.zeros((4, self.size), dtype=np.int64)
        ids[2] = -1
        ids[:3, :rows] = _token_arrays(spans, self.step.cache.block_size)
        ids[3, :rows] = _length_arrays(spans)[0]
        ids_4B, tables_BW = upload([ids, _tables(spans, rows)], self.step.device)
        self.ids_4B.copy_(ids_4B)
        if feed is not None:
            self.ids_4B[0].copy_(_fed(ids_4B[0], feed))
        self.tables_BW[:rows, : tables_BW.shape[1]].copy_(tables_BW)
        self.graph.replay()
        return self.logits_BV[:rows]


def _fed(tokens_T: Tensor, feed: Tensor | None) -> Tensor:
    """Put results of the last step, still on the device, where a token is below 0."""
    if feed is None:
        return tokens_T
    known = feed.to(torch.int32)[(-1 - tokens_T).clamp(min=0).long()]
    return torch.where(tokens_T < 0, known, tokens_T)


def _token_arrays(spans: Sequence[Span], block_size: int) -> list[np.ndarray]:
    """Tokens, positions and slots of all tokens of the step."""
    tokens = np.array([token for span in spans for token in span.tokens])
    positions = [np.arange(span.context, span.context + len(span.tokens)) for span in spans]
    slots = [
        np.asarray(span.blocks)[at // block_size] * block_size + at % block_size
        for span, at in zip(spans, positions, strict=True)
    ]
    return [tokens, np.concatenate(positions), np.concatenate(slots)]


def _length_arrays(spans: Sequence[Span]) -> list[np.ndarray]:
    return [np.array([span.context + len(span.tokens) for span in spans])]


def _tables(spans: Sequence[Span], rows: int) -> np.ndarray:
    """Block tables, filled up with block 0, which nobody reads."""
    tables = np.zeros((rows, max(len(span.blocks) for span in spans)), dtype=np.int64)
    for row, span in enumerate(spans):
        tables[row, : len(span.blocks)] = span.blocks
    return tables


def _layer(block: nn.Module) -> _Layer:
    assert isinstance(block, Block) and isinstance(block.mlp, GatedMLP)
    attention, mlp = block.attention, block.mlp
    out, down = (_whole(layer) for layer in (attention.out, mlp.down))
    qkv, gate_up = Weight.of(attention.qkv), Weight.of(mlp.gate_up)
    return _Layer(block.attention_norm.weight, qkv, out, block.mlp_norm.weight, gate_up, down)


def _whole(layer: nn.Module) -> Weight:
    """A weight whose inputs may be divided; its bias then belongs to rank 0."""
    if not isinstance(layer, RowLinear):
        assert isinstance(layer, Linear | QuantLinear | Fp8Linear)
        return Weight.of(layer)
    inner = Weight.of(layer.inner)
    bias = layer.bias if dist.get_rank(layer.group) == 0 else None
    return replace(inner, bias=bias)


def _is_known(model: CausalLM, dtype: torch.dtype) -> bool:
    """Whether the model is made of exactly the layers that the kernels know, all weights in the cache's dtype."""
    leaves = Counter(type(module) for module in model.modules() if not list(module.children()))
    layers = model.config.num_layers
    products = sum(leaves.pop(kind, 0) for kind in (Linear, QuantLinear, Fp8Linear))
    embeddings = leaves.pop(nn.Embedding, 0) + leaves.pop(VocabEmbedding, 0)
    return (
        products == 4 * layers + (model.head is not None)
        and embeddings == 1
        and leaves == {RMSNorm: 2 * layers + 1}
        and all(_is_known_block(block) for block in model.trunk.layers)
        and all(Weight.knows(layer) for layer in model.modules() if isinstance(layer, QuantLinear))
        and model.trunk.compute_dtype in (None, dtype)
        and all(parameter.dtype == dtype and parameter.is_contiguous() for parameter in model.parameters())
    )


def _is_known_block(block: nn.Module) -> bool:
    """No experts, windows, norms of heads or bias in the gate."""
    if type(block) is not Block or type(block.mlp) is not GatedMLP or type(block.attention) is not Attention:
        return False
    attention = block.attention
    return not attention.window and attention.q_norm is None and block.mlp.gate_up.bias is None
