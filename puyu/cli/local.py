"""Flags of the verbs that run a model in this process, and the `LLM` that they name.

A verb adds its own arguments, then these; torch is imported when the model is opened, not for a help page.

    add_flags(parser); ...; with open_llm(given.model, given) as llm: ...
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puyu.engine.llm import LLM


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Where and how the engine runs."""
    engine = parser.add_argument_group("engine")
    engine.add_argument("--device", default="auto", help="auto, cpu or cuda [auto]")
    engine.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 [auto]")
    engine.add_argument("--deterministic", action="store_true", help="the same answer in any company; slower")
    engine.add_argument(
        "--cache-dtype", choices=("auto", "int8", "int4"), default="auto", help="keys and values [auto]"
    )
    engine.add_argument(
        "--cache-tokens", type=int, default=0, help="room for keys and values, in tokens; 0 chooses [0]"
    )
    engine.add_argument("--context", type=int, default=0, help="longest conversation, in tokens; 0: the model's [0]")
    engine.add_argument("--draft-model", default="", metavar="DIR", help="a small model that guesses ahead")
    engine.add_argument(
        "--draft-tokens", type=int, default=0, help="guess so many tokens ahead, from the text itself [0]"
    )
    engine.add_argument(
        "--allow-pickle", action="store_true", help="read pickle weights where there are no safetensors"
    )


def open_llm(model: str, given: argparse.Namespace, *, adapters: Mapping[str, str] | None = None) -> LLM:
    """The model with what `add_flags` read; ConfigError names a flag."""
    names = ("deterministic", "cache_dtype", "cache_tokens", "context", "draft_tokens", "allow_pickle")
    from puyu.configure import build
    from puyu.engine.core import EngineConfig
    from puyu.engine.llm import LLM

    config = build(EngineConfig, {name: getattr(given, name) for name in names}, where="engine flags")
    draft = given.draft_model or None
    return LLM(model, device=given.device, dtype=given.dtype, config=config, draft_model=draft, adapters=adapters)
