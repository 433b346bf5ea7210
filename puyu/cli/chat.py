"""`puyu chat DIR|HUB_ID` or `puyu chat --url URL`: talk to a model in the terminal, with streaming.

Lines from a pipe are turns of one conversation; `--prompt` asks once. Answers go to standard output, all else to
standard error. With `--url` no torch is needed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from puyu.cli.local import add_flags, open_llm
from puyu.errors import ConfigError, RequestError
from puyu.log import say
from puyu.types import Delta, GenerateRequest, LanguageModel, Message, SamplingParams, ToolCall

if TYPE_CHECKING:
    from puyu.agent.loop import Agent, Event

HELP = "/reset forgets the conversation   /quit ends   (Ctrl-C stops an answer, Ctrl-D ends)"


def parser(verb: str, help: str) -> argparse.ArgumentParser:
    """Arguments that `chat` and `agent` share."""
    made = argparse.ArgumentParser(prog=f"puyu {verb}", description=help, allow_abbrev=False)
    made.add_argument("model", nargs="?", default="", help="model folder or hub id (owner/name, ms:owner/name)")
    made.add_argument("--url", default="", help="talk to a server (ours or OpenAI-compatible) instead")
    made.add_argument("--served-name", default="", help="which of the server's models; the first by default")
    made.add_argument("--api-key", default="", help="the server's key; better in the variable PUYU_API_KEY")
    made.add_argument("--system", default="", help="system text")
    made.add_argument("--max-tokens", type=int, default=256, help="longest answer, in tokens [256]")
    made.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token [0]")
    made.add_argument("--top-p", type=float, default=1.0, help="sample from this share of the probability [1]")
    made.add_argument("--top-k", type=int, default=0, help="sample from so many tokens; 0 is all [0]")
    made.add_argument("--min-p", type=float, default=0.0, help="leave out what is below this share of the best [0]")
    made.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 makes repeating unlikely [1]")
    made.add_argument("--seed", type=int, default=None, help="makes sampling repeatable")
    made.add_argument("--style", choices=("native", "react"), default="native", help="how tools are called [native]")
    add_flags(made)
    return made


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    options = parser("chat", "Talk to a model in the terminal.")
    options.add_argument("--calculator", action="store_true", help="offer the calculator as a tool")
    options.add_argument("--prompt", default=None, help="ask this once and end")
    options.add_argument("--raw", action="store_true", help="continue plain text, without the chat template")
    given = options.parse_args(list(argv))
    with opened(given) as model:
        talk = Talk(model, given)
        turns = [given.prompt] if given.prompt is not None else typed_lines()
        for turn in turns:
            if turn.strip() == "/quit":
                break
            talk.turn(turn)
        talk.report()
    return 0


@contextlib.contextmanager
def opened(given: argparse.Namespace) -> Iterator[LanguageModel]:
    """The model that the arguments name: a client, or an engine in this process."""
    if bool(given.model) == bool(given.url):
        raise ConfigError("name one model", remedy="puyu chat DIR, or puyu chat owner/name, or puyu chat --url URL")
    if given.url:
        from puyu.client import Client

        key = given.api_key or os.environ.get("PUYU_API_KEY", "")
        with Client(given.url, model=given.served_name, api_key=key) as client:
            yield client
    else:
        with open_llm(given.model, given) as llm:
            yield llm


def params_of(given: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        given.max_tokens,
        given.temperature,
        given.top_p,
        given.top_k,
        seed=given.seed,
        min_p=given.min_p,
        repetition_penalty=given.repetition_penalty,
    )


def typed_lines() -> Iterator[str]:
    """Turns that a person types, or the lines of a pipe."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() a history and arrow keys
    say(HELP)
    while True:
        try:
            line = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            say()
            return
        if line.strip():
            yield line


class Screen:
    """Shows events as they come: text as it is, calls and observations on lines of their own."""

    def __init__(self) -> None:
        self.at_start = True

    def show(self, event: Event) -> None:
        """The callback of an agent."""
        from puyu.tools.tool import Observation

        if isinstance(event, Delta):
            self._write(event.text)
        elif isinstance(event, ToolCall):
            self.line(f"  -> {event.name}({event.arguments})")
        elif isinstance(event, Observation):
            self.line(f"  {'=' if event.ok else '!'} {event.text}")

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self.at_start = text.endswith("\n")

    def line(self, text: str) -> None:
        """A whole line, after ending the one under way."""
        self.end()
        self._write(text + "\n")

    def end(self) -> None:
        """Begin a new line, unless one has just begun."""
        if not self.at_start:
            self._write("\n")


@dataclass
class Talk:
    """A conversation at the terminal: history, and what it has cost so far."""

    model: LanguageModel
    given: argparse.Namespace
    history: tuple[Message, ...] = ()
    tokens: int = 0
    seconds: float = 0.0
    screen: Screen = field(default_factory=Screen)

    def turn(self, text: str) -> None:
        """One command or one question. Ctrl-C stops the answer, not the conversation."""
        if text.strip() == "/reset":
            self.history = ()
            say("forgotten")
        elif text.strip() == "/help":
            say(HELP)
        else:
            began = time.monotonic()
            try:
                self._continue(text) if self.given.raw else self._answer(text)
            except KeyboardInterrupt:
                say("\n(stopped)")
            except RequestError as error:
                if not sys.stdin.isatty():
                    raise
                say(f"error: {error}")
            self.seconds += time.monotonic() - began
            self.screen.end()

    def _answer(self, text: str) -> None:
        run = self.agent().run(text, history=self.history)
        self.history = tuple(message for message in run.messages if message.role != "system")
        self.tokens += run.usage.completion_tokens
        if run.status != "done":
            say(f"\n(ended: {run.status})")

    def agent(self) -> Agent:
        """The model with the tools that were asked for."""
        from puyu.agent.loop import Agent
        from puyu.tools.calculate import calculator

        agent = Agent(self.model, [calculator] if self.given.calculator else (), self.given.system)
        return replace(agent, params=params_of(self.given), style=self.given.style, on_event=self.screen.show)

    def _continue(self, text: str) -> None:
        async def stream() -> None:
            request = GenerateRequest(text, params_of(self.given))
            async for delta in self.model.stream(request):
                self.screen.show(delta)
                self.tokens += delta.usage.completion_tokens if delta.usage else 0

        asyncio.run(stream())

    def report(self) -> None:
        """Tokens per second of all answers, tools included."""
        if self.tokens:
            rate = self.tokens / max(self.seconds, 1e-9)
            say(f"{self.tokens} tokens in {self.seconds:.1f} s, {rate:.1f} tokens/s")
