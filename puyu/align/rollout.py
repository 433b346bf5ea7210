"""Prompts -> answers of the current policy -> a Batch with advantages: the source that PPO's Trainer draws from.

The policy answers through the engine on the very weights that are trained (no copy). Its log-probabilities come
from the engine; `engine_gap` in the metrics is how far they are from the trainer's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from puyu.align.advantages import gae
from puyu.align.objectives import answer_logprobs, answer_values
from puyu.align.rewards import Moments, Prompt, Scorer
from puyu.data.mix import key_of, permuted
from puyu.data.packing import Batch, pack_documents
from puyu.engine.llm import LLM
from puyu.model.heads import CausalLM, ScalarModel
from puyu.types import Completion, GenerateRequest, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """How answers are drawn and rewarded."""

    prompts_per_step: int
    max_tokens: int
    temperature: float
    kl_weight: float
    gamma: float
    lam: float
    seed: int
    whiten: bool


def ask(llm: LLM, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[Completion]:
    """One answer to each prompt, as one batch."""
    pairs = zip(prompts, params, strict=True)
    return llm.generate_all([GenerateRequest(p.conversation.messages, s, p.conversation.tools) for p, s in pairs])


def pack_answers(llm: LLM, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> Batch:
    """prompt + answer documents; only the answers' tokens carry weight."""
    documents = []
    for prompt, answer in zip(prompts, answers, strict=True):
        before = llm.prompt_ids(GenerateRequest(prompt.conversation.messages, tools=prompt.conversation.tools))
        loss = [False] * len(before) + [True] * len(answer.token_ids)
        documents.append(([*before, *answer.token_ids], loss))
    return pack_documents(documents)


class RolloutSource:
    """Each batch is one rollout: draw prompts without replacement, answer, score, estimate advantages."""

    def __init__(
        self,
        llm: LLM,
        *,
        reference: CausalLM,
        critic: ScalarModel,
        scorer: Scorer,
        prompts: Sequence[Prompt],
        settings: RolloutSettings,
    ) -> None:
        self.llm, self.reference, self.critic, self.scorer = llm, reference, critic, scorer
        self.prompts, self.settings = list(prompts), settings
        self.done, self.moments = 0, Moments()

    def state(self) -> dict[str, Any]:
        """Rollouts done and the reward's running moments."""
        return {"done": self.done, "moments": asdict(self.moments)}

    def load(self, state: Mapping[str, Any], /) -> None:
        self.done, self.moments = int(state["done"]), Moments(**state["moments"])

    def next_batch(self, *, rank: int = 0, world: int = 1) -> Batch:
        """One rollout of the current policy (a single controller: world 1)."""
        assert world == 1, "rollouts run in one process; replicas are the business of the engine"
        chosen = self._draw()
        answers = self._answer(chosen)
        rewards = self.scorer(chosen, answers)
        self.moments.add([reward.total for reward in rewards])
        batch = pack_answers(self.llm, chosen, answers)
        extras = self._estimated(batch, answers, [self.moments.normalized(reward.total) for reward in rewards])
        means = {
            "reward": _mean([reward.total for reward in rewards]),
            "score": _mean([reward.score for reward in rewards]),
            "check": _mean([reward.check for reward in rewards]),
            "length": _mean([float(len(answer.token_ids)) for answer in answers]),
            "truncated": _mean([float(answer.finish_reason == "length") for answer in answers]),
        }
        self.done += 1
        extras |= {f"mean_{name}": torch.tensor(value) for name, value in means.items()}
        return Batch(batch.tokens_T, batch.positions_T, batch.targets_T, batch.weights_T, batch.starts_S, extras=extras)

    def _draw(self) -> list[Prompt]:
        """The next prompts of a seeded permutation per pass over the file."""
        count, drawn = len(self.prompts), []
        for number in range(
            self.done * self.settings.prompts_per_step, (self.done + 1) * self.settings.prompts_per_step
        ):
            epoch, position = divmod(number, count)
            drawn.append(self.prompts[permuted(position, count, key_of(self.settings.seed, epoch))])
        return drawn

    def _answer(self, chosen: Sequence[Prompt]) -> list[Completion]:
        self.llm.reset_prefix_cache()  # the weights have changed since the last rollout
        settings = self.settings
        params = [
            SamplingParams(
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                seed=key_of(settings.seed, self.done, index) >> 2,
                logprobs=True,
            )
            for index in range(len(chosen))
        ]
        return ask(self.llm, chosen, params)

    @torch.no_grad()
    def _estimated(self, batch: Batch, answers: Sequence[Completion], final: Sequence[float]) -> dict[str, Tensor]:
        """Old log-probabilities, advantages and returns per answer token, and the rollout's mean KL."""
        settings = self.settings
        lengths = [len(answer.token_ids) for answer in answers]
        engine_A = torch.tensor([value for answer in answers for value in answer.logprobs])
        assert isinstance(self.llm.model, CausalLM)
        policy_A, _ = answer_logprobs(self.llm.model, batch, temperature=settings.temperature)
        reference_A, _ = answer_logprobs(self.reference, batch, temperature=settings.temperature)
        values_A = answer_values(self.critic, batch).float()
        kl_A = policy_A - reference_A
        rewards_A = -settings.kl_weight * kl_A
        ends = torch.tensor(lengths).cumsum(0) - 1
        rewards_A[ends] += torch.tensor(final)
        found = gae(rewards_A, values_A, lengths, gamma=settings.gamma, lam=settings.lam)
        advantages_A = found.advantages_A
        if settings.whiten:
            advantages_A = (advantages_A - advantages_A.mean()) / (advantages_A.std() + 1e-8)
        return {
            "old_logprobs_A": policy_A,
            "advantages_A": advantages_A,
            "returns_A": found.returns_A,
            "mean_kl": kl_A.sum() / len(answers),
            "mean_engine_gap": (engine_A - policy_A).abs().max(),
            "mean_value_error": (found.returns_A - values_A).square().mean(),
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
