"""`GpuStep` in Triton's interpreter against the torch modules: whole steps of tiny models."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from puyu.engine.core import Engine, EngineConfig
from puyu.engine.gpu import GpuStep
from puyu.engine.kernels.fp8 import Fp8Linear, to_fp8
from puyu.engine.overlap import OverlapEngine, _Stream
from puyu.engine.parallel import shard
from puyu.engine.request import Request
from puyu.engine.runner import Runner, Span
from puyu.errors import ConfigError
from puyu.model.heads import CausalLM
from puyu.model.linear import Linear, QuantFormat, QuantLinear
from puyu.model.paged import KVCache
from puyu.model.quant_modules import make_quantized
from puyu.types import SamplingParams
from tests.engine.conftest import tiny_model, uneven

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

SHAPES: list[dict[str, int]] = [
    {},
    {"num_kv_heads": 1, "vocab_size": 99, "intermediate_size": 46, "num_layers": 1},
    {"num_kv_heads": 4, "head_dim": 6, "tie_embeddings": True, "num_layers": 1},
    {"qkv_bias": True, "out_bias": True, "num_heads": 6, "hidden_size": 48, "num_layers": 1},
]


def cache_of(model: CausalLM) -> KVCache:
    cache = KVCache(model.config, num_blocks=40, block_size=4, device="cpu", dtype=torch.float32)
    cache.rows.fill_(float("nan"))
    return cache


def filled(**shape: int) -> CausalLM:
    return uneven(tiny_model(7, **shape))


def modules(model: CausalLM, cache: KVCache, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """A runner that has only the torch modules."""
    runner = Runner(model, cache)
    monkeypatch.setattr(runner, "native", None)
    monkeypatch.setattr(runner, "gpu", None)
    return runner


STEPS = [
    [Span(tuple(range(3, 20)), 0, tuple(range(10, 16)), 0), Span((5,), 0, (1, 2), 1)],
    [
        Span((9,), 1, (1, 2), 1),
        Span(tuple(range(40, 47)), 17, tuple(range(10, 16)), 1),
        Span((1, 2), 0, (0,), 1),
    ],
    [Span((8,), 2, (1, 2), 1), Span((6,), 24, (*range(10, 16), 30), 1), Span((4,), 2, (0,), 0)],
]


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_equal_the_modules(shape: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in two chunks beside decodes, a row that does not sample; then decodes alone."""
    model = filled(**shape)
    step, theirs = GpuStep.make(model, cache_of(model)), modules(model, cache_of(model), monkeypatch)
    assert step is not None
    for spans in STEPS:
        torch.testing.assert_close(step.run(spans), theirs.run(spans).logits_SV, rtol=0, atol=3e-5)
    torch.testing.assert_close(step.cache.rows, theirs.cache.rows, rtol=0, atol=1e-5, equal_nan=True)


def quantized(form: QuantFormat) -> CausalLM:
    """Random codes, and the CPU's integer kernels left out, which round activations to bf16."""
    model = tiny_model(3, intermediate_size=64, num_layers=1)
    make_quantized(model, form)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("codes"):
            high = 256 if buffer.dtype == torch.uint8 else 127
            buffer.copy_(torch.randint(0 if high == 256 else -127, high, buffer.shape, generator=generator))
        elif name.endswith("zeros"):
            buffer.copy_(torch.randint(0, 16, buffer.shape, generator=generator))
        elif name.endswith("scales"):
            size = 0.002 if form.bits == 8 else 0.04
            buffer.copy_((torch.rand(buffer.shape, generator=generator) * size).bfloat16())
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.kernel_group = 0
    return model


