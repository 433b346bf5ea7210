"""What a step minimizes: `(model, Batch) -> LossOutput`, sums that the Trainer divides by the *global* weight.

- `lm_loss`: next-token cross-entropy. The head runs only where a weight is above 0, in chunks, and the gradient of
  the logits is formed in the forward pass, so that no [T, V] tensor is ever held (Wijmans et al. 2024, "Cut your
  losses"; Hsu et al. 2024, Liger).
- `ranking_loss`: InternLM2's focal ranking loss with the log barrier (arXiv 2403.17297, section 4.3), in fp32.

An objective may hold frozen models; it never steps, logs or knows a schedule.

    output = lm_loss(model, batch); (output.loss_sum / output.weight_sum).backward()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from puyu.data.packing import Batch
from puyu.model.attention import PackedPlan, Plan
from puyu.model.heads import CausalLM, ScalarModel
from puyu.train.native import softmax_step

CHUNK_BYTES, CPU_CHUNK_BYTES = 1 << 30, 96 << 20
"""Size of a chunk of logits, on a GPU and on a CPU: large enough that adding its share to the head's gradient costs
little beside the products."""

CHUNK_ROWS = 1024
"""A CPU's chunk has no more rows: with a small vocabulary it then stays in the cache."""

CACHE_BYTES = 2 << 20
"""Size of the rows that the softmax works on at once, on a CPU."""

CPU_ROUND = 128
"""Rows of the products are padded to a multiple of this on a CPU: each new shape costs about a millisecond there,
because its kernel is compiled, and packed conversations bring a new one with every batch."""


class LossOutput(NamedTuple):
    """Sums over this rank's batch. Each metric is a sum too; the Trainer divides it by the global weight.

    A metric KIND/NAME is divided by the metric weight/NAME where there is one (see `means`). All ranks give the same
    names.
    """

    loss_sum: Tensor
    weight_sum: Tensor
    metrics: dict[str, Tensor]

    @property
    def sums(self) -> dict[str, Tensor]:
        """All of them by name."""
        return {"loss": self.loss_sum, "weight": self.weight_sum, **self.metrics}


Objective = Callable[[Any, Batch], LossOutput]


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Global sums -> means: KIND/NAME by weight/NAME, all others by `weight`. What has no weight is left out."""
    found = {}
    for name, value in sums.items():
        kind, _, part = name.partition("/")
        weight = sums.get(f"weight/{part}", sums["weight"]) if part else max(sums["weight"], 1e-30)
        if kind != "weight" and weight > 0:
            found[name] = value / weight
    return found


class Vocabulary(NamedTuple):
    """Processes that each have `rows` rows of the head, in the order of ranks, the last one perhaps fewer."""

    group: dist.ProcessGroup
    rows: int


@dataclass(frozen=True, kw_only=True)
class SharedBatch(Batch):
    """One process's part of a batch that several compute together, as a layout has cut it."""

    plan: Plan
    """Attention among all parts."""
    vocabulary: Vocabulary | None = None
    """Who has the other rows of the head; all of them have the same tokens."""


def trunk_inputs(batch: Batch) -> tuple[Tensor, Tensor, Plan]:
    """What a trunk takes for a batch: tokens, positions and plan, perhaps padded behind the batch's tokens."""
    if isinstance(batch, SharedBatch):
        return batch.tokens_T, batch.positions_T, batch.plan
    count, extra = batch.num_tokens, _missing(batch.num_tokens, batch.tokens_T.device)
    starts_S = (*batch.starts_S, count) if extra else batch.starts_S  # padding is a document of its own
    plan = PackedPlan.build(starts_S, count + extra, batch.tokens_T.device)
    return F.pad(batch.tokens_T, (0, extra)), F.pad(batch.positions_T, (0, extra)), plan


def hidden_states(model: CausalLM | ScalarModel, batch: Batch) -> Tensor:
    """Trunk over a packed batch -> hidden [T, D]."""
    hidden_TD: Tensor = model.trunk(*trunk_inputs(batch))
    return hidden_TD[: batch.num_tokens]


