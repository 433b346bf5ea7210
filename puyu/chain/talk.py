"""The last stage: serve a model over HTTP, talk to it with `puyu.Client`, run an agent through it, stop cleanly.

Every line of the transcript comes from the model that the chain built. The base model's raw continuations are
taken offline beside it, as they are.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import Field

from puyu.configure import Config
from puyu.errors import PuyuError
from puyu.files import write_json
from puyu.log import Progress
from puyu.types import Message, SamplingParams


class TalkPrompt(Config):
    """One conversation of the transcript."""

    title: str = ""
    """Heading in the transcript; the first user turn when empty."""
    user: tuple[str, ...]
    """The user's turns, in order."""
    calculator: bool = False
    """Run it as an agent that may call the calculator."""


class TalkConfig(Config):
    """What to serve and what to say to it."""

    model: Path
    """Checkpoint directory to serve."""
    base: Path | None = None
    """Base model whose raw continuations are shown beside the transcript."""
    base_prompts: tuple[str, ...] = ("The ", "我们")
    """Beginnings that the base model continues."""
    prompts: tuple[TalkPrompt, ...] = Field(default=(TalkPrompt(user=("Who are you?",)),))
    """The fixed conversations of the transcript."""
    system: str = ""
    """System message of every conversation."""
    max_tokens: int = 96
    """Longest answer, in tokens."""
    base_tokens: int = 60
    """Longest continuation of the base model, in tokens."""


def run(config: TalkConfig, *, out: Path) -> dict[str, Any]:
    """Serve, talk, stop; writes transcript.json and base.json. Numbers: start and stop time, tool calls, tokens/s."""
    from puyu.client import Client
    from puyu.serve.server import ServeConfig, running_server

    entries: list[dict[str, Any]] = []
    began = time.monotonic()
    with running_server(ServeConfig(model=str(config.model), port=0), log=out / "server.log") as url:
        started = time.monotonic() - began
        client = Client(url)
        progress = Progress("talk", len(config.prompts), unit="conversation")
        for prompt in config.prompts:
            entries.append(_converse(client, config, prompt))
            progress.update()
        progress.close()
        speed = _stream_speed(client, config)
        stopping = time.monotonic()
    stopped = time.monotonic() - stopping
    write_json(out / "transcript.json", entries)
    write_json(out / "base.json", _continuations(config))
    calls = sum(len(message.get("tool_calls", ())) for entry in entries for message in entry["messages"])
    return {
        "headline": f"{len(entries)} conversations, {calls} tool calls, {speed:.0f} tok/s streamed, "
        f"up in {started:.1f} s, down in {stopped:.1f} s",
        "conversations": len(entries),
        "tool_calls": calls,
        "stream_tokens_per_s": round(speed, 1),
        "start_seconds": round(started, 2),
        "stop_seconds": round(stopped, 2),
    }


def _converse(client: Any, config: TalkConfig, prompt: TalkPrompt) -> dict[str, Any]:
    params = SamplingParams(max_tokens=config.max_tokens, temperature=0.0)
    messages = [Message("system", config.system)] if config.system else []
    tools = _calculator() if prompt.calculator else []
    for text in prompt.user:
        messages += _answered(client, messages, text, tools, params)
    title = prompt.title or prompt.user[0]
    return {"title": title, "messages": [message.to_openai() for message in messages]}


def _answered(
    client: Any, messages: list[Message], text: str, tools: list[Any], params: SamplingParams
) -> list[Message]:
    """The user's turn and all that follows it."""
    asked = [*messages, Message("user", text)]
    if not tools:
        return [asked[-1], client.chat(asked, params=params).message]
    from puyu.agent.loop import Agent

    trajectory = Agent(client, tools=tools, params=params).run(text, history=messages)
    return list(trajectory.messages[len(messages) :])


def _calculator() -> list[Any]:
    from puyu.tools.calculate import calculator

    return [calculator]


def _stream_speed(client: Any, config: TalkConfig) -> float:
    """Tokens a second of one streamed answer, first token to last."""
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    began, tokens = 0.0, 0
    for delta in client.stream_chat([Message("user", "Hello")], params=params):
        began = began or time.monotonic()
        if delta.usage is not None:
            tokens = delta.usage.completion_tokens
    if tokens < 2:
        raise PuyuError("the served model streamed no tokens", remedy="run `puyu serve` by hand and look at its log")
    return (tokens - 1) / max(time.monotonic() - began, 1e-9)


def _continuations(config: TalkConfig) -> list[dict[str, str]]:
    if config.base is None:
        return []
    from puyu.engine.llm import LLM

    llm = LLM(str(config.base))
    try:
        params = SamplingParams(max_tokens=config.base_tokens, temperature=0.8, top_p=0.95, seed=1)
        return [{"prompt": p, "text": llm.complete(p, params=params).text} for p in config.base_prompts]
    finally:
        llm.close()
