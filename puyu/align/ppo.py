"""PPO after InternLM2's COOL RLHF (arXiv 2403.17297, section 4.3): four models, one Trainer.

Actor and reference start from the SFT model; the reward model is frozen; the critic starts from the reward model
with a new head and is trained alone for `critic_warmup` rollouts. One update per rollout, so the ratio is 1 at each
update; the clip is there for several updates. KL to the reference is taken off the reward of each token.

    $ puyu ppo recipes/nano.yaml
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from puyu.align.objectives import answer_logprobs, answer_values, policy_loss, value_loss
from puyu.align.rewards import Prompt, Reward, Scorer, read_prompts
from puyu.align.rollout import RolloutSettings, RolloutSource, ask
from puyu.configure import Config
from puyu.data.packing import Batch
from puyu.device import pick_device
from puyu.engine.llm import LLM
from puyu.eval.statistics import paired_difference
from puyu.files import write_jsonl
from puyu.log import say
from puyu.model.checkpoint import load_model, load_scalar_model, save_model
from puyu.model.heads import CausalLM, ScalarModel
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train.health import HealthConfig
from puyu.train.objectives import LossOutput
from puyu.train.optim import OptimConfig
from puyu.train.scoring import RewardModel
from puyu.train.stage import check_vocabulary, finish, finished, identity_of, place
from puyu.train.trainer import OnStep, Trainer, TrainerConfig
from puyu.types import Completion, SamplingParams


class PPOConfig(Config):
    """Align a model with a reward."""

    actor: Path
    """Checkpoint to align (the SFT model); also the reference of the KL term."""
    reward: Path
    """Reward model checkpoint; the critic starts from it."""
    prompts: Path
    """JSONL of training prompts with checks."""
    heldout: Path
    """JSONL of held-out prompts for the paired comparison before and after."""
    heldout_limit: int = 0
    """Compare on only the first held-out prompts; 0: all."""
    domain: str = "default"
    """Reward domain of prompts that name none."""
    steps: int = 24
    """Rollouts, critic warm-up included."""
    critic_warmup: int = 4
    """First rollouts, in which only the critic learns."""
    prompts_per_step: int = 64
    """Prompts of a rollout."""
    max_tokens: int = 48
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """Of the sampled answers."""
    kl_weight: float = 0.02
    """Weight of the KL to the reference in each token's reward."""
    model_weight: float = 1.0
    """Weight of the reward model's score."""
    check_weight: float = 2.0
    """Weight of the verifiable check."""
    bound: float = 5.0
    """Scores are clamped to [-bound, bound]."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.99
    """GAE's lambda."""
    clip: float = 0.2
    """Clip of the policy ratio."""
    value_weight: float = 0.5
    """Weight of the critic's loss in the sum."""
    critic_rate: float = 5.0
    """The critic's learning rate, as a multiple of the actor's (COOL RLHF: 5e-6 against 1e-6)."""
    whiten: bool = True
    """Give the advantages of a rollout mean 0 and deviation 1; COOL RLHF with its 512 prompts did not."""
    optim: OptimConfig = OptimConfig(lr=5e-5, schedule="constant", warmup=0, weight_decay=0.0)
    """Optimizer; the rate is the actor's. The default suits models of a few million parameters."""
    seed: int = 0
    """Seed of prompts and answers."""
    dtype: str = "float32"
    """Compute dtype of training and rollouts."""
    device: str = "auto"
    """auto, cpu or cuda."""
    checkpoint_every: int = 8
    """Rollouts between saved states."""
    tensorboard: bool = False
    """Write TensorBoard files too."""


class ActorCritic(nn.Module):
    """Both trained models as one, so that one state on disk holds them at the same rollout."""

    def __init__(self, actor: CausalLM, critic: ScalarModel) -> None:
        super().__init__()
        self.actor, self.critic = actor, critic


def run(config: PPOConfig, *, out: Path, on_step: OnStep | None = None) -> dict[str, Any]:
    """Train (or go on), compare with the reference on held-out prompts, save; returns the key numbers."""
    identity = identity_of(config)
    if numbers := finished(out, identity):
        return numbers
    tokenizer = Tokenizer.load(config.actor)
    actor, reference, critic, scorer = load_models(config, tokenizer)
    with LLM.from_model(actor, tokenizer, name="actor") as policy, LLM.from_model(reference, tokenizer) as before:
        source = RolloutSource(
            policy,
            reference=reference,
            critic=critic,
            scorer=scorer,
            prompts=read_prompts(config.prompts, domain=config.domain),
            settings=_settings(config),
        )
        trainer = Trainer(
            ActorCritic(actor, critic), _objective(config, source), source, _trainer(config, identity), out=out
        )
        trainer.on_step = on_step
        numbers = trainer.fit()
        policy.reset_prefix_cache()
        actor.eval()
        numbers["heldout"] = compare(config, before, policy, scorer, out=out)
    save_model(actor, out, dtype=torch.float32)
    tokenizer.save(out)
    return finish(out, identity, {**numbers, "headline": _headline(numbers)})


