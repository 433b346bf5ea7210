"""What is asked: seeded streams of prompts with a length for each answer.

    asks(config, ruler, limit=2048) -> Ask, Ask, ...

`sharegpt`: lengths like those of the ShareGPT conversations that servers are compared with, drawn from two log-normal
distributions, no file needed. `fixed` and `random`: lengths as given. `prefix`: few long system prompts, each with
many questions. `conversations`: the first two turns of each line of a file; as in vLLM's benchmark, prompts under 4 or
over 1,024 tokens and pairs over 2,048 are left out. Lengths are in the server's tokens where a `Ruler` could learn
them. Prompts are common words in random order: no two begin alike, unless that is the workload.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

from puyu.errors import ConfigError, InputError
from puyu.files import read_jsonl

Kind = Literal["sharegpt", "fixed", "random", "prefix", "conversations"]

SHORTEST, LONGEST_PROMPT, LONGEST_PAIR = 4, 1024, 2048
# logarithm's mean and deviation; after the cuts above the means are 213 and 205 tokens, close to those of ShareGPT
PROMPT_SHAPE, OUTPUT_SHAPE = (math.log(150), 1.4), (math.log(140), 0.9)
TOKENS_A_WORD, LETTERS_A_TOKEN = 4 / 3, 4.0

ASKED_AT_ONCE = 16

FIRST = "the"
WORDS = tuple((Path(__file__).parent / "words.txt").read_text(encoding="ascii").split())


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: `prompt_tokens` is what the ruler says (no chat template), `max_tokens` the answer's length."""

    prompt: str
    prompt_tokens: int
    max_tokens: int
    system: str = ""


@dataclass(frozen=True, slots=True)
class Sizes:
    """A range of lengths, both ends included."""

    low: int
    high: int

    @classmethod
    def read(cls, text: str, name: str) -> Sizes:
        """`128` or `64-512`."""
        low, _, high = text.partition("-")
        if not low.isdigit() or not (high or low).isdigit() or not 1 <= int(low) <= int(high or low):
            raise ConfigError(f"{name}: {text!r} is no length", remedy="write tokens, as in 128, or a range: 64-512")
        return cls(int(low), int(high or low))

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


Count = Callable[[str], Awaitable[int | None]]
"""Tokens of a text by the server's own tokenizer; None where it has no such route."""


@dataclass(slots=True)
class Ruler:
    """Composes texts of a wanted length: learns what a first word and each further word cost in the server's tokens.

    Tokenizers cut at spaces, so costs add up; the prompt's true length is in the usage of each answer anyway.
    """

    first: float = TOKENS_A_WORD
    costs: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WORDS, TOKENS_A_WORD))
    is_exact: bool = False

    @classmethod
    async def learn(cls, counted: Count) -> Ruler:
        """One question a word, some at a time, or an estimate where the server does not count tokens."""
        first = await counted(FIRST)
        if first is None:
            return cls()
        lengths: list[int | None] = []
        for start in range(0, len(WORDS), ASKED_AT_ONCE):
            some = WORDS[start : start + ASKED_AT_ONCE]
            lengths += await asyncio.gather(*(counted(f"{FIRST} {word}") for word in some))
        costs = [max(1.0, float((length or first + 1) - first)) for length in lengths]
        return cls(float(first), dict(zip(WORDS, costs, strict=True)), True)

    def text(self, rng: random.Random, tokens: int) -> tuple[str, int]:
        """Words of about `tokens` tokens, never more unless one word is; and how many they are."""
        words, total = [FIRST], self.first
        while (room := tokens - total) > 0:
            word = rng.choice(WORDS)
            if self.costs[word] > room:  # near the end only the words that still fit are drawn from
                fitting = [other for other in WORDS if self.costs[other] <= room]
                if not fitting:
                    break
                word = rng.choice(fitting)
            words.append(word)
            total += self.costs[word]
        return " ".join(words), round(total)

    def length(self, text: str) -> int:
        """An estimate for a text of somebody else."""
        return max(1, round(len(text) / LETTERS_A_TOKEN))


