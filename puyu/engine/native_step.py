"""`NativeStep`: one model over one cache, run by the native library (`native.py` builds and describes it).

    step = NativeStep.make(model, cache)      # None where the torch modules must do it
    logits_RV = step.run([Span(tokens, context, blocks, rows)])

D hidden, H head_dim, T tokens of a step, R rows of logits, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from puyu.engine import native
from puyu.model.attention import Attention
from puyu.model.heads import CausalLM
from puyu.model.layers import GatedMLP, RMSNorm
from puyu.model.linear import Linear, QuantLinear, QuantWeight
from puyu.model.paged import KVCache
from puyu.model.rope import RopeScaling
from puyu.model.transformer import Block

MAX_BATCH = 8
"""Rows of a dense model, beyond which torch's products catch up with one dot product after another."""
WIDTH = 32
"""Outputs of a pair of panels."""
HEAD_ROWS = 512
"""Rows of a head that are rounded at a time, so that what stands between stays in the cache."""
UNITS = (64, 32, 16)
"""Inputs that may share a scale of the activations; the largest that divides a layer's group."""

_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_INT8, _INT4 = 2, 3


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


class Packed:
    """One matrix in pairs of panels, with what must stay alive while the library reads it."""

    def __init__(self, library: ctypes.CDLL, layer: QuantLinear, *, gated: bool = False) -> None:
        self._library, self._gated = library, gated
        form, out, inputs = layer.form, layer.out_features, layer.in_features
        four, group = form.bits == 4, form.group or layer.in_features
        groups, outputs = inputs // group, -(-out // WIDTH) * WIDTH
        codes, scales, zeros = layer.matrix().codes.contiguous(), layer.scales.half().contiguous(), _offsets(layer)
        self.data = torch.empty(outputs * inputs // (2 if four else 1) + 64, dtype=torch.uint8)
        self.scales = torch.empty(outputs * groups, dtype=torch.float16)
        self.zeros = None if zeros is None else torch.empty_like(self.scales)
        self.bias = None if layer.bias is None else layer.bias.detach().float()
        self.order = None if layer.perm is None else layer.perm.contiguous()
        start = -self.data.data_ptr() % 64  # whole vectors do not straddle cache lines
        job = native.Pack(
            *(int(four), int(gated), out, inputs, groups, codes.data_ptr(), scales.data_ptr(), _pointer(zeros)),
            *(self.data.data_ptr() + start, self.scales.data_ptr(), _pointer(self.zeros)),
        )
        library.puyu_pack(ctypes.byref(job))
        unit = next(unit for unit in UNITS if group % unit == 0)
        self.matrix = native.Matrix(
            *(_INT4 if four else _INT8, inputs, out, group, unit, self.data.data_ptr() + start),
            *(self.scales.data_ptr(), _pointer(self.zeros), _pointer(self.bias), _pointer(self.order)),
        )

    def codes(self) -> Tensor:
        """The codes as the layer had them, unpacked."""
        four = self.matrix.kind == _INT4
        out, inputs = self.matrix.outputs, self.matrix.inputs
        codes = torch.empty(out, inputs // 2 if four else inputs, dtype=torch.uint8 if four else torch.int8)
        job = native.Pack(four, self._gated, out, inputs, 0, codes.data_ptr(), None, None, self.matrix.data, None, None)
        self._library.puyu_unpack(ctypes.byref(job))
        return codes

    def __deepcopy__(self, memo: object) -> Packed:
        """Never changes, so copies of a model share it."""
        return self

    @staticmethod
    def fits(layer: QuantLinear, *, gated: bool = False) -> bool:
        """Whether the layer's sizes fill vectors, and its scales are half floats."""
        group = layer.form.group or layer.in_features
        whole = group % UNITS[-1] == 0 and (not gated or layer.out_features % WIDTH == 0)
        asymmetric = layer.form.bits == 8 and layer.zeros is not None
        largest = layer.scales.abs().max().item()
        return whole and not asymmetric and (largest == 0 or 1e-5 < largest < 6e3)


def _offsets(layer: QuantLinear) -> Tensor | None:
    """What a group's weights are beside (code - 8) * scale, as half floats; None where that is nothing."""
    if layer.zeros is None:
        return None
    return ((8 - layer.zeros).float() * layer.scales.float()).half().contiguous()


def head_of(weight: Tensor) -> QuantLinear:
    """A language head as int8 with one scale a row: a quantized model reads it for every token."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), 1, dtype=torch.float16)
    for at in range(0, len(weight), HEAD_ROWS):
        wide = weight[at : at + HEAD_ROWS].detach().float()
        scale = (wide.abs().amax(dim=1, keepdim=True) / 127).half()
        steps = (wide / torch.where(scale > 0, scale, 1.0).float()).round_().clamp_(-127, 127)
        codes[at : at + HEAD_ROWS], scales[at : at + HEAD_ROWS] = steps, scale
    return QuantLinear.of(QuantWeight(codes, scales, bits=8))


class NativeStep:
    """Runs steps of one model over one cache; `make` says whether it can."""

    def __init__(self, library: ctypes.CDLL, model: CausalLM, cache: KVCache, *, invariant: bool = False) -> None:
        self.model, self.cache, self._library = model, cache, library
        config = model.config
        self._shape = native.Shape(
            *(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim),
            *(config.intermediate_size, config.vocab_size, config.num_layers),
            *(cache.block_size, cache.num_slots, 1, int(invariant)),
            *(_KINDS[model.trunk.embedding.weight.dtype], _KINDS[cache.rows.dtype], config.norm_eps),
        )
        self._packed: dict[int, Packed] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, QuantLinear):
                packed = self._packed[id(layer)] = Packed(library, layer, gated=name.endswith("gate_up"))
                layer.lend(packed.codes)  # one copy of the weights is enough
        self._head = self._packed_head() if self._packed else None
        self._layers = (native.Layer * config.num_layers)()
        self._parameters = list(model.parameters())
        self._places: list[int] = []
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._angles: tuple[tuple[float, RopeScaling | None], Tensor, Tensor] | None = None

    @staticmethod
    def make(model: CausalLM, cache: KVCache, *, invariant: bool = False) -> NativeStep | None:
        """None where the torch modules must do it."""
        library = native.load()
        if library is None or cache.device.type != "cpu" or cache.rows.dtype not in _KINDS:
            return None
        return NativeStep(library, model, cache, invariant=invariant) if _is_known(model, cache.rows.dtype) else None

    def release(self) -> None:
        """Give the packed weights back; the step is not to be used any more."""
        self._packed, self._head = {}, None

    def suits(self, num_tokens: int, longest: int) -> bool:
        """Whether this way is the faster one: always for quantized weights, else for a few sequences that decode."""
        return bool(self._packed) or (longest == 1 and num_tokens <= MAX_BATCH)

    def run(self, spans: Sequence[Span]) -> Tensor:
        """Logits [R, V] after the wanted rows of each span; keys and values of all tokens are written to the cache."""
        lengths = [len(span.tokens) for span in spans]
        contexts = [span.context for span in spans]
        longest = max(context + length for context, length in zip(contexts, lengths, strict=True))
        tokens_T = np.array([token for span in spans for token in span.tokens], dtype=np.int64)
        assert tokens_T.min() >= 0 and tokens_T.max() < self._shape.vocab, "a token id outside the vocabulary"
        tables = [np.array(span.blocks, dtype=np.int64) for span in spans]
        if len(tokens_T) == len(spans):
            positions_T = np.array(contexts, dtype=np.int64)
            slots_T = np.array([self._slot(span) for span in spans], dtype=np.int64)
        else:
            positions_T = np.concatenate([np.arange(c, c + n) for c, n in zip(contexts, lengths, strict=True)])
            slots_T = np.concatenate([self._slots(*item) for item in zip(tables, contexts, lengths, strict=True)])
        ends = np.cumsum(lengths)
        wanted = [row for end, span in zip(ends.tolist(), spans, strict=True) for row in range(end - span.rows, end)]
        rows_R = np.array(wanted, dtype=np.int64)
        sequences = (native.Span * len(spans))(
            *(
                native.Span(end - length, length, context, table.ctypes.data)
                for end, length, context, table in zip(ends.tolist(), lengths, contexts, tables, strict=True)
            )
        )
        logits_RV = torch.empty(len(rows_R), self._shape.vocab)
        self._shape.threads = torch.get_num_threads()
        scratch = self._room(len(tokens_T), longest)
        cos, sin = self._rotation(longest)
        self._fill_layers()
        trunk = self.model.trunk
        embedding = trunk.embedding.weight
        step = native.Step(
            *(len(tokens_T), len(spans), len(rows_R)),
            *(array.ctypes.data for array in (tokens_T, positions_T, slots_T, rows_R)),
            *(ctypes.addressof(sequences), cos.data_ptr(), sin.data_ptr()),
            *(embedding.data_ptr(), trunk.norm.weight.data_ptr()),
            self._head_matrix(),
            *(self.cache.rows.data_ptr(), scratch, logits_RV.data_ptr()),
        )
        self._library.puyu_step(ctypes.byref(self._shape), self._layers, ctypes.byref(step))
        return logits_RV

    def _slot(self, span: Span) -> int:
        """Where a single token goes."""
        block, offset = divmod(span.context, self.cache.block_size)
        return span.blocks[block] * self.cache.block_size + offset

    def _slots(self, table: np.ndarray, context: int, length: int) -> np.ndarray:
        places, size = np.arange(context, context + length), self.cache.block_size
        return table[places // size] * size + places % size

    def _room(self, tokens: int, longest: int) -> int:
        size = self._library.puyu_scratch_bytes(ctypes.byref(self._shape), tokens, longest)
        if self._scratch.numel() < size + 64:
            self._scratch = torch.empty(size + size // 4 + 64, dtype=torch.uint8)
        return self._scratch.data_ptr() + -self._scratch.data_ptr() % 64

    def _fill_layers(self) -> None:
        """Where the weights are now; they seldom move."""
        places = [parameter.data_ptr() for parameter in self._parameters]
        if places == self._places:
            return
        self._places = places
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

    def _packed_head(self) -> Packed | None:
        """The head of a quantized model; None where it is quantized already, or its size fills no vectors."""
        head = self.model.trunk.embedding.weight if self.model.head is None else self.model.head.weight
        if isinstance(self.model.head, QuantLinear) or head.shape[1] % UNITS[-1]:
            return None
        layer = head_of(head)
        return Packed(self._library, layer) if Packed.fits(layer) else None

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

    def _rotation(self, longest: int) -> tuple[Tensor, Tensor]:
        """cos and sin of all positions so far, [positions, H], made again when the base changes."""
        trunk = self.model.trunk
        rope = (trunk.rope_theta, trunk.config.scaling)
        if self._angles is None or self._angles[0] != rope or len(self._angles[1]) < longest:
            turn = trunk.rotation(torch.arange(max(2 * longest, 256)), torch.float32)
            self._angles = (rope, turn.cos.flatten(1).contiguous(), turn.sin.flatten(1).contiguous())
        return self._angles[1], self._angles[2]


def _dense(weight: Tensor, bias: Tensor | None) -> native.Matrix:
    out, inputs = weight.shape
    return native.Matrix(_KINDS[weight.dtype], inputs, out, 0, 0, weight.data_ptr(), None, None, _pointer(bias), None)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _is_known(model: CausalLM, dtype: torch.dtype) -> bool:
    """Whether the model is made of exactly the layers that step.cpp knows, in types that it reads."""
    leaves = Counter(type(module) for module in model.modules() if not list(module.children()))
    products = leaves.pop(Linear, 0) + leaves.pop(QuantLinear, 0)
    layers = model.config.num_layers
    norms = (4 if model.config.row.qk_norm is not None else 2) * layers + 1
    known = products == 4 * layers + (model.head is not None) and leaves == {RMSNorm: norms, nn.Embedding: 1}
    known = known and all(_is_known_block(block) for block in model.trunk.layers)
    types = {parameter.dtype for parameter in model.parameters()}
    floats = len(types) == 1 and types <= _KINDS.keys() and all(p.is_contiguous() for p in model.parameters())
    quantized = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    fits = all(Packed.fits(module, gated=name.endswith("gate_up")) for name, module in quantized)
    return known and floats and fits and (types == {dtype} or bool(quantized))


def _is_known_block(block: nn.Module) -> bool:
    """No experts."""
    return type(block) is Block and type(block.mlp) is GatedMLP and type(block.attention) is Attention
