"""Generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438) over the tokens of answers.

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1},   R_t = A_t + V_t

Nothing is bootstrapped behind the last token: an answer ends there, also a truncated one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Advantages(NamedTuple):
    """Per answer token, concatenated in the order of the answers: advantages and returns, both [A]."""

    advantages_A: Tensor
    returns_A: Tensor


def gae(rewards_A: Tensor, values_A: Tensor, lengths_R: list[int], *, gamma: float, lam: float) -> Advantages:
    """`lengths_R`: tokens of each answer; rewards and values are their concatenation."""
    assert sum(lengths_R) == rewards_A.numel() == values_A.numel(), "lengths must cover every answer token"
    rewards_RL, values_RL = _padded(rewards_A, lengths_R), _padded(values_A, lengths_R)
    longest = rewards_RL.shape[1]
    advantages_RL = torch.zeros_like(rewards_RL)
    after_R, next_value_R = torch.zeros(len(lengths_R)), torch.zeros(len(lengths_R))
    for step in reversed(range(longest)):
        # Padding has reward and value 0, so what stands behind an answer's end adds nothing to it.
        delta_R = rewards_RL[:, step] + gamma * next_value_R - values_RL[:, step]
        after_R = delta_R + gamma * lam * after_R
        next_value_R = values_RL[:, step]
        advantages_RL[:, step] = after_R
    mask = torch.arange(longest)[None, :] < torch.tensor(lengths_R)[:, None]
    advantages_A = advantages_RL[mask]
    return Advantages(advantages_A, advantages_A + values_A)


def _padded(values_A: Tensor, lengths_R: list[int]) -> Tensor:
    rows = torch.split(values_A.float().cpu(), lengths_R)
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
