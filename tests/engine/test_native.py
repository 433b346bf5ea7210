"""The native step against the torch modules."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puyu.device import cpu_flags
from puyu.engine import native
from puyu.engine.native_step import NativeStep
from puyu.engine.packed_weights import Packed, Room, head_of
from puyu.engine.runner import Span
from puyu.engine.sampler import Choice, sample
from puyu.errors import DependencyError
from puyu.model.config import ExpertShape
from puyu.model.heads import CausalLM
from puyu.model.init import init_weights
from puyu.model.kv_cache import CacheStorage
from puyu.model.linear import Linear, QuantFormat, QuantLinear
from puyu.model.paged import KVCache, PagedPlan, PagedSequence
from puyu.model.quant_modules import replace_module
from puyu.quant.rtn import rtn
from puyu.types import SamplingParams
from tests.engine.conftest import tiny_model, uneven
from tests.model.test_linear import random_codes

SHAPES: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 1, "vocab_size": 99, "intermediate_size": 46},  # sizes that no vector width divides
    {"num_kv_heads": 4, "head_dim": 6, "tie_embeddings": True},
    {"qkv_bias": True, "out_bias": True, "num_layers": 3, "head_dim": 32},
    {"num_heads": 3, "num_kv_heads": 1, "head_dim": 64},
    {"family": "qwen3", "head_dim": 16},  # norms of heads
    {"family": "mistral", "windows": (8, 0), "head_dim": 32},
    {"family": "llama", "mlp_bias": True, "qkv_bias": True, "out_bias": True},
]
HALVES = {"hidden_size": 64, "intermediate_size": 96}
QUANTIZED: list[tuple[QuantFormat, dict[str, Any]]] = [
    (QuantFormat(8), {**HALVES, "qkv_bias": True, "out_bias": True}),
    (QuantFormat(8, 32), {**HALVES, "head_dim": 32}),
    (QuantFormat(4, 32, symmetric=False), {**HALVES, "num_kv_heads": 1, "head_dim": 32}),
    (QuantFormat(4, 32), {**HALVES, "family": "llama", "mlp_bias": True}),
    (QuantFormat(4, 64, symmetric=False), {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 99}),
    (QuantFormat(4, 128, symmetric=False), {"hidden_size": 128, "intermediate_size": 256, "tie_embeddings": True}),
    (QuantFormat(4, 32, symmetric=False, permuted=True), {**HALVES, "qkv_bias": True}),
]
PROCESSORS = {"this one": [], "any": ["-DPUYU_PLAIN"]}
"""What processors and compilers with fewer instructions run."""
if "avx2" in cpu_flags():
    PROCESSORS["AVX2"] = ["-march=x86-64-v3"]
if "avx_vnni" in cpu_flags():
    PROCESSORS["AVX-VNNI"] = ["-march=x86-64-v3", "-mavxvnni"]


def quantize(model: CausalLM, form: QuantFormat) -> None:
    """Round every layer of the trunk; a permuted format groups inputs in a random order."""
    generator = torch.Generator().manual_seed(form.group)
    for name, layer in list(model.trunk.named_modules()):
        if isinstance(layer, Linear):
            perm = torch.randperm(layer.in_features, generator=generator) if form.permuted else None
            weight = layer.weight.detach() if perm is None else layer.weight.detach()[:, perm]
            codes = dataclasses.replace(rtn(weight, dataclasses.replace(form, permuted=False)), perm=perm)
            replace_module(model.trunk, name, QuantLinear.of(codes, bias=layer.bias))


def cache_of(model: CausalLM, dtype: torch.dtype = torch.float32, storage: CacheStorage = "auto") -> KVCache:
    cache = KVCache(model.config, num_blocks=64, block_size=4, device="cpu", dtype=dtype, storage=storage)
    cache.rows.fill_(float("nan") if storage == "auto" else 255)
    if cache.sides is not None:
        cache.sides.fill_(float("nan"))
    return cache


def filled(shape: dict[str, Any], *, std: float = 0.2) -> CausalLM:
    model = tiny_model(7, **shape)
    init_weights(model, seed=7, std=std)
    return uneven(model)


def forward(model: CausalLM, cache: KVCache, spans: list[Span]) -> Tensor:
    """What the torch modules give for the same spans."""
    sequences, positions, rows, start = [], [], [], 0
    for span in spans:
        sequences.append(PagedSequence(start, len(span.tokens), span.context, tuple(span.blocks)))
        positions += range(span.context, span.context + len(span.tokens))
        start += len(span.tokens)
        rows += range(start - span.rows, start)
    tokens = torch.tensor([token for span in spans for token in span.tokens])
    return model(tokens, torch.tensor(positions), PagedPlan.build(cache, sequences))[rows]


def traffic(seed: int, *, steps: int, prompts: bool) -> Iterator[list[Span]]:
    """Steps over five sequences in scattered blocks; prompts come in chunks, or token by token."""
    rng = random.Random(seed)
    free = rng.sample(range(64), 64)
    tables = [tuple(free.pop() for _ in range(12)) for _ in range(5)]
    done = [0] * 5
    for _ in range(steps):
        spans = []
        for row in rng.sample(range(5), rng.randrange(1, 6)):
            length = rng.choice([1, 1, 2, 7, 19]) if prompts else 1
            length = min(length, 48 - done[row])
            if length:
                tokens = [rng.randrange(90) for _ in range(length)]
                spans.append(Span(tokens, done[row], tables[row], rng.randrange(length + 1)))
                done[row] += length
        if spans:
            yield spans


@torch.inference_mode()
@pytest.mark.parametrize(("prompts", "threads"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_modules(shape: dict[str, Any], prompts: bool, threads: int) -> None:
    model = filled(shape)
    ours, theirs = cache_of(model), cache_of(model)
    step = NativeStep.make(model, ours)
    assert step is not None
    torch.set_num_threads(threads)
    for spans in traffic(len(shape), steps=14, prompts=prompts):
        torch.testing.assert_close(step.run(spans)[0], forward(model, theirs, spans), rtol=0, atol=4e-5)
    torch.set_num_threads(1)
    torch.testing.assert_close(ours.rows, theirs.rows, rtol=0, atol=1e-5, equal_nan=True)


@torch.inference_mode()
@pytest.mark.parametrize("flags", PROCESSORS.values(), ids=list(PROCESSORS))
@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize(
    "shape", [{"head_dim": 32}, {"num_kv_heads": 1, "head_dim": 64}, {"head_dim": 6}, {"head_dim": 32, "std": 3e-4}]
)
def test_keys_and_values_as_codes(
    shape: dict[str, Any], storage: CacheStorage, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codes, scales and offsets that the modules write, tiny ones too, whose scales are subnormal half floats; and
    what they read from them. Now and then a number stands so near to half a code that both sides round it apart."""
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, *flags])
    native.build()
    native.load.cache_clear()
    shape = dict(shape)
    model = filled({k: v for k, v in shape.items() if k != "std"}, std=shape.get("std", 0.2))
    ours, theirs = (cache_of(model, storage=storage) for _ in range(2))
    step = NativeStep.make(model, ours)
    assert step is not None and ours.sides is not None and theirs.sides is not None
    errors = [
        (step.run(spans)[0] - forward(model, theirs, spans)).abs().amax(1)
        for spans in traffic(3, steps=10, prompts=True)
    ]
    native.load.cache_clear()
    written = theirs.sides.isfinite().all(-1)
    assert torch.equal(ours.sides.isfinite().all(-1), written) and bool(written.any())
    apart = (ours.rows != theirs.rows)[written].float().mean()
    assert float(apart) < 0.01, "codes"
    torch.testing.assert_close(ours.sides[written].float(), theirs.sides[written].float(), rtol=2e-3, atol=2e-7)
    assert float(torch.cat(errors).median()) < 2e-5 and float(torch.cat(errors).max()) < 0.3


