"""`puyu agent DIR|HUB_ID "TASK"` or `puyu agent --url URL "TASK"`: answer one task with tools.

Shows each call and its observation, then the answer; the exit code is 1 when a limit came before the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from puyu.cli.chat import Screen, opened, params_of, parser
from puyu.errors import ConfigError
from puyu.log import say


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    options = parser("agent", "Answer one task with tools (the calculator).")
    options.add_argument("task", nargs="?", default="", help="what to do")
    options.add_argument("--max-turns", type=int, default=6, help="at most this many model turns [6]")
    given = options.parse_args(list(argv))
    if given.url and not given.task:  # the only word is the task: the server has the model
        given.model, given.task = "", given.model
    if not given.task:
        raise ConfigError("no task was given", remedy='for example: puyu agent runs/nano/ppo "What is 12*7?"')
    from puyu.agent.loop import Agent
    from puyu.tools.calculate import calculator

    screen = Screen()
    with opened(given) as model:
        agent = Agent(
            model, [calculator], given.system, given.max_turns, params_of(given), given.style, on_event=screen.show
        )
        run = agent.run(given.task)
    screen.end()
    if run.status != "done":
        say(f"(ended: {run.status})")
    return 0 if run.status == "done" else 1
