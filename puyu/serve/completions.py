"""POST /v1/completions, /tokenize, /detokenize, /score: plain text, ids, likelihoods.

With `echo` the prompt comes back before the answer, and with `logprobs` the log-probabilities of its tokens, as
evaluation harnesses ask for them (max_tokens 0 then generates nothing).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from puyu.errors import RequestError
from puyu.serve.chat import ChatMessage, ToolBody, tool_spec
from puyu.serve.protocol import Body, List, Sampling
from puyu.types import GenerateRequest, SamplingParams, ToolSpec

MAX_PROMPTS = 1024
MAX_PAIRS = 4096


class CompletionBody(Sampling):
    """POST /v1/completions. `prompt` is a text, several texts, the ids of one text or of several."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {**Sampling.neutral, "suffix": ("",)}

    prompt: str | List[str] | List[int] | List[List[int]]
    best_of: int | None = None
    logprobs: int | None = Field(default=None, ge=0)
    echo: bool | None = None
    suffix: Any = None

    @property
    def words(self) -> Mapping[str, str]:
        return {**super().words, "top_logprobs": "logprobs"}

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """Each prompt as text or ids; RequestError for none, and for too many."""
        prompt: Any = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt or any(item == [] for item in prompt):
            raise RequestError("the prompt is empty", param="prompt")
        rows = [prompt] if isinstance(prompt[0], int) else prompt
        found = [item if isinstance(item, str) else tuple(item) for item in rows]
        if len(found) > MAX_PROMPTS:
            raise RequestError(f"a request may have {MAX_PROMPTS} prompts, not {len(found)}", param="prompt")
        return found

    def to_requests(self, defaults: SamplingParams) -> list[GenerateRequest]:
        """One request for each prompt."""
        self.check_supported()
        if self.stream and (self.echo or (self.best_of or 0) > (self.n or 1)):
            wrong = "echo" if self.echo else "best_of"
            raise RequestError(f"{wrong} is not available in a stream", param=wrong)
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        if max_tokens == 0 and self.echo:
            max_tokens = 1  # and what it gives is left out
        params = self.params(defaults, max_tokens=max_tokens, top_logprobs=self.logprobs)
        params = replace(params, best_of=self.best_of or 0, prompt_logprobs=bool(self.echo) and params.logprobs)
        return [self.limited(GenerateRequest(prompt, params)) for prompt in self.prompts]


class ScoreBody(Body):
    """POST /score: log-likelihood of each (context, continuation)."""

    pairs: List[List[str]] = Field(max_length=MAX_PAIRS)

    def to_pairs(self) -> list[tuple[str, str]]:
        for index, pair in enumerate(self.pairs):
            if len(pair) != 2:
                raise RequestError("a pair is [context, continuation]", param=f"pairs[{index}]")
        return [(context, continuation) for context, continuation in self.pairs]


class TokenizeBody(Body):
    """POST /tokenize: ids of a text, or of a rendered chat."""

    prompt: str | None = None
    messages: List[ChatMessage] | None = None
    tools: List[ToolBody] | None = None
    add_special_tokens: bool = True

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        return tuple(tool_spec(tool) for tool in self.tools or ())


class DetokenizeBody(Body):
    """POST /detokenize: the text of ids."""

    tokens: List[int]