class Rounded(nn.Module):
    """A quantized layer in float64, its inputs rounded to int8 in units of inputs as the native step does."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.layer, group = layer, layer.form.group or layer.in_features
        self.unit = next(unit for unit in (64, 32, 16) if group % unit == 0)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(x.shape[-1]) if self.layer.perm is None else self.layer.perm
        units = x.float()[..., order].unflatten(-1, (-1, self.unit))
        most = units.abs().amax(-1, keepdim=True)
        codes = (units * torch.where(most > 0, 127 / most, 0.0)).round()
        rounded = (codes.double() * (most / 127).double()).flatten(-2)
        bias = None if self.layer.bias is None else self.layer.bias.double()
        return F.linear(rounded, self.layer.weight(torch.float64)[:, order], bias).to(x.dtype)


@torch.inference_mode()
@pytest.mark.parametrize(("form", "shape"), QUANTIZED)
@pytest.mark.parametrize("flags", PROCESSORS.values(), ids=list(PROCESSORS))
def test_quantized_layers_equal_rounded_inputs_times_dequantized_weights(
    form: QuantFormat, shape: dict[str, Any], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if flags:
        monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, *flags])
        native.build()
        native.load.cache_clear()
    model = filled({"num_layers": 2, **shape}, std=0.06)
    quantize(model, form)
    ours, theirs = cache_of(model), cache_of(model)
    step = NativeStep.make(model, ours)
    assert step is not None and step.suits(64, 19)
    oracle = copy.deepcopy(model)
    head = model.trunk.embedding.weight if model.head is None else model.head.weight
    oracle.head = head_of(native.load(), head)  # which a quantized model reads as int8
    for name, layer in list(oracle.named_modules()):
        if isinstance(layer, QuantLinear):
            setattr(oracle.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], Rounded(layer))
    errors = [
        (step.run(spans)[0] - forward(oracle, theirs, spans)).abs().amax(1)
        for spans in traffic(form.group + 1, steps=8, prompts=True)
    ]
    # now and then a number stands so near to half a code that both sides round it apart; rows without that are equal
    assert float(torch.cat(errors).median()) < 2e-6 and float(torch.cat(errors).max()) < 0.05
    native.load.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_is_rounded_to_the_nearest_code(dtype: torch.dtype) -> None:
    weight = torch.randn(300, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[7] = 0.0
    weight[8], weight[8, 3] = 0.5, 127.0  # half a code: to the even one
    weight[9], weight[9, 3] = 1.5, -127.0
    layer, wide = head_of(native.load(), weight), weight.double()
    scales = (wide.abs().amax(1, keepdim=True).float() / 127).half()
    assert torch.equal(layer.scales, scales)
    steps = (weight.float() / torch.where(scales > 0, scales, 1.0).float()).round().clamp(-127, 127)
    assert torch.equal(layer.matrix().codes, steps.to(torch.int8))


@pytest.mark.parametrize(("outputs", "gated"), [(32, False), (64, True), (70, False)])
@pytest.mark.parametrize(
    ("inputs", "form"),
    [(16, QuantFormat(8)), (160, QuantFormat(8, 32)), (144, QuantFormat(4, 16, symmetric=False)), (64, QuantFormat(4))],
)
def test_packed_codes_come_back(outputs: int, inputs: int, form: QuantFormat, gated: bool) -> None:
    weight = random_codes(outputs, inputs, form)
    library = native.load()
    assert library is not None
    layer = QuantLinear.of(weight)
    packed = Packed(library, layer, Room(Packed.size(layer)), gated=gated)
    assert torch.equal(packed.codes(), weight.codes)


@torch.inference_mode()
@pytest.mark.parametrize("form", [QuantFormat(8), QuantFormat(4, 32, symmetric=False)])
def test_a_packed_model_keeps_one_copy_and_is_still_a_model(form: QuantFormat) -> None:
    model = filled({"num_layers": 2, **HALVES}, std=0.06)
    quantize(model, form)
    cache = cache_of(model)
    spans = [Span([5, 6, 7, 8], 0, (3, 4), 4)]
    before, state = forward(model, cache, spans), {k: v.clone() for k, v in model.state_dict().items()}
    assert NativeStep.make(model, cache) is not None
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert layers and all(layer.codes.numel() == 0 for layer in layers)
    assert torch.equal(forward(model, cache, spans), before)
    assert torch.equal(forward(copy.deepcopy(model), cache, spans), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@torch.inference_mode()
@pytest.mark.parametrize("form", [None, QuantFormat(8), QuantFormat(4, 32, symmetric=False)])
def test_invariant_rows_depend_on_nothing_beside_them(form: QuantFormat | None) -> None:
    model = filled({"hidden_size": 64, "intermediate_size": 96, "head_dim": 32})
    if form is not None:
        quantize(model, form)
    step, alone = (NativeStep.make(model, cache_of(model), invariant=True) for _ in range(2))
    assert step is not None and alone is not None
    torch.set_num_threads(2)
    for spans in traffic(3, steps=12, prompts=True):
        together = step.run(spans)[0].split([span.rows for span in spans])
        for span, logits in zip(spans, together, strict=True):
            singles = [
                Span([token], span.context + at, span.blocks, int(at >= len(span.tokens) - span.rows))
                for at, token in enumerate(span.tokens)
            ]
            assert torch.equal(torch.cat([alone.run([single])[0] for single in singles]), logits)
    torch.set_num_threads(1)


@torch.inference_mode()
def test_a_row_that_is_not_finite_spoils_no_other_sequence() -> None:
    model = filled({"hidden_size": 64, "intermediate_size": 96})
    quantize(model, QuantFormat(4, 32, symmetric=False))
    cache = cache_of(model)
    step = NativeStep.make(model, cache)
    assert step is not None
    spans = [Span([3, 4], 0, (0,), 2), Span([5], 0, (1,), 1)]
    expected = step.run(spans)[0]
    with torch.no_grad():
        model.trunk.embedding.weight[4] = float("inf")
    logits = step.run(spans)[0]
    assert torch.equal(logits[2], expected[2]) and not logits[1].isfinite().any()


def test_a_library_of_another_system_leaves_the_work_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A home folder may be shared by machines whose C libraries differ."""
    monkeypatch.setenv("PUYU_NATIVE_DIR", str(tmp_path))
    native.library().path().write_bytes(b"no library")
    native.load.cache_clear()
    assert native.load() is None and "torch computes alone" in caplog.text
    native.load.cache_clear()


