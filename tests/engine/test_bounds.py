"""The default mode: other schedules change a token only where the two likeliest are closer than the bound."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from puyu.engine.bounds import margin_bound
from puyu.engine.core import Engine, EngineConfig
from puyu.engine.request import Request, Running
from puyu.engine.runner import Span
from puyu.model.heads import CausalLM
from puyu.model.linear import Linear, QuantFormat, QuantLinear
from puyu.model.packed import PackedPlan
from puyu.model.quant_modules import replace_module
from puyu.quant.rtn import rtn
from tests.engine.conftest import tiny_model

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 3, "head_dim": 32, "vocab_size": 199}
KINDS = ["float64", "float32", "float16", "bfloat16", "int8", "int4", "int8 keys"]


def model_of(kind: str, seed: int) -> tuple[CausalLM, EngineConfig]:
    model = tiny_model(seed, **SHAPE)
    if kind in ("int8", "int4"):
        form = QuantFormat(8) if kind == "int8" else QuantFormat(4, 32, symmetric=False)
        for name, layer in list(model.trunk.named_modules()):
            if isinstance(layer, Linear):
                replace_module(model.trunk, name, QuantLinear.of(rtn(layer.weight.detach(), form), bias=layer.bias))
    dtype = {"float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(kind, torch.float32)
    return model.to(dtype), EngineConfig(cache_dtype="int8" if kind == "int8 keys" else "auto", cache_tokens=2048)


def requests(seed: int) -> list[Request]:
    rng = random.Random(seed)
    shared = [rng.randrange(199) for _ in range(30)]
    made = []
    for index in range(8):
        own = [rng.randrange(199) for _ in range(rng.randrange(1, 40))]
        prompt = (*shared[: rng.choice((0, 16, 30))], *own, *own[:4])  # something for prompt lookup to find
        made.append(Request(str(index), prompt, 24))
    return made


def run(engine: Engine, wanted: Sequence[Request]) -> list[Running]:
    runs = []
    for request in wanted:
        runs.append(engine.add(request))
        engine.step()
    while engine.has_work:
        engine.step()
    return runs


def close(model: CausalLM, tokens: Sequence[int]) -> float:
    """How close the two likeliest tokens are after these, as a share of the largest logit."""
    ids = torch.tensor(tokens)
    with torch.inference_mode():
        row = model(ids, torch.arange(len(ids)), PackedPlan.build((0,), len(ids)))[-1].double()
    best, second = row.topk(2).values.tolist()
    return (best - second) / float(row.abs().max())


SCHEDULES = {
    "chunks": {"max_step_tokens": 9, "max_running": 3},
    "preemption": {"cache_tokens": 112, "block_size": 4, "max_running": 6},
    "guesses": {"draft_tokens": 3, "block_size": 4},
}


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_differ_only_where_two_are_close(kind: str, schedule: str) -> None:
    different = 0
    for seed in range(2):
        model, config = model_of(kind, seed)
        bound = margin_bound(model, codes=kind == "int8 keys")
        wanted = requests(seed)
        alone = [run(Engine(model, config), [request])[0] for request in wanted]
        engine = Engine(model, config.model_copy(update=SCHEDULES[schedule]))
        for expected, found in zip(alone, run(engine, wanted), strict=True):
            pairs = zip(expected.generated, found.generated, strict=True)
            first = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
            if first is not None:
                different += 1
                assert close(model, expected.tokens[: expected.num_prompt + first]) <= bound
    assert kind != "float64" or different == 0


@pytest.mark.parametrize("kind", KINDS)
def test_logits_move_by_much_less_than_the_bound(kind: str) -> None:
    """One prompt as a whole and in chunks: the largest change of a logit, as a share of the largest logit."""
    moved = 0.0
    for seed in range(3):
        model, config = model_of(kind, seed)
        rng = random.Random(seed)
        prompt = [rng.randrange(199) for _ in range(80)]
        rows = []
        for sizes in ([80], [7, 1] * 10):
            runner = Engine(model, config).runner
            runner.cache.rows.zero_()
            blocks, parts, start = tuple(range(6)), [], 0
            for size in sizes:
                span = Span(prompt[start : start + size], start, blocks, size)
                parts.append(runner.run([span]).logits_SV.double())
                start += size
            rows.append(torch.cat(parts))
        whole, cut = rows
        moved = max(moved, float(((whole - cut).abs().amax(1) / whole.abs().amax(1)).max()))
    bound = margin_bound(model, codes=kind == "int8 keys")

    assert moved <= bound / 2, "the bound has room"
    assert moved > 0 or kind == "float64", "the test means what its name says"
