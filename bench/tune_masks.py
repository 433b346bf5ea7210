"""tune.6: what is trained of 10,000 conversations with tools, against an independent reader of the text.

    python bench/tune_masks.py [--save] [--count 10000]

Conversations are drawn: several turns, system messages, tools, calls (plugin and interpreter) and their results,
Chinese, emoji, and text that tries to forge a turn. The oracle writes the format down again, character by character,
from the description in InternLM2's report, and knows of each byte whether the assistant wrote it. Counted are tokens
that are trained without being the assistant's, or the other way, bytes that differ, and conversations with an answer
that was cut or left out without being counted: those that are longer than `max_tokens` must be in `dropped`, whole.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness

from puyu.data.packing import ConversationSource
from puyu.tokenizer.chat import CHAT_TEMPLATE
from puyu.tokenizer.tokenizer import Tokenizer, from_merges
from puyu.train.sft import ChatData, read_docs

LIMIT = 900
FORGED = ("<|im_end|>", "<|im_start|>assistant\n", "<|action_start|>", '{"name": 1}', "```")
WORDS = ("the", "river", "号码", "图书馆", "x = 1", "🙂", "été", "\n", "  ", "7 * 6", *FORGED, "end")
Written = list[tuple[str, bool]]
"""Stretches of text, and whether the assistant wrote them."""


def text(rng: random.Random, most: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def drawn(rng: random.Random) -> dict[str, Any]:
    """One record in OpenAI's form."""
    messages: list[dict[str, Any]] = []
    tools = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}]
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": text(rng)})
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": text(rng, 60 if rng.random() < 0.05 else 12)})
        if rng.random() < 0.5:
            name = rng.choice(("look", "interpreter"))
            arguments = {"code": text(rng)} if name == "interpreter" else {"q": text(rng)}
            call = {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            messages.append(
                {"role": "assistant", "content": text(rng) if rng.random() < 0.5 else None, "tool_calls": [call]}
            )
            messages.append({"role": "tool", "content": text(rng)})
        messages.append({"role": "assistant", "content": text(rng, 40)})
    return {"messages": messages, **({"tools": tools} if rng.random() < 0.7 else {})}


def written(record: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """The record in InternLM2's format."""
    yield "<s>", False
    messages, kind = list(record["messages"]), "<|plugin|>"
    offered = [tool["function"] for tool in record.get("tools", ())]
    listed = (
        f"<|im_start|>system name=<|plugin|>\n{json.dumps(offered, ensure_ascii=False)}<|im_end|>\n" if offered else ""
    )
    if messages[0]["role"] != "system":
        yield listed, False
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"] or ""
        if role == "assistant":
            yield "<|im_start|>assistant\n", False
            yield content, True
            for call in message.get("tool_calls", ()):
                name, arguments = call["function"]["name"], call["function"]["arguments"]
                kind = "<|interpreter|>" if name == "interpreter" else "<|plugin|>"
                body = f'{{"name": "{name}", "parameters": {arguments}}}'
                if name == "interpreter":
                    body = f"```python\n{json.loads(arguments)['code']}\n```"
                yield f"<|action_start|>{kind}\n{body}<|action_end|>", True
            yield "<|im_end|>", True
            yield "\n", False
        elif role == "tool":
            yield f"<|im_start|>environment name={kind}\n{content}<|im_end|>\n", False
        else:
            yield f"<|im_start|>{role}\n{content}<|im_end|>\n", False
        if index == 0 and role == "system":
            yield listed, False


def wrong_tokens(ids: Any, learned: Any, oracle: Written, tokenizer: Tokenizer) -> int:
    """Tokens whose flag is not that of every byte they stand for; all of them where the bytes differ."""
    bytes_of = b"".join(part.encode() for part, _ in oracle)
    trained = [flag for part, flag in oracle for _ in part.encode()]
    at = wrong = 0
    for id, flag in zip(ids, learned, strict=True):
        size = len(tokenizer.token_bytes(int(id)))
        wrong += bytes_of[at : at + size] != tokenizer.token_bytes(int(id)) or set(trained[at : at + size]) != {
            bool(flag)
        }
        at += size
    return wrong + (at != len(bytes_of))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    given = parser.parse_args()
    run = harness.Run("tune_masks", before={})
    rng = random.Random(0)
    records = [drawn(rng) for _ in range(given.count)]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        tokenizer = from_merges([(b"t", b"h"), (b"th", b"e"), (b" ", b"the")], chat_template=CHAT_TEMPLATE)
        docs = read_docs([ChatData(path=path)], tokenizer, seed=0).train
    assert len(docs) == len(records)
    wrong = sum(
        wrong_tokens(ids, learned, list(written(record)), tokenizer)
        for (ids, learned), record in zip(docs, records, strict=True)
    )
    source = ConversationSource(docs, tokens_per_batch=4096, max_tokens=LIMIT, seed=0)
    long = sum(len(ids) > LIMIT for ids, _ in docs)
    unsaid = abs(source.dropped["too_long"] - long) + abs(len(source.items) + long - len(docs))
    kept = {id(doc) for doc in source.items}
    unsaid += sum(len(doc[0]) <= LIMIT and id(doc) not in kept for doc in docs)
    trained = sum(sum(map(bool, learned)) for _, learned in docs)  # type: ignore[arg-type]
    tokens = sum(len(ids) for ids, _ in docs)
    run.notes |= {
        "tokens": tokens,
        "trained": trained,
        "too long, counted": long,
        "lost unsaid": unsaid,
        "wrong": wrong,
    }
    run.finish([harness.Samples("tune.6", [float(wrong + unsaid)])], save=given.save and given.count >= 10_000)


if __name__ == "__main__":
    main()
