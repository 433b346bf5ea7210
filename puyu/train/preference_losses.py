"""Losses of preference training, from the log-probabilities of whole answers: DPO and its variants, SimPO, ORPO, KTO.

    losses_P = pair_loss("sigmoid", PairValues(chosen, rejected, ...), PreferenceNumbers(beta=0.1))

P pairs. A log-probability is the sum over an answer's tokens, in fp32 or wider; `lengths` are its numbers of tokens.
Each loss is one number a pair, so that packing, accumulation and the number of processes do not change the mean over
pairs. Knows no model and no batch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from puyu.configure import Config

PairKind = Literal[
    "sigmoid", "hinge", "ipo", "robust", "sppo_hard", "nca_pair", "apo_zero", "apo_down", "simpo", "orpo"
]
SingleKind = Literal["kto", "apo_zero_unpaired"]
"""Kinds that judge answers one by one."""
FREE_OF_REFERENCE: tuple[PairKind, ...] = ("simpo", "orpo")
"""Kinds that look at the trained model alone."""


class PreferenceNumbers(Config):
    """Numbers of the losses."""

    beta: float = 0.1
    """How far the model may go from the reference; simpo's factor of the mean log-probability, which wants 2 to 10, and
    orpo's of the odds."""
    smoothing: float = 0.0
    """Share of the pairs whose order is taken to be wrong (sigmoid: cDPO; robust corrects for it)."""
    margin: float = 1.0
    """simpo: what the better answer must be ahead by."""
    imitation: float = 0.0
    """This times the chosen answer's mean negative log-probability is added (RPO)."""
    wanted: float = 1.0
    """kto, apo_zero_unpaired: weight of wanted answers."""
    unwanted: float = 1.0
    """kto, apo_zero_unpaired: weight of the others; with fewer of them, more (their total within 1 to 4/3)."""


class PairValues(NamedTuple):
    """Log-probabilities [P] of both answers by the trained model and by the reference, and lengths [P]."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor


def pair_loss(kind: PairKind, values: PairValues, form: PreferenceNumbers) -> Tensor:
    """The loss of each pair, [P]."""
    better, worse = values.chosen - values.reference_chosen, values.rejected - values.reference_rejected
    if kind == "simpo":
        loss = _simpo(values, form)
    elif kind == "orpo":
        loss = _orpo(values, form)
    elif kind == "ipo":
        loss = (better / values.chosen_length - worse / values.rejected_length - 1 / (2 * form.beta)).square()
    else:
        loss = _LOSSES[kind](form.beta * better, form.beta * worse, form.smoothing)
    if form.imitation:
        loss = loss - form.imitation * values.chosen / values.chosen_length
    return loss


def _sigmoid(better: Tensor, worse: Tensor, smoothing: float) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290); smoothed: cDPO (Mitchell 2023)."""
    ahead = better - worse
    return -(1 - smoothing) * F.logsigmoid(ahead) - smoothing * F.logsigmoid(-ahead)


def _robust(better: Tensor, worse: Tensor, smoothing: float) -> Tensor:
    """Unbiased under flipped pairs (Chowdhury et al. 2024, arXiv 2403.00409)."""
    ahead = better - worse
    return (-(1 - smoothing) * F.logsigmoid(ahead) + smoothing * F.logsigmoid(-ahead)) / (1 - 2 * smoothing)


def _hinge(better: Tensor, worse: Tensor, _: float) -> Tensor:
    """SLiC (Zhao et al. 2023, arXiv 2305.10425) on the same differences."""
    return torch.relu(1 - (better - worse))


def _sppo_hard(better: Tensor, worse: Tensor, _: float) -> Tensor:
    """SPPO with certain preferences (Wu et al. 2024, arXiv 2405.00675), times beta squared."""
    return (better - 0.5).square() + (worse + 0.5).square()


def _nca_pair(better: Tensor, worse: Tensor, _: float) -> Tensor:
    """NCA (Chen et al. 2024, arXiv 2402.05369): keeps the chosen answer's probability from falling."""
    return -F.logsigmoid(better) - 0.5 * F.logsigmoid(-better) - 0.5 * F.logsigmoid(-worse)


def _apo_zero(better: Tensor, worse: Tensor, _: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266): up with the chosen one, down with the other."""
    return torch.sigmoid(-better) + torch.sigmoid(worse)


def _apo_down(better: Tensor, worse: Tensor, _: float) -> Tensor:
    """APO-down: both down, the other one further; for chosen answers that are worse than the model's own."""
    return torch.sigmoid(better) + torch.sigmoid(worse - better)


_LOSSES = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "sppo_hard": _sppo_hard,
    "nca_pair": _nca_pair,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}


def _simpo(values: PairValues, form: PreferenceNumbers) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv 2405.14734)."""
    ahead = values.chosen / values.chosen_length - values.rejected / values.rejected_length
    return -F.logsigmoid(form.beta * ahead - form.margin)


def _orpo(values: PairValues, form: PreferenceNumbers) -> Tensor:
    """ORPO (Hong et al. 2024, arXiv 2403.07691): imitate the chosen answer, and raise its odds over the other's."""
    chosen, rejected = values.chosen / values.chosen_length, values.rejected / values.rejected_length
    odds = (chosen - rejected) - (_log_rest(chosen) - _log_rest(rejected))
    return -chosen - form.beta * F.logsigmoid(odds)


def _log_rest(logprob: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends; what is certain counts as nearly certain, without a gradient."""
    logprob = logprob.clamp(max=-1e-7)
    return torch.where(logprob > -0.6931, torch.log(-torch.expm1(logprob)), torch.log1p(-torch.exp(logprob)))


def single_loss(kind: SingleKind, ratio_N: Tensor, good_N: Tensor, *, drift: Tensor, form: PreferenceNumbers) -> Tensor:
    """The loss of each of N answers, [N], from how much likelier each has become than it was for the reference.

    KTO (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7 and 8): `drift`, one number without a gradient, is how much
    likelier answers to other prompts have become. APO-zero (arXiv 2408.06266) judges against no drift.
    """
    zero = drift if kind == "kto" else torch.zeros_like(drift)
    good_N = good_N.to(ratio_N)
    sign_N, weight_N = 2 * good_N - 1, form.wanted * good_N + form.unwanted * (1 - good_N)
    return weight_N * torch.sigmoid(-form.beta * sign_N * (ratio_N - zero))
