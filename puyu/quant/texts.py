"""Tokens to calibrate and to measure with: documents of a JSONL file, or drawn from the model itself.

A line has `text`, or `messages` in OpenAI's form. Longer documents are cut into windows of the length asked for.
Without a file the model's own samples serve (as in LLM-QAT, arXiv 2305.17888): they need no data and lie where the
model works. The same file, seed and sizes give the same tokens.

    documents = read_documents(Path("texts.jsonl"), tokenizer, Budget(tokens=8192, length=512, seed=0))
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puyu.errors import InputError
from puyu.files import BadRecord, read_jsonl_lines
from puyu.log import logger
from puyu.model.heads import CausalLM
from puyu.model.kv_cache import KVCache
from puyu.model.paged import PagedPlan, PagedSequence
from puyu.tokenizer.chat import is_native, render
from puyu.tokenizer.template import render_jinja
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Conversation

_BLOCK, _ROWS = 16, 64


@dataclass(frozen=True, slots=True)
class Budget:
    """How much: at least `tokens` in all where there are so many, documents of up to `length`."""

    tokens: int
    length: int
    seed: int


def read_documents(path: Path, tokenizer: Tokenizer, budget: Budget) -> list[list[int]]:
    """Documents of a file in a seeded order; torn lines are left out and named in the log."""
    torn: list[BadRecord] = []
    records = list(read_jsonl_lines(path, quarantine=torn.append))
    for bad in torn:
        logger.warning("torn record left out: %s, line %d (byte %d)", bad.path, bad.line, bad.offset)
    random.Random(budget.seed).shuffle(records)
    documents: list[list[int]] = []
    left = budget.tokens
    for number, record in records:
        if left <= 0:
            break
        ids = _ids(record, tokenizer, where=f"{path}, line {number}")
        windows = [ids[start : start + budget.length] for start in range(0, len(ids), budget.length)]
        documents += [window for window in windows if len(window) > 1]
        left -= len(ids)
    if not documents:
        raise InputError(f"{path} holds no text ({len(torn)} torn lines)", remedy="check the path and the format")
    return documents


def _ids(record: Any, tokenizer: Tokenizer, *, where: str) -> list[int]:
    if isinstance(record, Mapping) and isinstance(record.get("text"), str):
        first, last = ([] if id is None else [id] for id in (tokenizer.bos_id, tokenizer.eos_id))
        return [*first, *tokenizer.encode(record["text"]), *last]
    if isinstance(record, Mapping) and "messages" in record:
        try:
            return _rendered(Conversation.from_openai(record), tokenizer)
        except InputError as error:
            raise InputError(f"{where}: {error.message}", remedy=error.remedy) from error
    raise InputError(f"{where}: needs the field 'text' or 'messages'", remedy="one JSON object a line")


def _rendered(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    if is_native(tokenizer):
        return list(render(conversation, tokenizer).ids)
    return render_jinja(conversation, tokenizer, add_generation_prompt=False)


@torch.inference_mode()
def sampled_documents(model: CausalLM, budget: Budget) -> list[list[int]]:
    """What the model itself says at temperature 1 from its first token on, until it ends or `length` is reached."""
    generator = torch.Generator().manual_seed(budget.seed)
    documents: list[list[int]] = []
    left = budget.tokens
    while left > 0:
        rows = min(_ROWS, -(-left // budget.length))
        found = _samples(model, rows, budget.length, generator)
        documents += found
        left -= sum(map(len, found))
    return documents


def _samples(model: CausalLM, rows: int, length: int, generator: torch.Generator) -> list[list[int]]:
    config, weight = model.config, model.trunk.embedding.weight
    width = -(-length // _BLOCK)
    cache = KVCache(config, num_blocks=rows * width, block_size=_BLOCK, device=weight.device, dtype=weight.dtype)
    tables = [tuple(range(row * width, (row + 1) * width)) for row in range(rows)]
    found = [[config.bos_id if config.bos_id is not None else 0] for _ in range(rows)]
    running = list(range(rows))
    while running and len(found[running[0]]) < length:
        at = len(found[running[0]]) - 1
        plan = PagedPlan.build(cache, [PagedSequence(i, 1, at, tables[row]) for i, row in enumerate(running)])
        last = torch.tensor([found[row][-1] for row in running], device=weight.device)
        next_tokens = _drawn(model(last, torch.full_like(last, at), plan), generator)
        for row, token in zip(running, next_tokens, strict=True):
            found[row].append(token)
        running = [row for row in running if found[row][-1] != config.eos_id]
    return found


def _drawn(logits_BV: Tensor, generator: torch.Generator) -> list[int]:
    probabilities = logits_BV.float().cpu().softmax(dim=-1)
    tokens: list[int] = torch.multinomial(probabilities, 1, generator=generator)[:, 0].tolist()
    return tokens