def _missing(rows: int, device: torch.device) -> int:
    """How many rows a product lacks to the next multiple of `CPU_ROUND`."""
    return -rows % CPU_ROUND if device.type == "cpu" and rows > CPU_ROUND else 0


def lm_loss(model: CausalLM, batch: Batch) -> LossOutput:
    """Weighted next-token cross-entropy, summed (nats)."""
    return lm_loss_of(hidden_states(model, batch), head_weight(model), batch)


def lm_loss_of(hidden_TD: Tensor, weight_VD: Tensor, batch: Batch) -> LossOutput:
    """The same from the trunk's hidden states, where another process has computed what is before them."""
    learned = batch.weights_T.nonzero().squeeze(-1)
    if learned.numel() < batch.num_tokens:
        hidden_TD = hidden_TD[learned]
    parts = batch.vocabulary if isinstance(batch, SharedBatch) else None
    targets_P, weights_P = batch.targets_T[learned], batch.weights_T[learned]
    loss_sum, losses_P = chunked_cross_entropy(hidden_TD, weight_VD, targets_P, weights_P, vocabulary=parts)
    return LossOutput(loss_sum, batch.weights_T.sum(), source_sums(batch, learned, losses_P))


def source_sums(batch: Batch, learned_P: Tensor, losses_P: Tensor) -> dict[str, Tensor]:
    """loss/NAME and weight/NAME of each source that the batch names, from the losses at its learned positions."""
    if not batch.sources:
        return {}
    of_P = batch.extras["source_T"][learned_P]
    zeros = losses_P.new_zeros(len(batch.sources), dtype=torch.float64)
    sums = zeros.index_add(0, of_P, losses_P.double()).unbind()
    weights = zeros.index_add(0, of_P, batch.weights_T[learned_P].double()).unbind()
    return dict(zip(source_names(batch), (*sums, *weights), strict=True))


def source_names(batch: Batch) -> list[str]:
    """Names of the metrics of its sources."""
    return [f"{kind}/{name}" for kind in ("loss", "weight") for name in batch.sources]


def token_losses(model: CausalLM, batch: Batch) -> Tensor:
    """Cross-entropy of every token [T], weight 0 where nothing is predicted; no gradient."""
    with torch.no_grad():
        hidden_TD = hidden_states(model, batch)
        _, losses_T = chunked_cross_entropy(hidden_TD, head_weight(model), batch.targets_T, batch.weights_T)
    return losses_T


def head_weight(model: CausalLM) -> Tensor:
    """The [V, D] matrix that gives logits: the head's, or the embedding's when tied."""
    return model.trunk.embedding.weight if model.head is None else model.head.weight


