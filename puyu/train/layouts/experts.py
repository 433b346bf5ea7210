"""Expert parallel: the experts of a block are divided among processes, and tokens travel to them and back.

Lepikhin et al. 2020 (GShard, arXiv 2006.16668), without capacities: no token is dropped, because the exact counts are
exchanged first. Each process has the experts [rank * m, (rank + 1) * m) of the group; their gradients come from all
tokens of the group, and are summed over the processes that hold the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.moe import ExpertMLP, Experts, through_experts
from puyu.train.layouts.comm import all_to_all, exchange
from puyu.train.layouts.shares import Dim


class SharedExperts(nn.Module):
    """Stands in for the list of experts: rows sorted by expert -> their outputs, wherever the experts are."""

    def __init__(self, experts: Experts, dim: Dim) -> None:
        super().__init__()
        self.dim, self.per_process = dim, len(experts) // dim.size
        first = dim.rank * self.per_process
        for index in range(first, first + self.per_process):
            self.add_module(str(index), experts[index])  # parameters keep their names

    def forward(self, rows_PD: Tensor, counts_E: Sequence[int]) -> Tensor:
        dim, local = self.dim, self.per_process
        given_gm = torch.tensor(counts_E, device=rows_PD.device).unflatten(0, (dim.size, local))
        ones = [1] * dim.size
        taken_gm = all_to_all(given_gm, ones, ones, dim.group)  # rows that each process has for each expert here
        given, taken = given_gm.sum(1).tolist(), taken_gm.sum(1).tolist()
        rows = exchange(rows_PD, given, taken, dim.group)
        expert_of = torch.arange(local, device=rows.device).repeat(dim.size).repeat_interleave(taken_gm.flatten())
        order = expert_of.argsort(stable=True)
        done = through_experts(self.children(), rows[order], taken_gm.sum(0).tolist())
        return exchange(done[order.argsort()], taken, given, dim.group)


def share_experts(model: CausalLM | ScalarModel, dim: Dim) -> None:
    """Leave only this process's experts in the model."""
    for block in [module for module in model.modules() if isinstance(module, ExpertMLP)]:
        block.experts = SharedExperts(block.experts, dim)  # type: ignore[assignment]
