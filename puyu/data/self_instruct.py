"""A few seed tasks -> many, written by any LanguageModel: Self-Instruct (Wang et al. 2023, arXiv 2212.10560).

    grown = asyncio.run(grow(seeds, model, SelfInstructConfig(count=100), journal=Journal(Path("new.jsonl.journal"))))

Each round shows the writer eight instructions (two of them its own, once there are some) and reads new ones from its
answer; asks of each new one whether it is classification; asks for an instance, input first, or for classification the
label first, so that not all labels are one. A candidate goes when ROUGE-L to any other instruction is 0.7 or more
(words; single Han characters), when it is too short or long, or asks for what text cannot give; an instance when it is
empty, repeats its input, or contradicts another. Whatever goes is counted, with the reason.

All answers of the writer stand in a journal that only grows, keyed by what was asked. Everything else follows from
seeds, config and answers, so that a killed run goes on where it stood, and the same answers give the same set.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from puyu.configure import Config
from puyu.data import self_instruct_prompts as prompts
from puyu.data.measure import UNIT
from puyu.documents.characters import HAN, folded
from puyu.errors import InputError, ResourceError
from puyu.files import disk_errors, hash_json, read_jsonl, read_jsonl_lines
from puyu.types import GenerateRequest, LanguageModel, Message, SamplingParams

_HAN = re.compile(f"[{HAN}]")


class SelfInstructConfig(Config):
    """How an instruction set grows."""

    count: int = Field(default=100, ge=1)
    """Records to write, besides the seeds."""
    language: Literal["en", "zh"] = "en"
    """Of the prompts to the writer."""
    shown: int = Field(default=8, ge=2)
    """Instructions that the writer is shown."""
    own: int = Field(default=2, ge=0)
    """Of these, how many it wrote itself, as soon as there are some."""
    asked: int = Field(default=8, ge=1)
    """New instructions that are asked for at once."""
    parallel: int = Field(default=4, ge=1)
    """Requests of one round; they see the same pool."""
    similarity: float = Field(default=0.7, gt=0, le=1)
    """ROUGE-L from which on two instructions are the same."""
    shortest: int = Field(default=4, ge=1)
    """Words (Han characters) of an instruction, at least."""
    longest: int = Field(default=150, ge=1)
    """Words (Han characters) of an instruction, at most."""
    unwanted: tuple[str, ...] = prompts.UNWANTED
    """Words that ask for what text cannot give."""
    patience: int = Field(default=5, ge=1)
    """Rounds without a new record before it ends."""
    chat: bool = True
    """Ask through the chat template; false: as plain text, for base models."""
    temperature: float = Field(default=0.7, ge=0)
    """Of the writer."""
    max_tokens: int = Field(default=1024, ge=16)
    """Longest answer of the writer."""
    seed: int = 0
    """Chooses what is shown, and seeds the writer."""


@dataclass(frozen=True, slots=True)
class Task:
    """An instruction with one instance of it."""

    id: str
    instruction: str
    input: str
    output: str
    is_classification: bool = False


def read_seeds(path: Path) -> list[Task]:
    """JSONL of `instruction, input?, output` or of Wang's `instruction, instances, is_classification`."""
    tasks = []
    for line, value in read_jsonl_lines(path):
        instances = value.get("instances") if isinstance(value, dict) else None
        first = instances[0] if isinstance(instances, list) and instances else value
        if not isinstance(first, dict) or not isinstance(value.get("instruction"), str):
            raise InputError(f"{path}, line {line}: no text in field 'instruction'", remedy="see docs/scorers.md")
        if not isinstance(first.get("output"), str):
            raise InputError(f"{path}, line {line}: no text in field 'output'", remedy="see docs/scorers.md")
        id = str(value.get("id") or f"seed {line}")
        labeled = bool(value.get("is_classification", False))
        tasks.append(Task(id, value["instruction"], str(first.get("input") or ""), first["output"], labeled))
    if len(tasks) < 2:
        raise InputError(f"{path} holds {len(tasks)} seeds", remedy="two at least; the paper has 175")
    return tasks


# ---- similarity


def units_of(text: str) -> tuple[str, ...]:
    """Words and single Han characters in lower case."""
    return tuple(UNIT.findall(folded(text)))


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """F1 of the longest common subsequence (Lin 2004); 0 where one is empty.

    >>> rouge_l("the cat sat".split(), "the cat ran".split())
    0.6666666666666666
    """
    return 2 * common_length(a, b) / (len(a) + len(b)) if a and b else 0.0


