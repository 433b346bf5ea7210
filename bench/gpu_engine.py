"""The engine on a GPU: every kernel against its torch reference, then the speed of the 7B shape with random weights.

    python bench/gpu_engine.py                      # everything, a few minutes on one H200
    python bench/gpu_engine.py --parts check,decode # some of it
    python bench/gpu_engine.py --parts sweep        # which tile is the fastest for each shape, for `choose_tile`
    TRITON_INTERPRET=1 python bench/gpu_engine.py --tiny   # the same code on a CPU: checks the bench, measures nothing

Parts: check, sweep, decode, streams, peers, memory, context. Weights are random: speed does not depend on them. The
share of bandwidth is bytes of weights and cache that a token must read, over the time of a token, over what a copy of
4 GiB moves (read and written) on this card in this run. Without a GPU it says so and ends. Last line: JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import harness  # also puts the checkout on the path
import numpy as np
import torch
from torch import Tensor

from puyu.engine.core import Engine, EngineConfig
from puyu.engine.kernels.launch import interpreting, upload
from puyu.engine.request import Request
from puyu.engine.runner import Runner, Span
from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM
from puyu.model.linear import Linear, QuantFormat, QuantLinear
from puyu.model.paged import KVCache
from puyu.model.quant_modules import make_quantized
from puyu.model.rope import rotation
from puyu.types import SamplingParams

SHAPE = {"vocab_size": 92544, "hidden_size": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8}
SHAPE |= {"intermediate_size": 14336, "max_positions": 262144, "rope_theta": 1e6}
TINY = {"vocab_size": 96, "hidden_size": 64, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2}
TINY |= {"intermediate_size": 64, "max_positions": 512}


class Size(NamedTuple):
    """How big everything is: the real thing, or small enough for the interpreter."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    repeats: int
    streams: tuple[int, ...]
    prompt: int
    answer: int
    long: int
    copied: int
    context: int


def size_of(tiny: bool) -> Size:
    if tiny:
        config = ModelConfig(**TINY)  # type: ignore[arg-type]
        return Size(config, torch.device("cpu"), torch.float32, 1, (1, 2), 5, 3, 20, 1 << 20, 16)
    config, streams = ModelConfig(**SHAPE), (1, 2, 4, 8, 16, 32, 64, 128, 256)  # type: ignore[arg-type]
    return Size(config, torch.device("cuda"), torch.bfloat16, 20, streams, 512, 128, 200_000, 4 << 30, 4096)


# --- time, memory, models ------------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], size: Size, *, inner: int = 1) -> float:
    """The median time of a call, of `inner` in a row that nobody waits between."""
    inner = inner if size.device.type == "cuda" else 1
    found = []
    for repeat in range(size.repeats + 3):
        wait(size.device)
        began = time.perf_counter()
        for _ in range(inner):
            function()
        wait(size.device)
        if repeat >= min(3, size.repeats):
            found.append((time.perf_counter() - began) / inner)
    return statistics.median(found)