@torch.inference_mode()
@pytest.mark.parametrize(("vocab", "num_ids"), [(9001, None), (9001, 4097), (64, 50), (64, 1)])
def test_the_best_ids_are_those_of_the_sampler(vocab: int, num_ids: int | None) -> None:
    """Equal logits, ids that stand for no token, parts of a row on both threads, rows that are not finite."""
    model = filled({"hidden_size": 64, "intermediate_size": 96, "vocab_size": vocab, "tie_embeddings": False})
    cache = cache_of(model)
    step = NativeStep.make(model, cache, num_ids=num_ids)
    assert step is not None and model.head is not None
    generator, head = torch.Generator().manual_seed(vocab), model.head.weight
    torch.set_num_threads(2)
    for case in range(12):
        values = torch.randn(3, 64, generator=generator)  # few different rows, so that many logits are equal
        head.copy_(values[torch.randint(0, 3, (vocab,), generator=generator)])
        if case in (4, 8):
            head[torch.randint(0, vocab, ())] = float("nan") if case == 4 else float("inf")
        spans = [Span([1 + case, 2], 0, (0,), 2), Span([3], 0, (1,), 1)]
        logits, best = step.run(spans)
        expected = sample(logits, [Choice(SamplingParams())] * 3, num_ids=num_ids)
        assert [id if id >= 0 else None for id in best] == expected.tokens
    torch.set_num_threads(1)


