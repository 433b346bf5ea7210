"""Text from a model that is being trained, made by the engine on shared weights: what `pretrain` and `sft` are given.

texts = go_on(model, tokenizer, ["The"], 64)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from puyu.types import SamplingParams

if TYPE_CHECKING:
    from puyu.model.heads import CausalLM
    from puyu.tokenizer.tokenizer import Tokenizer


def go_on(
    model: CausalLM, tokenizer: Tokenizer, prompts: Sequence[str], max_tokens: int, *, chat: bool = False
) -> list[str]:
    """The greedy continuation of each prompt, or with `chat` the answer to it as a user's turn."""
    from puyu.engine.core import EngineConfig
    from puyu.engine.llm import LLM

    longest = max(len(tokenizer.encode(prompt)) for prompt in prompts) + max_tokens
    # Room for the chat format around a prompt; no prefix is shared with a later evaluation of other weights.
    config = EngineConfig(cache_tokens=len(prompts) * (longest + 128), max_running=len(prompts), prefix_cache=False)
    with LLM.from_model(model, tokenizer, config=config) as llm:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        return [answer.text for answer in llm.batch(list(prompts), params=params, plain=not chat)]
