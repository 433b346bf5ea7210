"""`NativeStep`: one model over one cache, run by the native library (`native.py` builds and describes it).

    step = NativeStep.make(model, cache)      # None where the torch modules must do it
    logits_RV, best_R = step.run([Span(tokens, context, blocks, rows)])

D hidden, H head_dim, T tokens of a step, R rows of logits, V vocabulary.
"""

from __future__ import annotations

import ctypes
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from puyu.engine import native
from puyu.engine.packed_weights import KINDS, UNITS, Packed, Room, head_of, pointer
from puyu.model.attention import Attention
from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM
from puyu.model.layers import GatedMLP, RMSNorm
from puyu.model.linear import Linear, QuantLinear
from puyu.model.paged import KVCache
from puyu.model.transformer import Block

MAX_BATCH = 8
"""Rows of a dense model, beyond which torch's products catch up with one dot product after another."""

_STORAGES = {"int8": 2, "int4": 3}


class Span(Protocol):
    """What the runner wants computed (`runner.Span`)."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def context(self) -> int: ...
    @property
    def blocks(self) -> Sequence[int]: ...
    @property
    def rows(self) -> int: ...


class NativeStep:
    """Runs steps of one model over one cache; `make` says whether it can."""

    def __init__(
        self,
        library: ctypes.CDLL,
        model: CausalLM,
        cache: KVCache,
        *,
        invariant: bool = False,
        num_ids: int | None = None,
    ) -> None:
        self.model, self.cache, self._library = model, cache, library
        config = model.config
        self._shape = native.Shape(
            *(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim),
            *(config.intermediate_size, config.vocab_size, config.num_layers),
            *(cache.block_size, cache.num_slots, 1, int(invariant)),
            *(KINDS[model.trunk.embedding.weight.dtype], _cache_kind(cache), config.norm_eps),
        )
        self._packed: dict[int, Packed] = {}
        self._head: Packed | None = None
        self._pack([(name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantLinear)])
        self._layers = (native.Layer * config.num_layers)()
        self._parameters = list(model.parameters())
        self._places: list[int] = []
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._measured = (0, 0, 0)
        self._angles: tuple[float, ModelConfig, Tensor, Tensor] | None = None
        self._call = native.Call(num_ids=min(num_ids or config.vocab_size, config.vocab_size))

    @staticmethod
    def make(
        model: CausalLM, cache: KVCache, *, invariant: bool = False, num_ids: int | None = None
    ) -> NativeStep | None:
        """None where the torch modules must do it. `num_ids`: the ids that may be the best one of a row."""
        library = native.load()
        if library is None or cache.device.type != "cpu" or _cache_kind(cache) is None or not _is_known(model, cache):
            return None
        return NativeStep(library, model, cache, invariant=invariant, num_ids=num_ids)

    def _pack(self, layers: list[tuple[str, QuantLinear]]) -> None:
        """Pack all quantized layers, which then keep no codes of their own, and the head beside them."""
        if not layers:
            return
        head = self._quantized_head()
        room = Room(sum(Packed.size(layer) for layer in [*(layer for _, layer in layers), *filter(None, [head])]))
        for name, layer in layers:
            packed = self._packed[id(layer)] = Packed(self._library, layer, room, gated=name.endswith("gate_up"))
            layer.lend(packed.codes)
        self._head = None if head is None else Packed(self._library, head, room)
        del head
        self._library.puyu_give_back()

    def release(self) -> None:
        """Give the packed weights back; the step is not to be used any more."""
        self._packed, self._head = {}, None

    def suits(self, num_tokens: int, longest: int) -> bool:
        """Whether this way is the faster one: always for quantized weights, else for a few sequences that decode."""
        return bool(self._packed) or (longest == 1 and num_tokens <= MAX_BATCH)

    def run(self, spans: Sequence[Span]) -> tuple[Tensor, list[int]]:
        """Logits [R, V] after the wanted rows of each span, and the id of the largest one of each row, -1 where a row
        is not finite. Keys and values of all tokens are written to the cache."""
        call = self._call
        plan, longest = array("q"), 0
        call.num_tokens = call.num_rows = 0
        for span in spans:
            tokens, context, blocks, rows = span.tokens, span.context, span.blocks, span.rows
            assert min(tokens) >= 0 and max(tokens) < self._shape.vocab, "a token id outside the vocabulary"
            plan.extend((len(tokens), context, rows, len(blocks), *tokens, *blocks))
            call.num_tokens += len(tokens)
            call.num_rows += rows
            longest = max(longest, context + len(tokens))
        call.num_sequences, call.plan = len(spans), plan.buffer_info()[0]
        best = array("q", bytes(8 * call.num_rows))
        logits_RV = torch.empty(call.num_rows, self._shape.vocab)
        call.logits, call.best = logits_RV.data_ptr(), best.buffer_info()[0]
        self._shape.threads = torch.get_num_threads()
        self._make_room(call.num_tokens, longest)
        self._rotate(longest)
        self._fill_layers()
        call.cache, call.sides = self.cache.rows.data_ptr(), pointer(self.cache.sides)
        self._library.puyu_step(ctypes.byref(self._shape), self._layers, ctypes.byref(call))
        return logits_RV, best.tolist()

    def _make_room(self, tokens: int, longest: int) -> None:
        """Scratch for the step; enough for the next few tokens, too, so that a sequence that grows asks seldom."""
        wanted = (tokens, -(-longest // 256) * 256, self._shape.threads)
        if wanted == self._measured:
            return
        size = self._library.puyu_scratch_bytes(ctypes.byref(self._shape), *wanted[:2])
        if self._scratch.numel() < size + 64:
            self._scratch = torch.empty(size + size // 4 + 64, dtype=torch.uint8)
        self._measured = wanted
        self._call.scratch = self._scratch.data_ptr() + -self._scratch.data_ptr() % 64

    def _fill_layers(self) -> None:
        """Where the weights are now; they seldom move."""
        places = [parameter.data_ptr() for parameter in self._parameters]
        if places == self._places:
            return
        self._places = places
        trunk = self.model.trunk
        self._call.embedding, self._call.norm = trunk.embedding.weight.data_ptr(), trunk.norm.weight.data_ptr()
        self._call.head = self._head_matrix()
        for place, block in zip(self._layers, self.model.trunk.layers, strict=True):
            assert isinstance(block, Block) and isinstance(block.mlp, GatedMLP)
            attention, mlp = block.attention, block.mlp
            place.window = attention.window
            if attention.q_norm is not None and attention.k_norm is not None:
                place.query_norm = attention.q_norm.weight.data_ptr()
                place.key_norm = attention.k_norm.weight.data_ptr()
            place.attention_norm = block.attention_norm.weight.data_ptr()
            place.mlp_norm = block.mlp_norm.weight.data_ptr()
            place.qkv, place.attention_out = self._matrix(attention.qkv), self._matrix(attention.out)
            place.gate_up, place.down = self._matrix(mlp.gate_up), self._matrix(mlp.down)

    def _quantized_head(self) -> QuantLinear | None:
        """The head of a quantized model; None where it is quantized already, or its size fills no vectors."""
        head = self.model.trunk.embedding.weight if self.model.head is None else self.model.head.weight
        if isinstance(self.model.head, QuantLinear) or head.shape[1] % UNITS[-1]:
            return None
        layer = head_of(self._library, head)
        return layer if Packed.fits(layer) else None

    def _head_matrix(self) -> native.Matrix:
        if self._head is not None:
            return self._head.matrix
        if self.model.head is None:
            return _dense(self.model.trunk.embedding.weight, None)
        return self._matrix(self.model.head)

    def _matrix(self, layer: nn.Module) -> native.Matrix:
        if isinstance(layer, QuantLinear):
            return self._packed[id(layer)].matrix
        assert isinstance(layer, Linear)
        return _dense(layer.weight, layer.bias)

    def _rotate(self, longest: int) -> None:
        """cos and sin of all positions so far, [positions, H], made again when the base changes."""
        trunk, angles = self.model.trunk, self._angles
        theta, config = trunk.rope_theta, trunk.config
        if angles is None or angles[0] != theta or angles[1] is not config or len(angles[2]) < longest:
            turn = trunk.rotation(torch.arange(max(2 * longest, 256)), torch.float32)
            cos, sin = turn.cos.flatten(1).contiguous(), turn.sin.flatten(1).contiguous()
            self._angles = (theta, config, cos, sin)
            self._call.cos, self._call.sin = cos.data_ptr(), sin.data_ptr()


def _dense(weight: Tensor, bias: Tensor | None) -> native.Matrix:
    out, inputs = weight.shape
    return native.Matrix(KINDS[weight.dtype], inputs, out, 0, 0, weight.data_ptr(), None, None, pointer(bias), None)


def _cache_kind(cache: KVCache) -> int | None:
    """What the rows of a cache are made of, as common.h calls it."""
    return KINDS.get(cache.rows.dtype) if cache.storage == "auto" else _STORAGES[cache.storage]


def _is_known(model: CausalLM, cache: KVCache) -> bool:
    """Whether the model is made of exactly the layers that step.cpp knows, in types that it reads."""
    leaves = Counter(type(module) for module in model.modules() if not list(module.children()))
    products = leaves.pop(Linear, 0) + leaves.pop(QuantLinear, 0)
    layers = model.config.num_layers
    norms = (4 if model.config.row.qk_norm is not None else 2) * layers + 1
    known = products == 4 * layers + (model.head is not None) and leaves == {RMSNorm: norms, nn.Embedding: 1}
    known = known and all(_is_known_block(block) for block in model.trunk.layers)
    types = {parameter.dtype for parameter in model.parameters()}
    floats = len(types) == 1 and types <= KINDS.keys() and all(p.is_contiguous() for p in model.parameters())
    quantized = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    fits = all(Packed.fits(module, gated=name.endswith("gate_up")) for name, module in quantized)
    mixed = bool(quantized) or cache.storage != "auto"
    return known and floats and fits and (mixed or types == {cache.rows.dtype})


def _is_known_block(block: nn.Module) -> bool:
    """No experts."""
    return type(block) is Block and type(block.mlp) is GatedMLP and type(block.attention) is Attention
