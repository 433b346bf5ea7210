"""The agent's loop with scripted models: every turn is written down, so each outcome is exact."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from puyu import Agent, tool
from puyu.agent.loop import Event
from puyu.agent.react import NOTE
from puyu.agent.step import Step, Trajectory
from puyu.errors import ConfigError, RequestError
from puyu.tools.calculate import calculator
from puyu.tools.tool import Observation
from puyu.types import Completion, Conversation, Delta, GenerateRequest, Message, SamplingParams, ToolCall, Usage
from tests.fakes import ScriptedModel, called, said

CALL = ToolCall("calculator", '{"expression": "12*7"}', "c1")


def roles(request: GenerateRequest) -> list[str]:
    return [message.role for message in request.prompt if isinstance(message, Message)]


def test_an_answer_without_tools() -> None:
    model = ScriptedModel([said("Hello.")])
    run = Agent(model).run("Hi")
    assert (run.status, run.answer, run.calls) == ("done", "Hello.", ())
    assert model.requests[0].tools == () and roles(model.requests[0]) == ["user"]


def test_a_call_its_observation_and_the_answer() -> None:
    model = ScriptedModel([called(CALL, text="Let me see."), said("84")])
    run = Agent(model, [calculator], system="Be brief.", params=SamplingParams(max_tokens=9)).run("12*7?")
    assert (run.status, run.answer, run.calls) == ("done", "84", (CALL,))
    assert [tool.name for tool in model.requests[0].tools] == ["calculator"]
    assert model.requests[1].params.max_tokens == 9
    assert model.requests[1].prompt == (
        Message("system", "Be brief."),
        Message("user", "12*7?"),
        Message("assistant", "Let me see.", tool_calls=(CALL,)),
        Message("tool", "84", tool_call_id="c1", name="calculator"),
    )
    assert run.usage == Usage(20, 7)


def test_history_stands_before_the_request() -> None:
    model = ScriptedModel([said("Puyu.")])
    history = (Message("user", "Hi"), Message("assistant", "Hello"))
    Agent(model, system="S").run("Who?", history=history)
    assert roles(model.requests[0]) == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (ToolCall("calculator", '{"expression": "1'), "not JSON"),
        (ToolCall("calculator", "{}"), "'expression' is missing"),
        (ToolCall("calculater", "{}"), "did you mean 'calculator'?"),
        (ToolCall("calculator", '{"expression": "1/0"}'), "division by zero"),
        (ToolCall("", ""), "there is no tool"),
    ],
)
def test_mistakes_become_observations_that_the_model_reads(call: ToolCall, words: str) -> None:
    model = ScriptedModel([called(call), called(CALL), said("84")])
    run = Agent(model, [calculator]).run("12*7?")
    assert (run.status, run.answer) == ("done", "84")
    shown = model.requests[1].prompt[-1]
    assert isinstance(shown, Message) and shown.role == "tool" and words in shown.text
    assert not run.steps[0].observations[0].ok and run.steps[1].observations[0].ok


def test_parallel_calls_are_answered_in_call_order_with_their_ids() -> None:
    calls = tuple(ToolCall("calculator", f'{{"expression": "{n}+0"}}') for n in (3, 1, 2))
    model = ScriptedModel([called(*calls), said("done")])
    run = Agent(model, [calculator]).run("?")
    assert [seen.text for seen in run.steps[0].observations] == ["3", "1", "2"]
    ids = [call.id for call in run.steps[0].calls]
    assert len(set(ids)) == 3 and [m.tool_call_id for m in run.messages if m.role == "tool"] == ids


def test_limits_are_said() -> None:
    run = Agent(ScriptedModel([called(CALL)] * 2), [calculator], max_turns=2).run("?")
    assert (run.status, run.answer, len(run.steps)) == ("max_turns", "", 2)
    assert run.steps[1].observations[0].text == "84"
    for reason in ("length", "abort", "error"):
        cut = Completion(Message("assistant", "The answ"), reason)
        run = Agent(ScriptedModel([cut])).run("?")
        assert run.status == reason and run.answer == ("The answ" if reason == "length" else "")


def test_what_the_server_refuses_is_raised() -> None:
    class Refusing(ScriptedModel):
        async def generate(self, request: GenerateRequest) -> Completion:
            raise RequestError("the prompt is too long", param="messages")

    with pytest.raises(RequestError):
        Agent(Refusing([])).run("?")


@pytest.mark.parametrize("wrong", [{"max_turns": 0}, {"style": "magic"}, {"tools": [lambda x: x]}])
def test_a_bad_agent_is_an_error_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Agent(ScriptedModel([]), **wrong)


def test_events_in_order_and_the_same_result_when_streamed() -> None:
    script = [called(CALL, text="Hm"), said("84")]
    events: list[Event] = []
    streamed = Agent(ScriptedModel(script), [calculator], on_event=events.append).run("?")
    kinds = [type(event) for event in events]
    assert kinds == [Delta] * 3 + [ToolCall, Observation, Step] + [Delta] * 3 + [Step, Trajectory]
    plain = Agent(ScriptedModel(script), [calculator]).run("?")
    assert streamed.messages == plain.messages and streamed.usage == plain.usage


def test_inside_a_running_event_loop() -> None:
    async def main() -> str:
        agent = Agent(ScriptedModel([said("a"), said("b")]))
        return agent.run("?").answer + (await agent.arun("?")).answer

    assert asyncio.run(main()) == "ab"


def test_a_trajectory_is_training_data() -> None:
    model = ScriptedModel([called(CALL), said("84")])
    conversation = Agent(model, [calculator], system="S").run("12*7?").to_conversation()
    assert [m.role for m in conversation.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert conversation.metadata == {"status": "done", "turns": 2}
    assert Conversation.from_openai(conversation.to_openai()) == conversation


# -- ReAct -----------------------------------------------------------------------------------------------------

ACTION = 'Thought: multiply\nAction: calculator\nAction Input: {"expression": "12*7"}\n'


def test_react_run() -> None:
    model = ScriptedModel([said(ACTION), said("Thought: done\nFinal Answer: It is 84.")])
    run = Agent(model, [calculator], system="Be brief.", style="react").run("12*7?")
    assert (run.status, run.answer) == ("done", "It is 84.")
    first, second = model.requests
    assert first.params.stop == ("Observation:",) and first.tools == ()
    system = first.prompt[0]
    assert isinstance(system, Message) and system.text.startswith("Be brief.") and '"expression"' in system.text
    assert second.prompt[2:] == (Message("assistant", ACTION), Message("user", "Observation: 84"))
    native = run.to_conversation().messages
    assert [m.role for m in native] == ["system", "user", "assistant", "tool", "assistant"]
    assert native[0].text == "Be brief." and native[2].text == "multiply"


def test_react_turn_without_form_gets_a_note() -> None:
    model = ScriptedModel([said("I like numbers."), said("Final Answer: 84")])
    run = Agent(model, [calculator], style="react").run("12*7?")
    assert (run.status, run.answer, len(run.steps)) == ("done", "84", 2)
    assert model.requests[1].prompt[-1] == Message("user", NOTE)


def test_react_without_tools_is_a_plain_answer() -> None:
    assert Agent(ScriptedModel([said("Hi")]), style="react").run("?").answer == "Hi"


# -- the documentation -----------------------------------------------------------------------------------------


def test_the_agent_of_the_docs_runs_and_is_short() -> None:
    text = Path("docs/agent.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) < 20
    call = ToolCall("temperature", '{"city": "Wuhan"}')
    answers = ScriptedModel([called(call), said("It is 31 degrees in Wuhan.")])
    place = {"LLM": lambda path: answers, "tool": tool, "Agent": Agent}
    names: dict[str, Any] = {}
    stripped = re.sub(r"^from puyu import .*LLM.*$", "", code, flags=re.MULTILINE)
    printed: list[str] = []
    exec(compile(stripped, "docs/agent.md", "exec"), {**place, "print": lambda *a: printed.append(" ".join(a))}, names)
    assert printed == ["It is 31 degrees in Wuhan."]
    assert answers.requests[1].prompt[-1].text == "31"  # type: ignore[union-attr]