@pytest.mark.parametrize(
    "form", [QuantFormat(8), QuantFormat(4, 32), QuantFormat(4, 16, symmetric=False), QuantFormat(4)], ids=str
)
def test_quantized_steps_equal_dequantized_modules(form: QuantFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(form)
    step, theirs = GpuStep.make(model, cache_of(model)), modules(model, cache_of(model), monkeypatch)
    assert step is not None
    for spans in STEPS:
        torch.testing.assert_close(step.run(spans), theirs.run(spans).logits_SV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "form",
    [
        QuantFormat(8, 32),
        QuantFormat(8, symmetric=False),
        QuantFormat(8, activations=True),
        QuantFormat(4, 32, permuted=True),
        QuantFormat(4, 4),
    ],
    ids=str,
)
def test_formats_that_no_kernel_reads_are_left_to_torch(form: QuantFormat) -> None:
    model = tiny_model(3, intermediate_size=64, num_layers=1)
    make_quantized(model, form)
    assert GpuStep.make(model, cache_of(model)) is None


def test_changed_zeros_and_scales_count_after_renewal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleeping gives back what was made of the weights; waking makes it anew."""
    model = quantized(QuantFormat(4, 32, symmetric=False))
    runner = Runner(model, cache_of(model))
    assert runner.gpu is not None
    before = runner.run(STEPS[0]).logits_SV
    for name, buffer in model.named_buffers():
        if name.endswith("zeros"):
            buffer.add_(3)
        elif name.endswith("scales"):
            buffer.mul_(0.5)
    runner.release()
    with pytest.raises(AssertionError, match="given back"):
        runner.run(STEPS[0])
    runner.renew()
    theirs = modules(model, cache_of(model), monkeypatch).run(STEPS[0]).logits_SV
    torch.testing.assert_close(runner.run(STEPS[0]).logits_SV, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, theirs, atol=1e-2)


def test_drafts_have_a_row_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several wanted rows of a span, and a step that wants none."""
    model = filled(num_layers=1)
    step, theirs = GpuStep.make(model, cache_of(model)), modules(model, cache_of(model), monkeypatch)
    assert step is not None
    wanted = [Span((5, 6, 7, 8), 0, (1, 2), 3), Span((9, 9), 0, (3,), 0)]
    torch.testing.assert_close(step.run(wanted), theirs.run(wanted).logits_SV, rtol=0, atol=3e-5)
    assert step.run([Span((4, 5), 0, (0,), 0)]).shape == (0, model.config.vocab_size)


def test_hidden_states_come_from_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(num_layers=1)
    runner, theirs = Runner(model, cache_of(model)), modules(model, cache_of(model), monkeypatch)
    spans = [Span((5, 6, 7), 0, (1,), 0, hidden=True)]
    assert runner.gpu is not None
    assert torch.equal(runner.run(spans).hidden[0], theirs.run(spans).hidden[0])
    assert Runner(model, cache_of(model), alone=True).gpu is None, "kernels sum in an order that depends on the batch"


def test_fp8_and_sharded_models_are_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A group of one: the ways that sum over ranks and gather the vocabulary are taken."""
    model = tiny_model(3, intermediate_size=64, num_layers=1, out_bias=True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    shard(model)
    floats = tiny_model(3, intermediate_size=64, num_layers=1)
    to_fp8(floats)
    for ours, limit in ((model, 1e-5), (floats, 0.1)):
        step, theirs = GpuStep.make(ours, cache_of(ours)), modules(ours, cache_of(ours), monkeypatch)
        assert step is not None
        for spans in STEPS:
            found, expected = step.run(spans), theirs.run(spans).logits_SV
            assert (found - expected).norm() / expected.norm() < limit
    dist.destroy_process_group()


def test_a_model_that_fp8_cannot_hold_is_left_whole() -> None:
    """The second block's last product does not fit: nothing has changed when that is said."""
    model = tiny_model(3, intermediate_size=64, num_layers=2)
    model.trunk.layers[1].mlp.down = Linear(64, 40)  # type: ignore[union-attr, assignment]
    with pytest.raises(ConfigError, match="down is not one"):
        to_fp8(model)
    assert not any(isinstance(module, Fp8Linear) for module in model.modules())


def test_results_on_the_device_feed_the_next_step() -> None:
    model = filled()
    first, second = GpuStep.make(model, cache_of(model)), GpuStep.make(model, cache_of(model))
    assert first is not None and second is not None
    told = [Span((7, 11), 0, (0,), 1), Span((9,), 0, (1,), 1)]
    fed = [Span((-2, 11), 0, (0,), 1), Span((-3,), 0, (1,), 1)]
    assert torch.equal(first.run(told), second.run(fed, torch.tensor([1, 7, 9])))


def test_the_engine_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of all kinds through the scheduler, in little memory, with and without the kernels."""
    model, answers = filled(num_layers=1), []
    for kernels in (True, False):
        engine = Engine(model, EngineConfig(cache_tokens=40, block_size=4, max_step_tokens=9, max_running=4))
        if not kernels:
            monkeypatch.setattr(engine.runner, "gpu", None)
        assert (engine.runner.gpu is not None) == kernels
        rng = random.Random(0)
        runs = []
        for index in range(3):
            prompt = tuple(rng.randrange(90) for _ in range(rng.randrange(1, 14)))
            params = SamplingParams(temperature=0.0 if index % 2 else 0.9, seed=index, top_k=index * 5)
            runs.append(engine.add(Request(str(index), prompt, max_tokens=4, params=params)))
        while engine.has_work:
            engine.step()
            engine.audit()
        answers.append([list(run.generated) for run in runs])
    assert answers[0] == answers[1]


def test_overlapped_with_sampling_on_the_device_it_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane that GPUs take: fed tokens, the sampling kernel, results asked for one step later."""
    model, answers = filled(num_layers=1), []
    config = EngineConfig(cache_tokens=80, block_size=4, max_step_tokens=9, max_running=2)
    for kind in (Engine, OverlapEngine):
        engine = kind(model, config)
        if isinstance(engine, OverlapEngine):
            monkeypatch.setattr(engine, "_lane", _Stream(engine))
        params = [SamplingParams(logprobs=True), SamplingParams(temperature=0.9, top_k=9, seed=1, logprobs=True)]
        runs = [engine.add(Request(str(i), (3 + i, 4, 5), max_tokens=4, params=p)) for i, p in enumerate(params)]
        while engine.has_work:
            engine.step()
            engine.audit()
        answers.append([(list(run.generated), run.finish_reason, run.logprobs) for run in runs])
    for (tokens, reason, logprobs), (expected, why, theirs) in zip(*answers, strict=True):
        assert (tokens, reason) == (expected, why)
        assert logprobs == pytest.approx(theirs, abs=1e-4)


def test_what_it_does_not_know_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled()
    model.trunk.layers[0].mlp.extra = torch.nn.Identity()
    assert GpuStep.make(model, cache_of(model)) is None
    windowed = filled()
    windowed.trunk.layers[1].attention.window = 8
    assert GpuStep.make(windowed, cache_of(windowed)) is None
    assert GpuStep.make(filled(mlp_bias=True), cache_of(filled(mlp_bias=True))) is None
    few = filled()
    codes = KVCache(few.config, num_blocks=4, block_size=4, device="cpu", dtype=torch.float32, storage="int8")
    assert GpuStep.make(few, codes) is None
    double = filled().double()
    cache = KVCache(double.config, num_blocks=4, block_size=4, device="cpu", dtype=torch.float64)
    assert GpuStep.make(double, cache) is None
    half = filled()
    assert (
        GpuStep.make(half, KVCache(half.config, num_blocks=4, block_size=4, device="cpu", dtype=torch.bfloat16)) is None
    )
    monkeypatch.delenv("TRITON_INTERPRET")
    assert Runner(half, cache_of(half)).gpu is None, "no GPU and no interpreter"


def test_a_changed_rope_base_counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled()
    step = GpuStep.make(model, cache_of(model))
    assert step is not None
    step.run(STEPS[0])
    model.set_rope_theta(77.0)
    theirs = modules(model, cache_of(model), monkeypatch)
    torch.testing.assert_close(step.run(STEPS[0]), theirs.run(STEPS[0]).logits_SV, rtol=0, atol=3e-5)
