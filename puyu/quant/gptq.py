"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): codes that give the layer's outputs back, not its weights.

Inputs of calibration data give the Gram matrix H = X^T X. Columns are rounded one after another, and the error of
each is made up for by the columns that are still free, as H says; the Cholesky factor of the inverse of H holds all
that is needed for it. Columns of one block are updated at once, later ones when the block is done.

    codes = gptq(weight_OI, gram_II, QuantFormat(4, 64, symmetric=False))

`act_order` rounds the columns with the largest inputs first. Scales are then those of the original weights (static
groups), so that the codes stay in the order of the inputs and no permutation is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puyu.errors import ConfigError
from puyu.model.linear import QuantFormat, QuantWeight
from puyu.quant.grid import Grid, Loss, best_grid, grouped

BLOCK = 128


def gptq(
    weight_OI: Tensor, gram_II: Tensor, form: QuantFormat, *, damping: float = 0.01, act_order: bool = True
) -> QuantWeight:
    """Codes of a finite weight; computed in fp64. `damping`: share of the mean of H's diagonal that is added to it."""
    inputs = weight_OI.shape[1]
    group = form.group or inputs
    w_OI, h_II = weight_OI.double().clone(), damped(gram_II, damping)
    importance_Gg = h_II.diagonal().view(-1, group)
    order = h_II.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(inputs)
    order = order.to(w_OI.device)
    grid = best_grid(grouped(w_OI, form), form, _weighted(importance_Gg))
    factor_II = _inverse_factor(h_II[order][:, order])
    w_OI = w_OI[:, order]
    codes_OI = torch.empty_like(w_OI)
    block = BLOCK if act_order else max(BLOCK // group, 1) * group
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        errors = torch.empty_like(w_OI[:, start:stop])
        for column in range(start, stop):
            at = int(order[column])
            if not act_order and at % group == 0 and at:
                fresh = w_OI[:, column : column + group].unflatten(1, (1, -1))
                grid = _replaced(grid, at // group, best_grid(fresh, form, _weighted(importance_Gg[[at // group]])))
            one = grid.group(at // group)
            w_O1 = w_OI[:, column : column + 1]
            codes_OI[:, at] = one.codes(w_O1[..., None])[:, 0, 0]
            error_O = (w_O1 - one.values(codes_OI[:, at, None, None])[..., 0])[:, 0] / factor_II[column, column]
            w_OI[:, column + 1 : stop] -= error_O[:, None] * factor_II[column, column + 1 : stop]
            errors[:, column - start] = error_O
        w_OI[:, stop:] -= errors @ factor_II[start:stop, stop:]
    return grid.weight(grouped(codes_OI, form), form)


def damped(gram_II: Tensor, damping: float) -> Tensor:
    """H in fp64 with a fuller diagonal; an input that was never seen gets the mean, so that nothing leans on it."""
    h_II = gram_II.double().clone()
    diagonal = h_II.diagonal()
    seen = diagonal > 0
    mean = diagonal[seen].mean() if bool(seen.any()) else torch.ones((), dtype=h_II.dtype, device=h_II.device)
    diagonal += torch.where(seen, damping * mean, mean)
    return h_II


def _inverse_factor(h_II: Tensor) -> Tensor:
    """Upper U with U^T U = H^-1."""
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h_II))
        return torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:
        message = f"the inputs of a layer of {len(h_II)} columns do not tell them apart: {error}"
        raise ConfigError(
            f"damping: {message}", remedy="a larger damping (0.01 is usual), or more sequences"
        ) from error


def _weighted(importance_Gg: Tensor) -> Loss:
    return lambda difference_OGg: (difference_OGg.square() * importance_Gg).sum(dim=-1)


def _replaced(grid: Grid, index: int, one: Grid) -> Grid:
    """`grid` with the scales and zeros of one group changed."""
    grid.scales[:, index], grid.zeros[:, index] = one.scales[:, 0], one.zeros[:, 0]
    return grid
