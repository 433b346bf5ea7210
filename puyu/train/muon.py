"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest semi-orthogonal matrix, found by five
Newton-Schulz steps in bf16: every direction of the update gets the same size. Small models learn to copy from their
context several times sooner than with AdamW alone (docs/log.md). The scale sqrt(max(1, rows / columns)) keeps the
update's effect independent of a matrix's shape. Matrices that were joined for speed can be split before: query, key and
value of each key head are different maps, and so are gate and up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

from puyu.model.attention import Attention
from puyu.model.layers import GatedMLP

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)

BATCH_BYTES = 1 << 30
"""Whole matrices that a process holds at once for their products."""


class Parts(NamedTuple):
    """How the rows of a matrix divide: equal groups, each of matrices with so many rows."""

    groups: int
    rows: tuple[int, ...]


def parts_of(model: nn.Module) -> dict[str, Parts]:
    """The joined matrices of a model, by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            size, rows = module.head_dim, module.qkv.weight.shape[0]
            groups = rows // ((module.group + 2) * size)
            found[f"{name}.qkv.weight"] = Parts(groups, (module.group * size, size, size))
        elif isinstance(module, GatedMLP):
            found[f"{name}.gate_up.weight"] = Parts(2, (module.gate_up.weight.shape[0] // 2,))
    return found


class MuonAdamW(torch.optim.Optimizer):
    """Groups with `momentum` above 0 take Muon's step (2-D parameters only), the others fused AdamW's."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        parts: Mapping[nn.Parameter, Parts] | None = None,
    ) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps, "weight_decay": 0.0, "momentum": 0.0, "lr": 0.0})
        self.parts: Mapping[Any, Parts] = parts or {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every group."""
        assert closure is None, "the Trainer computes gradients itself"
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["momentum"] > 0:
                for same in self._alike(params):
                    self._muon(same, group)
            elif params:
                self._adamw(params, group)

    def allocate(self) -> None:
        """Make the states that the first step would make."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._allocate(parameter, muon=group["momentum"] > 0)

    def _allocate(self, parameter: Tensor, *, muon: bool) -> None:
        if self.state[parameter]:
            return
        self.state[parameter] = {"momentum": torch.zeros_like(parameter)} if muon else adam_state(parameter)

    def _muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Matrices of one shape: their products run as one batch."""
        for parameter in params:
            self._allocate(parameter, muon=True)
        grads = [parameter.grad for parameter in params if parameter.grad is not None]
        momenta = [self.state[parameter]["momentum"] for parameter in params]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, grads)
        ahead = torch._foreach_add(grads, momenta, alpha=group["momentum"])  # Nesterov
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        parts = self.parts.get(params[0]) or Parts(1, (params[0].shape[0],))
        torch._foreach_add_(params, _orthogonal_like(list(ahead), parts), alpha=-group["lr"])

    def _alike(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Matrices of one shape and parts that lie alike, so many at a time as `BATCH_BYTES` hold whole; one order
        everywhere."""
        groups: dict[Any, list[Tensor]] = {}
        for parameter in params:
            place = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
            groups.setdefault((parameter.shape, place, self.parts.get(parameter)), []).append(parameter)
        for same in groups.values():
            few = max(1, BATCH_BYTES // max(1, same[0].numel() * same[0].element_size()))
            yield from (same[first : first + few] for first in range(0, len(same), few))

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in params:
            self._allocate(parameter, muon=False)
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


def adam_state(parameter: Tensor) -> dict[str, Tensor]:
    """What fused AdamW has of a parameter before its first step."""
    zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **zeros}


def _orthogonal_like(updates: list[Tensor], parts: Parts) -> list[Tensor]:
    """The semi-orthogonal factors of the parts of each update, times their scales, placed as it is."""
    whole = [update.full_tensor() if isinstance(update, DTensor) else update for update in updates]
    grouped = torch.stack(whole).unflatten(1, (parts.groups, -1))  # matrix, group, rows, columns
    factors = [
        orthogonal(part.flatten(0, 1)).to(part.dtype).unflatten(0, part.shape[:2]) * _scale(part)
        for part in grouped.split(parts.rows, dim=2)
    ]
    found = torch.cat(factors, dim=2).flatten(1, 2).unbind()
    if not isinstance(updates[0], DTensor):
        return list(found)
    return [_placed_as(factor, update) for factor, update in zip(found, updates, strict=True)]


def _scale(matrices: Tensor) -> float:
    rows, columns = matrices.shape[-2:]
    return math.sqrt(max(1.0, rows / columns))


def _placed_as(whole: Tensor, other: Tensor) -> Tensor:
    assert isinstance(other, DTensor)
    return distribute_tensor(whole, other.device_mesh, other.placements, src_data_rank=None)


def orthogonal(matrices: Tensor, *, steps: int = 5) -> Tensor:
    """Newton-Schulz in bf16 over the last two dimensions: singular values of the result lie within about 0.3 of 1."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if tall else x
    x = x / (x.flatten(-2).norm(dim=-1)[..., None, None] + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
