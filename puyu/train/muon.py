"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest semi-orthogonal matrix, found by five
Newton-Schulz steps in bf16: every direction of the update gets the same size. Small models learn to copy from their
context several times sooner than with AdamW alone (docs/log.md). The scale sqrt(max(1, rows / columns)) keeps the
update's effect independent of a matrix's shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class MuonAdamW(torch.optim.Optimizer):
    """Groups with `momentum` above 0 take Muon's step (2-D parameters only), the others fused AdamW's."""

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps, "weight_decay": 0.0, "momentum": 0.0, "lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every group."""
        assert closure is None, "the Trainer computes gradients itself"
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["momentum"] > 0:
                for parameter in params:
                    self._muon(parameter, group)
            elif params:
                self._adamw(params, group)

    def _muon(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        grad = parameter.grad
        assert grad is not None
        state["momentum"].mul_(group["momentum"]).add_(grad)
        update = grad.add(state["momentum"], alpha=group["momentum"])  # Nesterov
        scale = math.sqrt(max(1.0, parameter.shape[0] / parameter.shape[1]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(_orthogonal_like(update), alpha=-group["lr"] * scale)

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in params:
            if not self.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.zeros(()), **zeros}
        states = [self.state[parameter] for parameter in params]
        adamw(
            params,
            [parameter.grad for parameter in params if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _orthogonal_like(update: Tensor) -> Tensor:
    """The semi-orthogonal factor of `update`, sharded as it is."""
    if not isinstance(update, DTensor):
        return orthogonal(update).to(update.dtype)
    from puyu.train.parallel import like

    return like(orthogonal(update.full_tensor()), update)


def orthogonal(matrix: Tensor, *, steps: int = 5) -> Tensor:
    """Newton-Schulz in bf16: singular values of the result lie near 1 (within about 0.3)."""
    x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    wide = x.shape[0] > x.shape[1]
    x = x.T if wide else x
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if wide else x
