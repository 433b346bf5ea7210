"""The budget of prompt tokens keeps steps within their limit, whatever they cost, and prompts always come through."""

from __future__ import annotations

import random

import pytest

from puyu.engine.core import Engine, EngineConfig
from puyu.engine.pace import MIN_TOKENS, Pace
from puyu.engine.request import Request
from puyu.types import SamplingParams
from tests.engine.conftest import tiny_model


@pytest.mark.parametrize(("base", "each"), [(0.004, 0.0004), (0.0, 0.001), (0.02, 0.00001)])
def test_steps_come_to_stay_within_the_limit(base: float, each: float) -> None:
    pace, rng = Pace(0.05), random.Random(0)
    late = []
    for step in range(300):
        decoding = rng.randrange(1, 12)
        tokens = decoding + min(pace.budget(decoding) or 500, 400 if rng.random() < 0.3 else 0)
        seconds = base + each * tokens
        pace.measured(tokens, seconds)
        late += [seconds] if step > 20 else []
    assert max(late) <= 0.05 * 1.2, "at most a little over, where the line was fitted from few steps"
    if base + each * 412 > 0.05:
        assert max(late) > 0.025, "the limit is used"


def test_a_machine_that_is_too_slow_still_reads_prompts() -> None:
    pace = Pace(0.01)
    for _ in range(50):
        pace.measured(8, 0.08)
    assert pace.budget(8) == MIN_TOKENS


def test_no_limit_is_no_budget() -> None:
    pace = Pace(0.0)
    pace.measured(8, 0.08)
    assert pace.budget(8) is None and Pace(1.0).budget(3) is None, "nothing is known yet"


class Steady(Pace):
    """Ten milliseconds a token, however fast it really is."""

    def measured(self, tokens: int, seconds: float) -> None:
        super().measured(tokens, 0.01 * tokens)


def prompt_chunks(limit_ms: float) -> list[int]:
    """Lengths of the chunks of a long prompt beside a request that is answering."""
    engine = Engine(tiny_model(), EngineConfig(cache_tokens=1024, max_pause_ms=limit_ms))
    engine.scheduler.pace = Steady(limit_ms / 1000)
    engine.add(Request("reader", (1, 2, 3), 100, SamplingParams(ignore_eos=True)))
    engine.step()
    engine.add(Request("long", tuple(range(1, 61)), 2))
    lengths = []
    while engine.has_work:
        before = next((r.num_computed for r in engine.scheduler.running if r.request.id == "long"), 0)
        engine.step()
        after = next((r.num_computed for r in engine.scheduler.running if r.request.id == "long"), None)
        if after is not None and after > before + 1:
            lengths.append(after - before)
    return lengths


def test_a_long_prompt_is_cut_while_somebody_reads() -> None:
    assert prompt_chunks(0.0) == [60]
    assert prompt_chunks(200.0) == [19, 19, 19, 3]
    assert prompt_chunks(1.0) == [MIN_TOKENS] * 15