def copy_bandwidth(size: Size) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.randn(size.copied // 4, device=size.device)
    target = torch.empty_like(source)
    return 2 * size.copied / seconds(lambda: target.copy_(source), size, inner=4)


def model_of(size: Size, bits: int) -> CausalLM:
    """Random weights made where they stay; 7: e4m3 floats."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with size.device:
            model = CausalLM(size.config)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    if bits in (4, 8):
        group = 128 if size.config.hidden_size % 128 == 0 else 32
        make_quantized(model, QuantFormat(8) if bits == 8 else QuantFormat(4, group, symmetric=False))
        model.to(size.device)
    for module in model.modules():
        fill(module)
    if bits == 7:
        from puyu.engine.kernels.fp8 import to_fp8

        to_fp8(model)
    return model


def fill(module: torch.nn.Module) -> None:
    if isinstance(module, Linear | torch.nn.Embedding):
        module.weight.normal_(0, 0.02)
    elif isinstance(module, QuantLinear):
        module.codes.random_(0, 255 if module.form.bits == 4 else 127)
        module.scales.fill_(0.02 / (8 if module.form.bits == 4 else 64))
        module.scales = module.scales.bfloat16()
        if module.zeros is not None:
            module.zeros.fill_(7)


def weight_bytes(model: CausalLM) -> int:
    """What one token reads: everything but the embedding, of which it reads a row (unless the head is tied to it)."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(t.nbytes for name, t in tensors if model.head is None or not name.startswith("trunk.embedding"))


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def randn(*shape: int, size: Size, seed: int = 0) -> Tensor:
    generator = torch.Generator(size.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=size.device).to(size.dtype)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


# --- check: every kernel against its reference ---------------------------------------------------------------------


class Check(NamedTuple):
    name: str
    ours: Callable[[], Any]
    reference: Callable[[], Any]
    limit: float


def check(size: Size) -> dict[str, Any]:
    """Relative error and both times; a kernel beyond its limit is named in `failed`."""
    found: dict[str, Any] = {}
    for made in checks(size):
        ours, theirs = made.ours(), made.reference()
        error = relative(ours, theirs) if isinstance(ours, Tensor) else max(map(relative, ours, theirs))
        took = 1e6 * seconds(made.ours, size, inner=10)
        found[made.name] = {"error": error, "us": took, "holds": error <= made.limit}
        found[made.name]["reference_us"] = 1e6 * seconds(made.reference, size._replace(repeats=1))
        print(f"  {made.name:<28} {json.dumps(found[made.name])}", file=sys.stderr)
    return {"kernels": found, "failed": [name for name, row in found.items() if not row["holds"]]}


def checks(size: Size) -> Iterator[Check]:
    yield from small_checks(size)
    yield from attention_checks(size)
    yield from product_checks(size)


def small_checks(size: Size) -> Iterator[Check]:
    from puyu.engine.kernels import fp8, norm, rope
    from puyu.engine.kernels.sampling import Knobs, sample_rows, sample_rows_reference

    config, rows = size.config, 256 if size.device.type == "cuda" else 3
    x, weight = randn(rows, config.hidden_size, size=size), randn(config.hidden_size, size=size, seed=1)
    limit = 1e-2 if size.dtype == torch.bfloat16 else 1e-5
    eps = config.norm_eps
    normed = lambda: norm.rms_norm_reference(x, weight, eps=eps)  # noqa: E731
    yield Check("rms_norm", lambda: norm.rms_norm(x, weight, eps=eps), normed, limit)
    yield Check("silu_mul", lambda: norm.silu_mul(x), lambda: norm.silu_mul_reference(x), limit)
    positions, head_dim = torch.arange(4096, device=size.device), config.head_dim
    turn = rotation(positions, theta=config.rope_theta, head_dim=head_dim, dtype=size.dtype)
    angles = rope.Angles(*(part.flatten(1)[:, : head_dim // 2].contiguous() for part in turn))
    places = rope.Places(*upload([np.arange(rows) * 13 % 4096, np.arange(rows)[::-1].copy()], size.device))
    qkv = randn(rows, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim, size=size)
    cache = torch.zeros(2 * config.num_kv_heads * rows, config.head_dim, dtype=size.dtype, device=size.device)
    arguments = (qkv, cache, angles, places)
    heads = config.num_kv_heads
    yield Check(
        "rope_and_cache",
        lambda: (rope.rope_and_cache(*arguments, num_kv_heads=heads), cache.clone()),
        lambda: (rope.rope_and_cache_reference(*arguments, num_kv_heads=heads), cache.clone()),
        limit,
    )
    if size.device.type == "cuda":  # the interpreter rounds e4m3 wrongly
        yield Check("fp8 rows", lambda: fp8.to_rows(x)[0].float(), lambda: fp8.to_rows_reference(x)[0].float(), 1e-2)
    logits = randn(rows, config.vocab_size, size=size, seed=3).float()
    kinds = [((0.0, 0.8)[i % 2], (0.0, 40.0)[i % 3 == 0], (1.0, 0.9)[i % 5 == 0], 0.0, i / rows) for i in range(rows)]
    vocab, knobs, at_home = config.vocab_size, Knobs.of(kinds, size.device), Knobs.of(kinds, torch.device("cpu"))
    sorted_ = lambda: sample_rows_reference(logits.cpu(), at_home, num_ids=vocab)[1]  # noqa: E731
    yield Check("sampling", lambda: sample_rows(logits, knobs, num_ids=vocab)[1].cpu(), sorted_, 0.05)


def attention_checks(size: Size) -> Iterator[Check]:
    from puyu.engine.kernels import attention

    config, heads = size.config, size.config.num_kv_heads
    limit = 1e-2 if size.dtype == torch.bfloat16 else 1e-5
    for batch, length in ((1, size.context), (8, size.context), (3, 37)):
        rows, pages = paged(size, batch, length)
        q = randn(batch, config.num_heads, config.head_dim, size=size)
        yield Check(
            f"decode {batch} x {length}",
            lambda q=q, r=rows, p=pages: attention.decode_attention(q, r, p, num_kv_heads=heads),
            lambda q=q, r=rows, p=pages: attention.decode_attention_reference(q, r, p, num_kv_heads=heads),
            limit,
        )
    for context in (0, size.context // 2 + 3):
        length = size.context // 4 + 1
        rows, pages = paged(size, 1, context + length)
        height = attention.tile_height(config.queries_per_kv, config.head_dim, size.dtype)
        arrays = attention.tile_arrays([(0, 0, length, context)], height)
        tiles = attention.Tiles(*upload(arrays, size.device), height)
        q = randn(length, config.num_heads, config.head_dim, size=size)
        yield Check(
            f"prefill {length} after {context}",
            lambda q=q, r=rows, p=pages, t=tiles: attention.prefill_attention(q, r, p, t, num_kv_heads=heads),
            lambda q=q, r=rows, p=pages, t=tiles: attention.prefill_attention_reference(q, r, p, t, num_kv_heads=heads),
            limit,
        )


def paged(size: Size, batch: int, length: int) -> tuple[Tensor, Any]:
    """A cache of random keys and values in shuffled blocks of 16."""
    from puyu.engine.kernels.attention import Pages

    width = -(-length // 16)
    tables = np.random.default_rng(0).permutation(batch * width).reshape(batch, width)
    rows = randn(2 * size.config.num_kv_heads * batch * width * 16, size.config.head_dim, size=size, seed=5)
    tables_BW, lengths_B = upload([tables, np.full(batch, length)], size.device)
    return rows, Pages(tables_BW, lengths_B, 16)


def product_checks(size: Size) -> Iterator[Check]:
    from puyu.engine.kernels import matmul

    limit = 1e-2 if size.dtype == torch.bfloat16 else 1e-4
    for bits in (16, 8, 4, 7):
        for name, weight in weights(size, bits):
            for rows in (1, 8, 64):
                around = matmul.Around(randn(weight.num_inputs, size=size, seed=2), 1e-5, gated=name == "gate_up")
                x = randn(rows, weight.num_inputs, size=size, seed=4)
                yield Check(
                    f"{name} {'fp8' if bits == 7 else bits} x {rows}",
                    lambda x=x, w=weight, a=around: matmul.project(x, w, a),
                    lambda x=x, w=weight, a=around: matmul.multiply_reference(x, w, a),
                    0.06 if bits == 7 and rows > 16 else limit,
                )


def weights(size: Size, bits: int) -> Iterator[tuple[str, Any]]:
    """The four matrices of a block."""
    from puyu.engine.kernels.matmul import Weight

    config = size.config.with_(num_layers=1)
    block: Any = model_of(size._replace(config=config), bits).trunk.layers[0]
    attention, mlp = block.attention, block.mlp
    for name, layer in (("qkv", attention.qkv), ("out", attention.out), ("gate_up", mlp.gate_up), ("down", mlp.down)):
        yield name, Weight.of(layer)


# --- sweep: the fastest tile ---------------------------------------------------------------------------------------


def sweep(size: Size) -> dict[str, Any]:
    """Of each matrix and number of rows: cuBLAS, the table's tile, and the best of the grid of tiles, in us."""
    from puyu.engine.kernels import matmul

    found: dict[str, Any] = {}
    for bits in (16, 8, 4):
        for name, weight in weights(size, bits):
            for rows in (1, 8):
                x = randn(rows, weight.num_inputs, size=size)
                dense = matmul.unpack(weight, size.dtype)
                times = {"cublas": 1e6 * seconds(lambda x=x, d=dense: torch.nn.functional.linear(x, d), size, inner=20)}
                for tile in tiles_of(rows, bits, size):
                    call = lambda x=x, w=weight, t=tile: matmul.multiply(x, w, tile=t)  # noqa: E731
                    times[str(tuple(tile))] = 1e6 * seconds(call, size, inner=20)
                best = min((key for key in times if key != "cublas"), key=lambda key: times[key])
                chosen = matmul.choose_tile(rows, weight)
                row = {"cublas": times["cublas"], "best": best, "best_us": times[best]}
                row["table_us"] = times.get(str(tuple(chosen))) if chosen else None
                row["gb_s"] = weight.data.nbytes / times[best] / 1e3
                found[f"{name} {bits} x {rows}"] = row
                print(f"  {name} {bits} x {rows}: {json.dumps(row)}", file=sys.stderr)
    return {"tiles": found}


def tiles_of(rows: int, bits: int, size: Size) -> Iterator[Any]:
    from puyu.engine.kernels.matmul import Tile, Weight, choose_tile

    table = choose_tile(rows, Weight(torch.empty(8, 8), bits))
    if table is not None:
        yield table
    if size.device.type != "cuda":
        return
    height = 1 if rows == 1 else 16
    for outputs in (8, 16, 32):
        for inputs in (256, 512, 1024) if rows == 1 else (128, 256):
            for warps, stages in ((4, 3), (4, 5), (8, 4)):
                yield Tile(outputs, inputs, height, warps, stages)


# --- decode: one sequence against the memory -----------------------------------------------------------------------


def spans_of(batch: int, context: int, block_size: int = 16) -> list[Span]:
    width = context // block_size + 1
    return [Span((5,), context, tuple(range(row * width, (row + 1) * width))) for row in range(batch)]


def decode(size: Size) -> dict[str, Any]:
    """Batch 1 after a short and a long context, in every format."""
    bandwidth = copy_bandwidth(size)
    found: dict[str, Any] = {"copy_gb_s": bandwidth / 1e9}
    for name, bits in (("bf16", 16), ("w8", 8), ("w4", 4), ("fp8", 7)):
        free()
        model = model_of(size, bits)
        blocks = size.context // 16 + 2
        cache = KVCache(size.config, num_blocks=blocks, block_size=16, device=size.device, dtype=size.dtype)
        cache.rows.normal_()
        runner = Runner(model, cache)
        assert runner.gpu is not None
        for context in (size.context // 32, size.context):
            spans = spans_of(1, context)
            took = seconds(lambda r=runner, s=spans: r.run(s), size, inner=20)
            read = weight_bytes(model) + context * KVCache.block_bytes(size.config, block_size=1, dtype=size.dtype)
            row = {"ms": 1e3 * took, "tokens_s": 1 / took, "read_gb": read / 1e9, "share": read / took / bandwidth}
            found[f"{name} after {context}"] = row
            print(f"  {name} after {context}: {json.dumps(row)}", file=sys.stderr)
        del model, cache, runner
    return found


# --- streams: the whole engine -------------------------------------------------------------------------------------


def serve(engine: Engine, count: int, size: Size) -> dict[str, float]:
    """`count` requests at once: output tokens a second, percentiles of time to first token and of time per token."""
    rng = np.random.default_rng(count)
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=1)
    began = time.perf_counter()
    for index in range(count):
        prompt = tuple(rng.integers(3, size.config.vocab_size, size.prompt).tolist())
        engine.add(Request(f"{count}-{index}", prompt, max_tokens=size.answer, params=params))
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    tokens = 0
    while engine.has_work:
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            assert event.token is not None, "a request failed"
            first.setdefault(event.running.request.id, now - began)
            last[event.running.request.id] = now - began
            tokens += 1
    took = time.perf_counter() - began
    each = [(last[name] - first[name]) / max(size.answer - 1, 1) for name in first]
    row = {"tokens_s": tokens / took}
    for name, values in (("ttft_ms", list(first.values())), ("tpot_ms", each)):
        row |= {f"{name}_p{p}": 1e3 * float(np.percentile(values, p)) for p in (50, 95, 99)}
    return row


def streams(size: Size) -> dict[str, Any]:
    """1 to 256 requests at once; with overlap, without, and with the torch modules alone."""
    from puyu.engine.overlap import OverlapEngine

    found: dict[str, Any] = {}
    for name, bits, kind, modules in (
        ("bf16 overlapped", 16, OverlapEngine, False),
        ("bf16", 16, Engine, False),
        ("w4 overlapped", 4, OverlapEngine, False),
        ("fp8 overlapped", 7, OverlapEngine, False),
        ("bf16 plain torch", 16, Engine, True),
    ):
        free()
        tokens = max(size.streams) * (size.prompt + size.answer + 16)
        running = max(size.streams)
        config = EngineConfig(cache_tokens=tokens, max_running=running, max_step_tokens=4096, prefix_cache=False)
        engine = kind(model_of(size, bits), config)
        if modules:
            engine.runner.gpu = None
        for count in size.streams if not modules else size.streams[::3]:
            serve(engine, count, size)
            found[f"{name} x {count}"] = row = serve(engine, count, size)
            print(f"  {name} x {count}: {json.dumps(row)}", file=sys.stderr)
        del engine
    return found


def peers(size: Size) -> dict[str, Any]:
    """transformers' generate with the same shape, bf16 and sdpa: one sequence and 32."""
    import transformers

    free()
    config = size.config
    shape = transformers.LlamaConfig(
        **{name: value for name, value in SHAPE.items() if name in ("vocab_size", "hidden_size", "intermediate_size")}
        if size.device.type == "cuda"
        else {name: TINY[name] for name in ("vocab_size", "hidden_size", "intermediate_size")},
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_positions,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    with size.device:
        model = transformers.LlamaForCausalLM(shape).eval()
    torch.set_default_dtype(before)
    found: dict[str, Any] = {}
    for count in (1, min(32, max(size.streams))):
        prompt = torch.randint(3, config.vocab_size, (count, size.prompt), device=size.device)
        settings = {"do_sample": False, "max_new_tokens": size.answer, "min_new_tokens": size.answer}
        call = lambda p=prompt, s=settings: model.generate(p, attention_mask=torch.ones_like(p), **s)  # noqa: E731
        with torch.inference_mode():
            took = seconds(call, size._replace(repeats=min(size.repeats, 3)))
        found[f"transformers {transformers.__version__} x {count}"] = {"tokens_s": count * size.answer / took}
    return found


# --- memory and context --------------------------------------------------------------------------------------------


def memory(size: Size) -> dict[str, Any]:
    """7B in int4 with eight streams of 4k tokens: the most memory that was ever taken."""
    free()
    config = EngineConfig(cache_tokens=8 * size.context, max_running=8, max_step_tokens=1024, prefix_cache=False)
    engine = Engine(model_of(size, 4), config)
    free()
    for index in range(8):
        prompt = tuple(np.random.default_rng(index).integers(3, size.config.vocab_size, size.context - 4).tolist())
        engine.add(Request(str(index), prompt, max_tokens=4))
    while engine.has_work:
        assert all(event.finish_reason != "error" for event in engine.step())
    peak = torch.cuda.max_memory_reserved() if size.device.type == "cuda" else 0
    return {"streams": 8, "tokens_each": size.context, "peak_gb": peak / 1e9}


def context(size: Size) -> dict[str, Any]:
    """One prompt of 200k tokens in chunks, then tokens after it; and how many tokens would fit the card."""
    free()
    model = model_of(size, 16)
    per_token = KVCache.block_bytes(size.config, block_size=1, dtype=size.dtype)
    room = torch.cuda.mem_get_info()[0] - (4 << 30) if size.device.type == "cuda" else 0
    config = EngineConfig(cache_tokens=size.long + 64, max_running=1, max_step_tokens=8192, prefix_cache=False)
    engine = Engine(model, config)
    rng = np.random.default_rng(0)
    engine.add(Request("long", tuple(rng.integers(3, size.config.vocab_size, size.long).tolist()), max_tokens=9))
    began, times = time.perf_counter(), []
    while engine.has_work:
        for event in engine.step():
            assert event.finish_reason != "error"
            times.append(time.perf_counter() - began)
    return {
        "tokens": size.long,
        "fits": room // per_token,
        "prefill_s": times[0],
        "prefill_tokens_s": size.long / times[0],
        "decode_tokens_s": (len(times) - 1) / (times[-1] - times[0]),
    }


# --- all of it -----------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Size], dict[str, Any]]] = {
    "check": check,
    "decode": decode,
    "memory": memory,
    "context": context,
    "streams": streams,
    "peers": peers,
    "sweep": sweep,
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; in this order")
    parser.add_argument("--tiny", action="store_true", help="on a CPU in Triton's interpreter: checks the bench itself")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    options = parser.parse_args(arguments)
    if options.tiny and not interpreting():
        parser.error("--tiny needs TRITON_INTERPRET=1 in the environment")
    if not options.tiny and not torch.cuda.is_available():
        print(json.dumps({"bench": "gpu_engine", "measured": False, "why": "torch sees no GPU"}))
        return 0
    size = size_of(options.tiny)
    result = facts(size)
    for name in options.parts.split(","):
        print(name, file=sys.stderr)
        result[name] = PARTS[name](size)
        free()
    if options.save and not options.tiny:
        harness.RESULTS.mkdir(parents=True, exist_ok=True)
        path = harness.RESULTS / f"{result['date'][:10]}-gpu_engine.json"
        path.write_text(json.dumps({**result, "bars": judged(result)}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)
    return 1 if result.get("check", {}).get("failed") else 0


def judged(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The bars of the parts that were run."""
    decoded = result.get("decode", {})
    shares = {
        bar: [row["share"] for name, row in decoded.items() if name.startswith(f"{form} ")]
        for bar, form in (("engine.14", "bf16"), ("engine.15", "w4"))
    }
    found = {bar: min(values) for bar, values in shares.items() if values}
    if "context" in result:  # what was computed, where the card would hold more
        found["engine.16"] = min(result["context"]["tokens"], result["context"]["fits"])
    if "memory" in result:
        found["engine.17"] = result["memory"]["peak_gb"]
    return harness.judged([harness.Samples(bar, [float(value)]) for bar, value in found.items()])


def facts(size: Size) -> dict[str, Any]:
    import triton

    cuda, versions = size.device.type == "cuda", {"torch": torch.__version__, "triton": triton.__version__}
    card = torch.cuda.get_device_name() if cuda else "interpreter"
    return {**harness.facts("gpu_engine", versions, card=card), "measured": cuda}


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main(sys.argv[1:]))
