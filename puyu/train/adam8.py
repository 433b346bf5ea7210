"""AdamW whose moments take one byte a number: block-wise dynamic quantization (Dettmers et al. 2022, arXiv 2110.02861).

Each 256 numbers of a row share a scale, their largest magnitude; a code is one of 256 values, half of them in the top
decade, the others in the six decades below. Instead of the second moment its square root is kept, which halves the
decades, and a number above zero never becomes zero, so that no denominator vanishes. Vectors keep fp32 moments. Blocks
lie within rows: codes and scales of some rows are those of the whole tensor, so states move between layouts exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
_ROOM = 1 << 24
"""Numbers that are unpacked at once."""


@lru_cache(maxsize=8)
def codebook(signed: bool, device: torch.device) -> Tensor:
    """The 256 values in [-1, 1] (or [0, 1]), rising: 2^i (or 2^(i + 1)) between 10^(i - 7) and 10^(i - 6), 0 and 1."""
    values = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        values.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6))
    positive = torch.cat(values)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = torch.cat([-positive, positive, ends]) if signed else torch.cat([positive, ends])
    return found.sort().values.float().to(device)


def pack(values_RC: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes uint8 [R, C] and scales fp32 [R, ceil(C / BLOCK)], to the nearest value of the book."""
    book = codebook(signed, values_RC.device)
    blocks = _blocks(values_RC)
    scales = blocks.abs().amax(-1)
    shares = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).contiguous()
    codes = torch.bucketize(shares, (book[1:] + book[:-1]) / 2, out_int32=True)
    if not signed:
        codes = torch.where(shares > 0, codes.clamp_min(1), codes)
    return codes.to(torch.uint8).flatten(1)[:, : values_RC.shape[1]].contiguous(), scales


def unpack(codes_RC: Tensor, scales_RB: Tensor, *, signed: bool) -> Tensor:
    """The values [R, C] in fp32."""
    values = codebook(signed, codes_RC.device)[codes_RC.int()]
    return (_blocks(values) * scales_RB[..., None]).flatten(1)[:, : codes_RC.shape[1]]


def _blocks(values_RC: Tensor) -> Tensor:
    return F.pad(values_RC, (0, -values_RC.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


class AdamW8(torch.optim.Optimizer):
    """AdamW with one-byte moments for matrices, fp32 moments for vectors."""

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps, "weight_decay": 0.0, "lr": 0.0})

    def allocate(self) -> None:
        """Make the states that the first step would make."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._allocate(parameter)

    def _allocate(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for kind in ("exp_avg", "root_avg_sq"):
                if parameter.ndim < 2:
                    state[kind] = torch.zeros_like(parameter)
                    continue
                rows, columns = parameter.shape
                zero = 127 if kind == "exp_avg" else 0
                state[kind] = torch.full_like(parameter, zero, dtype=torch.uint8)
                state[f"{kind}_scale"] = parameter.new_zeros((rows, -(-columns // BLOCK)), dtype=torch.float32)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter with a gradient."""
        assert closure is None, "the Trainer computes gradients itself"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self._allocate(parameter), group)

    def _update(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        state["step"] += 1
        step = int(state["step"])
        if parameter.ndim < 2:
            self._adam(parameter, parameter.grad, state["exp_avg"], state["root_avg_sq"], group, step)
            return
        rows = max(1, _ROOM // parameter.shape[1])
        for start in range(0, len(parameter), rows):
            cut = slice(start, start + rows)
            held = {name: value[cut] for name, value in state.items() if value.ndim}
            first = unpack(held["exp_avg"], held["exp_avg_scale"], signed=True)
            root = unpack(held["root_avg_sq"], held["root_avg_sq_scale"], signed=False)
            assert parameter.grad is not None
            self._adam(parameter[cut], parameter.grad[cut], first, root, group, step)
            for name, value in (("exp_avg", first), ("root_avg_sq", root)):
                codes, scales = pack(value, signed=name == "exp_avg")
                held[name].copy_(codes)
                held[f"{name}_scale"].copy_(scales)

    @staticmethod
    def _adam(weight: Tensor, grad: Any, first: Tensor, root: Tensor, group: dict[str, Any], step: int) -> None:
        """In place; `root` is the square root of the second moment."""
        (beta1, beta2), rate = group["betas"], group["lr"]
        first.lerp_(grad.to(first.dtype), 1 - beta1)
        root.square_().mul_(beta2).addcmul_(grad, grad, value=1 - beta2).sqrt_()
        weight.mul_(1 - rate * group["weight_decay"])
        below = root / (1 - beta2**step) ** 0.5 + group["eps"]
        weight.addcdiv_(first, below, value=-rate / (1 - beta1**step))
