"""PPO's losses over a packed Batch (Schulman et al. 2017, arXiv 1707.06347; token mean, as in COOL RLHF).

A batch holds prompt + answer documents; `weights_T` is 1 where the next token belongs to an answer. Extras, each
aligned to those positions: `old_logprobs_T`, `advantages_T`, `returns_T`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puyu.data.packing import Batch
from puyu.model.attention import PackedPlan
from puyu.model.heads import CausalLM, ScalarModel


def answer_logprobs(model: CausalLM, batch: Batch, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities [A] of the answer tokens and the entropies [A] of their distributions, fp32."""
    logits_AV = model.logits(_answer_hidden(model, batch)).float() / temperature
    logprobs_AV = torch.log_softmax(logits_AV, dim=-1)
    chosen_A = logprobs_AV.gather(-1, batch.targets_T[answer_mask(batch)][:, None]).squeeze(-1)
    entropy_A = -(logprobs_AV.exp() * logprobs_AV).sum(-1)
    return chosen_A, entropy_A


def answer_values(model: ScalarModel, batch: Batch) -> Tensor:
    """The critic's value [A] before each answer token."""
    return model.scalar(_answer_hidden(model, batch))


def answer_mask(batch: Batch) -> Tensor:
    """True [T] where the next token belongs to an answer."""
    return batch.weights_T > 0


def _answer_hidden(model: CausalLM | ScalarModel, batch: Batch) -> Tensor:
    plan = PackedPlan.build(batch.starts_S, batch.num_tokens, batch.tokens_T.device)
    return model.trunk(batch.tokens_T, batch.positions_T, plan)[answer_mask(batch)]


def policy_loss(logprobs_A: Tensor, old_A: Tensor, advantages_A: Tensor, *, clip: float) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - clip, 1 + clip) A) summed over tokens, and how many were clipped."""
    ratio_A = torch.exp(logprobs_A - old_A)
    plain_A = ratio_A * advantages_A
    clipped_A = ratio_A.clamp(1 - clip, 1 + clip) * advantages_A
    return -torch.minimum(plain_A, clipped_A).sum(), (clipped_A < plain_A).sum()


def value_loss(values_A: Tensor, returns_A: Tensor) -> Tensor:
    """0.5 (V - R)^2 summed over tokens."""
    return 0.5 * (values_A - returns_A).square().sum()
