"""Small things to train on: a byte-level tokenizer, a folder of documents, chats, pairs, and a model of a few units."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch

from puyu.data.packing import ConversationSource
from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM
from puyu.model.init import init_weights
from puyu.tokenizer.chat import CHAT_TEMPLATE
from puyu.tokenizer.tokenizer import Tokenizer, from_merges

SHAPE = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 32}
WORDS = ("the", "cat", "sat", "on", "a", "mat", "书生", "浦语")


def tokenizer(folder: Path) -> Tokenizer:
    made = from_merges([(b"t", b"h"), (b"th", b"e"), (b"a", b"t")], chat_template=CHAT_TEMPLATE)
    made.save(folder)
    return made


def _lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def corpus(folder: Path, count: int = 40) -> Path:
    rng = random.Random(0)
    rows = []
    for i in range(count):
        text = f"{i}: " + " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 30)))
        rows.append(
            {"id": str(i), "text": text, "domain": ("web", "code")[i % 2], "language": ("en", "zh")[i % 3 == 0]}
        )
    _lines(folder / "kept.jsonl", rows)
    return folder


def chats(path: Path, count: int = 12) -> Path:
    def turns(i: int) -> list:
        return [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": f"the {WORDS[i % 8]}"}]

    return _lines(path, [{"messages": turns(i)} for i in range(count)])


def pairs(path: Path, count: int = 24) -> Path:
    def row(i: int) -> dict:
        return {"prompt": f"hi {i}", "chosen": "cat", "rejected": "mat", "domain": ("default", "helpful")[i % 2]}

    return _lines(path, [row(i) for i in range(count)])


def model(*, vocab_size: int = 50, dtype: torch.dtype = torch.float64, seed: int = 0, **shape) -> CausalLM:
    made = CausalLM(ModelConfig(vocab_size=vocab_size, **(SHAPE | shape)))
    init_weights(made, seed=seed, std=0.1)
    return made.to(dtype)


def documents(count: int = 30, vocab_size: int = 50, seed: int = 0) -> list:
    rng = random.Random(seed)
    docs = []
    for _ in range(count):
        length = rng.randint(2, 25)
        ids = [rng.randrange(vocab_size) for _ in range(length)]
        docs.append((ids, [rng.random() < 0.7 for _ in range(length - 1)] + [True]))
    return docs


def source(seed: int = 0, tokens_per_batch: int = 80, count: int = 30) -> ConversationSource:
    return ConversationSource(documents(count), tokens_per_batch=tokens_per_batch, seed=seed)


class Interrupted(Exception):
    """A run was left, as a test wanted."""


def interrupt_at(step: int) -> Callable[[int, object], None]:
    """An `on_step` that leaves the run after that step."""

    def hook(done: int, _: object) -> None:
        if done == step:
            raise Interrupted

    return hook


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
