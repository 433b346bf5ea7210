"""Speed and quality of a checkpoint through the engine: the lines that `quantize` prints before and after."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from puyu.types import GenerateRequest, SamplingParams

_TEXTS = (
    "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience "
    "and should act towards one another in a spirit of brotherhood.",
    "Everyone has the right to life, liberty and security of person. No one shall be held in slavery or servitude.",
    "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    "人人有权享有生命、自由和人身安全。任何人不得使为奴隶或奴役。",
)


def measure_checkpoint(folder: Path, *, new_tokens: int = 96, repeats: int = 3) -> dict[str, Any]:
    """Perplexity per token on fixed texts (UDHR articles 1, 3 and 4, English and Chinese) and greedy decode speed.

    Speed is the best of `repeats` runs of one sequence, in new tokens a second, prefill included.
    """
    from puyu.engine.llm import LLM

    llm = LLM(str(folder))
    try:
        scored = llm.score_all([("", text) for text in _TEXTS])
        tokens = sum(item.num_tokens for item in scored)
        perplexity = math.exp(-sum(item.logprob for item in scored) / tokens)
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(_TEXTS[0], params)
        speeds = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            done = llm.generate_all([request])[0]
            speeds.append(done.usage.completion_tokens / (time.perf_counter() - began))
    finally:
        llm.close()
    return {"perplexity": round(perplexity, 4), "decode_tokens_per_s": round(max(speeds[1:]), 1)}
