"""Puyu (浦语): one package for the whole life of a large language model.

    from puyu import LLM
    llm = LLM("runs/nano/ppo")
    print(llm.chat([{"role": "user", "content": "Who are you?"}]).text)

Public names are imported on first use, so that `import puyu` costs nothing and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from puyu.agent.loop import Agent
    from puyu.client import Client
    from puyu.engine.llm import LLM
    from puyu.errors import PuyuError
    from puyu.tokenizer.tokenizer import Tokenizer
    from puyu.tools.tool import Tool, Toolbox, tool
    from puyu.types import Completion, Conversation, Message, Preference, SamplingParams, ToolCall, ToolSpec

__version__ = "0.1.0"

_HOMES = {
    "LLM": "puyu.engine.llm",
    "Agent": "puyu.agent.loop",
    "Client": "puyu.client",
    "Completion": "puyu.types",
    "Conversation": "puyu.types",
    "Message": "puyu.types",
    "Preference": "puyu.types",
    "PuyuError": "puyu.errors",
    "SamplingParams": "puyu.types",
    "Tokenizer": "puyu.tokenizer.tokenizer",
    "Tool": "puyu.tools.tool",
    "ToolCall": "puyu.types",
    "ToolSpec": "puyu.types",
    "Toolbox": "puyu.tools.tool",
    "tool": "puyu.tools.tool",
}

__all__ = [
    "LLM",
    "Agent",
    "Client",
    "Completion",
    "Conversation",
    "Message",
    "Preference",
    "PuyuError",
    "SamplingParams",
    "Tokenizer",
    "Tool",
    "ToolCall",
    "ToolSpec",
    "Toolbox",
    "__version__",
    "tool",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'puyu' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
