"""The agent: a model, tools, and one loop between them.

    agent = Agent(LLM("runs/nano/ppo"), tools=[calculator])
    print(agent.run("What is 12.5 * 8?").answer)

Each turn asks the model, runs the calls of its reply side by side, and shows it the observations, until it answers
without a call or `max_turns` is reached. What the model does wrong (an unknown tool, arguments that are no JSON,
a failing tool) becomes an observation that it can read; what the server or the user does wrong is raised. Two
styles: `native` (the model's own tool calls) and `react` (text, see `puyu.agent.react`).

It knows a model only as a `LanguageModel`: our engine, our server, or somebody's endpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from puyu.agent import react
from puyu.agent.step import Status, Step, Trajectory
from puyu.errors import ConfigError
from puyu.tools.tool import Observation, Tool, Toolbox
from puyu.types import Completion, Delta, GenerateRequest, LanguageModel, Message, SamplingParams, ToolCall, Usage

Event = Delta | ToolCall | Observation | Step | Trajectory
"""What a callback is told, in order: deltas of the reply, then its calls, their observations, the finished step;
last of all the trajectory."""


@dataclass(frozen=True)
class Agent:
    """A model with tools. `tools` are Tools or plain functions with type hints and a docstring.

    `params` go with every turn. `on_event` is called in the loop's thread; with it, turns are streamed.
    """

    model: LanguageModel
    tools: Sequence[Tool | Callable[..., Any]] = ()
    system: str = ""
    max_turns: int = 6
    params: SamplingParams = field(default_factory=SamplingParams)
    style: Literal["native", "react"] = "native"
    on_event: Callable[[Event], None] | None = None

    def __post_init__(self) -> None:
        if self.max_turns < 1:
            raise ConfigError(f"max_turns must be at least 1, not {self.max_turns}")
        if self.style not in ("native", "react"):
            raise ConfigError(f"unknown style {self.style!r}", remedy="use 'native' or 'react'")
        Toolbox(self.tools)  # a tool without a schema is an error here, not at the first run

    @property
    def toolbox(self) -> Toolbox:
        return Toolbox(self.tools)

    def run(self, text: str, *, history: Sequence[Message] = ()) -> Trajectory:
        """Work on one request, after the turns of `history`; blocks until done."""
        return run_blocking(self.arun(text, history=history))

    async def arun(self, text: str, *, history: Sequence[Message] = ()) -> Trajectory:
        """Like `run`, in the caller's event loop."""
        toolbox = self.toolbox
        opening = (*self._system(), *history, Message("user", text))
        steps: list[Step] = []
        status: Status = "max_turns"
        while len(steps) < self.max_turns:
            step = await self._step(opening, steps, toolbox)
            steps.append(step)
            self._tell(step)
            if ended := _ended(step):
                status = ended
                break
        trajectory = Trajectory(opening, tuple(steps), status, toolbox.specs)
        self._tell(trajectory)
        return trajectory

    def _system(self) -> tuple[Message, ...]:
        return (Message("system", self.system),) if self.system else ()

    async def _step(self, opening: tuple[Message, ...], steps: Sequence[Step], toolbox: Toolbox) -> Step:
        """One model turn and the observations of its calls."""
        completion = await self._ask(self._request(opening, steps, toolbox))
        step = self._read(completion, len(steps))
        for call in step.calls:
            self._tell(call)
        observations = await toolbox.arun(step.calls)
        for observation in observations:
            self._tell(observation)
        return replace(step, observations=observations)

    def _request(self, opening: tuple[Message, ...], steps: Sequence[Step], toolbox: Toolbox) -> GenerateRequest:
        if self.style == "native" or not len(toolbox):
            turns = (message for step in steps for message in step.to_messages())
            return GenerateRequest((*opening, *turns), self.params, toolbox.specs)
        explained = "\n\n".join(filter(None, [self.system, react.instructions(toolbox.specs)]))
        rest = opening[1:] if self.system else opening
        shown = (message for step in steps for message in react.to_messages(step))
        params = replace(self.params, stop=(*self.params.stop, react.STOP))
        return GenerateRequest((Message("system", explained), *rest, *shown), params)

    def _read(self, completion: Completion, turn: int) -> Step:
        calls, text, note = completion.message.tool_calls, completion.text, ""
        if self.style == "react" and self.tools:
            parsed = react.read_turn(completion.text, turn=turn)
            calls, text = parsed.calls, parsed.text
            note = "" if parsed.calls or parsed.final or completion.finish_reason != "stop" else react.NOTE
        if completion.finish_reason in ("abort", "error"):
            calls = ()
        calls = tuple(replace(call, id=call.id or f"call_{turn}_{i}") for i, call in enumerate(calls))
        return Step(text, calls, (), completion.finish_reason, completion.usage, completion.text, note)

    async def _ask(self, request: GenerateRequest) -> Completion:
        if self.on_event is None:
            return await self.model.generate(request)
        parts: list[str] = []
        calls: list[ToolCall] = []
        last = Delta(finish_reason="error")
        async for delta in self.model.stream(request):
            self._tell(delta)
            parts.append(delta.text)
            calls += delta.tool_calls
            last = delta
        message = Message("assistant", "".join(parts), tool_calls=tuple(calls))
        return Completion(message, last.finish_reason or "error", last.usage or Usage())

    def _tell(self, event: Event) -> None:
        if self.on_event is not None:
            self.on_event(event)


def _ended(step: Step) -> Status | None:
    """How the run ends with this step; None when it goes on."""
    if step.finish_reason in ("abort", "error"):
        return "abort" if step.finish_reason == "abort" else "error"
    if step.calls or step.note:
        return None
    return "length" if step.finish_reason == "length" else "done"


T = TypeVar("T")


def run_blocking(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end from ordinary code; inside a running event loop (a notebook), in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
