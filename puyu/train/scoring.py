"""A reward model as others use it: domain rubrics, the sequence that is scored, and scores for answers.

A rubric is a system turn set before the conversation; only the reward model sees it (InternLM2's conditional reward
model, arXiv 2403.17297 section 4.3). The score stands at a reward token behind the answer. The rubrics live in the
checkpoint, `reward_domains.json`, with their hash: scoring with other rubrics than those of training is refused.

    >>> rewards = RewardModel.load(Path("runs/nano/reward"))
    >>> rewards.score([(conversation, answer, "helpful")])
    [1.27]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from puyu.data.packing import grouped, pack_documents, with_reward_token
from puyu.errors import CheckpointError, ConfigError, InputError
from puyu.files import hash_json, read_json, write_json
from puyu.model.attention import PackedPlan
from puyu.model.checkpoint import load_scalar_model
from puyu.model.heads import ScalarModel
from puyu.tokenizer.chat import render
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train.stage import check_vocabulary
from puyu.types import Conversation, Message

FILE = "reward_domains.json"


@dataclass(frozen=True, slots=True)
class Rubrics:
    """Domain -> text of the system turn ("" for none), and the token that carries the score."""

    domains: Mapping[str, str]
    reward_id: int
    max_length: int

    def text(self, domain: str) -> str:
        """The rubric of a domain; ConfigError names the known ones."""
        if domain not in self.domains:
            known = ", ".join(self.domains)
            raise ConfigError(f"unknown reward domain {domain!r}", remedy=f"known domains: {known}")
        return self.domains[domain]

    def number(self, domain: str) -> int:
        """The domain's place in the table."""
        self.text(domain)
        return list(self.domains).index(domain)

    def key(self) -> str:
        return hash_json([list(self.domains.items()), self.reward_id, self.max_length])

    def save(self, folder: Path) -> None:
        value = {"domains": dict(self.domains), "reward_id": self.reward_id, "max_length": self.max_length}
        write_json(folder / FILE, {**value, "hash": self.key()})

    @staticmethod
    def load(folder: Path) -> Rubrics:
        """Read them; CheckpointError when they are missing or were changed after training."""
        if not (folder / FILE).is_file():
            raise CheckpointError(f"{folder} has no {FILE}", remedy="train it with `puyu reward`")
        value = read_json(folder / FILE)
        try:
            found = Rubrics(value["domains"], value["reward_id"], value["max_length"])
            saved = value["hash"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / FILE} lacks {error}", remedy="copy the checkpoint again") from error
        if found.key() != saved:
            remedy = "restore the file; other rubrics need another training"
            raise CheckpointError(f"{folder / FILE} was changed after training", remedy=remedy)
        return found


def reward_token(tokenizer: Tokenizer, name: str) -> int:
    """The id of the reward token; InputError when the vocabulary lacks it."""
    found = tokenizer.token_id(name)
    if found is None:
        remedy = "set reward_token to an unused token of the vocabulary"
        raise InputError(f"the tokenizer has no token {name!r}", remedy=remedy)
    return found


def scoring_ids(
    prompt: Conversation, answer: Message, domain: str, rubrics: Rubrics, tokenizer: Tokenizer
) -> list[int]:
    """Rubric, conversation and answer as ChatML, cut to length, then the reward token."""
    rubric = rubrics.text(domain)
    first = (Message("system", rubric),) if rubric else ()
    conversation = Conversation((*first, *prompt.messages, answer), prompt.tools)
    return with_reward_token(render(conversation, tokenizer).ids, rubrics.reward_id, max_length=rubrics.max_length)


@dataclass(frozen=True)
class RewardModel:
    """A frozen scorer."""

    model: ScalarModel
    tokenizer: Tokenizer
    rubrics: Rubrics

    @staticmethod
    def load(folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> RewardModel:
        """Open a reward checkpoint; `dtype` is that of the activations."""
        tokenizer = Tokenizer.load(folder)
        model = load_scalar_model(folder, device=device)
        check_vocabulary(tokenizer, model.config.vocab_size, folder=folder)
        model.set_compute_dtype(dtype)
        return RewardModel(model.requires_grad_(False), tokenizer, Rubrics.load(folder))

    def score(self, items: Sequence[tuple[Conversation, Message, str]], *, batch_tokens: int = 16_384) -> list[float]:
        """Scores of (prompt, answer, domain), in order."""
        sequences = [scoring_ids(*item, self.rubrics, self.tokenizer) for item in items]
        return [score for group in grouped(sequences, len, most=batch_tokens) for score in self._score(group)]

    @torch.no_grad()
    def _score(self, group: list[list[int]]) -> list[float]:
        device = self.model.trunk.device
        batch = pack_documents([(ids, None) for ids in group]).to(device)
        plan = PackedPlan.build(batch.starts_S, batch.num_tokens, device)
        hidden_TD = self.model.trunk(batch.tokens_T, batch.positions_T, plan)
        last_S = torch.tensor(batch.ends_S, device=device) - 1
        values: list[float] = self.model.scalar(hidden_TD[last_S]).tolist()
        return values
