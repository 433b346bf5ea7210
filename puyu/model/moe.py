"""A mixture of experts in place of the MLP: a router gives each token its k best experts, whose outputs are added.

Mixtral (Jiang et al. 2024, arXiv 2401.04088), Qwen-MoE (with a shared expert behind a gate of its own). T tokens, D
hidden, E experts. Pairs of token and expert are sorted by expert, so that an expert computes its own tokens in one
product and an expert without tokens costs nothing. Outputs go back to their token before they are added, so the sum
has one order whatever the batch.

Experts are `GatedMLP`s, whose matrices a quantizer may replace; router and gate are `Gate`s, which it does not know:
one wrong choice costs more than their few bytes save.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puyu.model.config import ModelConfig
from puyu.model.layers import GatedMLP


class Gate(nn.Module):
    """y = x W^T in the dtype of x. Not a `Linear`, so that it always keeps full precision."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Experts(nn.ModuleList):
    """Rows sorted by expert -> their outputs, in the same order."""

    def forward(self, rows_PD: Tensor, counts_E: Sequence[int]) -> Tensor:
        return through_experts(self, rows_PD, counts_E)


def through_experts(experts: Iterable[nn.Module], rows_PD: Tensor, counts_E: Sequence[int]) -> Tensor:
    """Each expert computes its rows. One without rows runs only in training, so that its gradient is zero instead of
    missing, whichever tokens a process has."""
    pairs = zip(experts, rows_PD.split(list(counts_E)), strict=True)
    parts = [expert(part) for expert, part in pairs if len(part) or torch.is_grad_enabled()]
    return torch.cat(parts) if parts else rows_PD


class ExpertMLP(nn.Module):
    """Sum of the chosen experts, each weighted by its probability, and of the shared one, if there is one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = config.experts
        assert shape is not None, "a config without experts"
        self.per_token, self.normalize = shape.per_token, shape.normalize
        self.router = Gate(config.hidden_size, shape.count)
        self.count = shape.count
        self.experts = Experts(GatedMLP(config, size=shape.size) for _ in range(shape.count))
        self.shared = GatedMLP(config, size=shape.shared_size) if shape.shared_size else None
        self.shared_gate = Gate(config.hidden_size, 1) if shape.shared_size else None

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_Tk, chosen_Tk = self.route(x_TD)
        order = chosen_Tk.flatten().argsort(stable=True)
        counts = torch.bincount(chosen_Tk.flatten(), minlength=self.count).tolist()
        sorted_PD = self.experts(x_TD[order // self.per_token], counts)
        given_TkD = sorted_PD[order.argsort()].unflatten(0, chosen_Tk.shape)
        y_TD = (given_TkD * weights_Tk[..., None]).sum(dim=1).to(x_TD.dtype)
        if self.shared is None or self.shared_gate is None:
            return y_TD
        return y_TD + torch.sigmoid(self.shared_gate(x_TD)) * self.shared(x_TD)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's experts and their weights, [T, k]; probabilities in fp32 or wider."""
        logits_TE = self.router(x_TD)
        wide = torch.promote_types(logits_TE.dtype, torch.float32)
        weights_Tk, chosen_Tk = logits_TE.softmax(dim=-1, dtype=wide).topk(self.per_token, dim=-1)
        if self.normalize:
            weights_Tk = weights_Tk / weights_Tk.sum(dim=-1, keepdim=True)
        return weights_Tk, chosen_Tk
