"""Ways to ask: generate once, likelihood of each choice, rolling likelihood of a text, an agent that may call tools.

Each function returns a Solver. Plain text reaches the model as plain text (base models are asked too); messages go
through the model's chat template. Nothing here judges an answer.

    solver = generate(SamplingParams(max_tokens=64))
    output = await solver(sample, model)
"""

from __future__ import annotations

from collections.abc import Sequence

from puyu.agent.loop import Agent
from puyu.errors import InputError, PuyuError
from puyu.eval.sample import Output, Sample
from puyu.eval.task import Solver
from puyu.tools.tool import Tool
from puyu.types import GenerateRequest, LanguageModel, Message, SamplingParams


def generate(params: SamplingParams) -> Solver:
    """One completion of the prompt, with the sample's tools on offer (their calls are not run)."""

    async def solve(sample: Sample, model: LanguageModel) -> Output:
        done = await model.generate(GenerateRequest(sample.prompt, params, sample.tools))
        return _output((done.message,), done.finish_reason)

    return solve


def likelihood(*, delimiter: str = " ") -> Solver:
    """Log-likelihood of each choice after the prompt, joined by `delimiter` (the convention of lm-eval-harness)."""

    async def solve(sample: Sample, model: LanguageModel) -> Output:
        context = _plain(sample)
        return Output(scored=tuple(await model.score([(context, delimiter + choice) for choice in sample.choices])))

    return solve


def rolling(*, window_bytes: int) -> Solver:
    """Log-likelihood of the whole prompt, in pieces of `window_bytes`, each after the piece before it."""

    async def solve(sample: Sample, model: LanguageModel) -> Output:
        pieces = split_bytes(_plain(sample), window_bytes)
        return Output(scored=tuple(await model.score(list(zip(["", *pieces], pieces, strict=False)))))

    return solve


def agent(tools: Sequence[Tool], *, params: SamplingParams, max_turns: int = 4) -> Solver:
    """An agent's run: the model's turns and the results of the tools that it really called."""

    async def solve(sample: Sample, model: LanguageModel) -> Output:
        runner = Agent(model, tools=tuple(tools), max_turns=max_turns, params=params)
        *history, question = _messages(sample)
        run = await runner.arun(question.text, history=history)
        return _output(run.messages[len(run.opening) :], run.status)

    return solve


def split_bytes(text: str, size: int) -> list[str]:
    """Cut into pieces of at most `size` UTF-8 bytes, never inside a character; nothing is lost.

    A cut prefers to stand before white space and never stands after it where that can be had: models count the
    spaces at the end of a context as part of what follows, and would score them twice.

    >>> split_bytes("ab浦语", 4), split_bytes("one two three", 8)
    (['ab', '浦', '语'], ['one two', ' three'])
    """
    pieces, start = [], 0
    while start < len(text):
        end = _good_cut(text, start, _reach(text, start, size))
        pieces.append(text[start:end])
        start = end
    return pieces


def _reach(text: str, start: int, size: int) -> int:
    """The end of the longest piece from `start` within `size` bytes; one character at least."""
    used, end = 0, start
    while end < len(text):
        used += len(text[end].encode("utf-8", "surrogatepass"))
        if used > size and end > start:
            break
        end += 1
    return end


def _good_cut(text: str, start: int, end: int) -> int:
    """The last place in the later half of text[start:end] before white space; else not after it; else `end`."""
    if end == len(text):
        return end
    half = start + (end - start) // 2
    spots = (i for i in range(end, half, -1) if text[i].isspace() and not text[i - 1].isspace())
    solid = (i for i in range(end, start, -1) if not text[i - 1].isspace())
    return next(spots, next(solid, end))


def _output(messages: tuple[Message, ...], ended: str) -> Output:
    if ended in ("error", "abort"):
        raise PuyuError(f"the model ended the request with {ended!r}")  # counted by the runner as model_error
    return Output(messages=messages, finish_reason=ended)


def _plain(sample: Sample) -> str:
    if not isinstance(sample.prompt, str):
        raise InputError(f"sample {sample.id!r}: a likelihood task needs plain text, not messages")
    return sample.prompt


def _messages(sample: Sample) -> tuple[Message, ...]:
    return (Message("user", sample.prompt),) if isinstance(sample.prompt, str) else sample.prompt