@dataclass(frozen=True, slots=True)
class Workload:
    """What to draw. `limit`: tokens that prompt and answer may have together."""

    kind: Kind
    prompt: Sizes
    output: Sizes
    seed: int = 0
    limit: int = LONGEST_PAIR
    prefixes: int = 4
    prefix_tokens: int = 512

    def draw(self, ruler: Ruler) -> Iterator[Ask]:
        """Requests without end, the same for the same seed, ruler and limit."""
        rng = random.Random(self.seed)
        shared = [ruler.text(rng, self.prefix_tokens) for _ in range(self.prefixes)] if self.kind == "prefix" else []
        for index in count():
            system, before = shared[index % len(shared)] if shared else ("", 0)
            prompt_tokens, max_tokens = self._lengths(rng, self.limit - before)
            prompt, tokens = ruler.text(rng, prompt_tokens)
            yield Ask(prompt, before + tokens, max_tokens, system)

    def _lengths(self, rng: random.Random, limit: int) -> tuple[int, int]:
        if self.kind == "sharegpt":
            return sharegpt_lengths(rng, limit)
        lengths = self.prompt.draw(rng), self.output.draw(rng)
        if sum(lengths) > limit:
            message = f"prompt and output: {sum(lengths)} tokens, where the model takes {limit} beside its prefix"
            raise ConfigError(message, remedy="ask for less: --prompt, --output, --prefix-tokens")
        return lengths


def sharegpt_lengths(rng: random.Random, limit: int) -> tuple[int, int]:
    """Tokens of a prompt and of its answer; what the filter of `conversations` would drop is drawn again."""
    limit = min(limit, LONGEST_PAIR)
    if limit < 4 * SHORTEST:
        raise ConfigError(f"workload: a context of {limit} tokens is too short for conversations")
    while True:
        prompt, output = (round(rng.lognormvariate(*shape)) for shape in (PROMPT_SHAPE, OUTPUT_SHAPE))
        if is_kept(prompt, output, limit):
            return prompt, output


def is_kept(prompt: int, output: int, limit: int = LONGEST_PAIR) -> bool:
    """Whether a pair of turns belongs to the workload."""
    return min(prompt, output) >= SHORTEST and prompt <= LONGEST_PROMPT and prompt + output <= limit


# --- files -----------------------------------------------------------------------------------------------------------


def read_turns(path: Path) -> list[tuple[str, str]]:
    """The first prompt and answer of each line; lines without two turns of text are left out."""
    if not path.is_file():
        raise InputError(f"file: there is no {path}", remedy="name a JSONL file of conversations")
    pairs = [pair for row in read_jsonl(path) for pair in _first_pair(row)]
    if not pairs:
        remedy = 'a line is {"conversations": [{"from", "value"}, ...]} or {"messages": [{"role", "content"}, ...]}'
        raise InputError(f"file: {path} has no line with two turns", remedy=remedy)
    return pairs


def _first_pair(row: Any) -> list[tuple[str, str]]:
    turns = (row.get("conversations") or row.get("messages") or ()) if isinstance(row, dict) else ()
    said = [turn for turn in turns if isinstance(turn, dict) and not _is_system(turn)]
    texts = [turn.get("value") or turn.get("content") for turn in said]
    first, second = [*texts, None, None][:2]
    return [(first, second)] if isinstance(first, str) and isinstance(second, str) else []


def _is_system(turn: dict[str, Any]) -> bool:
    return "system" in (turn.get("from"), turn.get("role"))


async def measured(
    pairs: Sequence[tuple[str, str]], counted: Count, ruler: Ruler, *, limit: int, wanted: int
) -> tuple[list[Ask], int]:
    """The first `wanted` pairs that are kept (0: all), with the answers' lengths; and how many were left out."""
    asks: list[Ask] = []
    dropped = 0
    for prompt, answer in pairs:
        tokens, output = [
            (await counted(text) or ruler.length(text)) if ruler.is_exact else ruler.length(text)
            for text in (prompt, answer)
        ]
        if is_kept(tokens, output, min(limit, LONGEST_PAIR)):
            asks.append(Ask(prompt, tokens, output))
        else:
            dropped += 1
        if wanted and len(asks) == wanted:
            break
    if not asks:
        raise InputError(f"file: none of its {dropped} conversations fits the limits of the workload")
    return asks, dropped
