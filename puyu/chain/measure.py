"""Speed of a checkpoint through the engine: the lines that `quantize` prints before and after."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from puyu.types import GenerateRequest, SamplingParams

_TEXT = (
    "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience "
    "and should act towards one another in a spirit of brotherhood. 人人生而自由,在尊严和权利上一律平等。"
)


def measure_checkpoint(folder: Path, *, new_tokens: int = 96, repeats: int = 3) -> dict[str, Any]:
    """Greedy decoding and prefill of one sequence, in tokens a second: the best of `repeats` runs.

    Decoding is new tokens over the time of the request, its short prompt included; prefill is a prompt of about
    three quarters of the context and one new token.
    """
    from puyu.engine.core import EngineConfig
    from puyu.engine.llm import LLM

    llm = LLM(str(folder), config=EngineConfig(prefix_cache=False))
    try:
        context = llm.model.config.max_positions
        new_tokens = min(new_tokens, context // 2)
        short, long = _prompt(llm, context // 4), _prompt(llm, context * 3 // 4)
        decoded, _ = _best(llm, short, new_tokens, repeats)
        _, read = _best(llm, long, 1, repeats)
    finally:
        llm.close()
    return {"decode_tokens_per_s": round(decoded, 1), "prefill_tokens_per_s": round(read, 1)}


def _prompt(llm: Any, tokens: int) -> str:
    """The text again and again, cut to fit into that many tokens."""
    text = _TEXT
    while len(llm.prompt_ids(GenerateRequest(text))) < tokens:
        text += " " + _TEXT
    while len(llm.prompt_ids(GenerateRequest(text))) > tokens:
        text = text[: len(text) * 9 // 10]
    return text


def _best(llm: Any, prompt: str, new_tokens: int, repeats: int) -> tuple[float, float]:
    """(new tokens a second, prompt tokens a second) of the quickest run after one to warm up."""
    request = GenerateRequest(prompt, SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True))
    shortest, tokens = float("inf"), 0
    for index in range(repeats + 1):
        began = time.perf_counter()
        usage = llm.generate_all([request])[0].usage
        if index:
            shortest, tokens = min(shortest, time.perf_counter() - began), usage.prompt_tokens
    return new_tokens / shortest, tokens / shortest