@torch.inference_mode()
def test_bf16_is_as_close_to_fp32_as_the_modules_are() -> None:
    exact = filled({})
    model = filled({}).bfloat16()
    errors = []
    caches = [cache_of(model, torch.bfloat16) for _ in range(2)]
    exact_cache = cache_of(exact)
    step = NativeStep.make(model, caches[0])
    assert step is not None
    for at, token in enumerate(range(1, 21)):
        spans = [Span([token], at, tuple(range(8)))]
        right = forward(exact, exact_cache, spans)
        modules = forward(model, caches[1], spans).float()
        errors.append([float((x - right).abs().mean()) for x in (step.run(spans)[0], modules)])
    ours_error, modules_error = torch.tensor(errors).mean(0).tolist()
    assert ours_error < 1.1 * modules_error


@torch.inference_mode()
def test_changed_weights_and_rope_base_count_at_once() -> None:
    model = filled({})
    cache, other = cache_of(model), cache_of(model)
    step = NativeStep.make(model, cache)
    assert step is not None
    step.run([Span([5], 0, (0, 1))])
    init_weights(model, seed=9, std=0.2)
    model.trunk.layers[1].mlp.down.weight.data = model.trunk.layers[1].mlp.down.weight.data.clone()
    model.set_rope_theta(77.0)
    for at in range(3):
        spans = [Span([5 + at], at, (0, 1))]
        torch.testing.assert_close(step.run(spans)[0], forward(model, other, spans), rtol=0, atol=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
)
def test_stretched_positions_are_in_its_tables(scaling: dict[str, object]) -> None:
    model = tiny_model(3, rope_scaling=scaling, max_positions=20)
    cache, other = cache_of(model), cache_of(model)
    step = NativeStep.make(model, cache)
    assert step is not None
    for at in range(24):
        if at == 20:
            model.set_context(64)  # the tables follow; the twin's cache keeps the old keys too
        spans = [Span([at], at, tuple(range(6)))]
        torch.testing.assert_close(step.run(spans)[0], forward(model, other, spans), rtol=0, atol=2e-5)


def test_experts_are_left_to_torch() -> None:
    for experts in (
        ExpertShape(count=2, per_token=1, size=48),
        ExpertShape(count=2, per_token=1, size=48, dense_layers=(0,)),
    ):
        model = tiny_model(3, family="qwen3_moe", experts=experts)
        assert NativeStep.make(model, cache_of(model)) is None


def test_what_it_does_not_know_is_left_to_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = filled({})
    assert NativeStep.make(model.double(), cache_of(model, torch.float64)) is None
    model = filled({})
    assert NativeStep.make(model, cache_of(model, torch.bfloat16)) is None, "mixed precision rounds otherwise"
    model.trunk.layers[0].mlp.extra = torch.nn.Identity()
    assert NativeStep.make(model, cache_of(model)) is None
    model = filled({"intermediate_size": 72})
    quantize(model, QuantFormat(8))
    assert NativeStep.make(model, cache_of(model)) is None, "72 inputs are no whole units"
    monkeypatch.setenv("PUYU_NATIVE_DIR", str(tmp_path))
    native.load.cache_clear()
    assert native.load() is None
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DependencyError, match=r"no C\+\+ compiler"):
        native.build()
    monkeypatch.undo()
    native.load.cache_clear()