def chunked_cross_entropy(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    targets_P: Tensor,
    weights_P: Tensor,
    *,
    vocabulary: Vocabulary | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of weights * cross-entropy, and the weighted loss of each position (without gradient).

    With a `vocabulary` the process has a part of the matrix, and gets the gradient of its rows and that part of the
    hidden states' gradient which comes from them.
    """
    learns = torch.is_grad_enabled()
    arguments = (hidden_PD, weight_VD, targets_P, weights_P, learns, vocabulary)
    loss_sum, losses_P = _ChunkedCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss_sum, losses_P


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Logits of one chunk at a time; their gradient is multiplied out at once and only [P, D] and [V, D] are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PD: Tensor,
        weight_VD: Tensor,
        targets_P: Tensor,
        weights_P: Tensor,
        learns: bool,
        vocabulary: Vocabulary | None,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if hidden_PD.dtype == torch.float64 else torch.float32
        count, extra = len(targets_P), _missing(len(targets_P), hidden_PD.device)
        if extra:
            hidden_PD = F.pad(hidden_PD, (0, 0, 0, extra))
            targets_P, weights_P = F.pad(targets_P, (0, extra)), F.pad(weights_P, (0, extra))
        cast_VD = weight_VD.to(hidden_PD.dtype)
        of_hidden, of_weight = ctx.needs_input_grad[:2]  # a frozen head has no gradient
        grad_PD = torch.empty_like(hidden_PD) if learns and of_hidden else None
        grad_VD = torch.zeros_like(weight_VD) if learns and of_weight else None
        losses_P = torch.zeros(len(targets_P), dtype=wide, device=hidden_PD.device)
        columns = weight_VD.shape[0] if vocabulary is None else vocabulary.rows  # chunks are the same on all processes
        rows = _chunk_rows(columns * cast_VD.itemsize, len(targets_P), cast_VD.device)
        room_RV = hidden_PD.new_empty(rows, len(cast_VD))  # one for all chunks
        for start in range(0, len(targets_P), rows):
            cut = slice(start, start + rows)
            scaled_C = weights_P[cut].to(wide)
            logits_CV = torch.mm(hidden_PD[cut], cast_VD.T, out=room_RV[: len(scaled_C)])
            if vocabulary is None:
                losses_P[cut], grad_CV = _softmax_step(logits_CV, targets_P[cut], scaled_C, learns=learns)
            else:
                losses_P[cut], grad_CV = _softmax_parts(logits_CV, targets_P[cut], scaled_C, vocabulary)
            if grad_PD is not None:
                torch.mm(grad_CV, cast_VD, out=grad_PD[cut])
            if grad_VD is not None:
                _accumulate(grad_VD, grad_CV, hidden_PD[cut])
        ctx.grads = (None if grad_PD is None else grad_PD[:count], grad_VD) if learns else None
        losses_P = losses_P[:count]
        ctx.mark_non_differentiable(losses_P)
        return losses_P.sum(), losses_P

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.grads is not None, "a second backward pass over the same loss"
        grads, ctx.grads = ctx.grads, None
        if scale.device.type != "cpu" or scale != 1:  # in place: the larger one has the size of the head
            grads = [None if grad is None else grad.mul_(scale.to(grad.dtype)) for grad in grads]
        return *grads, None, None, None, None


def chunked_logprobs(hidden_PD: Tensor, weight_VD: Tensor, targets_P: Tensor) -> Tensor:
    """The log-probability of each target, [P], fp32 or wider, with a gradient: logits are made a chunk at a time, and
    again in the backward pass, because what each row is weighted with is not known before."""
    found: Tensor = _ChunkedLogprobs.apply(hidden_PD, weight_VD, targets_P)  # type: ignore[no-untyped-call]
    return found


class _ChunkedLogprobs(torch.autograd.Function):
    """Minus the cross-entropy of each row; nothing of the size [P, V] is kept."""

    @staticmethod
    def forward(ctx: Any, hidden_PD: Tensor, weight_VD: Tensor, targets_P: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_PD, weight_VD, targets_P)
        wide = torch.float64 if hidden_PD.dtype == torch.float64 else torch.float32
        ones_P = torch.ones(len(targets_P), dtype=wide, device=hidden_PD.device)
        parts = [losses_C for _, _, losses_C, _ in _chunks(hidden_PD, weight_VD, targets_P, ones_P, learns=False)]
        return -torch.cat(parts) if parts else ones_P

    @staticmethod
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        hidden_PD, weight_VD, targets_P = ctx.saved_tensors
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        grad_PD = torch.empty_like(hidden_PD) if of_hidden else None
        grad_VD = torch.zeros_like(weight_VD) if of_weight else None
        for cut, cast_VD, _, grad_CV in _chunks(hidden_PD, weight_VD, targets_P, -grad_P, learns=True):
            if grad_PD is not None:
                grad_PD[cut] = grad_CV @ cast_VD
            if grad_VD is not None:
                _accumulate(grad_VD, grad_CV, hidden_PD[cut])
        return grad_PD, grad_VD, None


def _chunks(
    hidden_PD: Tensor, weight_VD: Tensor, targets_P: Tensor, weights_P: Tensor, *, learns: bool
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Rows, the cast head, weighted losses and weighted gradients of the logits, a chunk at a time."""
    cast_VD = weight_VD.to(hidden_PD.dtype)
    rows = _chunk_rows(len(cast_VD) * cast_VD.itemsize, len(targets_P), cast_VD.device)
    for start in range(0, len(targets_P), rows):
        cut = slice(start, start + rows)
        logits_CV = hidden_PD[cut] @ cast_VD.T
        yield cut, cast_VD, *_softmax_step(logits_CV, targets_P[cut], weights_P[cut].contiguous(), learns=learns)


def _chunk_rows(row_bytes: int, count: int, device: torch.device) -> int:
    """How many of `count` rows have their logits made at once: a multiple of 128, where there are so many."""
    on_cpu = device.type == "cpu"
    rows = (CPU_CHUNK_BYTES if on_cpu else CHUNK_BYTES) // row_bytes // 128 * 128
    return max(1, min(count, max(128, min(rows, CHUNK_ROWS) if on_cpu else rows)))


def _softmax_step(logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor, *, learns: bool) -> tuple[Tensor, Tensor]:
    """Weighted losses [C]; the logits are overwritten by their weighted gradient."""
    if (losses_C := softmax_step(logits_CV, targets_C, weights_C, learns=learns)) is not None:
        return losses_C, logits_CV
    rows = len(logits_CV)
    if logits_CV.device.type == "cpu":  # a few rows at a time stay in the cache
        rows = max(1, CACHE_BYTES // (logits_CV.shape[1] * weights_C.itemsize))
    parts = []
    for start in range(0, len(logits_CV), rows):
        cut = slice(start, start + rows)
        losses_R, grad_RV = _softmax_rows(logits_CV[cut].to(weights_C.dtype), targets_C[cut, None], weights_C[cut])
        parts.append(losses_R)
        if learns:
            logits_CV[cut] = grad_RV
    return torch.cat(parts), logits_CV


def _softmax_rows(logits_RV: Tensor, targets_R1: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted losses [R] and weighted gradient [R, V], in the wide dtype."""
    grad_RV = torch.softmax(logits_RV, dim=-1)
    # The largest probability never underflows, so the normalizer comes from it: log Z = max - log p_max.
    log_z_R = logits_RV.amax(-1) - grad_RV.amax(-1).log()
    losses_R = (log_z_R - logits_RV.gather(-1, targets_R1).squeeze(-1)) * weights_R
    grad_RV.scatter_add_(-1, targets_R1, -torch.ones_like(targets_R1, dtype=grad_RV.dtype))
    return losses_R, grad_RV.mul_(weights_R[:, None])


def _softmax_parts(
    logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """Weighted losses [C], and the weighted gradient of this process's logits, where others have the other columns."""
    wide_CV, group = logits_CV.to(weights_C.dtype), vocabulary.group
    top_C = wide_CV.amax(-1)
    dist.all_reduce(top_C, dist.ReduceOp.MAX, group=group)
    at_C = targets_C - dist.get_rank(group) * vocabulary.rows
    here_C = (at_C >= 0) & (at_C < logits_CV.shape[1])
    at_C1 = at_C.clamp(0, logits_CV.shape[1] - 1)[:, None]
    own_C = wide_CV.gather(-1, at_C1).squeeze(-1).where(here_C, torch.zeros_like(top_C))
    grad_CV = (wide_CV - top_C[:, None]).exp_()
    sums_2C = torch.stack((grad_CV.sum(-1), own_C))
    dist.all_reduce(sums_2C, group=group)
    losses_C = (top_C + sums_2C[0].log() - sums_2C[1]) * weights_C
    grad_CV /= sums_2C[0][:, None]
    grad_CV.scatter_add_(-1, at_C1, -here_C[:, None].to(grad_CV.dtype))
    return losses_C, grad_CV.mul_(weights_C[:, None]).to(logits_CV.dtype)


def _accumulate(total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    if total_VD.dtype == hidden_CD.dtype:
        total_VD.addmm_(grad_CV.T, hidden_CD)
    else:
        total_VD.add_(grad_CV.T @ hidden_CD)


def focal_ranking(margin_S: Tensor, *, gamma: float) -> Tensor:
    """-(1 - 2 max(0, P - 1/2))^gamma log P with P = sigmoid(chosen - rejected); easy pairs fade out."""
    ease_S = torch.relu(torch.sigmoid(margin_S) - 0.5) * 2
    return -((1 - ease_S) ** gamma) * F.logsigmoid(margin_S)


def barrier(score_S: Tensor, *, bound: float = 5.0, eps: float = 0.1) -> Tensor:
    """-(log(bound + x) + log(bound - x)), continued as a line (C1) beyond bound - eps.

    So a score that escaped is still pulled back; a clamp, as in XTuner, would leave it without a gradient.
    """
    edge = bound - eps
    inside_S = score_S.clamp(-edge, edge)
    slope = 2 * edge / (bound**2 - edge**2)
    return -(torch.log(bound + inside_S) + torch.log(bound - inside_S)) + slope * torch.relu(score_S.abs() - edge)


def pair_losses(
    chosen_S: Tensor,
    rejected_S: Tensor,
    *,
    gamma: float = 2.0,
    penalty: float = 0.02,
    margin_S: Tensor | float = 0.0,
) -> Tensor:
    """Focal ranking loss of how far the scores are apart beyond the margin (Touvron et al. 2023, arXiv 2307.09288,
    section 3.2.2) plus `penalty` times the barrier's mean over the two scores, per pair."""
    rank_S = focal_ranking(chosen_S - rejected_S - margin_S, gamma=gamma)
    return rank_S + penalty * (barrier(chosen_S) + barrier(rejected_S)) / 2


def pair_scores(model: ScalarModel, batch: Batch) -> Tensor:
    """Scores [S] at the reward tokens, fp32 or wider."""
    return model.scalar(hidden_states(model, batch)[batch.extras["last_S"]])


def ranking_loss(*, gamma: float = 2.0, penalty: float = 0.02) -> Objective:
    """The objective of a reward model; `gamma` 0 and `penalty` 0 give the plain Bradley-Terry loss."""

    def objective(model: ScalarModel, batch: Batch) -> LossOutput:
        if not len(batch.extras["last_S"]):  # a rank without a pair still takes part in collectives
            nothing = model.scalar(hidden_states(model, batch)).sum() * 0.0
            return LossOutput(nothing, nothing.detach(), {name: nothing.detach() for name in ("accuracy", "margin")})
        chosen_S, rejected_S = pair_scores(model, batch).reshape(-1, 2).unbind(-1)
        margin_S = (chosen_S - rejected_S).detach()
        wanted_S = batch.extras["margin_P"].to(chosen_S)
        loss_sum = pair_losses(chosen_S, rejected_S, gamma=gamma, penalty=penalty, margin_S=wanted_S).sum()
        metrics = {"accuracy": (margin_S > 0).sum(), "margin": margin_S.sum()}
        return LossOutput(loss_sum, loss_sum.new_tensor(float(len(margin_S))), metrics)

    return objective


def noisy(objective: Objective, alpha: float) -> Objective:
    """The objective with noise on what the embedding gives, in training: uniform in ±alpha / sqrt(L D) for a document
    of L tokens and D dimensions (NEFTune, Jain et al. 2023, arXiv 2310.05914)."""

    def noisy_loss(model: CausalLM, batch: Batch) -> LossOutput:
        if not (model.training and torch.is_grad_enabled()):
            return objective(model, batch)
        lengths_S = torch.tensor(batch.ends_S) - torch.tensor(batch.starts_S)
        scale_T = (lengths_S * model.config.hidden_size).rsqrt().repeat_interleave(lengths_S) * alpha

        def add(_: nn.Module, __: object, embedded_TD: Tensor) -> Tensor:
            own_T = F.pad(scale_T, (0, len(embedded_TD) - len(scale_T))).to(embedded_TD)  # nothing for padding
            return embedded_TD + torch.empty_like(embedded_TD).uniform_(-1, 1) * own_T[:, None]

        hook = model.trunk.embedding.register_forward_hook(add)
        try:
            return objective(model, batch)
        finally:
            hook.remove()

    return noisy_loss


class Step(nn.Module):
    """Model and objective as one module, so that sharding sees the whole computation as one forward pass."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> LossOutput:
        return self.objective(self.model, batch)