def load_models(config: PPOConfig, tokenizer: Tokenizer) -> tuple[CausalLM, CausalLM, ScalarModel, Scorer]:
    """Actor, frozen reference, critic with a new head, and the scorer around the frozen reward model."""
    device = pick_device(config.device)
    actor = place(load_model(config.actor), dtype=config.dtype, device=device)
    reference = place(load_model(config.actor), dtype=config.dtype, device=device).eval().requires_grad_(False)
    check_vocabulary(tokenizer, actor.config.vocab_size, folder=config.actor)
    critic = place(load_scalar_model(config.reward), dtype=config.dtype, device=device)
    nn.init.zeros_(critic.head.weight)
    check_vocabulary(tokenizer, critic.config.vocab_size, folder=config.reward)
    rewards = RewardModel.load(config.reward, dtype=reference.trunk.compute_dtype or torch.float32, device=device)
    scorer = Scorer(rewards, config.model_weight, config.check_weight, config.bound)
    return actor, reference, critic, scorer


def _settings(config: PPOConfig) -> RolloutSettings:
    return RolloutSettings(
        prompts_per_step=config.prompts_per_step,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        kl_weight=config.kl_weight,
        gamma=config.gamma,
        lam=config.lam,
        seed=config.seed,
        whiten=config.whiten,
    )


def _trainer(config: PPOConfig, identity: str) -> TrainerConfig:
    scale = {"critic.": config.critic_rate, **config.optim.scale}
    return TrainerConfig(
        steps=config.steps,
        optim=config.optim.model_copy(update={"scale": scale}),
        checkpoint_every=config.checkpoint_every,
        dtype=config.dtype,
        seed=config.seed,
        identity=identity,
        name="ppo",
        tensorboard=config.tensorboard,
        health=HealthConfig(spike=0.0),  # its loss is a difference around zero
    )


def _objective(config: PPOConfig, source: RolloutSource) -> Any:
    """Policy and value loss of a rollout, summed over answer tokens; the rollout's means ride along as metrics."""

    def objective(model: ActorCritic, batch: Batch) -> LossOutput:
        weight = batch.weights_T.sum()
        values_A = answer_values(model.critic, batch).float()
        loss = config.value_weight * value_loss(values_A, batch.extras["returns_A"])
        metrics = {"value_loss": loss.detach()}
        if source.done > config.critic_warmup:  # `done` counts the rollout that this batch is
            logprobs_A, entropy_A = answer_logprobs(model.actor, batch, temperature=config.temperature)
            extras = batch.extras
            policy, clipped = policy_loss(
                logprobs_A, extras["old_logprobs_A"], extras["advantages_A"], clip=config.clip
            )
            loss = loss + policy
            metrics |= {"policy_loss": policy.detach(), "entropy": entropy_A.detach().sum(), "clipped": clipped}
        means = {
            name.removeprefix("mean_"): value * weight for name, value in batch.extras.items() if name[:5] == "mean_"
        }
        return LossOutput(loss, weight, metrics | means)

    return objective


def compare(config: PPOConfig, before: LLM, after: LLM, scorer: Scorer, *, out: Path) -> dict[str, Any]:
    """Rewards of both policies on the held-out prompts, sampled with equal seeds and greedy; 95 % paired intervals."""
    prompts = read_prompts(config.heldout, domain=config.domain)[: config.heldout_limit or None]
    result: dict[str, Any] = {"prompts": len(prompts)}
    rows: list[dict[str, Any]] = []
    for kind, temperature in (("sampled", config.temperature), ("greedy", 0.0)):
        params = [
            SamplingParams(max_tokens=config.max_tokens, temperature=temperature, seed=config.seed + index)
            for index in range(len(prompts))
        ]
        answers = [ask(llm, prompts, params) for llm in (before, after)]
        rewards = [scorer(prompts, found) for found in answers]
        result[kind] = _difference(*rewards)
        rows += _rows(kind, prompts, answers, rewards)
    write_jsonl(out / "heldout.jsonl", rows)
    say(f"  ppo: held-out reward {_interval(result['sampled'])}")
    return result


def _difference(before: Sequence[Reward], after: Sequence[Reward]) -> dict[str, float]:
    found = paired_difference([reward.total for reward in before], [reward.total for reward in after])
    result = {"difference": found.value, "low": found.low, "high": found.high}
    for name, rewards in (("before", before), ("after", after)):
        for part in ("total", "score", "check"):
            result[f"{part}_{name}"] = math.fsum(getattr(reward, part) for reward in rewards) / len(rewards)
    return result


def _rows(
    kind: str, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]], rewards: Sequence[Sequence[Reward]]
) -> list[dict[str, Any]]:
    """Every held-out answer with its rewards, for reading."""
    rows = []
    for index, prompt in enumerate(prompts):
        row: dict[str, Any] = {"id": prompt.id, "kind": kind, "prompt": prompt.conversation.messages[-1].text}
        for name, completions, found in zip(("before", "after"), answers, rewards, strict=True):
            reward, message = found[index], completions[index].message
            row[name] = {"score": reward.score, "check": reward.check, "message": message.to_openai()}
        rows.append(row)
    return rows


def _interval(found: dict[str, float]) -> str:
    return (
        f"{found['total_before']:.3f} -> {found['total_after']:.3f}, paired difference {found['difference']:+.3f} "
        + (f"[{found['low']:+.3f}, {found['high']:+.3f}]")
    )


def _headline(numbers: dict[str, Any]) -> str:
    return f"{numbers['steps']} rollouts, held-out reward {_interval(numbers['heldout']['sampled'])}"
