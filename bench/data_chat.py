"""data.16: conversations with tools to ids and loss masks, against transformers' apply_chat_template with masks.

    python bench/data_chat.py [--save] [--pairs 5] [--peer-python PATH]

InternLM2's, Qwen 2.5's and Llama 3.1's format, each with a vocabulary of 8,000 learned here and the reference template
of tests/tokenizer/families.py. Ids of all conversations, and masks of those of a sample, must be equal. A sample is
conversations a second over the three formats. The published templates mark nothing, so the peer finds its masks as
trainers do: what a turn adds to the prompt before it. The notes say how fast both sides are in each format, and how
fast the peer is where a template marks spans itself (`return_assistant_tokens_mask`). DATA_CHAT_COUNT=1000 tries it
with less than the 10,000 conversations.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import harness

FAMILIES = ("internlm2", "qwen 2.5", "llama 3.1")
VOCAB, SAMPLE = 8000, 300
Found = list[tuple[list[int], list[bool]]]


# --- the conversations ---------------------------------------------------------------------------------------------

SYLLABLES = ("ka", "lo", "mi", "ten", "ra", "sho", "vel", "un", "der", "ing", "pre", "sta", "tion", "lum", "wei", "hai")
CHARACTERS = "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后"


def make_words(rng: random.Random, count: int) -> list[str]:
    latin = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(count)]
    return latin + ["".join(rng.choices(CHARACTERS, k=rng.randint(2, 4))) for _ in range(count // 4)]


def say(rng: random.Random, words: list[str], longest: int) -> str:
    """A few sentences, some with numbers, lists and code."""
    found = []
    for _ in range(rng.randint(1, longest)):
        body = " ".join(rng.choices(words, k=rng.randint(4, 16)))
        found.append(body.capitalize() + rng.choice((".", "?", ".\n", ":\n\n- ", f" {rng.randint(0, 10**6)}.", "。")))
    return " ".join(found).strip()


def make_tools(rng: random.Random, words: list[str]) -> list[dict[str, Any]]:
    tools = []
    for _ in range(rng.randint(1, 4)):
        fields = {rng.choice(words): {"type": "string", "description": say(rng, words, 1)} for _ in range(3)}
        schema = {"type": "object", "properties": fields, "required": list(fields)[:1]}
        spec = {"name": f"get_{rng.choice(SYLLABLES)}", "description": say(rng, words, 1), "parameters": schema}
        tools.append({"type": "function", "function": spec})
    return tools


def make_conversation(rng: random.Random, words: list[str]) -> dict[str, Any]:
    """Two to four questions; each is answered at once, or after one call or two. What all three formats express."""
    tools = make_tools(rng, words)
    messages: list[dict[str, Any]] = [{"role": "system", "content": say(rng, words, 3)}]
    for _ in range(rng.randint(2, 4)):
        messages.append({"role": "user", "content": say(rng, words, 4)})
        for _ in range(rng.choice((0, 1, 1, 2))):
            spec = rng.choice(tools)["function"]
            arguments = {
                name: rng.choice((say(rng, words, 1), rng.randint(0, 999)))
                for name in list(spec["parameters"]["properties"])
            }
            call = {"id": "", "type": "function", "function": {"name": spec["name"], "arguments": arguments}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "content": json.dumps({"result": say(rng, words, 2)}, ensure_ascii=False)})
        messages.append({"role": "assistant", "content": say(rng, words, 6)})
    return {"messages": messages, "tools": tools}


def prepare(folder: Path, count: int) -> None:
    """Conversations, and a tokenizer of each family that has learned from some of them."""
    from puyu.tokenizer.bpe import PATTERN
    from puyu.tokenizer.encode import bytes_of, merge_pairs
    from puyu.tokenizer.template import CHAT_TEMPLATE
    from puyu.tokenizer.tokenizer import from_merges
    from tests.tokenizer.families import FAMILIES as THEIRS
    from tests.tokenizer.families import save_family, vocabulary

    rng = random.Random(0)
    words = make_words(rng, 3000)
    rows = [make_conversation(rng, words) for _ in range(count)]
    lines = tuple(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    learned = merge_pairs(json.loads(vocabulary(PATTERN, VOCAB, lines[:500]))["model"])
    merges = [(bytes_of(left), bytes_of(right)) for left, right in learned]
    from_merges(merges, chat_template=CHAT_TEMPLATE).save(folder / "internlm2")
    for name in FAMILIES[1:]:
        assert name in THEIRS
        save_family(name, folder / name, size=VOCAB, lines=lines[:500])


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "chats.jsonl").read_text(encoding="utf-8").splitlines()]


def digest(rows: Iterable[list[int] | tuple[int, ...]]) -> str:
    """A hash of ids, or of masks."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps([int(item) for item in row]).encode())
    return found.hexdigest()[:16]


# --- the two sides -------------------------------------------------------------------------------------------------