def common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table as the bits of one number (Hyyrö 2004)."""
    where: dict[str, int] = {}
    for at, unit in enumerate(a):
        where[unit] = where.get(unit, 0) | 1 << at
    full = (1 << len(a)) - 1
    row = full
    for unit in b:
        hits = row & where.get(unit, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(a) - row.bit_count()


def nearest(units: Sequence[str], pool: Iterable[Sequence[str]], *, least: float) -> tuple[float, int]:
    """(ROUGE-L, place) of the most similar one; those whose lengths alone keep them below `least` are passed over."""
    best, place = 0.0, -1
    for at, other in enumerate(pool):
        bound = 2 * min(len(units), len(other)) / max(len(units) + len(other), 1)
        if bound >= max(least, best) and (found := rouge_l(units, other)) > best:
            best, place = found, at
    return best, place


# ---- the journal


class Journal:
    """The writer's answers, one line each, appended at once; a torn last line is cut off when it is opened."""

    def __init__(self, path: Path, *, identity: str = "") -> None:
        self.path, self._answers = path, dict[str, str]()
        self._asked: Counter[str] = Counter()
        if path.is_file():
            self._read(identity)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"identity": identity})

    def _read(self, identity: str) -> None:
        content = self.path.read_bytes()
        good = content.rfind(b"\n") + 1
        if good < len(content):
            with open(self.path, "rb+") as stream:
                stream.truncate(good)
        rows = list(read_jsonl(self.path))
        if not rows:
            self._append({"identity": identity})
        elif rows[0].get("identity") != identity:
            remedy = "restore seeds and flags, or choose another --out"
            raise InputError(f"{self.path} was begun with other seeds or another config", remedy=remedy)
        self._answers = {row["key"]: row["text"] for row in rows[1:]}

    def _append(self, row: dict[str, Any]) -> None:
        with disk_errors(self.path), open(self.path, "ab") as stream:
            stream.write(json.dumps(row, ensure_ascii=True).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def key(self, prompt: str) -> str:
        """Names one asking: the same prompt asked again is another."""
        self._asked[prompt] += 1
        return hash_json([prompt, self._asked[prompt]])

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> str:
        return self._answers[key]

    def put(self, key: str, text: str) -> None:
        """An answer, kept before it is used."""
        self._append({"key": key, "text": text})
        self._answers[key] = text


# ---- growing


@dataclass(slots=True)
class Grown:
    """The records, the candidates that went, and the counts."""

    records: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A new instruction, and where it is from."""

    instruction: str
    shown: tuple[str, ...]
    prompt: str
    round: int


async def grow(
    seeds: Sequence[Task], model: LanguageModel, config: SelfInstructConfig, *, journal: Journal, name: str = ""
) -> Grown:
    """Rounds until there are `count` records, or `patience` rounds brought none. `name` is the writer's."""
    growth = _Growth(list(seeds), model, config, journal, name)
    round_number = quiet = 0
    while len(growth.grown.records) < config.count and quiet < config.patience:
        round_number += 1
        before = len(growth.grown.records)
        await growth.round(round_number)
        quiet = 0 if len(growth.grown.records) > before else quiet + 1
    counts = Counter(row["reason"] for row in growth.grown.rejected)
    growth.grown.report = {
        "records": len(growth.grown.records),
        "candidates": len(growth.grown.records) + len(growth.grown.rejected),
        "rejected": dict(sorted(counts.items())),
        "rounds": round_number,
        "requests": growth.requests,
        "ended": "count" if len(growth.grown.records) >= config.count else "patience",
    }
    return growth.grown


class _Growth:
    """A run in progress: the pool, and what became of the candidates."""

    def __init__(
        self, seeds: list[Task], model: LanguageModel, config: SelfInstructConfig, journal: Journal, name: str
    ) -> None:
        self.seeds, self.model, self.config, self.journal, self.name = seeds, model, config, journal, name
        self.prompts = prompts.of(config.language)
        self.pool = list(seeds)
        self.units = [units_of(task.instruction) for task in seeds]
        self.outputs = {(task.instruction, task.input): task.output for task in seeds}
        self.grown, self.requests = Grown(), 0

    async def round(self, number: int) -> None:
        """New instructions, those that pass, their kind, their instances."""
        random = np.random.Generator(np.random.PCG64([self.config.seed, number]))
        shown = [self._shown(random) for _ in range(self.config.parallel)]
        asked = [self.prompts.instructions([task.instruction for task in tasks], self.config.asked) for tasks in shown]
        answers = await self._ask(asked)
        candidates = []
        for tasks, prompt, answer in zip(shown, asked, answers, strict=True):
            ids = tuple(task.id for task in tasks)
            found = prompts.numbered(answer)
            if not found:
                self._reject(_Candidate("", ids, prompt, number), "no_instruction", head=answer[:160])
            candidates += [_Candidate(text, ids, prompt, number) for text in found]
        passed = [candidate for candidate in candidates if self._passes(candidate)]
        kinds = await self._ask([self.prompts.kind(candidate.instruction) for candidate in passed])
        labeled = [prompts.is_yes(answer) for answer in kinds]
        wanted = [self.prompts.instance(c.instruction, labeled=yes) for c, yes in zip(passed, labeled, strict=True)]
        for candidate, yes, answer in zip(passed, labeled, await self._ask(wanted), strict=True):
            self._settle(candidate, answer, labeled=yes)

    def _shown(self, random: np.random.Generator) -> list[Task]:
        """Some seeds and some of the writer's own, in a random order."""
        own = self.pool[len(self.seeds) :]
        mine = [own[at] for at in random.permutation(len(own))[: self.config.own]]
        theirs = [self.seeds[at] for at in random.permutation(len(self.seeds))[: self.config.shown - len(mine)]]
        both = theirs + mine
        return [both[at] for at in random.permutation(len(both))]

    async def _ask(self, asked: Sequence[str]) -> list[str]:
        """The answers in order, from the journal where they are there already."""
        keys = [self.journal.key(prompt) for prompt in asked]
        gate = asyncio.Semaphore(self.config.parallel)

        async def one(prompt: str, key: str) -> None:
            async with gate:
                if key in self.journal:
                    return
                self.requests += 1
                self.journal.put(key, await self._generate(prompt, key))

        await asyncio.gather(*(one(prompt, key) for prompt, key in zip(asked, keys, strict=True)))
        return [self.journal[key] for key in keys]

    async def _generate(self, prompt: str, key: str) -> str:
        config = self.config
        seed = int(key[:8], 16) % 2**31
        params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=seed)
        asked = (Message("user", prompt),) if config.chat else prompt
        answer = await self.model.generate(GenerateRequest(asked, params))
        if answer.finish_reason not in ("stop", "length"):
            remedy = "look at the server, then run the same command again"
            raise ResourceError(f"the writer ended a request with {answer.finish_reason!r}", remedy=remedy)
        return answer.text

    def _passes(self, candidate: _Candidate) -> bool:
        """Whether the instruction is new and fit; from then on it is known."""
        units = units_of(candidate.instruction)
        reason = unfit(candidate.instruction, units, self.config)
        if reason:
            self._reject(candidate, reason)
            return False
        similarity, place = nearest(units, self.units, least=self.config.similarity)
        if similarity >= self.config.similarity:
            self._reject(candidate, "similar", value=round(similarity, 4), of=self.pool[place].id)
            return False
        self.units.append(units)
        self.pool.append(Task(hash_json([candidate.instruction])[:16], candidate.instruction, "", ""))
        return True

    def _settle(self, candidate: _Candidate, answer: str, *, labeled: bool) -> None:
        """The instance, if it is one."""
        task_id = hash_json([candidate.instruction])[:16]
        given, output = self.prompts.read_instance(answer)
        reason = "no_output" if not output else "output_is_input" if output == given else ""
        known = self.outputs.get((candidate.instruction, given))
        reason = reason or ("contradicts" if known is not None and known != output else "")
        if not reason and len(self.grown.records) >= self.config.count:
            reason = "beyond_the_count"
        if reason:
            self._reject(candidate, reason, head=answer[:160])
            return
        self.outputs[candidate.instruction, given] = output
        made: dict[str, Any] = {
            "seeds": list(candidate.shown),
            "model": self.name,
            "prompt": hash_json(candidate.prompt),
        }
        made |= {"templates": prompts.VERSION, "round": candidate.round, "method": "self-instruct"}
        row = {"id": task_id, "instruction": candidate.instruction, "input": given, "output": output}
        self.grown.records.append({**row, "is_classification": labeled, "metadata": made})

    def _reject(self, candidate: _Candidate, reason: str, **more: Any) -> None:
        head = {"instruction": candidate.instruction, "round": candidate.round, "reason": reason}
        self.grown.rejected.append({**head, **more})


def unfit(instruction: str, units: Sequence[str], config: SelfInstructConfig) -> str:
    """Why an instruction is none that a text can answer; empty when it is one."""
    if len(units) < config.shortest:
        return "too_short"
    if len(units) > config.longest:
        return "too_long"
    if not (instruction[0].isalnum() or instruction[0] in "\"'“‘「《（("):
        return "odd_beginning"
    if bool(_HAN.search(instruction)) is not (config.language == "zh"):
        return "other_language"
    line = f" {' '.join(units)} "
    spoken = folded(instruction)
    # a Han word stands anywhere; others stand as a whole word, so that `graph` is not found in `paragraph`
    hits = (word for word in config.unwanted if (word in spoken if _HAN.search(word) else f" {word} " in line))
    return "unwanted_word" if next(hits, None) else ""
