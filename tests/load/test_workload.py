"""Prompts and lengths: the same for the same seed, as long as they say, and what a file gives."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
from itertools import islice
from pathlib import Path

import pytest

from puyu.errors import ConfigError, InputError
from puyu.load.workload import (
    LONGEST_PROMPT,
    SHORTEST,
    WORDS,
    Ask,
    Ruler,
    Sizes,
    Workload,
    is_kept,
    measured,
    read_turns,
    sharegpt_lengths,
)


async def by_letters(text: str) -> int | None:
    """A tokenizer with one token a byte and one to begin with."""
    return 1 + len(text)


def drawn(count: int, **changes: object) -> list[Ask]:
    values = {"kind": "random", "prompt": Sizes(8, 40), "output": Sizes(1, 9), **changes}
    return list(islice(Workload(**values).draw(Ruler()), count))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["sharegpt", "random", "prefix"])
def test_the_seed_decides(kind: str) -> None:
    assert drawn(20, kind=kind) == drawn(20, kind=kind)
    assert drawn(20, kind=kind) != drawn(20, kind=kind, seed=1)
    assert drawn(30, kind=kind)[:20] == drawn(20, kind=kind)


def test_words_are_words() -> None:
    assert len(WORDS) == len(set(WORDS)) > 400
    assert all(word.isalpha() and word.islower() for word in WORDS)
    assert set(drawn(1)[0].prompt.split()) <= {"the", *WORDS}


def test_lengths_are_those_of_the_servers_tokens() -> None:
    ruler = asyncio.run(Ruler.learn(by_letters))
    assert ruler.is_exact
    for tokens in (16, 64, 257):
        text, counted = ruler.text(random.Random(tokens), tokens)
        assert counted == len(text) + 1
        assert tokens - 2 <= counted <= tokens


def test_without_a_count_lengths_are_estimates() -> None:
    async def unknown(text: str) -> int | None:
        return None

    ruler = asyncio.run(Ruler.learn(unknown))
    assert not ruler.is_exact and 85 <= ruler.text(random.Random(0), 128)[0].count(" ") <= 97


def test_fixed_and_random_lengths() -> None:
    fixed = drawn(5, kind="fixed", prompt=Sizes(20, 20), output=Sizes(7, 7))
    assert {(ask.max_tokens, ask.prompt_tokens) for ask in fixed} == {(7, 20)}
    assert len({ask.prompt for ask in fixed}) == 5
    several = drawn(300)
    assert {ask.max_tokens for ask in several} == set(range(1, 10))
    assert all(6 <= ask.prompt_tokens <= 40 for ask in several)


def test_prefixes_are_shared_and_questions_are_not() -> None:
    asks = drawn(12, kind="prefix", prefixes=3, prefix_tokens=50)
    assert [ask.system for ask in asks[:3]] == [ask.system for ask in asks[3:6]]
    assert len({ask.system for ask in asks}) == 3 and len({ask.prompt for ask in asks}) == 12
    assert all(50 + 6 <= ask.prompt_tokens <= 50 + 40 for ask in asks)


def test_conversation_lengths_look_like_sharegpt() -> None:
    rng = random.Random(0)
    pairs = [sharegpt_lengths(rng, 2048) for _ in range(4000)]
    assert all(is_kept(*pair) for pair in pairs)
    assert 195 < statistics.mean(prompt for prompt, _ in pairs) < 230
    assert 190 < statistics.mean(output for _, output in pairs) < 220
    assert all(sum(sharegpt_lengths(rng, 128)) <= 128 for _ in range(200))
    with pytest.raises(ConfigError, match="too short"):
        sharegpt_lengths(rng, 8)


def test_the_filter_of_conversations() -> None:
    assert is_kept(SHORTEST, SHORTEST) and is_kept(LONGEST_PROMPT, LONGEST_PROMPT)
    assert not is_kept(3, 50) and not is_kept(50, 3) and not is_kept(1025, 50) and not is_kept(1024, 1025)


def test_lengths_beyond_the_context_are_refused() -> None:
    with pytest.raises(ConfigError, match="prompt and output"):
        drawn(1, prompt=Sizes(100, 100), output=Sizes(100, 100), limit=128)


@pytest.mark.parametrize("text", ["", "0", "8-4", "a", "4-", "-4", "1.5"])
def test_lengths_that_cannot_be_read(text: str) -> None:
    if text == "4-":
        assert Sizes.read(text, "prompt") == Sizes(4, 4)
        return
    with pytest.raises(ConfigError, match="prompt"):
        Sizes.read(text, "prompt")


def test_files_of_both_forms(tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "one " * 10}, {"from": "gpt", "value": "two " * 6}]},
        {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "a\u2028b" * 9},
                      {"role": "assistant", "content": "yes " * 8}, {"role": "user", "content": "more"}]},
        {"conversations": [{"from": "human", "value": "alone"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "two " * 6}]},
        {"other": 1},
    ]  # fmt: skip
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    pairs = read_turns(path)
    assert [first[:3] for first, _ in pairs] == ["one", "a\u2028b", "hi"]
    ruler = asyncio.run(Ruler.learn(by_letters))
    asks, dropped = asyncio.run(measured(pairs, by_letters, ruler, limit=2048, wanted=0))
    assert (len(asks), dropped) == (2, 1) and asks[0].prompt_tokens == 41 and asks[0].max_tokens == 25
    with pytest.raises(InputError, match="none of its 3"):
        asyncio.run(measured(pairs, by_letters, ruler, limit=16, wanted=0))


def test_files_that_give_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="file: there is no"):
        read_turns(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="no line with two turns"):
        read_turns(tmp_path / "bad.jsonl")
    (tmp_path / "torn.jsonl").write_text("{\n")
    with pytest.raises(InputError, match="line 1"):
        read_turns(tmp_path / "torn.jsonl")