def ours(folder: Path) -> None:
    """The worker of our side: `render_all`."""
    import worker

    from puyu import __version__
    from puyu.tokenizer.chat import render_all
    from puyu.tokenizer.tokenizer import Tokenizer
    from puyu.types import Conversation

    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    talks = [Conversation.from_openai(row) for row in read_rows(folder)]
    tokenizers = {name: Tokenizer.load(folder / name) for name in FAMILIES}
    facts: dict[str, Any] = {"speed": {}}
    for name, tokenizer in tokenizers.items():
        began = time.perf_counter()
        rendered = list(render_all(talks, tokenizer))
        facts["speed"][name] = round(len(talks) / (time.perf_counter() - began))
        facts[name] = digest(item.ids for item in rendered), digest(item.loss for item in rendered[:SAMPLE])
        facts["tokens"] = sum(len(item.ids) for item in rendered)
    worker.ready(versions={"puyu": __version__}, **facts)
    while worker.told():
        began = time.perf_counter()
        for tokenizer in tokenizers.values():
            for _ in render_all(talks, tokenizer):
                pass
        worker.answer(len(FAMILIES) * len(talks) / (time.perf_counter() - began))


def peer(folder: Path) -> None:
    """The worker of the peer, in its own environment; a sample is a part of the conversations."""
    import transformers
    import worker

    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    rows = read_rows(folder)
    tokenizers = {name: transformers.AutoTokenizer.from_pretrained(folder / name) for name in FAMILIES}
    facts: dict[str, Any] = {"speed": {}, "marked speed": {}}
    for name, tokenizer in tokenizers.items():
        ids = [encode(tokenizer, row["messages"], row["tools"]) for row in rows]
        masked, facts["speed"][name] = timed(lambda tokenizer=tokenizer: by_prefixes(tokenizer, rows[:SAMPLE]))
        assert [row[0] for row in masked] == ids[:SAMPLE]
        facts[name] = digest(ids), digest(without_borders(tokenizer, *row) for row in masked)
        marked, facts["marked speed"][name] = timed(lambda tokenizer=tokenizer: by_marks(tokenizer, rows[:SAMPLE]))
        assert [row[0] for row in marked] == ids[:SAMPLE]
    worker.ready(versions={"transformers": transformers.__version__}, **facts)
    while worker.told():
        began = time.perf_counter()
        for tokenizer in tokenizers.values():
            by_prefixes(tokenizer, rows[:SAMPLE])
        worker.answer(len(FAMILIES) * SAMPLE / (time.perf_counter() - began))


def timed(run: Callable[[], Found]) -> tuple[Found, int]:
    began = time.perf_counter()
    found = run()
    return found, round(len(found) / (time.perf_counter() - began))


def encode(tokenizer: Any, messages: list[Any], tools: Any, *, prompt: bool = False) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=prompt, tokenize=True, return_dict=False
    )
    return ids


def by_prefixes(tokenizer: Any, rows: list[dict[str, Any]]) -> Found:
    """Ids with a mask of what each answer adds to the prompt before it."""
    found = []
    for row in rows:
        messages, tools = row["messages"], row["tools"]
        ids = encode(tokenizer, messages, tools)
        mask = [False] * len(ids)
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start = len(encode(tokenizer, messages[:index], tools, prompt=True))
                end = len(encode(tokenizer, messages[: index + 1], tools))
                mask[start:end] = [True] * (end - start)
        found.append((ids, mask))
    return found


def by_marks(tokenizer: Any, rows: list[dict[str, Any]]) -> Found:
    """The same with a template that marks everything as the assistant's: what the marks cost, whatever they mark."""
    template = "{% generation %}" + tokenizer.chat_template + "{% endgeneration %}"
    found = []
    for row in rows:
        value = tokenizer.apply_chat_template(
            row["messages"],
            tools=row["tools"],
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        found.append((value["input_ids"], [bool(item) for item in value["assistant_masks"]]))
    return found


def without_borders(tokenizer: Any, ids: list[int], mask: list[bool]) -> list[bool]:
    """The mask without the line break behind the end of a turn, which nobody wrote."""
    ends = {tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|eot_id|>")}
    return [trained and not (at and ids[at - 1] in ends) for at, trained in enumerate(mask)]


def compare(arguments: argparse.Namespace) -> None:
    python = harness.peer_python("transformers", arguments.peer_python)
    run = harness.Run("data_chat", peer_flags=f"masks by prefixes, {SAMPLE} conversations a sample and format")
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), int(os.environ.get("DATA_CHAT_COUNT", "10000")))
        us = harness.Worker([sys.executable, __file__, "--worker", "ours", name])
        them = harness.Worker([python, __file__, "--worker", "peer", name])
        found = harness.alternate(us, them, pairs=arguments.pairs)
        us.close()
        them.close()
    run.versions = us.facts["versions"] | them.facts["versions"]
    differ = [name for name in FAMILIES if us.facts[name] != them.facts[name]]
    assert not differ, f"ids or masks differ: {differ}"
    marked = them.facts["marked speed"]
    run.notes = {"ours": us.facts["speed"], "peer": them.facts["speed"], "peer with marks": marked}
    run.finish([harness.Samples("data.16", *found, unit="conversations/s")], save=arguments.save)


if __name__ == "__main__":
    harness.comparison(__doc__ or "", {"ours": ours, "peer": peer}, compare, pairs=5)
